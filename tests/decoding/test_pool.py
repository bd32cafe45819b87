"""Decoding in other processes gives what decoding here gives, whatever befalls those processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from server.config import MediaConfig
from server.decoding.jobs import Decoded, FramesJob, ImageJob, Job, VideoJob
from server.decoding.messages import Start, task_of
from server.decoding.pool import DecoderPool
from server.decoding.work import do
from server.errors import (
    ConfigError,
    InvalidRequest,
    MediaError,
    MediaTooLarge,
    ShuttingDown,
    Unavailable,
)
from server.media.file import MediaFile
from server.media.kinds import MAX_LISTED_FRAMES
from server.vision.frames import video_layout
from server.vision.tiles import image_layout, vision_input
from tests.clips import SIZE, clip
from tests.decoding import hostile_forker, lying_forker
from tests.decoding.pools import (
    children_of,
    decoder_pids,
    descriptors,
    forker_pid,
    running_pool,
)
from tests.decoding.samples import PICTURES, SPEC, VIDEOS, picture
from tests.limits import limits

ROOT = Path(__file__).resolve().parents[2]
START = Start(limits=limits(), spec=SPEC)


async def decode(
    pool: DecoderPool, data: bytes, job: Job | None = None, tenant: str = ""
) -> Decoded:
    return await pool.decode(job or ImageJob(), MediaFile.of_bytes(data), tenant=tenant)


def assert_as_here(decoded: Decoded, job: Job, data: bytes) -> None:
    """The same as the same work in this process."""
    answer, tiles = do(task_of(job, num_bytes=len(data), is_probe=False), data, START)
    assert answer.error is None and tiles is not None
    assert np.array_equal(decoded.tiles, tiles)
    assert decoded.size == answer.size
    if isinstance(job, ImageJob):
        layout = image_layout(answer.size, SPEC, detail=job.detail, max_grids=job.max_grids)
        assert decoded.vision == vision_input("image", layout, tiles, SPEC)
        assert (decoded.duration_s, decoded.num_frames) == (None, None)
    else:
        layout = video_layout(len(tiles), SPEC)
        assert decoded.vision == vision_input("video", layout, tiles, SPEC)
        assert (decoded.duration_s, decoded.num_frames) == (answer.duration_s, len(tiles))
    assert len(layout.tile_queries) == len(tiles)
    assert decoded.decode_s > 0 and decoded.preprocess_s > 0


async def test_pictures_and_videos_are_decoded_as_here() -> None:
    async with running_pool(decode_processes=2) as pool:
        for name, sample in PICTURES.items():
            data = sample()
            for job in (ImageJob(), ImageJob(detail="low"), ImageJob(max_grids=2)):
                assert_as_here(await decode(pool, data, job, name), job, data)
        for name, sample in VIDEOS.items():
            data = sample()
            window = VideoJob(fps=1.0, start_s=1.0, end_s=3.0, max_frames=2)
            for video_job in (VideoJob(), VideoJob(num_frames=3), window):
                if name == "times used twice" and video_job is window:
                    continue
                assert_as_here(await decode(pool, data, video_job, name), video_job, data)


async def test_a_list_of_frames() -> None:
    frames = [picture(image_format, size=(60, 40)) for image_format in ("JPEG", "PNG", "WEBP")] * 3
    data = b"".join(frames)
    lengths = tuple(len(frame) for frame in frames)
    async with running_pool() as pool:
        for job in (
            FramesJob(lengths),
            FramesJob(lengths, fps=2.0, num_frames=4),
            FramesJob(lengths, fps=0.5, start_s=5.0),
        ):
            decoded = await decode(pool, data, job)
            assert_as_here(decoded, job, data)
            assert decoded.duration_s == 9 / job.fps
        probed = await pool.probe(FramesJob(lengths), MediaFile.of_bytes(data), tenant="")
        assert (probed.size, probed.duration_s, probed.num_frames) == ((60, 40), 9.0, 9)
        too_many = FramesJob((1,) * (MAX_LISTED_FRAMES + 1))
        with pytest.raises(MediaTooLarge, match="at most"):
            await decode(pool, data, too_many)
        most = FramesJob((0,) * MAX_LISTED_FRAMES)  # the longest task there is arrives
        with pytest.raises(MediaTooLarge, match="lasts"):
            await decode(pool, data, most)


async def test_probing() -> None:
    async with running_pool() as pool:
        for orientation, size in ((1, (90, 60)), (6, (60, 90))):
            for image_format in ("JPEG", "PNG", "WEBP"):
                data = MediaFile.of_bytes(picture(image_format, orientation=orientation))
                probed = await pool.probe(ImageJob(), data, tenant="")
                assert (probed.size, probed.duration_s, probed.num_frames) == (size, None, None)
        data = MediaFile.of_bytes(clip(20))
        for job, num_frames in (
            (VideoJob(), 20),
            (VideoJob(start_s=2.0), 16),
            (VideoJob(start_s=2.2, end_s=3.2), 2),
            (VideoJob(start_s=2.2, end_s=3.2, fps=100), 3),
            (VideoJob(end_s=0.1, fps=100), 1),
            (VideoJob(max_frames=7), 7),
            (VideoJob(num_frames=3), 3),
        ):
            probed = await pool.probe(job, data, tenant="")
            assert (probed.size, probed.duration_s, probed.num_frames) == (SIZE, 10.0, num_frames)
        for wrong in (VideoJob(start_s=10.0), VideoJob(start_s=3.0, end_s=2.0)):
            for ask in (pool.probe, pool.decode):
                with pytest.raises(InvalidRequest) as caught:
                    await ask(wrong, data, tenant="")
                assert caught.value.code == "invalid_value"
        with pytest.raises(MediaError) as media_error:
            await pool.probe(ImageJob(), MediaFile.of_bytes(b"GIF89a"), tenant="")
        assert media_error.value.code == "image_parse_error"


@pytest.mark.parametrize(
    ("job", "data", "settings", "code"),
    [
        (ImageJob(), b"%PDF-1.7", {}, "unsupported_image_media_type"),
        (ImageJob(), picture()[:-200], {}, "image_parse_error"),
        (ImageJob(), picture(), {"max_image_side": 50}, "image_too_large"),
        (ImageJob(), picture(size=(3000, 2000)), {"image_decode_memory_bytes": 1000},
         "image_parse_error"),
        (VideoJob(), b"#EXTM3U", {}, "unsupported_video_media_type"),
        (VideoJob(), clip(20)[:400], {}, "video_parse_error"),
        (VideoJob(), clip(20), {"max_video_duration_s": 1.0}, "video_too_large"),
        (FramesJob((8,)), b"%PDF-1.7", {}, "unsupported_video_media_type"),
        (FramesJob((2,)), b"\xff\xd8\xff", {}, "unsupported_video_media_type"),
        (FramesJob((3,)), b"\xff\xd8\xff", {}, "video_parse_error"),
    ],
)  # fmt: skip
async def test_refusals(job: Job, data: bytes, settings: dict[str, float], code: str) -> None:
    async with running_pool(**settings) as pool:
        with pytest.raises(MediaError) as caught:
            await decode(pool, data, job)
        assert caught.value.code == code
        assert caught.value.message.isprintable() and "0x" not in caught.value.message


# Decoders and their fates.


async def test_a_decoder_serves_one_tenant_and_is_replaced_after_a_failure() -> None:
    async with running_pool() as pool:
        seen = []
        for tenant, data in (
            ("a", picture()),
            ("a", picture("JPEG")),
            ("b", picture()),
            ("b", b"no picture"),
            ("b", picture()),
        ):
            try:
                await decode(pool, data, tenant=tenant)
                (pid,) = await until_decoders(1)
            except MediaError:  # told before its decoder is gone
                (pid,) = await until_decoders(1, other_than=seen[-1])
            seen.append(pid)
        first, second, third, fourth, fifth = seen
        assert first == second and len({second, third, fourth}) == 3 and fourth == fifth


async def test_an_idle_decoder_is_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.decoding.pool.MAX_IDLE_S", 0.05)
    async with running_pool() as pool:
        (first,) = decoder_pids()
        await asyncio.sleep(0.3)
        assert decoder_pids() == [first]  # it has seen nothing yet
        await decode(pool, picture())
        (second,) = await until_decoders(1, other_than=first)
        await asyncio.sleep(0.3)
        assert decoder_pids() == [second]
        assert_as_here(await decode(pool, picture()), ImageJob(), picture())


async def test_a_decoder_is_replaced_after_its_share_of_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.decoding.pool.MAX_JOBS_OF_A_DECODER", 3)
    async with running_pool() as pool:
        seen = []
        for index in range(9):
            if index % 3:  # in the middle of its life
                seen += await until_decoders(1)
            await decode(pool, picture())
        assert [seen.count(pid) for pid in dict.fromkeys(seen)] == [2, 2, 2]


async def until_decoders(count: int, *, other_than: int | None = None) -> list[int]:
    """The decoders, once that many live and those that ended are buried."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError, OSError):
            pids = decoder_pids()
            if len(pids) == count and other_than not in pids:
                return pids
        await asyncio.sleep(0.01)
    raise AssertionError("the decoders never became that many")


