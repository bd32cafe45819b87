"""Which URL, host, port and address media may be fetched from.

Two questions, asked for the first URL and again for each redirect: `target` judges what the URL
says, `may_connect` judges the addresses its host was found at. Whoever dials asks the second with
the very addresses it dials. Every refusal reads the same, so that nobody learns from it what lies
behind the server. Must not know how a name is resolved or a connection made.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import httpx

from server.config import MediaConfig
from server.errors import ConfigError, InvalidMediaUrl
from server.media.kinds import SourceKind

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL_CHARS = 8_192
_REFUSAL = "URL is not allowed."
_DEFAULT_PORTS = {"http": 80, "https": 443}

# Names as they stand in a hosts file or a zone, after IDNA; a last label that starts with a digit
# is an address in one of the spellings that C libraries read (127.1, 0x7f000001, 2130706433).
_NAME = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_MAX_NAME_CHARS = 253

# Global by the letter of `ipaddress`, or only in some of its versions, and still no place to fetch
# from: shared and benchmarking space, metadata services, protocol assignments (Teredo among them),
# relays, multicast.
_NEVER_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "224.0.0.0/3",
        "64:ff9b:1::/48",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """A URL that may be asked, and its host as it is resolved, judged, dialled and named to TLS."""

    url: httpx.URL
    host: str
    port: int
    address: IPAddress | None
    """The host, where it is written as an address."""


class Guard:
    """The rules of the settings; ConfigError where one of them cannot be read."""

    def __init__(self, config: MediaConfig) -> None:
        self._allowed = (
            None
            if config.allowed_hosts is None
            else _Hosts("media.allowed_hosts", config.allowed_hosts)
        )
        self._denied = _Hosts("media.denied_hosts", config.denied_hosts)
        self._private = _Hosts("media.allowed_private_hosts", config.allowed_private_hosts)
        self._ports = frozenset(config.allowed_ports)

    def target(self, url: str, *, kind: SourceKind, is_resolved_here: bool = True) -> Target:
        """What a URL asks for; InvalidMediaUrl, always with the same words, if it may not.

        Where a proxy resolves the names, `is_resolved_here` is False: the name alone has to do.
        """
        target = _parse(url)
        if target is None or target.port not in self._ports:
            raise refusal(kind)
        if target.address is not None:
            is_allowed = self.may_connect(target.host, [target.address])
        else:
            is_allowed = not self._denied.has_name(target.host)
            if self._allowed is not None and not self._allowed.has_name(target.host):
                is_allowed &= is_resolved_here and bool(self._allowed.networks)
        if not is_allowed:
            raise refusal(kind)
        return target

    def may_connect(self, host: str, addresses: Sequence[IPAddress]) -> bool:
        """Whether a host may be dialled that has these addresses: all of them, not only one."""
        if self._denied.has_name(host):
            return False
        is_named = self._allowed is None or self._allowed.has_name(host)
        return all(self._may_dial(host, address, is_named=is_named) for address in addresses)

    def _may_dial(self, host: str, address: IPAddress, *, is_named: bool) -> bool:
        forms = _with_embedded(address)
        if any(self._denied.has_address(form) for form in forms):
            return False
        if self._allowed is not None and not is_named and not self._allowed.has_address(forms[-1]):
            return False
        if self._private.has_name(host):
            return True
        if self._private.has_address(forms[-1]):
            return not _is_own(forms[-1]) or self._private.means_own_address(forms[-1])
        return _is_public(forms[-1]) and not any(_is_own(form) for form in forms)


def refusal(kind: SourceKind) -> InvalidMediaUrl:
    """The one answer to every URL that may not be fetched."""
    return InvalidMediaUrl(_REFUSAL, kind=kind)


class _Hosts:
    """One setting's names, `*.name` patterns and networks."""

    def __init__(self, setting: str, patterns: Sequence[str]) -> None:
        self._names: set[str] = set()
        self._parents: set[str] = set()
        networks: list[IPNetwork] = []
        for number, pattern in enumerate(patterns, 1):
            network = _network(pattern)
            name = _name(pattern.removeprefix("*."))
            if network is not None:
                networks.append(network)
            elif name is None:
                raise ConfigError(
                    f"{setting}: item {number} is not a host name, *.name or a network"
                )
            elif pattern.startswith("*."):
                self._parents.add(name)
            else:
                self._names.add(name)
        self.networks = tuple(networks)

    def has_name(self, host: str) -> bool:
        if host in self._names:
            return True
        labels = host.split(".")
        return any(".".join(labels[start:]) in self._parents for start in range(1, len(labels)))

    def has_address(self, address: IPAddress) -> bool:
        return any(address in network for network in self.networks)

    def means_own_address(self, address: IPAddress) -> bool:
        """Whether a network was surely written for this machine itself, not for others near it."""
        return any(
            address in network and (network.is_loopback or network.num_addresses == 1)
            for network in self.networks
        )


def _parse(url: str) -> Target | None:
    """None where a URL is not one that could be asked, whatever the settings say."""
    if len(url) > MAX_URL_CHARS or any(map(_is_never_in_a_url, url)):
        return None
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _DEFAULT_PORTS:
        return None
    for end in "/?#":
        rest = rest.partition(end)[0]
    if "@" in rest:
        return None
    # From here on there is one parser: what it says is judged, resolved, dialled and sent.
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return None
    host = parsed.raw_host.decode("ascii").removesuffix(".")
    address = _address(host)
    if parsed.userinfo or (address is None and not _is_name(host)):
        return None
    if host != parsed.raw_host.decode("ascii"):
        parsed = parsed.copy_with(host=host)
    port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    return Target(parsed.copy_with(fragment=None), host, port, address)


def _is_never_in_a_url(character: str) -> bool:
    return (
        character <= " "
        or character == "\\"
        or "\x7f" <= character <= "\x9f"
        or "\ud800" <= character <= "\udfff"
        or character.isspace()
    )


def _is_name(host: str) -> bool:
    return len(host) <= _MAX_NAME_CHARS and _NAME.fullmatch(host) is not None


def _address(host: str) -> IPAddress | None:
    """None for names, and for addresses of one interface (fe80::1%eth0), which nobody may name."""
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(pattern: str) -> IPNetwork | None:
    try:
        return ipaddress.ip_network(pattern)
    except ValueError:
        return None


def _name(pattern: str) -> str | None:
    """A setting's host name in the form that hosts of URLs are compared in."""
    target = None if set(pattern) & set(":/?#@") else _parse(f"http://{pattern}/")
    return target.host if target is not None and target.address is None else None


def _with_embedded(address: IPAddress) -> list[IPAddress]:
    """The address and, behind it, the IPv4 address that a packet to it is really for."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and (address in _IPV4_COMPATIBLE or address in _NAT64):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    # ::1 and :: are addresses of their own, not 0.0.0.1 and 0.0.0.0.
    return [address] if inner is None or int(address) < 2 else [address, inner]


def _is_public(address: IPAddress) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _NEVER_PUBLIC)


def _is_own(address: IPAddress) -> bool:
    """Whether an address belongs to this machine: then it would be spoken to from that address.

    Connecting a datagram socket asks the system for the route and sends nothing.
    """
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False  # there is no way to it at all
