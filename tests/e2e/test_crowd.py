"""Hundreds at once on the demo model: all are answered, and those that leave hold nobody up."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import RunningServer, serving

NUM_STREAMS = 500


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(
        tmp_path_factory.mktemp("crowd"),
        ENGINE__MAX_REQUESTS_WAITING=2 * NUM_STREAMS,
        HTTP__MAX_CONNECTIONS=2 * NUM_STREAMS,
    ) as server:
        yield server


async def outcome(client: httpx.AsyncClient, number: int, *, patience: float = 1.0) -> str:
    """How a stream ended; `patience` is the chance, event by event, of going on to listen."""
    body = {
        "model": "hcx-demo",
        "messages": [{"role": "user", "content": f"{number} " * (1 + number % 30)}],
        "max_tokens": 16,
        "ignore_eos": True,
        "stream": True,
    }
    chance = random.Random(number)
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return str(response.status_code)
        async for line in response.aiter_lines():
            if chance.random() > patience:
                return "left"
            if line.startswith('data: {"error"'):
                return line
            if line == "data: [DONE]":
                return "complete"
    return "cut off"


def crowd(server: RunningServer, count: int, *, patience: float = 1.0) -> Counter[str]:
    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            asked = (outcome(client, number, patience=patience) for number in range(count))
            return await asyncio.gather(*asked)

    return Counter(asyncio.run(all_of_them()))


def test_five_hundred_streams_are_all_completed(demo: RunningServer) -> None:
    assert crowd(demo, NUM_STREAMS) == {"complete": NUM_STREAMS}


def test_those_who_leave_hold_nobody_up(demo: RunningServer) -> None:
    ends = crowd(demo, NUM_STREAMS, patience=0.9)
    assert ends.keys() == {"left", "complete"} and ends["left"] > NUM_STREAMS // 2
    assert crowd(demo, 20) == {"complete": 20}
