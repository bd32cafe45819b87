"""What /metrics says of the requests and of the engine, beside what is counted as it happens.

Every name with its words and where its value comes from. They are read when somebody asks: nobody
keeps them up to date. Must not know how anything is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import get_args

from server.api.health import Lifecycle
from server.chat.media import MediaReader
from server.chat.tokenizer import Delta
from server.engine.client import STEP_BOUNDS_S, Engine, EngineStatus
from server.errors import ServerError, Unavailable
from server.telemetry.metrics import Metric, Metrics, counter, gauge, histogram, info, one_of


def read_requests(lifecycle: Lifecycle) -> Iterator[Metric]:
    yield gauge(
        "hcx_http_requests_running",
        "HTTP requests in progress, in whatever phase. Without those for /health and /ready.",
        lifecycle.num_running,
    )
    yield gauge(
        "hcx_http_connections", "Open connections, idle ones too.", lifecycle.count_connections()
    )


def read_engine(engine: Engine) -> Iterator[Metric]:
    yield from _read_status(engine)
    yield from _read_queue(engine)
    yield from _read_caches(engine)
    yield from _read_work(engine)


def _read_status(engine: Engine) -> Iterator[Metric]:
    facts, pid = engine.facts, engine.worker_pid
    yield one_of(
        "hcx_engine_status",
        "1 for what the engine is now.",
        "status",
        engine.status,
        get_args(EngineStatus),
    )
    yield info(
        "hcx_engine",
        "The engine process; its labels are empty while there is none.",
        {
            "pid": "" if pid is None else str(pid),
            "device": facts.device if facts else "",
            "dtype": facts.dtype if facts else "",
            "attention": facts.attention if facts else "",
        },
    )
    yield counter(
        "hcx_engine_restarts",
        "How often the engine process was started again after it had ended or hung.",
        engine.num_restarts,
    )


def _read_queue(engine: Engine) -> Iterator[Metric]:
    queue, stats = engine.queue, engine.stats
    yield gauge("hcx_requests_running", "Admitted requests that have started.", queue.num_started)
    yield gauge("hcx_requests_waiting", "Admitted requests not yet started.", queue.num_waiting)
    yield gauge(
        "hcx_waiting_prompt_tokens",
        "Tokens in the prompts of waiting requests.",
        queue.waiting_prompt_tokens,
    )
    yield gauge(
        "hcx_waiting_tile_bytes",
        "Pixels of the media of waiting requests.",
        queue.waiting_tile_bytes,
    )
    yield gauge(
        "hcx_engine_requests_running",
        "Requests in the running set, as the engine process last said.",
        stats.num_running,
    )
    yield gauge(
        "hcx_engine_requests_waiting",
        "Requests in the scheduler's line, those that gave up their blocks among them.",
        stats.num_waiting,
    )
    yield gauge(
        "hcx_running_tile_bytes",
        "Pixels of the media of requests in the running set.",
        stats.running_tile_bytes,
    )


def _read_caches(engine: Engine) -> Iterator[Metric]:
    facts, stats = engine.facts, engine.stats
    yield gauge(
        "hcx_kv_blocks",
        "Blocks of the key/value cache.",
        facts.kv_tokens // facts.block_size if facts else 0,
    )
    yield gauge("hcx_kv_blocks_used", "Blocks that requests hold.", stats.num_blocks_used)
    yield gauge(
        "hcx_kv_blocks_cached",
        "Blocks that nobody holds, kept for whoever begins with the same. They are free room.",
        stats.num_blocks_cached,
    )
    yield gauge(
        "hcx_encoder_cache_held_bytes",
        "Encoded pictures and videos that requests hold.",
        stats.encoder_held_bytes,
    )
    yield gauge(
        "hcx_encoder_cache_kept_bytes",
        "Encoded pictures and videos that nobody holds, kept for whoever sends the same.",
        stats.encoder_kept_bytes,
    )
    totals = stats.totals
    yield counter(
        "hcx_prefix_cache_lookup_tokens",
        "Prompt tokens of requests that have started.",
        totals.num_prefix_tokens_looked_up,
    )
    yield counter(
        "hcx_prefix_cache_hit_tokens",
        "Those of them that were in the key/value cache.",
        totals.num_prefix_tokens_hit,
    )
    yield counter(
        "hcx_encoder_cache_hits",
        "Pictures and videos that were encoded already, or just then for somebody else.",
        totals.num_encodings_hit,
    )
    yield counter(
        "hcx_encoder_cache_misses",
        "Pictures and videos that had to be encoded.",
        totals.num_encodings_missed,
    )


def _read_work(engine: Engine) -> Iterator[Metric]:
    totals = engine.stats.totals
    yield counter("hcx_engine_steps", "Steps computed.", totals.num_steps)
    yield histogram(
        "hcx_engine_step_duration_seconds",
        "How long the steps took.",
        STEP_BOUNDS_S,
        totals.num_steps_up_to,
        totals.steps_s,
    )
    yield counter(
        "hcx_prompt_tokens_computed",
        "Prompt tokens computed; those that had to be computed again count again.",
        totals.num_prompt_tokens_computed,
    )
    yield counter("hcx_generated_tokens", "Tokens generated.", totals.num_tokens_generated)
    yield counter(
        "hcx_preemptions",
        "How often a running request had to give up its blocks and wait again.",
        totals.num_preemptions,
    )


def read_media(reader: MediaReader) -> Iterator[Metric]:
    fetcher, decoders = reader.fetcher, reader.decoders
    yield gauge("hcx_fetches_running", "Media being fetched.", fetcher.num_running)
    yield gauge("hcx_fetches_waiting", "Media that wait to be fetched.", fetcher.num_waiting)
    yield gauge("hcx_decodes_running", "Media with a decoder.", decoders.num_running)
    yield gauge("hcx_decodes_waiting", "Media that wait for a decoder.", decoders.num_waiting)
    yield gauge("hcx_decoder_processes", "Decoders there are.", decoders.num_processes)
    yield counter(
        "hcx_decoders_replaced",
        "Decoders that were thrown away: after a failure, so many media, or for another tenant.",
        decoders.num_replaced,
    )
    yield gauge(
        "hcx_media_reads_blocking",
        "Media being read from disks or base64 in threads, those that wait for one included.",
        reader.num_blocking,
    )
    yield gauge(
        "hcx_fetched_cache_bytes", "Fetched media kept in memory.", fetcher.num_cached_bytes
    )
    yield gauge(
        "hcx_finished_cache_bytes", "Pixels ready for the engine.", reader.finished.num_bytes
    )


@contextlib.contextmanager
def counting_refusals(metrics: Metrics) -> Iterator[None]:
    """What finds no room before the engine, which counts its own, is counted by what was short."""
    try:
        yield
    except Unavailable as error:
        if error.shortage is not None:
            metrics.count_rejection(error.shortage)
        raise


async def counted(
    deltas: AsyncGenerator[Delta, None], metrics: Metrics, *, num_choices: int = 1
) -> AsyncGenerator[Delta, None]:
    """The same deltas; how each choice ended is counted: as an abort where nobody waited for it."""
    num_running, reason = num_choices, "abort"
    try:
        async for delta in deltas:
            if delta.finish_reason is not None:
                num_running -= 1
                metrics.count_answer(delta.finish_reason)
            yield delta
    except ServerError as error:
        reason = error.code
        raise
    except Exception:
        reason = ServerError.code
        raise
    finally:
        await deltas.aclose()
        for _ in range(num_running):
            metrics.count_answer(reason)
