"""Real engine processes that die, hang, fail to start and are stopped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher

from server.config import EngineConfig, ModelConfig
from server.core import GenerationRequest, TokenEvent
from server.engine.client import EngineClient, TokenStream
from server.engine.process import ENTRY_MODULE, RestartPolicy
from server.errors import (
    CheckpointError,
    ConfigError,
    ModelLoading,
    PoisonRequest,
    ShuttingDown,
    Unavailable,
    WorkerRestarting,
)
from server.kernels.machine import product_units
from server.telemetry.metrics import Metrics
from tests.engine.faulty_worker import (
    HANG,
    KILL,
    KILL_AFTER_FIRST_TOKEN,
    KILLING_GRAMMAR,
    MODULE,
    SLOW,
    SLOW_GRAMMAR,
)
from tests.engine.samples import make_request
from tools.random_checkpoint import SIZES, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


def make_client(
    checkpoint: Path,
    *,
    entry_module: str = MODULE,
    restart_policy: RestartPolicy | None = None,
    **settings: object,
) -> EngineClient:
    settings = {"num_threads": 1, **settings}
    return EngineClient(
        checkpoint,
        vision=None,
        engine=EngineConfig.model_validate(settings),
        model=ModelConfig(device="cpu"),
        metrics=Metrics(),
        restart_policy=restart_policy or RestartPolicy(max_delay_s=0.2, first_delay_s=0.05),
        entry_module=entry_module,
    )


@asynccontextmanager
async def started(client: EngineClient) -> AsyncIterator[EngineClient]:
    async with asyncio.timeout(LIMIT_S):
        await client.start()
        try:
            yield client
        finally:
            await client.stop()


async def collect(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of its own, so that what is left there can be seen."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.skipif(not product_units(torch.bfloat16), reason="this CPU does not multiply bfloat16")
async def test_in_bfloat16_an_answer_is_the_same_alone_and_in_a_crowd(tmp_path: Path) -> None:
    size = replace(SIZES["tiny"], head_dim=64, intermediate_size=128)
    write_checkpoint(tmp_path, size=size, dtype="bfloat16")
    async with started(make_client(tmp_path, entry_module=ENTRY_MODULE)) as client:
        assert client.facts is not None
        assert (client.facts.attention, client.facts.dtype) == ("PairBackend", "bfloat16")
        requests = [
            make_request(str(n), prompt=tuple(range(3 + n, 90 + 7 * n)), max_tokens=40)
            for n in range(8)
        ]
        alone = [await collect(await client.submit(each, [])) for each in requests]
        streams = [await client.submit(each, []) for each in requests]
        crowd = await asyncio.gather(*map(collect, streams))
        assert [[event.token_id for event in one] for one in alone] == [
            [event.token_id for event in one] for one in crowd
        ]


async def test_an_engine_that_is_launched_first_is_the_one_that_is_started(
    tiny_checkpoint: Path, temporary: Path
) -> None:
    client = make_client(tiny_checkpoint, entry_module=ENTRY_MODULE)
    await client.launch()
    launched = client.worker_pid
    assert launched is not None and is_alive(launched)
    assert client.status == "loading"
    async with started(client):
        assert client.worker_pid == launched
    assert not is_alive(launched)
    assert not list(temporary.iterdir())


async def test_an_engine_that_is_launched_and_never_started_leaves_nothing(
    tiny_checkpoint: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(tiny_checkpoint, entry_module=ENTRY_MODULE)
    await client.stop()  # nothing has begun
    await client.launch()
    launched = client.worker_pid
    assert launched is not None
    await client.stop()
    del client
    gc.collect()
    assert not is_alive(launched)
    assert not list(temporary.iterdir())
    assert not caplog.records  # such as of an exception that nobody has asked for


async def test_a_killed_process_ends_what_it_answered_and_nothing_that_waited(
    tiny_checkpoint: Path,
) -> None:
    async with started(make_client(tiny_checkpoint, max_requests_running=1)) as client:
        expected = await collect(await client.submit(make_request("1", max_tokens=5), []))
        running = await client.submit(make_request("0", prompt=(SLOW,), max_tokens=400), [])
        waiting = [await client.submit(make_request(n, max_tokens=5), []) for n in "12"]
        await anext(running)
        first_pid = client.worker_pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)

        *_, last = await collect(running)
        assert last == TokenEvent("0", None, "error", "worker_restarting")
        assert client.status == "restarting"
        with pytest.raises(WorkerRestarting):
            await client.submit(make_request("refused"), [])

        assert await collect(waiting[0]) == expected
        assert len(await collect(waiting[1])) == 5
        assert client.worker_pid != first_pid


async def test_what_was_counted_goes_on_with_the_next_process(tiny_checkpoint: Path) -> None:
    async with started(make_client(tiny_checkpoint)) as client:
        for num_lives in (1, 2):
            assert len(await collect(await client.submit(make_request(max_tokens=5), []))) == 5
            stats = client.stats  # those that came with the last token
            assert stats.totals.num_tokens_generated == 5 * num_lives
            assert stats.totals.num_prompt_tokens_computed == 3 * num_lives
            assert stats.totals.num_steps == sum(stats.totals.num_steps_up_to) == 5 * num_lives
            assert (stats.num_running, stats.num_blocks_used) == (0, 0)
            assert client.num_restarts == num_lives - 1
            assert client.worker_pid is not None
            os.kill(client.worker_pid, signal.SIGKILL)
            await until(lambda: client.status == "restarting")
            assert client.stats.totals == stats.totals
            await until(lambda: client.status == "ready")


async def test_what_meets_two_crashes_ends_and_its_neighbours_are_answered(
    tiny_checkpoint: Path,
) -> None:
    """All are in the step that ends the process: nobody but the guilty one may pay for it."""
    async with started(make_client(tiny_checkpoint)) as client:
        names = ("before", "deadly", "after", "last")
        prompts = {name: (KILL,) if name == "deadly" else (1, 2, 3) for name in names}
        streams = {
            name: await client.submit(make_request(name, prompt=prompts[name], max_tokens=1), [])
            for name in names
        }
        ends = {name: await collect(stream) for name, stream in streams.items()}
        with pytest.raises(PoisonRequest):
            await client.submit(make_request("again", prompt=(KILL,), max_tokens=1), [])
        assert len(await collect(await client.submit(make_request(max_tokens=1), []))) == 1
    assert ends.pop("deadly") == [TokenEvent("deadly", None, "error", "poison_request")]
    assert [[event.finish_reason for event in events] for events in ends.values()] == [
        ["length"],
        ["length"],
        ["length"],
    ]


def bound(name: str, grammar: str) -> GenerationRequest:
    return replace(make_request(name, max_tokens=2, stop=(256,)), grammar=grammar)


async def test_a_grammar_that_kills_the_process_is_found_and_those_that_wait_are_answered(
    tiny_checkpoint: Path,
) -> None:
    """It has never run, while another did: but its matcher was being built."""
    good = LLMatcher.grammar_from_regex("[ab]{9}")
    async with started(make_client(tiny_checkpoint)) as client:
        running = await client.submit(make_request("0", prompt=(SLOW,), max_tokens=400), [])
        await anext(running)
        requests = [
            bound("before", good),
            bound("deadly", KILLING_GRAMMAR),
            bound("after", good + " "),
        ]
        streams = {each.request_id: await client.submit(each, []) for each in requests}
        ends = {name: await collect(stream) for name, stream in streams.items()}
        assert client.num_restarts == 2
        assert (await collect(running))[-1].error_code == "worker_restarting"
    assert ends.pop("deadly") == [TokenEvent("deadly", None, "error", "poison_request")]
    assert [[event.finish_reason for event in events] for events in ends.values()] == [
        [None, "length"],
        [None, "length"],
    ]


async def test_what_waits_for_its_matcher_waits_in_the_queue_and_fills_it(
    tiny_checkpoint: Path,
) -> None:
    client = make_client(tiny_checkpoint, max_requests_waiting=3, shutdown_timeout_s=0.2)
    async with started(client):
        waiting = [await client.submit(bound(name, SLOW_GRAMMAR), []) for name in "abc"]
        with pytest.raises(Unavailable):
            await client.submit(bound("d", SLOW_GRAMMAR), [])
        await asyncio.sleep(0.3)
        assert client.queue.num_waiting == 3
        with pytest.raises(Unavailable):
            await client.submit(bound("d", SLOW_GRAMMAR), [])
        for stream in waiting:
            stream.close()


async def test_a_client_that_leaves_during_a_restart_holds_nobody_back(
    tiny_checkpoint: Path,
) -> None:
    client = make_client(
        tiny_checkpoint,
        max_requests_running=2,
        restart_policy=RestartPolicy(max_delay_s=0.5, first_delay_s=0.5),
    )
    async with started(client):
        slow = [await client.submit(make_request(n, prompt=(SLOW,)), []) for n in "ab"]
        leaving = await client.submit(make_request("leaving"), [])
        await until(lambda: client.queue.num_waiting == 1)
        assert client.worker_pid is not None
        os.kill(client.worker_pid, signal.SIGKILL)
        await until(lambda: client.status == "restarting")
        leaving.close()
        for stream in slow:  # whoever had no token yet is sent again, the others are told
            (*_, last) = await collect(stream)
            assert last.finish_reason is not None


async def test_who_waits_too_long_is_told_so(tiny_checkpoint: Path) -> None:
    client = make_client(tiny_checkpoint, max_requests_running=1, max_wait_s=0.3)
    async with started(client):
        running = await client.submit(make_request("0", prompt=(SLOW,), max_tokens=400), [])
        waiting = await client.submit(make_request("1"), [])
        assert await collect(waiting) == [TokenEvent("1", None, "error", "server_is_overloaded")]
        assert (await anext(running)).token_id is not None
        running.close()
        assert len(await collect(await client.submit(make_request("2", max_tokens=2), []))) == 2


async def test_a_restart_is_no_waiting(tiny_checkpoint: Path) -> None:
    client = make_client(tiny_checkpoint, max_requests_running=1, max_wait_s=4.0)
    async with started(client):
        running = await client.submit(make_request("0", prompt=(SLOW,), max_tokens=400), [])
        await anext(running)
        first = await client.submit(make_request("1", prompt=(SLOW,), max_tokens=4000), [])
        second = await client.submit(make_request("2", max_tokens=2), [])
        assert client.worker_pid is not None
        os.kill(client.worker_pid, signal.SIGKILL)
        await anext(first)
        await asyncio.sleep(4.5)
        first.close()
        assert [event.error_code for event in await collect(second)] == [None, None]


async def test_no_more_run_than_a_step_has_tokens(tiny_checkpoint: Path) -> None:
    async with started(make_client(tiny_checkpoint, max_tokens_per_step=2)) as client:
        requests = [make_request(n, prompt=(SLOW, int(n)), max_tokens=200) for n in "1234"]
        streams = [await client.submit(each, []) for each in requests]
        for _ in range(10):
            await asyncio.gather(anext(streams[0]), anext(streams[1]))
        assert (client.queue.num_started, client.queue.num_waiting) == (2, 2)
        for stream in streams[:2]:
            stream.close()
        for _ in range(3):
            await asyncio.gather(anext(streams[2]), anext(streams[3]))
        assert (client.queue.num_started, client.queue.num_waiting) == (2, 0)


async def test_a_hanging_process_is_replaced(tiny_checkpoint: Path) -> None:
    """By a step that never ends, and stopped in its tracks while idle."""
    async with started(make_client(tiny_checkpoint, step_timeout_s=3.0)) as client:
        await asyncio.sleep(4.0)  # idle for longer than that is no hang
        assert client.status == "ready"
        first_pid = client.worker_pid
        assert first_pid is not None
        hanging = await client.submit(make_request("hanging", prompt=(HANG,)), [])
        answered, ended = await collect(hanging)
        assert answered.token_id is not None
        assert ended == TokenEvent("hanging", None, "error", "worker_restarting")
        await until(lambda: client.status == "ready" and not is_alive(first_pid))

        second_pid = client.worker_pid
        assert second_pid is not None
        os.kill(second_pid, signal.SIGSTOP)
        await until(lambda: client.status == "restarting")
        assert not is_alive(second_pid)


async def test_it_is_given_up_after_five_crashes(tiny_checkpoint: Path) -> None:
    """The clock stands still; the first four crashes were a moment ago."""
    policy = RestartPolicy(max_delay_s=1.0, clock=lambda: 0.0)
    for _ in range(4):
        assert policy.delay_after_crash() is not None
    client = make_client(tiny_checkpoint, restart_policy=policy, max_requests_running=1)
    async with started(client):
        deadly = await client.submit(
            make_request("deadly", prompt=(KILL_AFTER_FIRST_TOKEN,), max_tokens=9), []
        )
        waiting = await client.submit(make_request("waiting"), [])
        answered, ended = await collect(deadly)
        assert answered.token_id is not None
        assert ended == TokenEvent("deadly", None, "error", "worker_restarting")
        assert await collect(waiting) == [TokenEvent("waiting", None, "error", "worker_restarting")]
        assert client.status == "crashed" and client.worker_pid is None
        with pytest.raises(WorkerRestarting, match="operator"):
            await client.submit(make_request(), [])


async def test_stopping_ends_streams_process_and_files(
    tiny_checkpoint: Path, temporary: Path
) -> None:
    client = make_client(tiny_checkpoint)
    async with asyncio.timeout(LIMIT_S):
        await client.start()
        [folder] = temporary.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        stream = await client.submit(make_request("r", prompt=(SLOW,), max_tokens=400), [])
        await anext(stream)
        pid = client.worker_pid
        assert pid is not None
        await client.stop()
        *_, last = await collect(stream)
    assert last == TokenEvent("r", None, "error", "shutting_down")
    assert client.status == "stopping" and not is_alive(pid)
    assert list(temporary.iterdir()) == []
    with pytest.raises(ShuttingDown):
        await client.submit(make_request(), [])


async def test_stopping_does_not_wait_for_a_step_that_hangs(tiny_checkpoint: Path) -> None:
    client = make_client(tiny_checkpoint, shutdown_timeout_s=0.5)
    async with started(client):
        stream = await client.submit(make_request(prompt=(HANG,)), [])
        await anext(stream)
        pid = client.worker_pid
        assert pid is not None
        before_s = time.monotonic()
        await client.stop()
        assert time.monotonic() - before_s < 5
        assert not is_alive(pid)
        stream.close()


async def test_stopping_while_loading(tiny_checkpoint: Path, temporary: Path) -> None:
    client = make_client(tiny_checkpoint)
    async with asyncio.timeout(LIMIT_S):
        starting = asyncio.create_task(client.start())
        await until(lambda: client.worker_pid is not None)
        pid = client.worker_pid
        assert pid is not None and client.status == "loading"
        with pytest.raises(ModelLoading):
            await client.submit(make_request(), [])
        await client.stop()
        with pytest.raises(CheckpointError, match="stopped before"):
            await starting
    assert not is_alive(pid)
    assert list(temporary.iterdir()) == []


async def test_a_cancelled_start_leaves_nothing(tiny_checkpoint: Path, temporary: Path) -> None:
    client = make_client(tiny_checkpoint)
    async with asyncio.timeout(LIMIT_S):
        starting = asyncio.create_task(client.start())
        await until(lambda: client.worker_pid is not None)
        pid = client.worker_pid
        assert pid is not None
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
    assert not is_alive(pid)
    assert list(temporary.iterdir()) == []


async def test_a_setting_that_cannot_be_used_is_one_line(tiny_checkpoint: Path) -> None:
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ConfigError, match="kv_cache_bytes") as raised:
            await make_client(tiny_checkpoint, kv_cache_bytes=1 << 20).start()
    assert "\n" not in str(raised.value)
    assert "holds 2048 tokens, less than the context of 4096" in str(raised.value)


async def test_a_bad_checkpoint_is_one_line_and_no_second_try(
    tmp_path: Path, temporary: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    client = make_client(tmp_path)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(CheckpointError) as raised:
            await client.start()
    assert "\n" not in str(raised.value)
    assert client.worker_pid is None and list(temporary.iterdir()) == []


async def test_a_process_that_dies_at_once_is_a_failed_start(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = make_client(tiny_checkpoint, entry_module="server.engine.no_such_module")
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(CheckpointError, match="ended unexpectedly"):
            await client.start()
    assert "No module named" in capfd.readouterr().err


ORPHAN = """
import asyncio, sys
from pathlib import Path
from tests.engine.test_supervision import make_client