async def hanging(pool: DecoderPool, tenant: str = "") -> asyncio.Task[Decoded]:
    """A job that runs and does not end."""
    task = asyncio.create_task(decode(pool, b"do:sleep 60", tenant=tenant))
    before = pool.num_running
    while pool.num_running == before:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    return task


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_killed_decoder_costs_one_job(number: signal.Signals) -> None:
    async with running_pool(hostile_forker.MODULE) as pool:
        task = await hanging(pool)
        (pid,) = decoder_pids()
        os.kill(pid, number)
        with pytest.raises(MediaError) as caught:
            await task
        assert caught.value.code == "image_parse_error"
        assert_as_here(await decode(pool, picture()), ImageJob(), picture())
        assert await until_decoders(1) != [pid]


@pytest.mark.parametrize("deed", ["crash 11", "crash 3"])
async def test_a_crash_costs_one_job(deed: str) -> None:
    async with running_pool(hostile_forker.MODULE) as pool:
        with pytest.raises(MediaError) as caught:
            await decode(pool, f"do:{deed}".encode())
        assert caught.value.code == "image_parse_error"
        assert_as_here(await decode(pool, picture()), ImageJob(), picture())


@pytest.mark.parametrize("number", [None, signal.SIGSTOP])
async def test_a_hung_decoder_costs_one_job(number: signal.Signals | None) -> None:
    async with running_pool(
        hostile_forker.MODULE, image_decode_timeout_s=0.4, video_decode_timeout_s=0.3
    ) as pool:
        started_s = time.monotonic()
        task = await hanging(pool)
        if number is not None:
            os.kill(decoder_pids()[0], number)
        with pytest.raises(MediaTooLarge, match=r"longer to decode than 0\.4 s") as caught:
            await task
        assert caught.value.code == "image_too_large"
        with pytest.raises(MediaTooLarge) as caught:
            await decode(pool, b"do:spin", VideoJob())
        assert caught.value.code == "video_too_large"
        assert time.monotonic() - started_s < 7
        assert_as_here(await decode(pool, picture()), ImageJob(), picture())


