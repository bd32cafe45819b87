"""Videos to chosen frames: counts, times, seeking, every oddity, and every refusal."""

from __future__ import annotations

import io
import math
import os
import socket
import struct
import threading
from bisect import bisect_right
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.errors import MediaError, MediaTooLarge, UnsupportedMediaType
from server.media.formats import sniff_video
from server.media.limits import DecodeLimits
from server.media.video import (
    DecodedVideo,
    choose_frames,
    decode_frame_list,
    decode_video,
    probe_frame_list,
    probe_video,
)
from tests.clips import (
    NUM_GREYS,
    SIZE,
    changing_size,
    clip,
    damaged,
    frame_number,
    grey_number,
    motion_jpeg,
    numbered_frame,
    recurring_greys,
    remuxed,
    without_frames,
    without_video,
)
from tests.limits import limits

CONFIG = limits()
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
CUES = b"\x1c\x53\xbb\x6b"  # the name of the element that is Matroska's index
MILLISECONDS = Fraction(1, 1000)


def every_400_ms(duration_s: float) -> list[float]:
    num_frames = min(108, max(1, math.floor(duration_s / 0.4 + 1e-6)))
    return [(index + 0.5) * duration_s / num_frames for index in range(num_frames)]


def decoded(data: bytes, *, config: DecodeLimits = CONFIG) -> DecodedVideo:
    return decode_video(data, config, sample_times=every_400_ms, fit=lambda frame: frame)


def numbers(video: DecodedVideo) -> list[int]:
    return [frame_number(frame) for frame in video.frames]


@pytest.mark.parametrize(
    ("num_frames", "num_chosen"),
    [(1, 1), (2, 2), (8, 8), (9, 9), (10, 10), (64, 64), (108, 108), (300, 108)],
)
def test_clips_at_two_frames_a_second(num_frames: int, num_chosen: int) -> None:
    video = decoded(clip(num_frames))
    assert len(video.frames) == len(video.times_s) == num_chosen
    assert video.duration_s == num_frames / 2
    expected = sorted({int(moment * 2) for moment in every_400_ms(num_frames / 2)})
    assert numbers(video) == expected
    assert list(video.times_s) == [number / 2 for number in expected]


@pytest.mark.parametrize("rate", [25, 30, Fraction(30000, 1001), 60, 10])
def test_frames_are_the_nearest_at_or_before_their_moment(rate: Fraction | int) -> None:
    video = decoded(clip(100, rate=rate))
    assert video.duration_s == pytest.approx(float(100 / Fraction(rate)))
    moments = every_400_ms(video.duration_s)
    assert numbers(video) == [math.floor(moment * rate + 1e-6) for moment in moments]
    for time_s, moment in zip(video.times_s, moments, strict=True):
        assert 0 <= moment - time_s + 1e-6 < 1 / rate + 1e-6


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "libx265"),
        ("mp4", "libsvtav1"),
        ("mp4", "mpeg4"),
        ("mov", "libx264"),
        ("mov", "mjpeg"),
        ("matroska", "libx264"),
        ("matroska", "libvpx-vp9"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("avi", "mjpeg"),
        ("avi", "libx264"),
        ("gif", "gif"),
    ],
)
def test_containers_and_codecs(container: str, codec: str) -> None:
    video = decoded(clip(20, container=container, codec=codec))
    assert numbers(video) == list(range(20))
    assert video.times_s == tuple(index / 2 for index in range(20))
    assert video.duration_s == 10.0
    scale = 2 if codec in ("libx265", "libsvtav1") else 1
    original = numbered_frame(3, scale=scale)
    assert (video.frames[3].size, video.frames[3].mode) == (original.size, "RGB")
    difference = np.asarray(video.frames[3]).astype(int) - np.asarray(original)
    assert np.abs(difference).mean() < (30 if codec == "gif" else 12)  # GIF has 256 colours


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("b_frames", [1, 3])
def test_b_frames(container: str, b_frames: int) -> None:
    video = decoded(clip(20, container=container, b_frames=b_frames))
    assert numbers(video) == list(range(20))
    assert video.times_s == tuple(index / 2 for index in range(20))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate(container: str) -> None:
    times = [0, 40, 1000, 1050, 1900, 5000, 5040, 9000]
    data = clip(8, times=times, time_base=MILLISECONDS, rate=25, container=container)
    video = decoded(data)
    assert 9.0 < video.duration_s < 10.3
    chosen = sorted({bisect_right(times, moment * 1000) - 1 for moment in moments_ms(video)})
    assert numbers(video) == chosen
    assert video.times_s == tuple(times[number] / 1000 for number in chosen)


