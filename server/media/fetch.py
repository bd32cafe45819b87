"""From an http(s) URL to the bytes behind it, within limits of size, time and number.

One GET without credentials, cookies or a referrer, sent through `dial` and judged by `guard`;
redirects are followed by hand, each judged like the first URL, and their bodies never read. What
the host says is only believed where it is counted. Must not know what a request, a model or a pixel
is, nor what the bytes mean.
"""

from __future__ import annotations

import asyncio
import copy
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import httpcore
import httpx

from server.config import MediaConfig
from server.errors import DownloadFailed, MediaFileTooLarge, ServerError, ShuttingDown
from server.media.cache import DiskCache, MediaCache, cache_key
from server.media.dial import (
    AddressForbidden,
    GuardedTransport,
    NameNotFound,
    Resolver,
    SystemResolver,
)
from server.media.file import MediaFile, MediaFileWriter
from server.media.freshness import StoredAnswer, confirmed, stored_answer, unpacked
from server.media.guard import Guard, Target, refusal
from server.media.kinds import SourceKind, max_bytes
from server.turns import Turns

CacheOutcome = Literal["hit", "revalidated", "miss"]

SPEED_WINDOW_S = 5.0
"""How long a body may take for as many bytes as the least speed gives in that time."""
MAX_WAIT_S = 60.0
"""Longest wait for turns of one fetch."""
MEMORY_SHARE = 0.5
"""Of `media.cache_bytes`; the rest is for finished pixels."""

_REDIRECTS = (301, 302, 303, 307, 308)
_CACHE_THREADS = 2
_DISK_TIMEOUT_S = 2.0
_MAX_DISK_WRITES = 8
_MAX_BYTES_COPIED_AT_ONCE = 256 * 1024
# A body in tiny pieces costs far more than its bytes: the event loop must get its turn between
# them, and no honest host sends so many.
_PIECES_AT_ONCE = 16
_MAX_TINY_PIECES = 4_096
_MIN_PIECE_BYTES = 64


@dataclass(frozen=True)
class Fetched:
    """A medium's bytes, and whether they had to come over the network."""

    file: MediaFile
    cache: CacheOutcome


@dataclass(frozen=True)
class _Redirect:
    location: str


@dataclass(frozen=True)
class _NotModified:
    headers: httpx.Headers


@dataclass(frozen=True)
class _Whole:
    file: MediaFile
    headers: httpx.Headers


@dataclass(frozen=True)
class _Keys:
    memory: str
    disk: str


class _Trip:
    """One fetch under way, shared by all who asked for the same."""

    def __init__(self, task: asyncio.Task[Fetched | ServerError]) -> None:
        self.task = task
        self.num_waiters = 0


