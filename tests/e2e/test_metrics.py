"""What /metrics says of a real server: before it works, meanwhile, and after many have left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

from tests.e2e.conftest import (
    REPOSITORY,
    RunningServer,
    data_url,
    picture_url,
    serving,
    with_picture,
    with_video,
)

NUM_ABORTS = 1000
NUM_AT_ONCE = 50

IDLE = {
    "hcx_http_requests_running": 0.0,
    "hcx_requests_running": 0.0,
    "hcx_requests_waiting": 0.0,
    "hcx_waiting_prompt_tokens": 0.0,
    "hcx_waiting_tile_bytes": 0.0,
    "hcx_engine_requests_running": 0.0,
    "hcx_engine_requests_waiting": 0.0,
    "hcx_running_tile_bytes": 0.0,
    "hcx_kv_blocks_used": 0.0,
    "hcx_encoder_cache_held_bytes": 0.0,
}
"""What is there of requests when there are none, whatever was before."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With so small a cache that there is not always room in it."""
    with serving(
        tmp_path_factory.mktemp("metrics"),
        ENGINE__MAX_REQUESTS_RUNNING=24,
        ENGINE__KV_CACHE_BYTES=6_000_000,
    ) as server:
        yield server


def picture(number: int) -> str:
    image = Image.new("RGB", (120 + number, 90), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 70, 70), fill=(number, 40, 200 - number))
    return picture_url(image)


def wait_for(
    server: RunningServer, condition: Callable[[Mapping[str, float]], bool]
) -> dict[str, float]:
    deadline_s = time.monotonic() + 20
    while not condition(found := server.metrics()):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


def is_idle(found: Mapping[str, float]) -> bool:
    return found.items() >= IDLE.items()


def test_metrics_follow_a_request(demo: RunningServer) -> None:
    before = wait_for(demo, is_idle)
    assert before["hcx_kv_blocks"] > 0
    assert before['hcx_engine_status{status="ready"}'] == 1
    assert any(f'pid="{demo.worker_pid}"' in name for name in before if "engine_info" in name)

    content: Any = with_picture("What is in the picture? Tell me everything.", picture(1))
    stream = demo.client.chat.completions.create(
        model=demo.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    during = wait_for(demo, lambda found: found["hcx_engine_requests_running"] == 1)
    assert during["hcx_requests_running"] == during["hcx_http_requests_running"] == 1
    assert during["hcx_kv_blocks_used"] > 0
    assert during["hcx_encoder_cache_misses_total"] == 1
    stream.close()

    after = wait_for(demo, is_idle)
    assert after["hcx_kv_blocks_cached"] > 0
    assert after["hcx_encoder_cache_kept_bytes"] > 0
    assert after['hcx_answers_finished_total{reason="abort"}'] == 1

    content = with_picture("Which colour is it?", picture(1))
    answer = demo.client.chat.completions.create(
        model=demo.model, messages=[{"role": "user", "content": content}], max_tokens=5
    )
    # At once: whoever has got an answer finds it counted.
    last = demo.metrics()
    assert is_idle(last)
    assert answer.usage is not None
    grown = {name: last[name] - after[name] for name in after if name in last}
    assert grown["hcx_generated_tokens_total"] == answer.usage.completion_tokens
    assert grown["hcx_prefix_cache_lookup_tokens_total"] == answer.usage.prompt_tokens
    details = answer.usage.prompt_tokens_details
    cached = 0 if details is None else details.cached_tokens
    assert grown["hcx_prefix_cache_hit_tokens_total"] == cached
    assert grown["hcx_engine_steps_total"] >= answer.usage.completion_tokens
    assert last["hcx_engine_step_duration_seconds_count"] == last["hcx_engine_steps_total"]


def random_body(chance: random.Random, server: RunningServer, video: str) -> dict[str, object]:
    number = chance.randrange(40)
    words = f"{chance.random()} " * chance.choice([1, 20, 60])
    content: object = words
    kind = chance.choices(["text", "picture", "video"], [10, 8, 1])[0]
    if kind == "picture":
        content = with_picture(words, picture(number))
    elif kind == "video":
        content = with_video(words, video)
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": chance.choice([3, 400]),
        "ignore_eos": True,
        "stream": chance.random() < 0.5,
        "priority": chance.randint(-1, 1),
    }


async def leave_at_random(server: RunningServer, body: Mapping[str, object], rest: float) -> None:
    """Sends a request and goes away, `rest` of a moment later, now and then by a reset."""
    content = json.dumps(body).encode()
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(rest):
            while await reader.read(65536):
                pass
    if rest < 0.1:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


async def many_leave(server: RunningServer) -> None:
    chance = random.Random(3)
    video = data_url((REPOSITORY / "docs/example.mp4").read_bytes(), "video/mp4")
    at_once = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(body: Mapping[str, object], rest: float) -> None:
        async with at_once:
            await leave_at_random(server, body, rest)

    await asyncio.gather(
        *(
            one(
                random_body(chance, server, video),
                chance.choice([0.02, 0.3, 2.5]) * chance.random(),
            )
            for _ in range(NUM_ABORTS)
        )
    )


def test_a_thousand_who_leave_at_random_leave_nothing_behind(demo: RunningServer) -> None:
    before = wait_for(demo, is_idle)
    expected = demo.ask("Count from one to five.", max_tokens=20)
    asyncio.run(many_leave(demo))
    after = wait_for(demo, is_idle)
    pid = f'pid="{demo.worker_pid}"'
    assert [n for n in before if "engine_info" in n] == [n for n in after if pid in n]
    assert after["hcx_engine_restarts_total"] == 0
    # They left in every phase: not all before anything began, and not all too late.
    aborts = 'hcx_answers_finished_total{reason="abort"}'
    assert after[aborts] - before.get(aborts, 0) > NUM_ABORTS // 4
    assert after["hcx_kv_blocks_cached"] > 0
    assert demo.ask("Count from one to five.", max_tokens=20) == expected


def test_a_process_that_ended_takes_its_blocks_and_leaves_its_counts(demo: RunningServer) -> None:
    before = wait_for(demo, is_idle)
    stream = demo.client.chat.completions.create(
        model=demo.model,
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    wait_for(demo, lambda found: found["hcx_kv_blocks_used"] > 0)
    os.kill(demo.worker_pid, signal.SIGKILL)
    gone = wait_for(demo, lambda found: found["hcx_engine_restarts_total"] == 1)
    assert is_idle({**gone, "hcx_http_requests_running": 0.0})
    assert gone['hcx_engine_status{status="restarting"}'] == 1
    with contextlib.suppress(Exception):
        stream.close()
    ready = wait_for(demo, lambda found: found['hcx_engine_status{status="ready"}'] == 1)
    assert ready["hcx_generated_tokens_total"] > before["hcx_generated_tokens_total"]
    assert ready['hcx_answers_finished_total{reason="worker_restarting"}'] == 1