def moments_ms(video: DecodedVideo) -> list[float]:
    return every_400_ms(video.duration_s)


def test_sound_and_cover_art_are_not_frames() -> None:
    for audio, cover in ((True, False), (True, True), (False, True)):
        video = decoded(clip(10, audio=audio, cover=cover))
        assert numbers(video) == list(range(10))


def test_fragmented_and_moov_first() -> None:
    assert numbers(decoded(clip(20, container_options=FRAGMENTED))) == list(range(20))
    plain = clip(20)
    assert plain.index(b"moov") > plain.index(b"mdat")  # the usual clip here has it last
    assert numbers(decoded(_moov_first(plain))) == list(range(20))


def _moov_first(data: bytes) -> bytes:
    """Move the index to the front and the chunk offsets with it."""
    boxes: list[bytes] = []
    offset = 0
    while offset < len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        boxes.append(data[offset : offset + length])
        offset += length
    (moov,) = (box for box in boxes if box[4:8] == b"moov")
    at = moov.index(b"stco") + 8
    (count,) = struct.unpack_from(">I", moov, at)
    offsets = struct.unpack_from(f">{count}I", moov, at + 4)
    moved = bytearray(moov)
    struct.pack_into(f">{count}I", moved, at + 4, *(value + len(moov) for value in offsets))
    rest = [box for box in boxes if box[4:8] != b"moov"]
    return rest[0] + bytes(moved) + b"".join(rest[1:])


@pytest.mark.parametrize("start", [0, 700, 90_000])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_the_first_frame_is_at_zero(start: int, container: str) -> None:
    times = [start + 500 * index for index in range(6)]
    video = decoded(clip(6, times=times, time_base=MILLISECONDS, container=container))
    assert numbers(video) == list(range(6))
    assert video.times_s == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert video.duration_s == 3.0


def test_an_edit_list_cuts_the_beginning() -> None:
    """Frames before the edit are decoded, because others need them, and never shown."""
    data = clip(8, times=[-1000 + 500 * index for index in range(8)], time_base=MILLISECONDS)
    assert b"elst" in data
    video = decoded(data)
    assert numbers(video) == [2, 3, 4, 5, 6, 7]
    assert video.times_s == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


@pytest.mark.parametrize(
    ("rotation", "turn"),
    [
        (0, None),
        (90, Image.Transpose.ROTATE_90),
        (-90, Image.Transpose.ROTATE_270),
        (180, Image.Transpose.ROTATE_180),
        (270, Image.Transpose.ROTATE_270),
        (80, Image.Transpose.ROTATE_90),  # to the nearest quarter turn
    ],
)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_rotation(rotation: int, turn: Image.Transpose | None, container: str) -> None:
    video = decoded(clip(3, rotation=rotation, container=container))
    straight = decoded(clip(3, container=container))
    for frame, expected in zip(video.frames, straight.frames, strict=True):
        upright = expected if turn is None else expected.transpose(turn)
        assert np.array_equal(np.asarray(frame), np.asarray(upright))


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
    ],
)
def test_mirrored(matrix: tuple[int, int, int, int], turn: Image.Transpose) -> None:
    a, b, c, d = (value << 16 for value in matrix)
    video = decoded(clip(2, display_matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30]))
    expected = decoded(clip(2)).frames[0].transpose(turn)
    assert np.array_equal(np.asarray(video.frames[0]), np.asarray(expected))


def test_a_change_of_size_keeps_the_first_frames_size() -> None:
    video = decoded(changing_size(8))
    assert {frame.size for frame in video.frames} == {SIZE}
    assert numbers(video) == list(range(8))


def test_a_time_used_twice() -> None:
    """Of frames shown at one moment the last is the one that is seen."""
    video = decoded(motion_jpeg([0, 500, 500, 1000, 1500, 1500, 2000]))
    assert numbers(video) == [0, 2, 3, 5, 6]
    assert video.times_s == (0.0, 0.5, 1.0, 1.5, 2.0)


