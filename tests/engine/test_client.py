"""The client over one healthy engine process, and the stream it hands out."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from server.config import EngineConfig, ModelConfig
from server.core import Tiles, TokenEvent, VisionInput, VisionLayout
from server.engine import admission
from server.engine.client import EngineClient, QueueStats, TokenStream
from server.errors import InvalidPrompt, PromptTooLong, RateLimited, ServerError, Unavailable
from server.model.config import CheckpointInfo
from server.telemetry.metrics import Metrics
from tests.engine.faulty_worker import MODULE, RAISE, SLOW
from tests.engine.samples import make_request, make_tiles

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIDE = 56
PICTURE = VisionInput(
    "image",
    VisionLayout((16, 16, 16), local_grid=(1, 2), kept=(1, 0, 2, 8), newline=True),
    "a" * 64,
)


@pytest.fixture(scope="module")
def loading() -> list[tuple[int, int]]:
    """What the client was told while it loaded."""
    return []


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(
    tiny_info: CheckpointInfo, loading: list[tuple[int, int]], metrics: Metrics
) -> AsyncIterator[EngineClient]:
    engine = EngineConfig(
        num_threads=1, block_size=4, max_requests_waiting=3, max_requests_running=1
    )
    client = EngineClient(
        tiny_info.path,
        vision=tiny_info.vision,
        engine=engine,
        model=ModelConfig(device="cpu", max_context=512),
        metrics=metrics,
        max_requests_per_tenant=4,
        on_loading=lambda num_bytes, total_bytes: loading.append((num_bytes, total_bytes)),
        entry_module=MODULE,
    )
    async with asyncio.timeout(120):
        await client.start()
    yield client
    async with asyncio.timeout(20):
        await client.stop()


async def collect(stream: TokenStream) -> list[TokenEvent]:
    async with asyncio.timeout(60):
        return [event async for event in stream]


async def answer(client: EngineClient, *tiles: Tiles, **options: object) -> list[int | None]:
    request = make_request(**options)  # type: ignore[arg-type]
    return [event.token_id for event in await collect(await client.submit(request, tiles))]


async def test_an_answer_is_streamed_and_ends_once(client: EngineClient) -> None:
    events = await collect(await client.submit(make_request("a", max_tokens=6), []))
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
    assert {event.request_id for event in events} == {"a"}


async def test_a_stop_id_is_the_last_event(client: EngineClient) -> None:
    first, *_ = await answer(client, max_tokens=1)
    assert first is not None
    events = await collect(await client.submit(make_request(stop=[first], max_tokens=9), []))
    assert events == [TokenEvent("r", first, "stop")]


async def test_a_picture_reaches_the_model(client: EngineClient, tiny_info: CheckpointInfo) -> None:
    request = make_request(prompt=(1, PICTURE, 2), max_tokens=2, spec=tiny_info.vision)  # type: ignore[arg-type]
    events = await collect(await client.submit(request, make_tiles(request, side=SIDE)))
    assert [event.finish_reason for event in events] == [None, "length"]


async def test_a_seed_repeats_an_answer_and_none_does_not(client: EngineClient) -> None:
    seeded = [await answer(client, max_tokens=8, temperature=2.0, seed=5) for _ in range(2)]
    assert seeded[0] == seeded[1]
    free = {tuple(await answer(client, max_tokens=8, temperature=2.0)) for _ in range(4)}
    assert len(free) > 1


async def test_nothing_keeps_the_pixels_of_a_request_that_is_over(
    client: EngineClient, tiny_info: CheckpointInfo
) -> None:
    """Whether it was answered or left while it waited: a video's are tens of megabytes."""
    request = make_request(prompt=(1, PICTURE, 2), max_tokens=400, spec=tiny_info.vision)  # type: ignore[arg-type]
    for is_answered in (True, False):
        (pixels,) = make_tiles(request, side=SIDE)
        kept = weakref.ref(pixels)
        stream = await client.submit(replace(request, request_id=str(is_answered)), [pixels])
        del pixels
        if is_answered:
            await anext(stream)
        stream.close()
        async with asyncio.timeout(20):
            while kept() is not None:
                await asyncio.sleep(0.02)