async def main():
    client = make_client(Path(sys.argv[1]))
    await client.start()
    print(client.worker_pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_process_never_outlives_the_one_that_started_it(tiny_checkpoint: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tiny_checkpoint)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        deadline_s = time.monotonic() + 5
        while is_alive(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.communicate(timeout=10)


async def test_who_leaves_before_the_process_is_lost_is_blamed_all_the_same(
    tiny_checkpoint: Path,
) -> None:
    """Clients give up sooner than the watchdog does."""
    async with started(make_client(tiny_checkpoint, step_timeout_s=1)) as client:
        for number in range(2):
            poison = await client.submit(make_request(f"{number}", prompt=(HANG,)), [])
            await asyncio.sleep(0.3)
            poison.close()
            await until(lambda lost=number + 1: client.num_restarts == lost)
            await until(lambda: client.status == "ready")
        with pytest.raises(PoisonRequest):
            await client.submit(make_request("again", prompt=(HANG,)), [])
        assert len(await collect(await client.submit(make_request(max_tokens=2), []))) == 2


async def test_who_leaves_while_his_deadly_grammar_is_built_is_blamed_and_nobody_else(
    tiny_checkpoint: Path,
) -> None:
    async with started(make_client(tiny_checkpoint)) as client:
        for number in range(2):
            leaving = await client.submit(bound(f"{number}", KILLING_GRAMMAR), [])
            staying = await client.submit(make_request(f"s{number}", max_tokens=2), [])
            await asyncio.sleep(0.02)
            leaving.close()
            await until(lambda lost=number + 1: client.num_restarts == lost)
            assert (await collect(staying))[-1].error_code in (None, "worker_restarting")
            await until(lambda: client.status == "ready")
        with pytest.raises(PoisonRequest):
            await client.submit(bound("again", KILLING_GRAMMAR), [])