def test_times_that_go_back_are_put_in_order() -> None:
    video = decoded(motion_jpeg([0, 1000, 500, 1500, 2500, 2000]))
    assert numbers(video) == [0, 1, 2, 3, 4, 5]
    assert video.times_s == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


def test_a_single_frame_without_a_duration() -> None:
    video = decoded(motion_jpeg([700]))
    assert (numbers(video), video.times_s) == ([0], (0.0,))


def test_each_frame_is_fitted_as_it_is_decoded() -> None:
    sizes: list[tuple[int, int]] = []

    def fit(frame: Image.Image) -> Image.Image:
        sizes.append(frame.size)
        assert frame.mode == "RGB"
        return frame.resize((7, 5))

    video = decode_video(clip(20, scale=2), CONFIG, sample_times=lambda _: [1.0, 4.0], fit=fit)
    assert sizes == [(SIZE[0] * 2, SIZE[1] * 2)] * 2  # those not chosen are never turned into RGB
    assert [frame.size for frame in video.frames] == [(7, 5)] * 2


def test_moments_come_from_the_caller() -> None:
    asked: list[float] = []

    def sample_times(duration_s: float) -> list[float]:
        asked.append(duration_s)
        return [0.0, 0.49, 0.5, 7.2, 7.3, 1e9]

    video = decode_video(clip(20), CONFIG, sample_times=sample_times, fit=lambda frame: frame)
    assert asked == [10.0]
    assert numbers(video) == [0, 1, 14, 19]
    assert video.times_s == (0.0, 0.5, 7.0, 9.5)


@given(
    times=st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted),
    wanted=st.lists(st.floats(-1, 120), max_size=40).map(sorted),
)
def test_choosing_frames(times: list[float], wanted: list[float]) -> None:
    chosen = choose_frames(times, wanted)
    assert chosen == sorted(set(chosen))
    allowed = set()
    for moment in wanted:
        before = [index for index, time in enumerate(times) if time <= moment + 1e-6]
        allowed.add(before[-1] if before else 0)
    assert set(chosen) == allowed


# What decoding everything gives, written separately and naively.


def everything(data: bytes) -> list[tuple[float, np.ndarray]]:
    with av.open(io.BytesIO(data)) as container:
        ticks_and_pixels = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    first = ticks_and_pixels[0][0]
    return [(float(tick - first), pixels) for tick, pixels in ticks_and_pixels]


def nearest(frames: list[tuple[float, np.ndarray]], moments: list[float]) -> list[np.ndarray]:
    chosen: list[int] = []
    for moment in moments:
        index = [i for i, (time, _) in enumerate(frames) if time <= moment + 1e-6][-1]
        if index not in chosen:
            chosen.append(index)
    return [frames[index][1] for index in chosen]


OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12"}
HIDDEN_FRAMES = {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good", "cpu-used": "5"}
SEEKING = {
    "short groups": partial(clip, 60, rate=10, gop=10),
    "one long group": partial(clip, 60, rate=10, gop=250),
    "keyframes only": partial(clip, 60, rate=10, gop=1),
    "B-frames": partial(clip, 60, rate=10, gop=10, b_frames=3),
    "B-frames in MKV": partial(clip, 60, rate=10, gop=10, b_frames=3, container="matroska"),
    "open groups": partial(clip, 60, rate=10, gop=12, b_frames=3, options=OPEN_GROUPS),
    "open groups in MKV": partial(
        clip, 60, rate=10, gop=12, b_frames=3, options=OPEN_GROUPS, container="matroska"
    ),
    "no true keyframes": partial(
        clip, 60, rate=10, gop=12, container="matroska", options={"intra-refresh": "1"}
    ),
    "HEVC open groups": partial(clip, 60, rate=10, gop=12, codec="libx265"),
    "VP8": partial(clip, 60, rate=10, gop=12, codec="libvpx", container="webm"),
    "VP8 with hidden frames": partial(
        clip, 60, rate=10, gop=30, codec="libvpx", container="webm", options=HIDDEN_FRAMES
    ),
    "VP9 with hidden frames": partial(
        clip, 60, rate=10, gop=20, codec="libvpx-vp9", container="webm", options=HIDDEN_FRAMES
    ),
    "MPEG-4": partial(clip, 60, rate=10, gop=12, b_frames=2, codec="mpeg4"),
    "MPEG-4 in AVI": partial(clip, 60, rate=10, gop=12, b_frames=2, codec="mpeg4", container="avi"),
    "fragments": partial(clip, 60, rate=10, gop=12, b_frames=2, container_options=FRAGMENTED),
    "GIF": partial(clip, 40, rate=10, codec="gif", container="gif"),
}


@pytest.mark.parametrize("name", SEEKING)
def test_seeking_changes_nothing(name: str) -> None:
    data = SEEKING[name]()
    frames = everything(data)
    rng = np.random.default_rng(len(name))
    for num_moments in (1, 1, 1, 3, 20):
        moments = sorted(rng.uniform(0, frames[-1][0], num_moments).tolist())
        video = decoded_at(data, moments)
        expected = nearest(frames, moments)
        assert len(video.frames) == len(expected)
        for frame, pixels in zip(video.frames, expected, strict=True):
            assert np.array_equal(np.asarray(frame), pixels)


def test_only_what_is_needed_is_decoded() -> None:
    """Seen from outside: a limit on decoded frames that only seeking keeps to."""
    config = limits(max_video_frames_decoded=30)
    for name in ("short groups", "B-frames", "B-frames in MKV"):
        video = decoded_at(SEEKING[name](), [1.05, 3.0, 5.95], config)
        assert numbers(video) == [10, 30, 59]
    one_group = SEEKING["one long group"]()
    assert numbers(decoded_at(one_group, [0.0, 2.9], config)) == [0, 29]
    with pytest.raises(MediaTooLarge, match="limit of 30"):
        decoded_at(one_group, [3.0], config)


def decoded_at(data: bytes, moments: list[float], config: DecodeLimits = CONFIG) -> DecodedVideo:
    return decode_video(data, config, sample_times=lambda _: moments, fit=lambda frame: frame)


# Damage.


def test_a_lost_packet_costs_its_frames_only() -> None:
    """All frames are intra-coded here, so that a lost one harms no other."""
    data = damaged(clip(20, codec="mjpeg", container="mov"), numbers=[4])
    video = decoded(data)
    assert {number for number in numbers(video) if number != 4} >= set(range(20)) - {4}
    assert list(video.times_s) == sorted(video.times_s)


def test_damage_in_a_group_is_bridged() -> None:
    data = damaged(clip(30, b_frames=2), numbers=[5, 20])
    video = decoded(data)
    assert 20 <= len(video.frames) <= 30
    assert numbers(video)[:3] == [0, 1, 2]
    assert list(video.times_s) == sorted(set(video.times_s))


def test_a_damaged_first_group_leaves_the_others() -> None:
    video = decoded(damaged(clip(36), numbers=[0]))
    assert numbers(video) == list(range(12, 36))
    assert video.times_s[0] == 6.0


def test_a_missing_keyframe_leaves_the_others() -> None:
    video = decoded(remuxed(clip(36), container="matroska", drop=[0]))
    assert numbers(video) == list(range(12, 36))


def test_seeking_into_damage_falls_back_to_everything() -> None:
    """The keyframe of the only group asked for is gone: what else decodes is served."""
    data = damaged(clip(36), numbers=[12])
    video = decoded_at(data, [6.2, 7.2])
    assert 1 <= len(video.frames) <= 2
    assert all(math.isfinite(time) and time <= 7.2 for time in video.times_s)


@pytest.mark.parametrize("container", ["matroska", "avi", "gif"])
@pytest.mark.parametrize("part", [0.5, 0.8, 0.95])
def test_a_truncated_file_is_served_as_far_as_it_goes(container: str, part: float) -> None:
    codec = {"gif": "gif", "avi": "mjpeg"}.get(container, "libx264")
    data = clip(40, container=container, codec=codec)
    video = decoded(data[: int(len(data) * part)])
    assert numbers(video) == list(range(len(video.frames)))
    assert 10 <= len(video.frames) < 40 or (container == "matroska" and video.frames)


def test_an_mp4_without_its_index_is_refused() -> None:
    data = clip(20)
    for part in (0.2, 0.6, 0.7, 0.9):
        with pytest.raises(MediaError) as caught:
            decoded(data[: int(len(data) * part)])
        assert caught.value.code == "video_parse_error"


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_random_damage_gives_frames_or_a_media_error(container: str, codec: str) -> None:
    data = clip(20, container=container, codec=codec)
    rng = np.random.default_rng(7)
    num_served = 0
    for _ in range(25):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 20))):
            changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            video = decoded(bytes(changed))
        except MediaError as error:
            assert error.status == 400 and error.kind == "video" and "0x" not in error.message
            continue
        num_served += 1
        assert video.frames
        assert all(math.isfinite(time) for time in video.times_s)
        assert list(video.times_s) == sorted(video.times_s)
    assert num_served > 0


