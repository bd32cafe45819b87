"""The one place that connects to another host: names to addresses, addresses judged, then dialled.

`GuardedTransport` is an httpx transport over an httpcore pool whose network backend asks the
`Guard` about every address before it connects to that same address. Nothing is kept from one
request to the next: no connection, no cookie. Must not know what is fetched, or what for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import httpcore
import httpx

from server.config import MediaConfig
from server.errors import ConfigError, Unavailable
from server.media.guard import Guard, IPAddress

MAX_ADDRESSES_TRIED = 4
_RESOLVER_THREADS = 32
_MAX_LOOKUPS = 256


class NameNotFound(Exception):
    """A host's name has no address."""


class AddressForbidden(Exception):
    """A host was found at an address that may not be dialled."""


class Resolver(Protocol):
    async def resolve(self, host: str, port: int) -> Sequence[IPAddress]:
        """A name's addresses in the order to try them; none, or NameNotFound, if it has none."""


class SystemResolver:
    """The system's own resolver in threads of its own, so that dead names hold up nothing else.

    A lookup cannot be stopped. One that nobody waits for any more still counts until it ends, and
    beyond `max_lookups` further ones are refused.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        num_threads: int = _RESOLVER_THREADS,
        max_lookups: int = _MAX_LOOKUPS,
        lookup: Callable[[str, int], Sequence[IPAddress]] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="resolver")
        self._max_lookups = max_lookups
        self._lookup = lookup or system_lookup
        self._running: set[Future[Sequence[IPAddress]]] = set()

    async def resolve(self, host: str, port: int) -> Sequence[IPAddress]:
        """NameNotFound, TimeoutError, or Unavailable where no lookup can be started in time."""
        self._running = {lookup for lookup in self._running if not lookup.done()}
        if len(self._running) >= self._max_lookups:
            raise Unavailable(shortage="lookups")
        lookup = self._threads.submit(self._lookup, host, port)
        self._running.add(lookup)
        waiting = asyncio.wrap_future(lookup)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(waiting)
        except TimeoutError:
            if lookup.cancel():  # it never had a thread
                raise Unavailable(shortage="lookups") from None
            raise
        except (OSError, UnicodeError):
            raise NameNotFound from None
        finally:
            waiting.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def system_lookup(host: str, port: int) -> Sequence[IPAddress]:
    """Blocks for as long as the system's resolver does. OSError where it knows no address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found))


class Dialler(httpcore.AsyncNetworkBackend):
    """Connects to the first of a host's addresses that answers, if all of them are allowed."""

    def __init__(
        self, resolver: Resolver, may_connect: Callable[[str, Sequence[IPAddress]], bool]
    ) -> None:
        self._resolver = resolver
        self._may_connect = may_connect
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """NameNotFound, AddressForbidden, TimeoutError, or httpcore's own errors."""
        give_up_at = None if timeout is None else time.monotonic() + timeout
        addresses = await self._addresses(host, port)
        if not addresses:
            raise NameNotFound
        if not self._may_connect(host, addresses):
            raise AddressForbidden
        tried = addresses[:MAX_ADDRESSES_TRIED]
        for num_left, address in zip(range(len(tried), 0, -1), tried, strict=True):
            # Each gets its part of the time, so that one that swallows packets leaves the others a
            # chance.
            part_s = None
            if give_up_at is not None:
                part_s = max(0.0, give_up_at - time.monotonic()) / num_left
            try:
                return _Stream(
                    await self._sockets.connect_tcp(
                        str(address), port, timeout=part_s, socket_options=socket_options
                    )
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if num_left == 1:
                    raise
        raise AssertionError("the last address returned or raised")

    async def _addresses(self, host: str, port: int) -> Sequence[IPAddress]:
        try:
            return [ipaddress.ip_address(host)]
        except ValueError:
            return await self._resolver.resolve(host, port)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is closed when its TLS handshake is cancelled too, not only if it fails."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            await self._stream.aclose()
            raise

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends each request over a connection of its own. Raises what httpcore and `Dialler` raise."""

    def __init__(self, config: MediaConfig, guard: Guard, resolver: Resolver) -> None:
        """ConfigError where the certificates or the proxy of the settings cannot be used."""
        trust = _trust_store(config)
        if config.proxy is None:
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=trust,
                max_connections=None,  # whoever asks counts
                max_keepalive_connections=0,
                network_backend=Dialler(resolver, guard.may_connect),
            )
        else:
            self._pool = _proxy_pool(config.proxy, trust, resolver)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._pool.handle_async_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                extensions=request.extensions,
            )
        )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer))

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._answer.aiter_stream():
            yield piece

    async def aclose(self) -> None:
        await self._answer.aclose()


def _trust_store(config: MediaConfig) -> ssl.SSLContext:
    trust = httpx.create_ssl_context(trust_env=False)
    if config.ca_file is not None:
        try:
            trust.load_verify_locations(cafile=config.ca_file)
        except OSError as error:
            if isinstance(error, ssl.SSLError):
                raise ConfigError("media.ca_file: holds no certificates in PEM form") from None
            raise ConfigError(f"media.ca_file: cannot be read: {error.strerror}") from None
    return trust


def _proxy_pool(proxy: str, trust: ssl.SSLContext, resolver: Resolver) -> httpcore.AsyncHTTPProxy:
    """The proxy is the operator's: found by name like any host, but at whatever address it has."""
    try:
        url = httpx.URL(proxy)
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.raw_host or url.raw_path != b"/":
        raise ConfigError("media.proxy: must be like http://user:password@host:port")
    return httpcore.AsyncHTTPProxy(
        proxy_url=httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/"
        ),
        proxy_auth=(url.username.encode(), url.password.encode()) if url.userinfo else None,
        ssl_context=trust,
        proxy_ssl_context=trust if url.scheme == "https" else None,
        max_connections=None,
        max_keepalive_connections=0,
        network_backend=Dialler(resolver, lambda host, addresses: True),
    )
