"""The engine process's end of the socket; it also tells when the HTTP process is gone."""

from __future__ import annotations

import sys

import zmq

from server.core import Tiles
from server.engine.messages import (
    FromEngine,
    Stop,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
    tiles_of,
)


class SocketChannel:
    """A socket, and standard input: a pipe whose other end only the HTTP process holds."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # what waits is bounded by what was admitted
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)

    def receive(self, *, timeout_s: float) -> list[tuple[ToEngine, list[Tiles]]]:
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        received: list[tuple[ToEngine, list[Tiles]]] = []
        while self._socket.poll(0):
            head, *frames = self._socket.recv_multipart(copy=False)
            message = decode_to_engine(head.bytes)
            tiles: list[Tiles] = []
            if isinstance(message, Submit):
                # The arrays are views of the frames and keep them alive.
                tiles = tiles_of(message, [frame.buffer for frame in frames])
            received.append((message, tiles))
        if sys.stdin.fileno() in ready:  # nothing is ever written to it, so this is its end
            received.append((Stop(), []))
        return received

    def send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))

    def close(self) -> None:
        """Gives what was sent a second to leave."""
        self._context.destroy(linger=1000)