# Refusals.


@pytest.mark.parametrize(
    "data",
    [without_frames(), without_video(), without_video(cover=True), clip(3)[:40]],
    ids=["no frames", "sound only", "sound with cover art", "header only"],
)
def test_nothing_to_show(data: bytes) -> None:
    with pytest.raises(MediaError) as caught:
        decoded(data)
    assert caught.value.code == "video_parse_error"


def test_frames_that_all_fail() -> None:
    data = damaged(clip(12, codec="mjpeg", container="mov"), numbers=range(12))
    with pytest.raises(MediaError, match="No frame of the video can be decoded") as caught:
        decoded(data)
    assert caught.value.code == "video_parse_error"
    data = clip(12, container="matroska")
    with av.open(io.BytesIO(data)) as source:
        packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    for payload in packets:
        data = data.replace(payload, b"\xff" * len(payload))
    with pytest.raises(MediaError) as caught:
        decoded(data)
    assert caught.value.code == "video_parse_error"


@pytest.mark.parametrize(("container", "codec"), [("matroska", "ffv1"), ("avi", "huffyuv")])
def test_other_codecs_are_refused(container: str, codec: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="codec") as caught:
        decoded(clip(3, container=container, codec=codec))
    assert caught.value.code == "unsupported_video_media_type"


@pytest.mark.parametrize("container", ["mpegts", "flv", "h264", "mpeg", "nut", "asf", "ivf"])
def test_other_containers_are_refused(container: str) -> None:
    codec = {"flv": "flv", "mpeg": "mpeg1video", "asf": "mpeg4", "ivf": "libvpx"}
    data = clip(3, rate=25, container=container, codec=codec.get(container, "libx264"))
    assert sniff_video(data) is None
    with pytest.raises(UnsupportedMediaType) as caught:
        decoded(data)
    assert caught.value.code == "unsupported_video_media_type"


@pytest.fixture
def canary(tmp_path: Path) -> str:
    """A named pipe that cannot be opened for reading without being seen."""
    path = tmp_path / "canary"
    os.mkfifo(path)
    return str(path)