async def test_an_idle_decoder_that_died_is_found_out() -> None:
    async with running_pool() as pool:
        (pid,) = decoder_pids()
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        with pytest.raises(MediaError):
            await decode(pool, picture())
        await decode(pool, picture())


async def test_cancelling_ends_the_decoder_at_once() -> None:
    async with running_pool(hostile_forker.MODULE) as pool:
        before = descriptors()
        task = await hanging(pool)
        (pid,) = decoder_pids()
        waiting = asyncio.create_task(decode(pool, picture()))
        dropped = asyncio.create_task(decode(pool, picture()))
        await asyncio.sleep(0.05)
        assert (pool.num_running, pool.num_waiting) == (1, 2)
        dropped.cancel()
        task.cancel()
        for cancelled in (task, dropped):
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert_as_here(await waiting, ImageJob(), picture())
        assert await until_decoders(1, other_than=pid)
        assert (pool.num_running, pool.num_waiting, pool.num_processes) == (0, 0, 1)
        del task, waiting, dropped
        assert len(descriptors()) <= len(before)


async def test_a_full_pool_refuses() -> None:
    async with running_pool(hostile_forker.MODULE, max_decodes_waiting=2) as pool:
        running = await hanging(pool)
        waiting = [asyncio.create_task(decode(pool, picture())) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable) as caught:
            await decode(pool, picture())
        assert caught.value.code == "server_is_overloaded"
        running.cancel()
        for task in waiting:
            assert_as_here(await task, ImageJob(), picture())
        await decode(pool, picture())


async def test_jobs_run_beside_each_other_and_in_order_of_arrival() -> None:
    async with running_pool(hostile_forker.MODULE, decode_processes=2) as pool:
        first, second = await hanging(pool, "a"), await hanging(pool, "b")
        assert pool.num_running == pool.num_processes == 2
        ended: list[int] = []

        async def numbered(number: int) -> None:
            await decode(pool, picture(), tenant=str(number % 3))
            ended.append(number)

        tasks = [asyncio.create_task(numbered(number)) for number in range(6)]
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(*tasks)
        assert ended == list(range(6))  # one decoder serves them: the other is still taken
        second.cancel()


