"""What a request's media become, with real decoders; what is fetched comes from a stand-in."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import os
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from server.chat.media import FRAMES_AT_ONCE, LeftOut, MediaReader, Medium, Reading
from server.chat.options import NO_OPTIONS, MediaOptions
from server.chat.parts import MediaPart, parse_messages
from server.config import MediaConfig
from server.core import VisionLayout, VisionSpec
from server.decoding.jobs import Decoded, Job, Probed
from server.decoding.pool import DecoderPool
from server.errors import (
    ArrayTooLong,
    AttachmentNotFound,
    DownloadFailed,
    InvalidRequest,
    ServerError,
    Unavailable,
)
from server.media.fetch import Fetched
from server.media.file import MediaFile
from server.media.store import FileStore, owner_digest
from server.vision.frames import video_layout
from tests.clips import clip

pytestmark = pytest.mark.asyncio(loop_scope="module")


def png(width: int, height: int, shade: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 30, 30)).save(file, "PNG")
    return file.getvalue()


def gif(num_frames: int) -> bytes:
    """0.4 s a frame, every frame another shade."""
    frames = [Image.new("L", (40, 30), 10 + 5 * index) for index in range(num_frames)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=400)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image(data: bytes | str, **more: Any) -> dict[str, Any]:
    source = data if isinstance(data, str) else base64_of(data)
    return {"type": "image_url", "image_url": {"url": source}, **more}


def video(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **more}


class Host:
    """Stands in for the network: what each URL gives, or the error it ends in."""

    num_running = num_waiting = num_cached_bytes = 0

    def __init__(self) -> None:
        self.answers: dict[str, bytes | ServerError] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.most_at_once = 0
        self._num_now = 0

    async def fetch(self, url: str, *, kind: str, tenant: str, cache_salt: str = "") -> Fetched:
        self.asked.append((url, kind, tenant))
        self._num_now += 1
        self.most_at_once = max(self.most_at_once, self._num_now)
        await asyncio.sleep(0.005)
        self._num_now -= 1
        answer = self.answers[url]
        if isinstance(answer, ServerError):
            raise answer
        return Fetched(MediaFile.of_bytes(answer), "miss")

    async def close(self) -> None:
        pass


class StuckDecoders:
    """Fails on what is not a PNG; with anything else it never ends."""

    num_running = num_waiting = num_processes = 0
    missing_protections = ()

    def __init__(self) -> None:
        self.num_started = 0
        self.num_cancelled = 0

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def decode(self, job: Job, file: MediaFile, *, tenant: str) -> Decoded:
        if file.head(4) != b"\x89PNG":
            while not self.num_started:
                await asyncio.sleep(0)
            raise DownloadFailed("It is broken.")
        self.num_started += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        raise AssertionError

    async def probe(self, job: Job, file: MediaFile, *, tenant: str) -> Probed:
        raise AssertionError


class Sent:
    """The attachments of a request."""

    def __init__(self, **files: bytes) -> None:
        self._files = files

    async def get(self, name: str) -> MediaFile:
        if name not in self._files:
            raise AttachmentNotFound("There is no such part.")
        return MediaFile.of_bytes(self._files[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    return FileStore(tmp_path_factory.mktemp("files"), 60.0, 1 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(vision: VisionSpec, folder: Path, files: FileStore) -> AsyncIterator[MediaReader]:
    config = MediaConfig(
        local_root=folder,
        max_request_bytes=200_000,
        max_image_bytes=100_000,
        max_video_bytes=200_000,
    )
    reader = MediaReader(
        config, vision, fetcher=Host(), decoders=DecoderPool(config, vision), files=files
    )
    await reader.start()
    yield reader
    await reader.stop()


@pytest.fixture
def host(reader: MediaReader) -> Host:
    reader.fetcher = host = Host()
    return host


def begin(
    reader: MediaReader, *, tenant: str = "t1", cache_salt: str = "", sent: Sent | None = None
) -> Reading:
    return reader.begin(tenant=tenant, cache_salt=cache_salt, attachments=sent)


def parts_of(*content: Any) -> list[MediaPart]:
    (message,) = parse_messages([{"role": "user", "content": list(content)}], MediaConfig())
    return list(message.media)


async def read(
    reader: MediaReader,
    *content: Any,
    options: MediaOptions = NO_OPTIONS,
    budget: int | None = None,
    tenant: str = "t1",
    cache_salt: str = "",
    sent: Sent | None = None,
) -> list[Any]:
    reading = begin(reader, tenant=tenant, cache_salt=cache_salt, sent=sent)
    parts = parts_of(*content)
    known = await reading.kinds(parts)
    parts = [known.get(part.path, part) for part in parts]
    return list(await reading.read(parts, options, token_budget=budget))


async def refusal(reader: MediaReader, *content: Any, **more: Any) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await read(reader, *content, **more)
    return caught.value


# Sources ------------------------------------------------------------------------------------------


async def test_every_source_gives_the_same_pixels(
    reader: MediaReader, host: Host, folder: Path, files: FileStore
) -> None:
    data = png(50, 30)
    name = unicodedata.normalize("NFD", "그림.png")
    (folder / name).write_bytes(data)
    host.answers["https://example.com/a.png"] = data
    upload = files.begin(owner_digest("t1"))
    upload.write(data)
    stored = upload.finish(filename=name, purpose="vision")
    sources = [
        base64_of(data),
        f"data:image/png;base64,{base64_of(data)}",
        "https://example.com/a.png",
        f"./{unicodedata.normalize('NFC', name)}",
        (folder / name).as_uri(),
        stored.id,
        "attachment:a",
    ]
    media = await read(reader, *map(image, sources), sent=Sent(a=data))
    assert len({medium.vision.digest for medium in media}) == 1
    assert {medium.report.size for medium in media} == {(50, 30)}
    assert host.asked == [("https://example.com/a.png", "image", "t1")]
    by_id = await read(reader, {"type": "file", "file": {"file_id": stored.id}})
    assert by_id[0].vision.digest == media[0].vision.digest


@pytest.mark.parametrize("filename", [None, "a.png", "a.mp4", "a"])
@pytest.mark.parametrize("declared", ["", "data:image/png;base64,", "data:video/mp4;base64,"])
@pytest.mark.parametrize(
    ("data", "kind", "other"),
    [
        (png(9, 9), "image", {"fps": 1}),
        (gif(3), "image", {"start_s": 1}),
        (clip(4), "video", {"detail": "low"}),
    ],
    ids=["PNG", "GIF", "MP4"],
)
async def test_of_a_file_the_bytes_say_what_it_is(
    reader: MediaReader,
    data: bytes,
    kind: str,
    other: dict[str, object],
    declared: str,
    filename: str | None,
) -> None:
    part = {"type": "file", "file": {"file_data": declared + base64_of(data), "filename": filename}}
    (medium,) = await read(reader, part)
    assert medium.part.kind == medium.report.kind == medium.vision.kind == kind
    error = await refusal(reader, part | {"media_options": other})
    assert (error.code, error.param) == (
        "invalid_value",
        f"messages[0].content[0].media_options.{next(iter(other))}",
    )


async def test_a_file_keeps_to_the_limit_of_what_it_is(reader: MediaReader, host: Host) -> None:
    long = clip(4) + bytes(100_000)  # what follows the last atom is ignored
    large = png(9, 9) + bytes(100_000)
    host.answers = {"https://example.com/a": long, "https://example.com/b": large}
    for data, url in ((long, "https://example.com/a"), (large, "https://example.com/b")):
        for source in ({"file_data": base64_of(data)}, {"file_url": url}):
            part = {"type": "input_file", **source}
            if data is long:
                (medium,) = await read(reader, part)
                assert medium.report.kind == "video"
                continue
            error = await refusal(reader, part)
            assert error.code == "image_file_too_large"
            assert error.message.startswith("messages[0].content[0], fetch: ")
            (left_out,) = await read(reader, part | {"on_error": "skip"})
            assert left_out.report.error_code == "image_file_too_large"


async def test_a_list_of_frames_may_come_as_a_file(reader: MediaReader) -> None:
    frames = ",".join(base64_of(png(9, 9, shade)) for shade in (10, 20))
    part = {"type": "file", "file": {"file_data": f"data:video/jpeg;base64,{frames}"}}
    (medium,) = await read(reader, part)
    assert (medium.report.kind, medium.report.num_frames) == ("video", 2)


async def test_another_caller_s_file_is_not_there(reader: MediaReader, files: FileStore) -> None:
    upload = files.begin(owner_digest("t1"))
    upload.write(png(8, 8))
    stored = upload.finish(filename="a.png", purpose="vision")
    missing = "file-" + "x" * 32
    told = [
        (error.status, error.code, error.message)
        for error in (
            await refusal(reader, image(stored.id), tenant="t2"),
            await refusal(reader, image(missing), tenant="t2"),
        )
    ]
    assert told[0] == told[1]
    assert told[0][:2] == (404, "file_not_found")


@pytest.mark.parametrize(
    "frames",
    [
        [base64_of(png(40, 20, 10 * shade)) for shade in range(1, 6)],
        "data:video/jpeg;base64,"
        + ",".join(base64_of(png(40, 20, 10 * shade)) for shade in range(1, 6)),
    ],
    ids=["a list of sources", "one URL"],
)
async def test_a_list_of_frames_is_a_video(reader: MediaReader, frames: Any) -> None:
    (medium,) = await read(reader, video(frames))
    assert (medium.report.num_frames, medium.report.duration_s) == (5, 5.0)
    shades = [int(tile[14, 14, 0]) for tile in medium.tiles]
    assert shades == [10, 20, 30, 40, 50]
    (faster,) = await read(reader, video(frames, media_options={"fps": 10}))
    assert faster.report.duration_s == 0.5
    assert faster.report.num_frames == 1  # the model's own rule: one in 0.4 s
    (part,) = await read(reader, video(frames, media_options={"start_s": 1, "end_s": 3}))
    assert [int(tile[14, 14, 0]) for tile in part.tiles] == [20, 30]


async def test_lists_are_limited(reader: MediaReader) -> None:
    with pytest.raises(ArrayTooLong):
        await read(reader, video(["AAAA"] * 1_025))
    error = await refusal(reader, video([base64_of(bytes(70_000))] * 3))
    assert error.code == "video_file_too_large"


async def test_of_a_long_list_few_files_are_open_and_no_more_is_got_than_may_be(
    reader: MediaReader, host: Host
) -> None:
    urls = [f"https://example.com/{number}" for number in range(60)]
    host.answers = {url: png(9, 9, number) for number, url in enumerate(urls)}
    most = before = num_memory_files()  # of other tests some may not be collected yet
    fetch = host.fetch

    async def watched(url: str, *, kind: str, tenant: str, cache_salt: str) -> Fetched:
        nonlocal most
        most = max(most, num_memory_files())
        return await fetch(url, kind=kind, tenant=tenant, cache_salt=cache_salt)

    host.fetch = watched  # type: ignore[method-assign]
    (medium,) = await read(reader, video(urls))
    assert medium.report.duration_s == 60
    assert most <= before + FRAMES_AT_ONCE + 2

    host.asked.clear()
    host.answers = {url: bytes(30_000) for url in urls}
    error = await refusal(reader, video(urls))
    assert error.code == "video_file_too_large"
    assert len(host.asked) <= 200_000 // 30_000 + FRAMES_AT_ONCE


async def test_a_request_has_so_many_bytes(reader: MediaReader) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    source = base64_of(file.getvalue())
    await read(reader, image(source), image(source))
    error = await refusal(reader, *[image(source)] * 4)
    assert error.code == "image_file_too_large"
    assert "together" in error.message


@pytest.mark.parametrize(
    ("size", "code"), [(0, "empty_image_file"), (100_001, "image_file_too_large")]
)
async def test_attachments_keep_to_the_limits_of_their_kind(
    reader: MediaReader, size: int, code: str
) -> None:
    error = await refusal(reader, image("attachment:a"), sent=Sent(a=bytes(size)))
    assert error.code == code


async def test_attachments_need_a_form(reader: MediaReader) -> None:
    error = await refusal(reader, image("attachment:a"))
    assert (error.code, error.param) == ("invalid_value", "messages[0].content[0].image_url.url")
    part = image("attachment:b", on_error="skip")
    for sent in (None, Sent(a=png(9, 9))):
        (left_out,) = await read(reader, part, sent=sent)
        assert left_out.report.error_code == "invalid_value"


async def test_of_one_request_only_so_many_are_fetched_at_once(
    reader: MediaReader, host: Host
) -> None:
    urls = [f"https://example.com/{number}.png" for number in range(12)]
    host.answers = {url: png(9, 9) for url in urls}
    assert len(await read(reader, *map(image, urls))) == 12
    assert host.most_at_once == reader.config.max_fetches_per_request == 4


# Failures -----------------------------------------------------------------------------------------


async def test_a_failure_names_part_stage_and_cause(reader: MediaReader, host: Host) -> None:
    shared = DownloadFailed("The host answered 404.", kind="image")
    host.answers["https://example.com/a.png"] = shared
    bad = image("https://example.com/a.png")
    for number in (0, 2):
        content = [image(png(9, 9))] * number
        error = await refusal(reader, *content, bad)
        path = f"messages[0].content[{number}]"
        assert error.message == f"{path}, fetch: The host answered 404."
        assert error.param == f"{path}.image_url.url"
    # One error may be told to several requests at once: it stays as it was.
    assert (shared.message, shared.param) == ("The host answered 404.", None)
    error = await refusal(reader, image(png(50, 50)[:-30]))
    assert error.message.startswith("messages[0].content[0], decode: ")


async def test_a_request_may_go_on_without_a_medium(reader: MediaReader) -> None:
    good, bad = image(png(9, 9)), image("AAAA", on_error="skip")
    first, second = await read(reader, good, bad)
    assert isinstance(first, Medium)
    assert isinstance(second, LeftOut)
    assert second.report.error_code == "unsupported_image_media_type"
    budgeted = await read(reader, good, bad, budget=10)
    assert [type(each) for each in budgeted] == [Medium, LeftOut]
    unknown = {"type": "file", "file": {"file_id": "file-" + "y" * 32}, "on_error": "skip"}
    assert [type(each) for each in await read(reader, good, unknown)] == [Medium, LeftOut]


async def test_trouble_of_the_server_is_nothing_to_go_on_without(
    reader: MediaReader, host: Host
) -> None:
    host.answers["https://example.com/a.png"] = Unavailable()
    error = await refusal(reader, image("https://example.com/a.png", on_error="skip"))
    assert error.code == "server_is_overloaded"


async def test_a_failure_ends_what_still_runs(vision: VisionSpec, reader: MediaReader) -> None:
    decoders = StuckDecoders()
    stuck = MediaReader(MediaConfig(), vision, fetcher=Host(), decoders=decoders)
    error = await refusal(stuck, image(png(9, 9)), image(gif(2)))
    assert error.param == "messages[0].content[1].image_url.url"
    assert (decoders.num_started, decoders.num_cancelled) == (1, 1)
    reading = asyncio.create_task(read(stuck, image(png(9, 9)), image(png(8, 8))))
    while decoders.num_started < 3:
        await asyncio.sleep(0.001)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert decoders.num_cancelled == 3
    await stuck.stop()


# Options ------------------------------------------------------------------------------------------


async def test_the_part_s_word_comes_before_the_request_s(reader: MediaReader) -> None:
    picture = png(200, 200)
    request = MediaOptions(max_grids=1, max_frames=3)
    own = {"media_options": {"max_grids": 4}}
    media = await read(
        reader, image(picture), image(picture, **own), video(base64_of(gif(9))), options=request
    )
    assert [medium.report.num_grids for medium in media] == [1, 4, None]
    assert media[0].report.options == {"detail": "high", "max_grids": 1}
    assert media[1].report.options == {"detail": "high", "max_grids": 4}
    assert media[2].report.num_frames == 3
    assert media[2].report.options["max_frames"] == 3


@pytest.mark.parametrize(
    ("options", "num_frames"),
    [
        ({}, 9),
        ({"fps": 1}, 3),
        ({"fps": 0.01}, 1),
        ({"num_frames": 4}, 4),
        ({"max_frames": 2}, 2),
        ({"num_frames": 18}, 9),
        ({"start_s": 0.8, "end_s": 2.0}, 3),
        ({"start_s": 3.1}, 1),
    ],
)
async def test_videos_are_looked_at_as_asked(
    reader: MediaReader, options: dict[str, Any], num_frames: int
) -> None:
    (medium,) = await read(reader, video(base64_of(gif(9)), media_options=options))
    assert medium.report.num_frames == num_frames == len(medium.tiles)
    assert medium.report.duration_s == pytest.approx(3.6)


async def test_nothing_is_seen_after_the_end(reader: MediaReader) -> None:
    beyond = {"start_s": 60}
    source = base64_of(gif(3))
    for budget in (None, 100):
        error = await refusal(reader, video(source, media_options=beyond), budget=budget)
        assert (error.code, error.param) == (
            "invalid_value",
            "messages[0].content[0].media_options",
        )
        assert error.message.startswith("messages[0].content[0], decode: ")
        error = await refusal(reader, video(source), options=MediaOptions(start_s=60))
        assert error.param == "media_options"
        part = video(source, media_options=beyond, on_error="skip")
        (left_out,) = await read(reader, part, budget=budget)
        assert left_out.report.error_code == "invalid_value"


@pytest.mark.parametrize("own", [{"num_frames": 1}, {"max_frames": 2}, {"fps": 0.5}, {}])
async def test_a_budget_that_is_kept_anyway_changes_nothing(
    reader: MediaReader, own: dict[str, Any]
) -> None:
    """Whatever the file holds: only what would be taken of it counts."""
    content = [image(png(200, 200)), video(base64_of(gif(60)), media_options=own)]
    without = [medium.vision for medium in await read(reader, *content)]
    total = sum(vision.num_tokens for vision in without)
    for budget in (total, 10_000):
        assert [medium.vision for medium in await read(reader, *content, budget=budget)] == without
    (_, less) = await read(reader, *content, budget=total - 1)
    assert less.vision.num_tokens <= without[1].num_tokens


async def test_planning_costs_nothing_however_many_frames_a_video_has(
    reader: MediaReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(num_frames: int, spec: VisionSpec) -> VisionLayout:
        asked.append(num_frames)
        return video_layout(num_frames, spec)

    monkeypatch.setattr("server.chat.media.video_layout", counted)
    await read(reader, video(base64_of(gif(200))), budget=9)
    assert len(asked) <= 18


@pytest.mark.parametrize("budget", range(2, 140, 9))
async def test_a_budget_of_tokens_is_kept(reader: MediaReader, budget: int) -> None:
    content = [image(png(200, 200)), video(base64_of(gif(12))), image(png(20, 160))]
    without = [medium.vision.num_tokens for medium in await read(reader, *content)]
    try:
        media = await read(reader, *content, budget=budget)
    except InvalidRequest as error:
        assert error.param == "media_options.visual_token_budget"
        assert budget < 5 + 5 + 4  # two thumbnails with their newlines, and one slow frame
        return
    tokens = [medium.vision.num_tokens for medium in media]
    assert sum(tokens) <= budget
    assert [medium.report.num_tokens for medium in media] == tokens
    assert all(few <= many for few, many in zip(tokens, without, strict=True))
    assert (tokens == without) == (sum(without) <= budget)
    again = [medium.vision.digest for medium in await read(reader, *content, budget=budget)]
    assert again == [medium.vision.digest for medium in media]


# What is kept -------------------------------------------------------------------------------------


async def test_finished_pixels_are_kept_for_who_sent_them(reader: MediaReader) -> None:
    data = png(77, 33)

    async def outcome(**more: Any) -> str:
        (medium,) = await read(reader, image(data), **more)
        assert medium.tiles.flags.writeable is False
        cache: str = medium.report.cache
        return cache

    assert await outcome(tenant="t3") == "miss"
    assert await outcome(tenant="t3") == "hit"
    assert await outcome(tenant="t4") == "miss"
    assert await outcome(tenant="t3", cache_salt="s") == "miss"
    assert await outcome(tenant="t3", cache_salt="s") == "hit"
    assert await outcome(tenant="t3", options=MediaOptions(detail="low")) == "miss"


async def test_a_failure_lets_go_of_its_files_at_once(reader: MediaReader, host: Host) -> None:
    """Without waiting for the garbage collector, which has no idea how large they are."""
    host.answers = {"https://example.com/a.png": png(9, 9)}
    good, bad = image("https://example.com/a.png"), image(png(60, 60)[:-40])
    gc.collect()
    gc.disable()
    try:
        before = num_memory_files()
        for content in ([bad], [good, bad], [bad | {"on_error": "skip"}], [good]):
            try:
                await read(reader, *content)
            except ServerError:
                pass
            else:
                assert content != [bad]
            for _ in range(500):  # a decoder may have to be replaced first
                if num_memory_files() == before:
                    break
                await asyncio.sleep(0.01)
            assert num_memory_files() == before
    finally:
        gc.enable()


def num_memory_files() -> int:
    links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("memfd:media" in link for link in links)