async def test_choices_come_in_one_stream_and_all_are_ended(client: EngineClient) -> None:
    """Greedy ones are what one alone would be; the queue counts them while they are there."""
    alone = await answer(client, max_tokens=5)
    stream = await client.submit(make_request("choices", max_tokens=5, num_choices=3), [])
    assert client.queue == QueueStats(num_waiting=3, waiting_prompt_tokens=3)
    events = await collect(stream)
    for choice in range(3):
        own = [event for event in events if event.choice == choice]
        assert [event.token_id for event in own] == alone
        assert [event.finish_reason for event in own] == [None] * 4 + ["length"]
    assert client.queue == QueueStats()


async def test_closing_one_choice_leaves_the_others(client: EngineClient) -> None:
    """One runs at a time: the second answers because the first, endless one is gone."""
    request = make_request("choices", prompt=(SLOW, 1), max_tokens=200, num_choices=2)
    stream = await client.submit(request, [])
    assert (await anext(stream)).choice == 0
    stream.close_choice(0)
    async with asyncio.timeout(10):
        assert (await anext(stream)).choice == 1
    stream.close_choice(1)
    assert await collect(stream) == []
    async with asyncio.timeout(10):
        assert len(await answer(client, max_tokens=3)) == 3


async def test_an_error_of_one_choice_ends_them_all_once(client: EngineClient) -> None:
    stream = await client.submit(make_request("bad", prompt=(RAISE,), num_choices=3), [])
    assert await collect(stream) == [TokenEvent("bad", None, "error", "internal_error")]
    assert len(await answer(client, max_tokens=2)) == 2
    assert client.queue == QueueStats()


async def test_logprobs_arrive(client: EngineClient) -> None:
    request = make_request(max_tokens=2, num_logprobs=2, num_prompt_logprobs=1)
    first, second = await collect(await client.submit(request, []))
    for event in (first, second):
        assert event.logprobs is not None
        assert event.logprobs.top[0] == (event.token_id, event.logprobs.logprob)  # it is greedy
        assert len(event.logprobs.top) == 2
    assert first.prompt_logprobs is not None and second.prompt_logprobs is None
    assert [told and told.token_id for told in first.prompt_logprobs] == [None, 2, 3]


async def test_facts_are_those_of_the_checkpoint(client: EngineClient) -> None:
    facts = client.facts
    assert client.status == "ready" and facts is not None
    assert (facts.logits_width, facts.max_request_tokens, facts.block_size) == (272, 512, 4)
    assert facts.kv_tokens == 16 * 512
    assert facts.device == "cpu" and facts.dtype == "float32"


async def test_loading_is_reported(client: EngineClient, loading: list[tuple[int, int]]) -> None:
    done = [num_bytes for num_bytes, _ in loading]
    assert done == sorted(done) and done[-1] == loading[-1][1] > 0


async def test_a_failing_request_is_no_crash(client: EngineClient) -> None:
    pid = client.worker_pid
    bad = await client.submit(make_request("bad", prompt=(RAISE,)), [])
    good = await client.submit(make_request("good", max_tokens=2), [])
    assert await collect(bad) == [TokenEvent("bad", None, "error", "internal_error")]
    assert len(await collect(good)) == 2
    assert client.worker_pid == pid


async def test_among_those_who_wait_the_lower_priority_is_first(client: EngineClient) -> None:
    running = await client.submit(make_request("0", prompt=(SLOW, 1), max_tokens=400), [])
    await anext(running)
    ended: list[str] = []

    async def wait(name: str, priority: int) -> None:
        request = make_request(name, max_tokens=1, priority=priority)
        await collect(await client.submit(request, []))
        ended.append(name)

    waiting = [asyncio.create_task(wait(*each)) for each in (("a", 0), ("b", 7), ("c", -7))]
    async with asyncio.timeout(10):
        while client.queue.num_waiting < 3:
            await asyncio.sleep(0.01)
    running.close()
    await asyncio.gather(*waiting)
    assert ended == ["c", "a", "b"]


