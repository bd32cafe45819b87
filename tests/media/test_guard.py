"""Which URLs and addresses may be fetched: tables of both, and the settings that change them."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import MediaConfig
from server.errors import ConfigError, InvalidMediaUrl
from server.media.guard import Guard

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]
FORBIDDEN = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:808:808::f7f7:f7f7",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


def may_connect(guard: Guard, host: str, *addresses: str) -> bool:
    return guard.may_connect(host, [ipaddress.ip_address(address) for address in addresses])


def is_allowed(guard: Guard, url: str, *, is_resolved_here: bool = True) -> bool:
    try:
        guard.target(url, kind="image", is_resolved_here=is_resolved_here)
    except InvalidMediaUrl as error:
        assert error.message == "URL is not allowed."
        return False
    return True


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert may_connect(Guard(MediaConfig()), "example.com", address)


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_addresses(address: str) -> None:
    guard = Guard(MediaConfig())
    assert not may_connect(guard, "example.com", address)
    assert not may_connect(guard, "example.com", PUBLIC[0], address)
    assert not may_connect(guard, "example.com", address, PUBLIC[0])


@given(address=st.ip_addresses(v=4))
@settings(max_examples=300)
def test_an_embedded_address_is_judged_like_the_plain_one(address: ipaddress.IPv4Address) -> None:
    guard = Guard(MediaConfig())
    number = int(address)
    for embedded in (
        ipaddress.IPv6Address((0xFFFF << 32) | number),
        ipaddress.IPv6Address((0x64FF9B << 96) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),
    ):
        if not guard.may_connect("example.com", [address]):
            assert not guard.may_connect("example.com", [embedded]), embedded


@pytest.mark.parametrize(
    ("url", "host", "port", "sent"),
    [
        ("http://example.com", "example.com", 80, "http://example.com"),
        ("https://example.com/a?b=c#d", "example.com", 443, "https://example.com/a?b=c"),
        ("HTTPS://EXAMPLE.COM:443/A", "example.com", 443, "https://example.com/A"),
        ("http://example.com.:80/", "example.com", 80, "http://example.com/"),
        ("https://example.com:80/", "example.com", 80, "https://example.com:80/"),
        ("http://한국.kr/고양이", "xn--3e0b707e.kr", 80, None),
        ("http://8.8.8.8/", "8.8.8.8", 80, "http://8.8.8.8/"),
        ("http://[2606:4700::1111]/", "2606:4700::1111", 80, "http://[2606:4700::1111]/"),
        ("http://a_b.example.com/", "a_b.example.com", 80, "http://a_b.example.com/"),
        ("http://example.com/@b", "example.com", 80, "http://example.com/@b"),
        ("http://example.com/?q=http://c@d", "example.com", 80, None),
    ],
)
def test_urls_that_may_be_asked(url: str, host: str, port: int, sent: str | None) -> None:
    target = Guard(MediaConfig()).target(url, kind="video")
    assert (target.host, target.port) == (host, port)
    if sent is not None:
        assert str(target.url) == sent


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http:",
        "http:/example.com/",
        "http:example.com",
        "http://",
        "http:///path",
        "//example.com/",
        "example.com",
        "ftp://example.com/",
        "file:///etc/passwd",
        "httpx://example.com/",
        "http://user@example.com/",
        "http://user:password@example.com/",
        "http://@example.com/",
        "http://example.com@8.8.8.8/",
        "http://example.com:80@8.8.8.8/",
        "http://example.com\\@8.8.8.8/",
        "http://example.com\\.evil.test/",
        "http://exa mple.com/",
        "http://example.com/a b",
        "http://example.com/\r\nHost: x",
        "http://example.com/\x00",
        "http://example.com/\x7f",
        "http://example.com/\u2028",
        "http://example.com/\u3000",
        "http://example.com/\ud800",
        " http://example.com/",
        "http://example.com/" + "a" * 8_192,
        "http://example.com:8080/",
        "http://example.com:0/",
        "http://example.com:-80/",
        "http://example.com:65616/",
        "http://example.com:80:80/",
        "http://example.com:x/",
        "http://[::1/",
        "http://[8.8.8.8]/",
        "http://[fe80::1%25eth0]/",
        "http://[2606:4700::1111%25lo]/",
        "http://8.8.8.8.8/",
        "http://8.8.2056/",
        "http://134744072/",
        "http://0x08080808/",
        "http://0x8.8.8.8/",
        "http://010.8.8.8/",
        "http://８.8.8.8/",
        "http://⑧.⑧.⑧.⑧/",
        "http://%38.8.8.8/",
        "http://exam%70le.com/",
        "http://example..com/",
        "http://.example.com/",
        "http://-example.com/",
        "http://" + "a" * 64 + ".com/",
        "http://" + "a." * 127 + "com/",
        "http://ex*mple.com/",
    ],
)
def test_urls_that_may_not(url: str) -> None:
    assert not is_allowed(Guard(MediaConfig()), url)


@pytest.mark.parametrize(
    ("config", "host", "address", "allowed"),
    [
        (MediaConfig(denied_hosts=("example.com",)), "example.com", "8.8.8.8", False),
        (MediaConfig(denied_hosts=("example.com",)), "www.example.com", "8.8.8.8", True),
        (MediaConfig(denied_hosts=("*.example.com",)), "a.b.example.com", "8.8.8.8", False),
        (MediaConfig(denied_hosts=("*.example.com",)), "example.com", "8.8.8.8", True),
        (MediaConfig(denied_hosts=("*.example.com",)), "badexample.com", "8.8.8.8", True),
        (MediaConfig(denied_hosts=("8.8.8.0/24",)), "example.com", "8.8.8.8", False),
        (MediaConfig(denied_hosts=("8.8.8.0/24",)), "example.com", "64:ff9b::808:808", False),
        (MediaConfig(denied_hosts=("64:ff9b::/96",)), "example.com", "64:ff9b::808:808", False),
        (MediaConfig(denied_hosts=("8.8.8.8",)), "example.com", "8.8.4.4", True),
        (MediaConfig(denied_hosts=("한국.KR.",)), "xn--3e0b707e.kr", "8.8.8.8", False),
        (MediaConfig(allowed_hosts=()), "example.com", "8.8.8.8", False),
        (MediaConfig(allowed_hosts=("EXAMPLE.com",)), "example.com", "8.8.8.8", True),
        (MediaConfig(allowed_hosts=("example.com",)), "example.com", "10.0.0.1", False),
        (MediaConfig(allowed_hosts=("example.com",)), "example.net", "8.8.8.8", False),
        (MediaConfig(allowed_hosts=("8.8.8.0/24",)), "example.net", "8.8.8.8", True),
        (MediaConfig(allowed_hosts=("8.8.8.0/24",)), "example.net", "8.8.4.4", False),
        (MediaConfig(allowed_private_hosts=("nas.test",)), "nas.test", "10.0.0.1", True),
        (MediaConfig(allowed_private_hosts=("nas.test",)), "nas.test", "127.0.0.1", True),
        (MediaConfig(allowed_private_hosts=("nas.test",)), "other.test", "10.0.0.1", False),
        (MediaConfig(allowed_private_hosts=("10.0.0.0/8",)), "any.test", "10.9.9.9", True),
        (MediaConfig(allowed_private_hosts=("10.0.0.0/8",)), "any.test", "::ffff:a00:1", True),
        (MediaConfig(allowed_private_hosts=("10.0.0.0/8",)), "any.test", "172.16.0.1", False),
        (MediaConfig(allowed_private_hosts=("0.0.0.0/0",)), "any.test", "127.0.0.1", False),
        (MediaConfig(allowed_private_hosts=("127.0.0.0/8",)), "any.test", "127.0.0.1", True),
        (MediaConfig(allowed_private_hosts=("::1",)), "any.test", "::1", True),
        (
            MediaConfig(allowed_private_hosts=("nas.test",), denied_hosts=("10.0.0.0/8",)),
            "nas.test",
            "10.0.0.1",
            False,
        ),
        (
            MediaConfig(allowed_private_hosts=("nas.test",), allowed_hosts=("example.com",)),
            "nas.test",
            "10.0.0.1",
            False,
        ),
    ],
)
def test_lists_of_hosts(config: MediaConfig, host: str, address: str, allowed: bool) -> None:
    guard = Guard(config)
    by_url = is_allowed(guard, f"http://{host}/")
    assert (by_url and may_connect(guard, host, address)) is allowed
    literal = f"[{address}]" if ":" in address else address
    assert is_allowed(guard, f"http://{literal}/") == may_connect(guard, address, address)


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (None, "http://example.com/", True),
        (("example.com",), "http://example.com/", True),
        (("8.8.8.0/24",), "http://example.com/", False),  # nobody knows where it is
        (("8.8.8.0/24",), "http://8.8.8.8/", True),
        (None, "http://127.0.0.1/", False),
    ],
)
def test_behind_a_proxy_a_name_alone_has_to_do(
    hosts: tuple[str, ...] | None, url: str, allowed: bool
) -> None:
    guard = Guard(MediaConfig(allowed_hosts=hosts))
    assert is_allowed(guard, url, is_resolved_here=False) is allowed


def test_ports() -> None:
    guard = Guard(MediaConfig(allowed_ports=(443, 8443)))
    assert is_allowed(guard, "https://example.com/")
    assert is_allowed(guard, "http://example.com:8443/")
    assert not is_allowed(guard, "http://example.com/")


def test_the_addresses_of_this_machine_are_never_public_nor_merely_near() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = str(probe.getsockname()[0])
    near = str(ipaddress.ip_network(f"{own}/24", strict=False))
    assert not may_connect(Guard(MediaConfig()), "any.test", own)
    assert not may_connect(Guard(MediaConfig(allowed_private_hosts=(near,))), "any.test", own)
    assert may_connect(Guard(MediaConfig(allowed_private_hosts=(own,))), "any.test", own)
    assert may_connect(Guard(MediaConfig(allowed_private_hosts=("any.test",))), "any.test", own)


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.",
        "a.*.b",
        "http://a.test",
        "a.test:80",
        "a.test/x",
        "10.0.0.1/8",
        "127.1",
        "a b",
        "@",
    ],
)
@pytest.mark.parametrize("setting", ["allowed_hosts", "denied_hosts", "allowed_private_hosts"])
def test_a_pattern_that_cannot_be_read(setting: str, pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Guard(MediaConfig.model_validate({setting: ("fine.test", pattern)}))
    assert str(caught.value).startswith(f"media.{setting}: item 2 is not")
    assert "\n" not in str(caught.value)


@given(url=st.text(max_size=60) | st.from_regex(r"https?://[^/]{0,30}[/?#]?.{0,10}"))
@settings(max_examples=500)
def test_any_text_is_judged_without_another_error(url: str) -> None:
    guard = Guard(MediaConfig())
    if is_allowed(guard, url):
        target = guard.target(url, kind="image")
        assert target.url.raw_host.decode() == target.host
        assert guard.target(str(target.url), kind="image") == target