class Fetcher:
    """Fetches media for everybody. Belongs to one event loop; `close` ends what is under way."""

    def __init__(
        self,
        config: MediaConfig,
        *,
        resolver: Resolver | None = None,
        user_agent: str = "hcx-server",
        speed_window_s: float = SPEED_WINDOW_S,
        max_wait_s: float = MAX_WAIT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """ConfigError where a setting cannot be used. `clock` tells seconds since 1970."""
        self._config = config
        self._guard = Guard(config)
        self._own_resolver = (
            SystemResolver(timeout_s=config.connect_timeout_s) if resolver is None else None
        )
        self._transport = GuardedTransport(
            config, self._guard, resolver or cast(Resolver, self._own_resolver)
        )
        self._turns = Turns(
            max_running=config.max_fetches,
            max_per_place=config.max_fetches_per_host,
            max_waiting=config.max_fetches_waiting,
            shortage="fetches",
        )
        self._memory: MediaCache[StoredAnswer] = MediaCache(
            int(config.cache_bytes * MEMORY_SHARE), config.cache_ttl_s
        )
        self._disk = (
            DiskCache(config.cache_dir, config.cache_dir_bytes, config.cache_ttl_s, clock=clock)
            if config.cache_dir is not None
            else None
        )
        # Apart, so that a disk that hangs holds up nothing but itself.
        self._copiers = ThreadPoolExecutor(_CACHE_THREADS, thread_name_prefix="media-copy")
        self._disk_users = ThreadPoolExecutor(_CACHE_THREADS, thread_name_prefix="media-disk")
        self._disk_writes: set[Future[None]] = set()
        self._secret = os.urandom(32)
        self._user_agent = user_agent
        self._speed_window_s = speed_window_s
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._trips: dict[str, _Trip] = {}
        self._tasks: set[asyncio.Task[Fetched | ServerError]] = set()
        self._is_closed = False

    async def fetch(
        self, url: str, *, kind: SourceKind, tenant: str, cache_salt: str = ""
    ) -> Fetched:
        """InvalidMediaUrl, DownloadFailed or MediaFileTooLarge; Unavailable where too many wait.

        Who asks for what is already being fetched for the same tenant under the same salt waits for
        that fetch. It is given up, and its connection closed, when the last of them is cancelled.
        """
        if self._is_closed:
            raise ShuttingDown
        target = self._judged(url.strip(), kind)
        key = self._keys(target, kind, tenant, cache_salt).memory
        trip = self._trips.get(key)
        if trip is None:
            task = asyncio.create_task(self._outcome(target, kind, tenant, cache_salt))
            trip = self._trips[key] = _Trip(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._end(key, trip))
        trip.num_waiters += 1
        try:
            outcome = await asyncio.shield(trip.task)
        except asyncio.CancelledError:
            if self._is_closed and trip.task.cancelled():
                raise ShuttingDown from None
            raise
        finally:
            trip.num_waiters -= 1
            if trip.num_waiters == 0:
                self._end(key, trip)
                trip.task.cancel()
        if isinstance(outcome, ServerError):
            # Each waiter gets an error of its own: it will be told which of its parts failed.
            raise copy.copy(outcome)
        return outcome

    @property
    def num_running(self) -> int:
        return self._turns.num_running

    @property
    def num_waiting(self) -> int:
        return self._turns.num_waiting

    @property
    def num_cached_bytes(self) -> int:
        """In memory."""
        return self._memory.num_bytes

    async def close(self) -> None:
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.aclose()
        self._copiers.shutdown(wait=False, cancel_futures=True)
        self._disk_users.shutdown(wait=False, cancel_futures=True)
        if self._own_resolver is not None:
            self._own_resolver.close()

    def _end(self, key: str, trip: _Trip) -> None:
        if self._trips.get(key) is trip:
            del self._trips[key]

    async def _outcome(
        self, target: Target, kind: SourceKind, tenant: str, cache_salt: str
    ) -> Fetched | ServerError:
        try:
            return await self._follow(target, kind, tenant, cache_salt)
        except ServerError as error:
            return error

    async def _follow(
        self, target: Target, kind: SourceKind, tenant: str, cache_salt: str
    ) -> Fetched:
        """Hop after hop, each with its own place in the cache and its own turn at its host."""
        clock = asyncio.get_running_loop().time
        is_image = kind == "image"
        config = self._config
        fetch_s = config.image_fetch_timeout_s if is_image else config.video_fetch_timeout_s
        wait_s = self._max_wait_s
        for _ in range(self._config.max_redirects + 1):
            keys = self._keys(target, kind, tenant, cache_salt)
            stored = await self._find(keys)
            if stored is not None and stored.is_fresh(self._clock()):
                return Fetched(await self._file_of(stored), "hit")
            asked_at = clock()
            async with self._turns.turn(target.host, tenant=tenant, max_wait_s=wait_s):
                began_at = clock()
                wait_s -= began_at - asked_at
                try:
                    async with asyncio.timeout(fetch_s):
                        answer = await self._ask(target, stored, kind)
                except TimeoutError:
                    raise _failed(kind, "it took too long") from None
                fetch_s -= clock() - began_at
            match answer:
                case _Redirect():
                    target = self._judged_redirect(target, answer.location, kind)
                case _NotModified() if stored is not None:
                    self._keep_confirmed(keys, stored, answer.headers)
                    return Fetched(await self._file_of(stored), "revalidated")
                case _Whole():
                    await self._keep(keys, answer)
                    return Fetched(answer.file, "miss")
        raise _failed(kind, "it was redirected too often")

    def _judged(self, url: str, kind: SourceKind) -> Target:
        return self._guard.target(url, kind=kind, is_resolved_here=self._config.proxy is None)

    def _judged_redirect(self, target: Target, location: str, kind: SourceKind) -> Target:
        try:
            joined = str(target.url.join(location))
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise refusal(kind) from None
        return self._judged(joined, kind)

    async def _ask(
        self, target: Target, stored: StoredAnswer | None, kind: SourceKind
    ) -> _Redirect | _NotModified | _Whole:
        """Send one request and read its answer."""
        clock = asyncio.get_running_loop().time
        deadline = asyncio.timeout(self._config.connect_timeout_s)
        late = "the host could not be reached in time"

        async def on_event(name: str, _: Mapping[str, Any]) -> None:
            nonlocal late
            if name == "http11.send_request_headers.started" and not deadline.expired():
                deadline.reschedule(clock() + self._config.first_byte_timeout_s)
                late = "the host took too long to answer"

        request = httpx.Request(
            "GET",
            target.url,
            headers={
                "User-Agent": self._user_agent,
                "Accept": f"{kind}/*, */*;q=0.5",
                "Accept-Encoding": "identity",
                "Connection": "close",
                **({} if stored is None else stored.conditions()),
            },
            extensions={
                "trace": on_event,
                "timeout": {"connect": self._config.connect_timeout_s},
            },
        )
        with _explained(kind):
            try:
                async with deadline:
                    response = await self._transport.handle_async_request(request)
            except TimeoutError:
                raise _failed(kind, late) from None
            try:
                return await self._read(response, stored, kind)
            finally:
                await response.aclose()

    async def _read(
        self, response: httpx.Response, stored: StoredAnswer | None, kind: SourceKind
    ) -> _Redirect | _NotModified | _Whole:
        status, headers = response.status_code, response.headers
        if status in _REDIRECTS:
            locations = headers.get_list("location")
            if len(locations) != 1:
                raise _failed(kind, "the host redirected it to nowhere")
            return _Redirect(locations[0])
        if status == 304 and stored is not None:
            return _NotModified(headers)
        if status != 200:
            raise _failed(kind, f"the host answered {status}")
        if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise _failed(kind, "the host sent it compressed, which was not asked for")
        return _Whole(await self._body(response, kind), headers)

    async def _body(self, response: httpx.Response, kind: SourceKind) -> MediaFile:
        limit = max_bytes(self._config, kind)
        declared = response.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise MediaFileTooLarge(
                f"The {kind} has {int(declared)} bytes; the limit is {limit}.", kind=kind
            )
        clock = asyncio.get_running_loop().time
        bytes_per_window = self._config.min_fetch_bytes_per_s * self._speed_window_s
        num_pieces = in_window = 0
        writer = MediaFileWriter()
        try:
            async with asyncio.timeout(self._speed_window_s) as slow:
                async for piece in response.aiter_raw():
                    num_pieces += 1
                    if writer.num_bytes + len(piece) > limit:
                        raise MediaFileTooLarge(
                            f"The {kind} has more than {limit} bytes, which is the limit.",
                            kind=kind,
                        )
                    writer.write(piece)
                    if writer.num_bytes < (num_pieces - _MAX_TINY_PIECES) * _MIN_PIECE_BYTES:
                        raise _failed(kind, "the host sends it in too many pieces")
                    if num_pieces % _PIECES_AT_ONCE == 0:
                        await asyncio.sleep(0)
                    in_window += len(piece)
                    if in_window >= bytes_per_window and not slow.expired():
                        in_window = 0
                        slow.reschedule(clock() + self._speed_window_s)
        except TimeoutError:
            raise _failed(kind, "the host sends it too slowly") from None
        if writer.num_bytes == 0:
            raise _failed(kind, "the host sent no bytes")
        return writer.finish()

    def _keys(self, target: Target, kind: SourceKind, tenant: str, cache_salt: str) -> _Keys:
        fields = ("fetched", tenant, cache_salt, kind, str(target.url))
        return _Keys(cache_key(*fields, secret=self._secret), cache_key(*fields))

    async def _find(self, keys: _Keys) -> StoredAnswer | None:
        stored = self._memory.get(keys.memory)
        if stored is not None or self._disk is None or not self._disk.is_on:
            return stored
        try:
            async with asyncio.timeout(_DISK_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                packed = await loop.run_in_executor(self._disk_users, self._disk.get, keys.disk)
        except TimeoutError:
            self._disk.turn_off("it takes too long")
            return None
        stored = None if packed is None else unpacked(packed)
        if stored is not None:
            self._memory.put(keys.memory, stored, len(stored.data))
        return stored

    async def _file_of(self, stored: StoredAnswer) -> MediaFile:
        if len(stored.data) <= _MAX_BYTES_COPIED_AT_ONCE:
            return MediaFile.of_bytes(stored.data)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._copiers, MediaFile.of_bytes, stored.data)

    async def _keep(self, keys: _Keys, answer: _Whole) -> None:
        if self._config.cache_bytes == 0 and self._disk is None:
            return
        kept = stored_answer(
            b"", answer.headers, now_s=self._clock(), ttl_s=self._config.cache_ttl_s
        )
        if kept is None:
            self._forget(keys)
            return
        data = await asyncio.get_running_loop().run_in_executor(self._copiers, answer.file.read)
        self._store(keys, replace(kept, data=data))

    def _keep_confirmed(self, keys: _Keys, stored: StoredAnswer, headers: httpx.Headers) -> None:
        now_s = self._clock()
        kept = confirmed(stored, headers, now_s=now_s, ttl_s=self._config.cache_ttl_s)
        if kept is None:
            self._forget(keys)
        else:
            self._store(keys, kept)

    def _store(self, keys: _Keys, stored: StoredAnswer) -> None:
        self._memory.put(keys.memory, stored, len(stored.data))
        self._write_to_disk(lambda disk: disk.put(keys.disk, stored.packed()))

    def _forget(self, keys: _Keys) -> None:
        self._memory.remove(keys.memory)
        self._write_to_disk(lambda disk: disk.remove(keys.disk))

    def _write_to_disk(self, write: Callable[[DiskCache], None]) -> None:
        """In the background; what a slow disk cannot take in time is not kept there."""
        self._disk_writes = {each for each in self._disk_writes if not each.done()}
        disk = self._disk
        if disk is not None and disk.is_on and len(self._disk_writes) < _MAX_DISK_WRITES:
            self._disk_writes.add(self._disk_users.submit(write, disk))


def _failed(kind: SourceKind, cause: str) -> DownloadFailed:
    return DownloadFailed(f"The {kind} could not be fetched: {cause}.", kind=kind)


@contextmanager
def _explained(kind: SourceKind) -> Iterator[None]:
    """What went wrong below, in words of ours. The order is from the special to the general."""
    try:
        yield
    except AddressForbidden:
        raise refusal(kind) from None
    except NameNotFound:
        raise _failed(kind, "the host's name is not known") from None
    except (httpcore.TimeoutException, TimeoutError):
        raise _failed(kind, "the host could not be reached in time") from None
    except httpcore.ProxyError:
        raise _failed(kind, "the proxy does not pass it on") from None
    except httpcore.ConnectError as error:
        raise _failed(kind, _connect_cause(error)) from None
    except httpcore.ProtocolError:
        raise _failed(kind, "the host's answer is broken off or not HTTP") from None
    except (httpcore.NetworkError, OSError):
        raise _failed(kind, "the connection broke off") from None


def _connect_cause(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return "the host has no certificate that is trusted, or TLS failed"
        if isinstance(cause, ConnectionRefusedError):
            return "the host refused the connection"
        cause = cause.__cause__ or cause.__context__
    return "the host cannot be reached"
