"""The engine process from its first line to its exit status.

Started by `server.engine.process` with the address of a socket; everything else comes in the first
message. Reads no environment and no configuration file, and never outlives the HTTP process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from server.attention.backend import AttentionBackend, choose_backend
from server.core import VisionSpec
from server.engine.blocks import BlockPool
from server.engine.channel import SocketChannel
from server.engine.encodings import EncoderCache
from server.engine.facts import EngineFacts
from server.engine.masks import MaskBuilder
from server.engine.messages import LoadFailed, Loading, Ready, Start
from server.engine.meter import Meter
from server.engine.runner import Runner, choose_cache_bytes
from server.engine.scheduler import Scheduler
from server.engine.warm_up import warm_up
from server.engine.worker import StepRunner, Worker
from server.errors import CheckpointError, ConfigError
from server.grammar.matcher import ENGINE_STACK_BYTES, read_vocabulary
from server.kernels.machine import has_half_units
from server.model.checkpoint import DTYPES, load_model, pack_for_cpu
from server.model.config import CheckpointInfo, read_checkpoint
from server.model.tensors import DTYPE_BYTES

_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def serve(address: str, *, wrap: Callable[[Runner], StepRunner] = lambda runner: runner) -> int:
    """One life of the engine process; the exit status. Tests put faults in with `wrap`."""
    _die_with_parent()
    # Both may reach the whole group of processes: how this one ends, the HTTP process says.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(message)s")
    threading.stack_size(ENGINE_STACK_BYTES)  # for the threads that start and follow grammars
    channel = SocketChannel(address)
    try:
        worker = _load(channel, wrap)
        if worker is not None:
            worker.run()
    except (CheckpointError, ConfigError) as error:
        is_config = isinstance(error, ConfigError)
        channel.send(LoadFailed(str(error), is_config=is_config))
        return 1
    finally:
        channel.close()
    return 0


def _load(channel: SocketChannel, wrap: Callable[[Runner], StepRunner]) -> Worker | None:
    """A worker that has proved itself; None where the other side has gone meanwhile."""
    channel.send(Loading(0, 0))
    start = _receive_start(channel)
    if start is None:
        return None
    started_s = time.monotonic()
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    info = read_checkpoint(Path(start.checkpoint))
    reading = ThreadPoolExecutor(1)
    vocabulary = reading.submit(read_vocabulary, info.path)
    reading.shutdown(wait=False)
    device = _choose_device(start.device)
    dtype = choose_dtype(start.dtype, info, device=device)
    backend = choose_backend(
        start.attention,
        device=device,
        dtype=DTYPES[dtype],
        head_dim=info.text.head_dim,
        page_size=start.block_size,
    )

    def report(num_bytes: int, total_bytes: int) -> None:
        channel.send(Loading(num_bytes, total_bytes))

    model = load_model(info, device=device, dtype=dtype, backend=backend, progress=report)
    pack_for_cpu(model, info)
    context_length = min(info.context_length, start.max_context or info.context_length)
    block_size = backend.page_size
    bytes_per_token = _bytes_per_token(backend, info, device, dtype)
    num_blocks = _count_blocks(start, device, bytes_per_token, block_size, context_length)
    try:
        caches = backend.allocate(
            info.text.num_layers,
            num_blocks,
            num_kv_heads=info.text.num_kv_heads,
            head_dim=info.text.head_dim,
            dtype=DTYPES[dtype],
            device=device,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"no memory for a key/value cache of {num_blocks * block_size} tokens: "
            "lower engine.kv_cache_bytes or model.max_context"
        ) from error
    vision = info.vision
    runner = wrap(
        Runner(
            model,
            caches,
            block_size=block_size,
            device=device,
            placeholder_ids=_placeholder_ids(vision),
        )
    )
    masks = MaskBuilder(
        vocabulary.result(),
        num_ids=info.text.logits_rows,
        reserved_ids=_placeholder_ids(vision),
    )
    # The same blocks, but what the warm-up leaves in them is nothing anybody could share.
    measured = warm_up(
        runner,
        BlockPool(num_blocks=num_blocks, block_size=block_size),
        vision=vision,
        max_stages_per_tile=info.tower.num_parts if info.tower is not None else 1,
        max_tokens=start.max_tokens_per_step,
        max_context=context_length,
    )
    budget = measured.budget
    pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
    scheduler = Scheduler(
        pool,
        EncoderCache(
            max_bytes=start.encoder_cache_bytes,
            bytes_per_token=info.text.hidden_size * DTYPE_BYTES[dtype],
            stages_per_tile=measured.stages_per_tile,
        ),
        budget=budget,
        # Each of them takes a position of every step.
        max_running=min(start.max_requests_running, budget.max_tokens),
    )
    facts = EngineFacts(
        logits_width=info.text.logits_rows,
        embedding_rows=info.text.embedding_rows,
        max_request_tokens=context_length,
        kv_tokens=pool.num_tokens,
        kv_bytes=pool.num_tokens * bytes_per_token,
        block_size=block_size,
        device=device,
        dtype=dtype,
        attention=type(backend).__name__,
        slowest_step_s=round(measured.slowest_s, 3),
        load_s=round(time.monotonic() - started_s, 3),
    )
    channel.send(Ready(facts))
    meter = Meter(scheduler)
    return Worker(channel, scheduler, runner, masks, facts=facts, vision=vision, meter=meter)


def _placeholder_ids(vision: VisionSpec | None) -> frozenset[int]:
    if vision is None:
        return frozenset()
    ids = (vision.image_token_id, vision.video_token_id)
    return frozenset(token_id for token_id in ids if token_id is not None)


def _receive_start(channel: SocketChannel) -> Start | None:
    while True:
        for message, _ in channel.receive(timeout_s=1.0):
            return message if isinstance(message, Start) else None


def _choose_device(name: str) -> str:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_cuda else "cpu"
    if name.startswith("cuda") and not has_cuda:
        raise ConfigError(f"model.device is '{name}', but there is no usable CUDA device")
    return name


def choose_dtype(name: str, info: CheckpointInfo, *, device: str) -> str:
    """What `auto` stands for: the checkpoint's own, unless this CPU computes that very slowly.

    Without 16-bit units float32 is several times faster; it is taken where its weights leave half
    of the machine's memory free.
    """
    if name != "auto":
        return name
    own: torch.dtype = getattr(torch, info.dtype)
    if device != "cpu" or own == torch.float32 or has_half_units(own):
        return info.dtype
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "float32" if info.parameter_bytes("float32") <= memory_bytes // 2 else info.dtype


def _bytes_per_token(
    backend: AttentionBackend, info: CheckpointInfo, device: str, dtype: str
) -> int:
    """Of the cache, over all layers. A backend may have more room than the heads need."""
    [one_page] = backend.allocate(
        1,
        1,
        num_kv_heads=info.text.num_kv_heads,
        head_dim=info.text.head_dim,
        dtype=DTYPES[dtype],
        device=device,
    )
    page_bytes = one_page.keys.nbytes + one_page.values.nbytes
    return info.text.num_layers * page_bytes // backend.page_size


def _count_blocks(
    start: Start, device: str, bytes_per_token: int, block_size: int, context_length: int
) -> int:
    num_bytes = choose_cache_bytes(
        device,
        configured=start.kv_cache_bytes,
        bytes_per_token=bytes_per_token,
        # A whole number of blocks, or the last positions of the context would not fit.
        context_length=-(-context_length // block_size) * block_size,
    )
    num_blocks = num_bytes // (bytes_per_token * block_size)
    if num_blocks * block_size < context_length:
        raise ConfigError(
            f"the key/value cache of {num_bytes} bytes holds {num_blocks * block_size} tokens, "
            f"less than the context of {context_length}: raise engine.kv_cache_bytes to "
            f"{bytes_per_token * (context_length + block_size)} or lower model.max_context"
        )
    return num_blocks


def _die_with_parent() -> None:
    """On Linux, where the closed pipe would only be noticed between two steps."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
