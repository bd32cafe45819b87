"""Damaged files of every accepted kind through real decoders: tiles, or an error of the contract."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest

from server.decoding.jobs import FramesJob, ImageJob, Job, VideoJob
from server.decoding.messages import Start, task_of
from server.decoding.pool import DecoderPool
from server.decoding.work import do
from server.errors import MediaError
from server.media.file import MediaFile
from tests.decoding.pools import running_pool
from tests.decoding.samples import PICTURES, SPEC, VIDEOS
from tests.limits import limits

CODES = ("{}_parse_error", "{}_too_large", "unsupported_{}_media_type")
START = Start(limits=limits(), spec=SPEC)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, repeated or added; most often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = int(len(changed) * rng.random() ** rng.choice((1, 3)))
        length = rng.choice((1, 1, 2, 4, 64))
        match rng.randrange(5):
            case 0:
                changed[place : place + length] = rng.randbytes(length)
            case 1:
                changed[place : place + length] = bytes([rng.choice((0, 127, 128, 255))]) * length
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                del changed[place:]
    return bytes(changed)


def samples() -> list[tuple[Job, bytes]]:
    made: list[tuple[Job, bytes]] = []
    kinds: tuple[tuple[Job, Mapping[str, Callable[[], bytes]]], ...] = (
        (ImageJob(), PICTURES),
        (VideoJob(), VIDEOS),
    )
    for job, named in kinds:
        made += [(job, sample()) for sample in named.values()]
    frames = [PICTURES["JPEG"](), PICTURES["PNG RGB"]()]
    made.append((FramesJob(tuple(map(len, frames))), b"".join(frames)))
    return made


async def code_of(pool: DecoderPool, job: Job, data: bytes) -> str | None:
    """The code of the error, one of the contract's; None where there are tiles."""
    kind = "image" if isinstance(job, ImageJob) else "video"
    try:
        decoded = await pool.decode(job, MediaFile.of_bytes(data), tenant="")
    except MediaError as error:
        assert error.code in [code.format(kind) for code in CODES]
        assert error.message.isprintable() and "0x" not in error.message
        return error.code
    assert len(decoded.tiles) == len(decoded.vision.layout.tile_queries) > 0
    return None


async def assert_harmless(count: int, *, seed: int, is_compared: bool) -> None:
    rng = random.Random(seed)
    originals = samples()
    async with running_pool() as pool:
        for index in range(count):
            job, data = originals[index % len(originals)]
            data = mutated(data, rng)
            code = await code_of(pool, job, data)
            if is_compared:
                answer, _ = do(task_of(job, num_bytes=len(data), is_probe=False), data, START)
                assert (answer.error is None) == (code is None)
        for job, data in originals:
            assert await code_of(pool, job, data) is None


async def test_three_hundred_damaged_files() -> None:
    """And each is served or not as it is here, where nothing is forbidden."""
    await assert_harmless(300, seed=4, is_compared=True)


@pytest.mark.long
async def test_ten_thousand_damaged_files() -> None:
    await assert_harmless(10_000, seed=10, is_compared=False)