async def test_closing_a_stream_frees_the_engine_for_the_next(client: EngineClient) -> None:
    """One runs at a time: the second answers only because the first, endless one is gone."""
    stream = await client.submit(make_request("long", prompt=(SLOW, 1), max_tokens=500), [])
    await anext(stream)
    stream.close()
    stream.close()
    assert await collect(stream) == []
    async with asyncio.timeout(10):
        assert len(await answer(client, max_tokens=3)) == 3


async def test_a_dropped_stream_frees_the_engine_too(client: EngineClient) -> None:
    stream = await client.submit(make_request("dropped", prompt=(SLOW, 1), max_tokens=500), [])
    await anext(stream)
    del stream
    gc.collect()
    async with asyncio.timeout(10):
        assert len(await answer(client, max_tokens=3)) == 3


async def test_a_request_that_waits_can_be_aborted(client: EngineClient) -> None:
    running = await client.submit(make_request("1", prompt=(SLOW, 1), max_tokens=20), [])
    waiting = await client.submit(make_request("2"), [])
    last = await client.submit(make_request("3", max_tokens=2), [])
    waiting.close()
    assert len(await collect(running)) == 20
    assert len(await collect(last)) == 2


async def test_what_cannot_be_computed_is_refused_before_a_stream(client: EngineClient) -> None:
    with pytest.raises(PromptTooLong):
        await client.submit(make_request(prompt=(1,) * 500, max_tokens=13), [])
    with pytest.raises(InvalidPrompt):
        await client.submit(make_request(prompt=(272,)), [])