def was_opened(canary: str) -> bool:
    try:
        os.close(os.open(canary, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_bytes_that_name_other_places_are_never_followed(canary: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts"
        for place in (canary, f"file://{canary}", url):
            texts = [
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{place}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile '{place}'\n",
                f"<?xml version='1.0'?><MPD><Period><BaseURL>{place}</BaseURL></Period></MPD>",
                "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
                f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{place}'/></svg>",
                f"[Script Info]\n{place}\n",
                f"1\n00:00:01,000 --> 00:00:02,000\n{place}\n",
                f"[playlist]\nFile1={place}\n",
            ]
            for text in texts:
                with pytest.raises(UnsupportedMediaType) as caught:
                    decoded(text.encode())
                assert caught.value.code == "unsupported_video_media_type"
                # the same, dressed as a container
                for magic in (b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\1\0AVI "):
                    with pytest.raises(MediaError):
                        decoded(magic + text.encode())
        assert not was_opened(canary)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_file_that_refers_to_another_is_not_followed(canary: str) -> None:
    """An MP4 may say that its samples lie elsewhere."""
    data = clip(3)
    at = data.index(b"url \0\0\0\1") - 4  # the data reference that says "in this file"
    name = canary.encode() + b"\0"
    reference = struct.pack(">I", 12 + len(name)) + b"url \0\0\0\0" + name
    changed = bytearray(data[:at] + reference + data[at + 12 :])
    grown = len(reference) - 12
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = changed.rindex(box, 0, at) - 4
        (length,) = struct.unpack_from(">I", changed, place)
        struct.pack_into(">I", changed, place, length + grown)
    thread = threading.Thread(target=_decode_quietly, args=(bytes(changed),))
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive() and not was_opened(canary)


def _decode_quietly(data: bytes) -> None:
    try:
        decoded(data)
    except MediaError:
        return


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_still_pictures_are_not_videos(brand: bytes) -> None:
    assert sniff_video(b"\0\0\0\x18ftyp" + brand + bytes(20)) is None


def test_limits() -> None:
    data = clip(20)  # 48 x 32 pixels, 10 s, 20 packets
    within = limits(
        max_video_pixels=48 * 32,
        max_video_duration_s=10.0,
        max_video_packets=20,
        max_video_frames_decoded=20,
    )
    assert len(decoded(data, config=within).frames) == 20
    for field, value, said in (
        ("max_video_pixels", 48 * 32 - 1, "48 x 32 pixels"),
        ("max_video_duration_s", 9.9, "lasts 10.0 s"),
        ("max_video_packets", 19, "more than 19 packets"),
        ("max_video_frames_decoded", 19, "limit of 19"),
        ("video_decode_timeout_s", 1e-9, "longer to decode"),
    ):
        with pytest.raises(MediaTooLarge, match=said) as caught:
            decoded(data, config=limits(**{field: value}))
        assert caught.value.code == "video_too_large"


def test_a_duration_that_the_header_hides() -> None:
    """A fragmented file's header knows no duration; the packets do."""
    times = [0, 500, 4_000_000]
    data = clip(3, times=times, time_base=MILLISECONDS, container_options=FRAGMENTED)
    with pytest.raises(MediaTooLarge, match="lasts"):
        decoded(data)


def test_a_frame_size_that_the_header_hides() -> None:
    """The limit holds for each frame, not only for what the file promises."""
    config = limits(max_video_pixels=SIZE[0] * SIZE[1])
    with pytest.raises(MediaTooLarge, match="pixels"):
        decoded(changing_size(8), config=config)


def test_a_monstrous_frame_is_not_made() -> None:
    """FFmpeg itself refuses what is far beyond the limit; the frames before it are served."""
    config = limits(max_video_pixels=SIZE[0] * SIZE[1])
    assert numbers(decoded(changing_size(8, factor=16), config=config)) == [0, 1, 2, 3]


@pytest.mark.parametrize("container", ["matroska", "webm"])
def test_unknown_duration(container: str) -> None:
    """A live recording: neither a duration nor an index in the file."""
    codec = "libvpx" if container == "webm" else "libx264"
    assert CUES in clip(20, container=container, codec=codec)
    data = clip(20, container=container, codec=codec, container_options={"live": "1"})
    assert CUES not in data
    with av.open(io.BytesIO(data)) as source:
        assert source.duration is None or source.streams.video[0].duration is None
    video = decoded(data)
    assert numbers(video) == list(range(20))
    assert video.duration_s == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_hundred_thousand_frames(container: str) -> None:
    """Few of them are decoded, and none is to probe them."""
    data = recurring_greys(100_000, container=container, rate=40)
    video = decoded(data)
    assert video.duration_s == 2500.0
    expected = [math.floor(moment * 40 + 1e-6) for moment in every_400_ms(2500.0)]
    assert len(expected) == 108
    assert video.times_s == tuple(number / 40 for number in expected)
    assert [grey_number(frame) for frame in video.frames] == [n % NUM_GREYS for n in expected]
    config = limits(video_decode_timeout_s=5.0)  # ten times what it takes
    probed = probe_video(data, config, sample_times=every_400_ms)
    assert (probed.size, probed.duration_s, probed.num_frames) == ((16, 16), 2500.0, 108)
    with pytest.raises(MediaTooLarge, match="more than 99999 packets") as caught:
        decoded(data, config=limits(max_video_packets=99_999))
    assert caught.value.code == "video_too_large"


def test_nothing_of_ffmpeg_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    decoded(damaged(clip(20), numbers=[3, 4]))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# Lists of frames, and what is known without decoding.


def listed(count: int) -> list[bytes]:
    formats = ("JPEG", "PNG", "WEBP", "BMP")
    return [saved(numbered_frame(index), formats[index % 4]) for index in range(count)]


def saved(picture: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


def of_list(
    frames: list[bytes],
    moments: list[float],
    *,
    fps: float = 1.0,
    config: DecodeLimits = CONFIG,
) -> DecodedVideo:
    return decode_frame_list(
        frames, config, fps=fps, sample_times=lambda _: moments, fit=lambda frame: frame
    )


def test_a_list_of_frames_is_a_video() -> None:
    video = of_list(listed(8), [0.5, 1.0, 1.9, 7.5, 99.0])
    assert numbers(video) == [0, 1, 7]
    assert (video.times_s, video.duration_s, video.size) == ((0.0, 1.0, 7.0), 8.0, SIZE)
    video = of_list(listed(8), [0.5, 1.0, 1.9, 7.5], fps=2.0)
    assert (numbers(video), video.times_s, video.duration_s) == (
        [1, 2, 3, 7],
        (0.5, 1, 1.5, 3.5),
        4,
    )


def test_listed_frames_that_are_not_chosen_are_not_decoded() -> None:
    frames = listed(4)
    frames[2] = b"no picture at all"
    assert numbers(of_list(frames, [0.0, 1.0, 3.0])) == [0, 1, 3]
    with pytest.raises(UnsupportedMediaType, match="Frame 3 of the video") as caught:
        of_list(frames, [0.0, 2.0])
    assert caught.value.code == "unsupported_video_media_type"
    frames[2] = frames[0][:-100]
    with pytest.raises(MediaError, match="Frame 3 of the video") as damage:
        of_list(frames, [0.0, 2.0])
    assert damage.value.code == "video_parse_error"


def test_listed_frames_of_other_sizes_take_the_first_ones() -> None:
    frames = listed(4)
    frames[1] = saved(numbered_frame(1, scale=3), "PNG")
    video = of_list(frames, [0.0, 1.0, 2.0])
    assert {frame.size for frame in video.frames} == {SIZE} and numbers(video) == [0, 1, 2]


def test_limits_of_lists() -> None:
    frames = listed(6)
    moments = [0.0, 1.0, 2.0]
    for field, value, said in (
        ("max_video_pixels", 48 * 32 - 1, "pixels"),
        ("max_video_duration_s", 5.9, "lasts 6.0 s"),
        ("max_video_packets", 5, "more than 5 packets"),
        ("max_video_frames_decoded", 2, "limit of 2"),
        ("video_decode_timeout_s", 1e-9, "longer to decode"),
    ):
        with pytest.raises(MediaTooLarge, match=said) as caught:
            of_list(frames, moments, config=limits(**{field: value}))
        assert caught.value.code == "video_too_large"
    with pytest.raises(MediaError, match="no frames"):
        of_list([], moments)


@pytest.mark.parametrize("moments", [[0.0], [1.0, 4.0], [2.0, 2.1, 2.2, 9.9], [9.9, 10.0]])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "gif"])
def test_probing_tells_what_decoding_would_find(moments: list[float], container: str) -> None:
    data = clip(20, container=container, codec="gif" if container == "gif" else "mpeg4")
    asked: list[float] = []

    def wanted(duration_s: float) -> list[float]:
        asked.append(duration_s)
        return moments

    video = probe_video(data, CONFIG, sample_times=wanted)
    decoded = decoded_at(data, moments)
    assert (video.size, video.duration_s) == (SIZE, decoded.duration_s) == (SIZE, 10.0)
    assert video.num_frames == len(decoded.frames)
    assert asked == [10.0]
    frames = probe_frame_list(listed(20), CONFIG, fps=2.0, sample_times=wanted)
    assert frames == video


def every_frame(duration_s: float) -> list[float]:
    """Of a clip of two frames a second."""
    return [index / 2 for index in range(max(4, round(duration_s * 2)))]


def test_probing_is_held_to_the_same_limits() -> None:
    for field, value in (
        ("max_video_pixels", 48 * 32 - 1),
        ("max_video_duration_s", 9.9),
        ("max_video_packets", 19),
    ):
        with pytest.raises(MediaTooLarge):
            probe_video(clip(20), limits(**{field: value}), sample_times=every_frame)
    # no frame is decoded
    unlimited = limits(max_video_frames_decoded=1)
    assert probe_video(clip(20), unlimited, sample_times=every_frame).num_frames == 20


def test_probing_without_usable_times() -> None:
    video = probe_video(motion_jpeg([0, 500, 500, 1000]), CONFIG, sample_times=every_frame)
    assert video.num_frames == 4