async def test_no_picture_waits_for_videos() -> None:
    """Not even for those of its own tenant that came before it."""
    async with running_pool(hostile_forker.MODULE, decode_processes=2) as pool:
        videos = [asyncio.create_task(decode(pool, b"do:sleep 60", VideoJob())) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert (pool.num_running, pool.num_waiting) == (1, 1)
        assert_as_here(await decode(pool, picture()), ImageJob(), picture())
        assert (pool.num_running, pool.num_waiting) == (1, 1)
        videos[0].cancel()
        while pool.num_waiting:
            await asyncio.sleep(0.01)
        assert pool.num_running == 1
        videos[1].cancel()


async def test_another_forker_is_started_when_it_dies() -> None:
    async with running_pool(hostile_forker.MODULE) as pool:
        for _ in range(2):
            task = await hanging(pool)
            pid, decoders = forker_pid(), decoder_pids()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(Unavailable) as caught:  # no fault of the medium
                await task
            assert caught.value.code == "server_is_overloaded"
            assert_as_here(await decode(pool, picture()), ImageJob(), picture())
            assert not any(is_running(decoder) for decoder in decoders)


async def test_a_stopped_forker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for timeout in ("EXIT_TIMEOUT_S", "FORK_TIMEOUT_S"):
        monkeypatch.setattr(f"server.decoding.processes.{timeout}", 0.5)
    async with running_pool() as pool:
        await decode(pool, picture(), tenant="a")
        os.kill(forker_pid(), signal.SIGSTOP)
        await decode(pool, picture(), tenant="b")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_closing_leaves_nothing_behind() -> None:
    before, children = descriptors(), children_of(os.getpid())
    async with running_pool(hostile_forker.MODULE, decode_processes=2) as pool:
        tasks = [await hanging(pool), await hanging(pool)]
        tasks.append(asyncio.create_task(decode(pool, picture())))
        await asyncio.sleep(0.05)
        pids = [forker_pid(), *decoder_pids()]
        assert len(pids) == 3
    for task in tasks:
        with pytest.raises(ShuttingDown):
            await task
    with pytest.raises(ShuttingDown):
        await decode(pool, picture())
    del tasks, task
    assert not any(map(is_running, pids))
    assert (children_of(os.getpid()), pool.num_processes) == (children, 0)
    assert descriptors() == before


async def test_what_cannot_be_started_says_so() -> None:
    before = descriptors()
    pool = DecoderPool(MediaConfig(), SPEC, entry_module="tests.decoding.no_such_forker")
    with pytest.raises(ConfigError, match="cannot be started"):
        await pool.start()
    assert descriptors() == before


PROGRAM = """
import asyncio, signal, sys
from server.media.file import MediaFile
from server.decoding.jobs import ImageJob
from tests.decoding.hostile_forker import MODULE
from tests.decoding.pools import decoder_pids, forker_pid, running_pool
async def main():
    async with running_pool(MODULE, decode_processes=2, image_decode_timeout_s=50.0) as pool:
        for deed in (b"do:spin", b"do:sleep 50"):
            asyncio.ensure_future(pool.decode(ImageJob(), MediaFile.of_bytes(deed), tenant=""))
        await asyncio.sleep(0.3)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, asyncio.current_task().cancel)
        print(forker_pid(), *decoder_pids(), flush=True)
        await asyncio.sleep(50)
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_decoders_do_not_outlive_the_server(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_running, pids))
        process.send_signal(number)
        process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.01)


# Decoders that lie.


@pytest.mark.parametrize("job", [ImageJob(), VideoJob()])
async def test_a_lying_decoder_harms_its_own_job_only(job: Job) -> None:
    is_image = isinstance(job, ImageJob)
    truth = "good" if is_image else "good video"
    async with running_pool(
        lying_forker.MODULE, image_decode_timeout_s=0.5, video_decode_timeout_s=0.5
    ) as pool:
        for name in (*lying_forker.ANSWERS, "shorter", "never"):
            if name == truth or (name == "twice" and is_image):
                tiles = (await decode(pool, name.encode(), job)).tiles
                assert tiles.shape == (2 if is_image else 3, 28, 28, 3) and not tiles.any()
            else:
                with pytest.raises(MediaError) as caught:
                    await decode(pool, name.encode(), job)
                error, kind = caught.value, "image" if is_image else "video"
                assert error.code == f"{kind}_{'too_large' if name == 'never' else 'parse_error'}"
                assert len(error.message) <= 300 and error.message.isprintable()
                assert name == "wordy error" or "decode" in error.message, name
            if name == "twice" and is_image:  # its second answer is not taken for the next one
                with pytest.raises(MediaError):
                    await decode(pool, truth.encode(), job)
            assert len((await decode(pool, truth.encode(), job)).tiles) == (2 if is_image else 3)
