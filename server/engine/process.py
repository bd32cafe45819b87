"""Starts the engine process, watches it and starts it again; knows nothing of requests.

Death is seen at once, a hang by its silence: the process says something after every step and every
second while idle. Importing this does not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import zmq
import zmq.asyncio

from server.config import environment_with
from server.core import TokenEvent
from server.engine.facts import EngineFacts, EngineStats, EngineStatus
from server.engine.messages import (
    Building,
    Joined,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    Start,
    Stop,
    decode_from_engine,
    encode,
)
from server.errors import CheckpointError, ConfigError

ENTRY_MODULE = "server.engine.worker_main"

MAX_CRASHES = 5
CRASH_WINDOW_S = 600.0

PATIENCE = 10
"""A step may take so many times the slowest of the warm-up before it counts as hung."""

SILENCE_S = 5.0
"""Without a sign of life for so long the process is no longer called ready."""

LAST_WORDS_S = 0.2
"""A dead process's messages have all arrived when the socket has been silent for so long."""

ENVIRONMENT = {
    # Weights in pages of 2 MiB: with small ones, looking pages up costs a third of the bandwidth.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # A thread that waits for another sleeps soon. By default it spins for milliseconds, and where
    # there are more busy threads than cores it keeps the very core that the other one waits for.
    "GOMP_SPINCOUNT": "3000",
    # oneDNN, and PyTorch's layer above it, keep a program of about a megabyte for each shape of a
    # product they have met: by default a thousand each, and every length of a step is a shape.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Set for the process where the environment does not set them. Elsewhere they mean nothing."""

Frames: TypeAlias = Sequence[bytes | memoryview]

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Whoever is told what happens. All calls come in the event loop and must not block."""

    def on_loading(self, num_bytes: int, total_bytes: int) -> None: ...

    def on_ready(self, facts: EngineFacts) -> None: ...

    def on_building(self, request_ids: Sequence[str]) -> None:
        """Of these, and no others, matchers are being built from now on."""

    def on_joined(self, request_ids: Sequence[str]) -> None: ...

    def on_events(self, events: Sequence[TokenEvent]) -> None: ...

    def on_stats(self, stats: EngineStats) -> None:
        """What the process has counted since it began; before the events that it comes with."""

    def on_lost(self, *, is_final: bool) -> None:
        """The process is gone; another follows unless `is_final`."""


class RestartPolicy:
    """How long to wait before the next start: 1, 2, 4 ... seconds, until it happens too often."""

    def __init__(
        self,
        *,
        max_delay_s: float,
        first_delay_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_delay_s = max_delay_s
        self._first_delay_s = first_delay_s
        self._clock = clock
        self._crashes_s: deque[float] = deque()

    def delay_after_crash(self) -> float | None:
        """Seconds to wait, or None to give up."""
        now_s = self._clock()
        self._crashes_s.append(now_s)
        while self._crashes_s[0] <= now_s - CRASH_WINDOW_S:
            self._crashes_s.popleft()
        if len(self._crashes_s) >= MAX_CRASHES:
            return None
        return min(self._max_delay_s, self._first_delay_s * 2.0 ** (len(self._crashes_s) - 1))


class EngineProcess:
    """The engine process, whichever life it is in."""

    def __init__(
        self,
        start_message: Start,
        listener: Listener,
        *,
        restart_policy: RestartPolicy,
        loading_timeout_s: float,
        step_timeout_s: float,
        shutdown_timeout_s: float,
        entry_module: str = ENTRY_MODULE,
    ) -> None:
        self.status: EngineStatus = "loading"
        self.facts: EngineFacts | None = None
        self.num_restarts = 0
        self._start_message = start_message
        self._listener = listener
        self._restart_policy = restart_policy
        self._loading_timeout_s = loading_timeout_s
        self._step_timeout_s = step_timeout_s
        self._shutdown_timeout_s = shutdown_timeout_s
        self._entry_module = entry_module
        self._last_sign_s = 0.0
        self._silence_s = SILENCE_S
        self._life: _Life | None = None
        self._supervisor: asyncio.Task[None] | None = None
        # Both are the running loop's, and made with the supervisor.
        self._has_begun: asyncio.Event
        self._is_ready: asyncio.Future[None]

    @property
    def is_silent(self) -> bool:
        """Whether a ready process owes a sign of life, though not yet long enough to be hung."""
        return self.status == "ready" and time.monotonic() > self._last_sign_s + self._silence_s

    @property
    def pid(self) -> int | None:
        return self._life.process.pid if self._life is not None else None

    async def launch(self) -> None:
        """Returns when the first life has begun, or cannot; `start` waits for what comes of it."""
        loop = asyncio.get_running_loop()
        self._has_begun, self._is_ready = asyncio.Event(), loop.create_future()
        directory = Path(tempfile.mkdtemp(prefix="hcx-"))  # mode 0700
        self._supervisor = asyncio.create_task(self._supervise(directory, self._is_ready))
        await self._has_begun.wait()

    async def start(self) -> None:
        """Returns when the first life is ready; raises, and cleans up, if it never is."""
        if self._supervisor is None:
            await self.launch()
        try:
            await asyncio.shield(self._is_ready)
        except BaseException:
            await self.stop()
            raise

    def send(self, frames: Frames) -> None:
        """Sends a message, if there is anyone ready for it."""
        if self.status == "ready" and self._life is not None:
            self._life.outbox.put_nowait(frames)

    async def stop(self) -> None:
        """Tells the process to end, kills it if it does not, and leaves nothing behind."""
        was_ready = self.status == "ready"
        self.status = "stopping"
        if was_ready and self._life is not None:
            self._life.outbox.put_nowait([encode(Stop())])
            await asyncio.wait([self._life.exited], timeout=self._shutdown_timeout_s)
        if self._supervisor is not None:
            self._supervisor.cancel()  # which kills what is still there
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
            if self._is_ready.done():
                self._is_ready.exception()  # or, where nobody waits for it, it would be said lost

    async def _supervise(self, directory: Path, is_ready: asyncio.Future[None]) -> None:
        context = zmq.asyncio.Context()
        try:
            delay_s: float | None = 0.0
            while delay_s is not None:
                await asyncio.sleep(delay_s)
                failure = await self._live(context, directory, is_ready)
                if self.status == "stopping":
                    return
                if not is_ready.done():  # what never worked is not worth a second try
                    is_ready.set_exception(failure)
                    return
                delay_s = self._restart_policy.delay_after_crash()
                self.status = "crashed" if delay_s is None else "restarting"
                self.num_restarts += delay_s is not None
                _log.error("%s; %s", failure, _outlook(delay_s))
                self._listener.on_lost(is_final=delay_s is None)
        finally:
            self._has_begun.set()
            if not is_ready.done():
                is_ready.set_exception(CheckpointError("stopped before the model was loaded"))
            context.destroy(linger=0)
            shutil.rmtree(directory, ignore_errors=True)

    async def _live(
        self, context: zmq.asyncio.Context, directory: Path, is_ready: asyncio.Future[None]
    ) -> Exception:
        """One life of the process, to its end; returns what ended it."""
        try:
            self._life = await _Life.begin(context, directory, self._entry_module)
            self._has_begun.set()
            self._life.outbox.put_nowait([encode(self._start_message)])
            return await self._watch(self._life, is_ready)
        except Exception:
            _log.exception("The engine process cannot be started or understood.")
            return CheckpointError("the engine process could not be used")
        finally:
            life, self._life = self._life, None
            if life is not None:
                await life.end()

    async def _watch(self, life: _Life, is_ready: asyncio.Future[None]) -> Exception:
        timeout_s = self._loading_timeout_s
        while True:
            try:
                frame = await life.receive(timeout_s=timeout_s)
            except TimeoutError:
                return CheckpointError(f"the engine process gave no sign of life for {timeout_s} s")
            if frame is None:
                status = await life.exited
                return CheckpointError(f"the engine process ended unexpectedly (status {status})")
            self._last_sign_s = time.monotonic()
            message = decode_from_engine(frame)
            match message:
                case Loading():
                    self._listener.on_loading(message.num_bytes, message.total_bytes)
                case LoadFailed():
                    error = ConfigError if message.is_config else CheckpointError
                    return error(message.message)
                case Ready():
                    slowest_s = message.facts.slowest_step_s
                    timeout_s = max(self._step_timeout_s, PATIENCE * slowest_s)
                    self._silence_s = max(SILENCE_S, 2 * slowest_s)
                    self.facts = message.facts
                    self.status = "ready"
                    if not is_ready.done():
                        is_ready.set_result(None)
                    self._listener.on_ready(message.facts)
                case Building():
                    self._listener.on_building(message.request_ids)
                case Joined():
                    self._listener.on_joined(message.request_ids)
                case Progress():
                    if message.stats is not None:
                        self._listener.on_stats(message.stats)
                    self._listener.on_events(message.events)


class _Life:
    """One operating-system process with its own socket, so that no message outlives it."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket) -> None:
        self.process = process
        self.exited = asyncio.ensure_future(process.wait())
        self.outbox: asyncio.Queue[Frames] = asyncio.Queue()
        self._socket = socket
        self._sender = asyncio.create_task(self._send_all())
        self._received: asyncio.Future[list[bytes]] | None = None

    @classmethod
    async def begin(cls, context: zmq.asyncio.Context, directory: Path, entry_module: str) -> _Life:
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        path = directory / "engine.sock"
        path.unlink(missing_ok=True)
        address = f"ipc://{path}"
        try:
            socket.bind(address)
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", entry_module, address],
                stdin=asyncio.subprocess.PIPE,  # nothing is written: its end says that we are gone
                # Where this package lies, so that the child finds the same one.
                cwd=Path(__file__).resolve().parents[2],
                env=environment_with(ENVIRONMENT),
            )
        except BaseException:
            socket.close(linger=0)
            raise
        return cls(process, socket)

    async def receive(self, *, timeout_s: float) -> bytes | None:
        """The next message, or None when the process has ended and said all it had to say."""
        while True:
            if self._received is None:
                self._received = asyncio.ensure_future(self._socket.recv_multipart())
            waited_for: set[asyncio.Future[list[bytes]] | asyncio.Future[int]] = {self._received}
            if self.exited.done():
                timeout_s = LAST_WORDS_S
            else:
                waited_for.add(self.exited)
            await asyncio.wait(waited_for, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._received.done():
                frames, self._received = self._received.result(), None
                return frames[0]
            if waited_for == {self._received}:
                return None
            if not self.exited.done() and not await self._socket.poll(0):
                raise TimeoutError

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._sender.cancel()
        if self._received is not None:
            self._received.cancel()
        self._socket.close(linger=0)
        await self.exited

    async def _send_all(self) -> None:
        while True:
            await self._socket.send_multipart(await self.outbox.get(), copy=False)


def _outlook(delay_s: float | None) -> str:
    if delay_s is None:
        return "it has crashed too often and is not started again"
    return f"starting it again in {delay_s:g} s"
