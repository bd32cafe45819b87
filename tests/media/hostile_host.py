"""A media host on loopback that answers as it is told, and a resolver that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType

from server.media.guard import IPAddress

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]
HANG_S = 60.0


class HostileHost:
    """Serves one behaviour per path; `*` is for every other path. Counts whoever connects."""

    def __init__(
        self,
        behaviours: Mapping[str, Behaviour] | None = None,
        *,
        addresses: Sequence[str] = ("127.0.0.1",),
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.behaviours = dict(behaviours or {})
        self.heads: list[str] = []
        self.num_connections = 0
        self.num_open = 0
        self.most_open = 0
        self._addresses = addresses
        self._trust = trust
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> HostileHost:
        for address in self._addresses:
            server = await asyncio.start_server(self._serve, address, self.port, ssl=self._trust)
            self.port = server.sockets[0].getsockname()[1]
            self._servers.append(server)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()

    @property
    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.heads]

    def url(self, path: str = "/cat.png", *, name: str = "media.test", scheme: str = "http") -> str:
        return f"{scheme}://{name}:{self.port}{path}"

    async def all_closed(self) -> None:
        """Returns when no connection is open any more; the caller bounds the time."""
        while self.num_open:
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.num_open -= 1
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        path = head.split(" ")[1]
        behaviour = self.behaviours.get(path, self.behaviours.get("*"))
        if behaviour is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        # A host that hangs notices at once when the other side goes.
        answering = asyncio.ensure_future(behaviour(writer))
        leaving = asyncio.ensure_future(reader.read())
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


def answer(body: bytes = b"", *headers: str, status: str = "200 OK") -> Behaviour:
    """An honest answer, with further headers."""
    return raw(_head(status, f"Content-Length: {len(body)}", *headers), body)


def raw(*pieces: bytes, pause_s: float = 0.0) -> Behaviour:
    """These bytes, then the end of the connection."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return behave


def stalls_after(*pieces: bytes) -> Behaviour:
    """These bytes, and then nothing, with the connection held open."""
    sends = raw(*pieces)

    async def behave(writer: asyncio.StreamWriter) -> None:
        await sends(writer)
        await asyncio.sleep(HANG_S)

    return behave


def trickles(before: bytes, piece: bytes, *, pause_s: float = 0.01) -> Behaviour:
    """The same piece again and again, for ever."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return behave


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Behaviour:
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return raw(_head("200 OK", "Transfer-Encoding: chunked"), *chunks, end)


def redirect(location: str, *, status: int = 302, body: bytes = b"") -> Behaviour:
    return answer(body, f"Location: {location}", status=f"{status} Moved")


def head(*headers: str, status: str = "200 OK") -> bytes:
    return _head(status, *headers)


def _head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


class ScriptedResolver:
    """Names to one answer per call, the last one for all further calls. None hangs."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str] | None]]) -> None:
        self._answers = {name: list(each) for name, each in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[IPAddress]:
        self.asked.append(host)
        script = self._answers.get(host, [[]])
        addresses = script.pop(0) if len(script) > 1 else script[0]
        if addresses is None:
            await asyncio.sleep(HANG_S)
            return []
        return [ipaddress.ip_address(address) for address in addresses]
