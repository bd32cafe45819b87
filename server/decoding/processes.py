"""The forker and the decoders as the HTTP process sees them.

Sockets, files and deadlines; nothing here blocks the event loop. What a decoder says is believed no
further than its shape. Must not know who asks, nor what an answer is good for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from server.decoding.messages import (
    MAX_ANSWER_BYTES,
    Answer,
    Fork,
    Kill,
    Start,
    Task,
    ToForker,
    decode_answer,
    decode_ready,
    encode,
)

ENTRY_MODULE = "server.decoding.forker"
LOADING_TIMEOUT_S = 60.0
FORK_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 5.0
# numpy would start threads, and who has threads should not fork.
_ENVIRONMENT = {
    "LC_CTYPE": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Memory of one picture is kept for the next: to get it from the kernel again costs as much as
    # decoding does. [bytes]
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}


class ForkerLost(Exception):
    """The forker is gone or does not do as it is told, and its decoders are gone with it."""


class DecoderLost(Exception):
    """A decoder is gone, or does not keep to what was agreed."""


class Forker:
    """One life of the forker."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self.missing: tuple[str, ...] = ()
        self._process = process
        self._control = control
        self._is_given_up = False
        self._numbers = itertools.count()

    @classmethod
    async def start(cls, message: Start, *, entry_module: str = ENTRY_MODULE) -> Forker:
        """Warmed up and ready to fork. ForkerLost where it never becomes that."""
        control, theirs = _pair()
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", entry_module, str(theirs.fileno())],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                # Where this package lies, so that the child finds the same one.
                cwd=Path(__file__).resolve().parents[2],
                env=_ENVIRONMENT | {"PYTHONPATH": ":".join(path for path in sys.path if path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            control.close()
            raise ForkerLost from error
        finally:
            theirs.close()
        forker = cls(process, control)
        try:
            control.send(encode(message))
            forker.missing = await _receive_ready(control, timeout_s=LOADING_TIMEOUT_S)
        except (OSError, DecoderLost) as error:
            await forker.close()
            raise ForkerLost from error
        except BaseException:
            await forker.close()
            raise
        return forker

    @property
    def is_lost(self) -> bool:
        """Its end of the socket is closed before its decoders are killed for lack of a parent."""
        if self._is_given_up:
            return True
        try:
            return not self._control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def fork(self) -> Decoder:
        """A decoder that is confined and waits for its first task."""
        ours, theirs = _pair()
        decoder = Decoder(self, next(self._numbers), ours)
        try:
            with theirs:  # from here on only the decoder holds it, so that its end is seen
                self.send(Fork(decoder.number), [theirs.fileno()])
            decoder.missing = await _receive_ready(ours, timeout_s=FORK_TIMEOUT_S)
        except DecoderLost as error:
            # A new decoder has not met anything yet that could be at fault.
            await decoder.end()
            self.give_up()
            raise ForkerLost from error
        except BaseException:
            await decoder.end()
            raise
        return decoder

    def send(self, message: ToForker, files: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._control, [encode(message)], files)
        except OSError as error:  # gone, or so far behind that its socket is full
            self.give_up()
            raise ForkerLost from error

    def give_up(self) -> None:
        """Kill it; the kernel kills its decoders."""
        self._is_given_up = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Let it end, or kill it; returns when it is gone."""
        self._control.close()
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self.give_up()
            await self._process.wait()
        except asyncio.CancelledError:
            self.give_up()
            raise


class Decoder:
    """One decoder. `tenant` is whose bytes it has seen, None of a new one."""

    def __init__(self, forker: Forker, number: int, connection: socket.socket) -> None:
        self.number = number
        self.missing: tuple[str, ...] = ()
        self.tenant: str | None = None
        self.num_jobs = 0
        self._forker = forker
        self._connection = connection

    async def ask(self, task: Task, files: Sequence[int]) -> Answer:
        """DecoderLost where it dies or talks nonsense. The caller minds the time."""
        self.num_jobs += 1
        try:
            _expect_silence(self._connection)
            socket.send_fds(self._connection, [encode(task)], files)
        except OSError as error:
            raise DecoderLost from error
        message = await _receive(self._connection)
        try:
            return decode_answer(message)
        except msgspec.DecodeError as error:
            raise DecoderLost from error

    async def end(self) -> None:
        """Kill it, whatever it does; returns when it is gone."""
        with contextlib.suppress(ForkerLost):
            self._forker.send(Kill(self.number))
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await _until_closed(self._connection)
        except TimeoutError:
            self._forker.give_up()
        finally:
            self._connection.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


async def _receive_ready(connection: socket.socket, *, timeout_s: float) -> tuple[str, ...]:
    try:
        async with asyncio.timeout(timeout_s):
            return decode_ready(await _receive(connection)).missing
    except (TimeoutError, msgspec.DecodeError) as error:
        raise DecoderLost from error


async def _receive(connection: socket.socket) -> bytes:
    """One packet. DecoderLost at the end, or where a packet is longer than any may be."""
    try:
        message = await asyncio.get_running_loop().sock_recv(connection, MAX_ANSWER_BYTES + 1)
    except OSError as error:
        raise DecoderLost from error
    if not message or len(message) > MAX_ANSWER_BYTES:
        raise DecoderLost
    return message


async def _until_closed(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(connection, MAX_ANSWER_BYTES):
            pass


def _expect_silence(connection: socket.socket) -> None:
    """An answer before the question would be taken for the answer to it."""
    with contextlib.suppress(BlockingIOError):
        connection.recv(1, socket.MSG_PEEK)
        raise DecoderLost