async def test_the_queue_has_an_end(
    client: EngineClient, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tenant four may be in the engine; of all, three may wait."""
    monkeypatch.setattr(admission.Admissions, "room_in_s", lambda *_: 16.2)
    running = await client.submit(make_request("0", prompt=(SLOW, 1), max_tokens=400), [])
    await anext(running)
    streams = [await client.submit(make_request(name, max_tokens=1), []) for name in "123"]
    with pytest.raises(RateLimited) as limited:
        await client.submit(make_request("4"), [])
    assert limited.value.retry_after_s == 17
    other = make_request("5")
    object.__setattr__(other, "tenant", "other")
    with pytest.raises(Unavailable) as error:
        await client.submit(other, [])
    assert (error.value.code, error.value.retry_after_s) == ("server_is_overloaded", 17)
    assert client.queue == QueueStats(num_started=1, num_waiting=3, waiting_prompt_tokens=9)
    running.close()
    for stream in streams:
        assert len(await collect(stream)) == 1
    assert client.queue == QueueStats()
    for reason in ("key_requests", "waiting_requests"):
        assert f'hcx_requests_rejected_total{{reason="{reason}"}} 1.0' in metrics.text().decode()


async def test_pixels_that_wait_have_a_bound(
    client: EngineClient,
    metrics: Metrics,
    tiny_info: CheckpointInfo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for one picture less a byte than two: those without pixels still enter."""
    picture = make_request(prompt=(1, PICTURE, 2), max_tokens=1, spec=tiny_info.vision)  # type: ignore[arg-type]
    tiles = make_tiles(picture, side=SIDE)
    num_bytes = 3 * SIDE * SIDE * 3
    monkeypatch.setattr(admission, "MAX_WAITING_TILE_BYTES", 2 * num_bytes - 1)
    running = await client.submit(make_request("0", prompt=(SLOW, 1), max_tokens=400), [])
    await anext(running)
    first = await client.submit(replace(picture, request_id="1"), tiles)
    assert client.queue.waiting_tile_bytes == num_bytes
    with pytest.raises(Unavailable) as error:
        await client.submit(replace(picture, request_id="2"), tiles)
    assert (error.value.status, error.value.code) == (503, "server_is_overloaded")
    assert 'rejected_total{reason="waiting_tile_bytes"} 1.0' in metrics.text().decode()
    text = await client.submit(make_request("3", max_tokens=1), [])
    first.close()
    async with asyncio.timeout(10):
        while client.queue.waiting_tile_bytes:
            await asyncio.sleep(0.01)
    second = await client.submit(replace(picture, request_id="4"), tiles)
    running.close()
    for stream in (text, second):
        assert len(await collect(stream)) == 1
    assert client.queue == QueueStats()


async def test_two_requests_with_one_id_are_a_bug_of_ours(client: EngineClient) -> None:
    stream = await client.submit(make_request("same", prompt=(SLOW,), max_tokens=50), [])
    with pytest.raises(ServerError, match="same id"):
        await client.submit(make_request("same"), [])
    stream.close()


class Aborts:
    def __init__(self) -> None:
        self.count = 0
        self.choices: list[int | None] = []
        self.mailbox: asyncio.Queue[TokenEvent] = asyncio.Queue()

    def stream(self, *, num_choices: int = 1) -> TokenStream:
        return TokenStream(self.mailbox, self.abort, num_choices=num_choices)

    def abort(self, choice: int | None) -> None:
        self.count += 1
        self.choices.append(choice)


async def test_a_finished_stream_aborts_nothing() -> None:
    aborts = Aborts()
    stream = aborts.stream()
    aborts.mailbox.put_nowait(TokenEvent("r", 1, "length"))
    assert [event.token_id async for event in stream] == [1]
    stream.close()
    del stream
    gc.collect()
    assert aborts.count == 0


async def test_a_stream_aborts_once_closed_and_dropped() -> None:
    aborts = Aborts()
    stream = aborts.stream()
    stream.close()
    stream.close()
    del stream
    gc.collect()
    assert aborts.count == 1


async def test_closing_wakes_who_waits_for_the_next_event() -> None:
    stream = Aborts().stream()
    waiting = asyncio.create_task(collect(stream))
    await asyncio.sleep(0)
    stream.close()
    async with asyncio.timeout(1):
        assert await waiting == []


async def test_a_closed_stream_yields_nothing_that_was_still_in_it() -> None:
    aborts = Aborts()
    stream = aborts.stream()
    aborts.mailbox.put_nowait(TokenEvent("r", 1))
    stream.close()
    assert await collect(stream) == []


async def test_a_stream_ends_when_its_last_choice_does() -> None:
    aborts = Aborts()
    stream = aborts.stream(num_choices=2)
    events = [
        TokenEvent("r", 1, "length", choice=1),
        TokenEvent("r", 2),
        TokenEvent("r", 3, "stop"),
    ]
    for event in events:
        aborts.mailbox.put_nowait(event)
    assert await collect(stream) == events
    stream.close()
    stream.close_choice(0)
    assert aborts.choices == []


async def test_a_closed_choice_yields_nothing_and_is_aborted_once() -> None:
    aborts = Aborts()
    stream = aborts.stream(num_choices=3)
    stream.close_choice(1)
    stream.close_choice(1)
    for choice in (1, 0, 2):
        aborts.mailbox.put_nowait(TokenEvent("r", 5, "length", choice=choice))
    assert [event.choice for event in await collect(stream)] == [0, 2]
    assert aborts.choices == [1]


async def test_closing_the_last_choice_closes_the_stream() -> None:
    aborts = Aborts()
    stream = aborts.stream(num_choices=2)
    stream.close_choice(0)
    stream.close_choice(1)
    assert await collect(stream) == []
    stream.close()
    assert aborts.choices == [0, None]


async def test_an_error_ends_all_choices_whichever_it_names() -> None:
    aborts = Aborts()
    stream = aborts.stream(num_choices=2)
    stream.close_choice(0)
    aborts.mailbox.put_nowait(TokenEvent("r", None, "error", "worker_restarting"))
    assert [event.error_code for event in await collect(stream)] == ["worker_restarting"]
    stream.close()
    assert aborts.choices == [0]


async def test_the_http_process_never_imports_torch() -> None:
    code = "import sys, server.engine.client; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
