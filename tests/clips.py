"""Small sample videos, made on the spot: every frame carries its own number as a pattern of blocks.

So a test can read from decoded pixels which frame it got, through any lossy codec.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

BLOCK = 8
COLUMNS, ROWS = 6, 4
SIZE = (COLUMNS * BLOCK, ROWS * BLOCK)  # (width, height)
RED = (200, 30, 30)
NUM_GREYS = 53


def numbered_frame(number: int, *, scale: int = 1) -> Image.Image:
    """Ten bits of a number as black and white blocks after a red one, top left."""
    blocks = np.full((ROWS, COLUMNS, 3), 128, dtype=np.uint8)
    flat = blocks.reshape(-1, 3)
    flat[0] = RED
    for bit in range(10):
        flat[1 + bit] = 235 if number >> bit & 1 else 20
    pixels = blocks.repeat(BLOCK * scale, axis=0).repeat(BLOCK * scale, axis=1)
    return Image.fromarray(pixels)


def frame_number(picture: Image.Image) -> int:
    """The number of an upright frame of any size."""
    width, height = picture.size
    pixels = np.asarray(picture).astype(int)
    number = 0
    for bit in range(10):
        row, column = divmod(1 + bit, COLUMNS)
        y, x = (2 * row + 1) * height // (2 * ROWS), (2 * column + 1) * width // (2 * COLUMNS)
        number |= int(pixels[y, x].mean() > 128) << bit
    return number


def clip(
    num_frames: int,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: Fraction | int = 2,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    gop: int = 12,
    b_frames: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int | None = None,
    display_matrix: Sequence[int] | None = None,
    audio: bool = False,
    cover: bool = False,
    scale: int = 1,
) -> bytes:
    """A clip of numbered frames; `times` are timestamps in `time_base` instead of a fixed rate."""
    if codec in ("libx265", "libsvtav1"):
        scale = max(scale, 2)  # x265 overruns its buffers on smaller frames, AV1 wants 64 pixels
    pixel_format = {"mjpeg": "yuvj420p", "gif": "rgb8", "huffyuv": "yuv422p"}.get(codec, "yuv420p")
    speed = {
        "libx264": {"preset": "ultrafast", "bf": str(b_frames), "threads": "1"},
        "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none"},
        "libsvtav1": {"preset": "12"},
        "libvpx": {"deadline": "realtime", "cpu-used": "8"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    }.get(codec, {})
    file = io.BytesIO()
    with av.open(file, "w", format=container, container_options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=speed | (options or {}))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = SIZE[0] * scale, SIZE[1] * scale
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if display_matrix is not None:
            stream.set_display_matrix(list(display_matrix))
        tone = _add_tone(output) if audio else None
        if cover:
            _add_cover(output)
        for index in range(num_frames):
            frame = av.VideoFrame.from_image(numbered_frame(index, scale=scale))
            frame = frame.reformat(format=pixel_format)
            frame.pts = index if times is None else times[index]
            frame.time_base = time_base or 1 / Fraction(rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if tone is not None:
            _encode_tone(output, tone, duration_s=num_frames / Fraction(rate))
    return file.getvalue()


def without_video(*, cover: bool = False) -> bytes:
    """Sound alone, if asked for with a picture of the record."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        tone = _add_tone(output)
        if cover:
            _add_cover(output)
        _encode_tone(output, tone, duration_s=Fraction(1))
    return file.getvalue()


def without_frames() -> bytes:
    """A video stream in the header and nothing in it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=2)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        output.start_encoding()
    return file.getvalue()


def motion_jpeg(times_ms: Sequence[int], *, factors: Sequence[int] = ()) -> bytes:
    """Frames stored in the order given, with any timestamps; each `factors` times as wide."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_mux_stream("mjpeg", rate=2, width=SIZE[0], height=SIZE[1])
        for index, time_ms in enumerate(times_ms):
            picture = numbered_frame(index)
            if factors:
                size = (factors[index] * SIZE[0], SIZE[1])
                picture = picture.resize(size, Image.Resampling.NEAREST)
            packet: av.Packet[av.VideoStream] = av.Packet(_jpeg(picture))
            packet.stream = stream  # type: ignore[assignment]
            packet.pts, packet.dts = time_ms, min(times_ms[index:])
            packet.time_base = Fraction(1, 1000)
            packet.is_keyframe = True
            output.mux(packet)
    return file.getvalue()


def changing_size(num_frames: int, *, factor: int = 2) -> bytes:
    """Motion JPEG whose later half has frames that many times as wide and of the same height."""
    times_ms = [500 * index for index in range(num_frames)]
    half = num_frames // 2
    return motion_jpeg(times_ms, factors=[1] * half + [factor] * (num_frames - half))


def recurring_greys(num_frames: int, *, container: str, rate: int) -> bytes:
    """Frames of 16 x 16, each a keyframe and evenly grey, of shades that take turns.

    Each shade is encoded once and its packet written again and again, so that many cost little.
    """
    shades = [np.full((16, 16, 3), 20 + 4 * shade, dtype=np.uint8) for shade in range(NUM_GREYS)]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        options = {"preset": "ultrafast", "crf": "1", "threads": "1"}
        stream = output.add_stream("libx264", rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        payloads: list[bytes] = []
        for pixels in shades:
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p")
            payloads.extend(bytes(packet) for packet in stream.encode(frame))
        payloads.extend(bytes(packet) for packet in stream.encode(None))
        assert len(payloads) == NUM_GREYS
        for index in range(num_frames):
            packet: av.Packet[av.VideoStream] = av.Packet(payloads[index % NUM_GREYS])
            packet.stream = stream
            packet.pts = packet.dts = index
            packet.duration = 1
            packet.time_base = Fraction(1, rate)
            packet.is_keyframe = True
            output.mux(packet)
    return file.getvalue()


def grey_number(picture: Image.Image) -> int:
    """Which of the recurring shades a frame has."""
    return round((float(np.asarray(picture).mean()) - 20) / 4)


def remuxed(data: bytes, *, container: str, drop: Sequence[int] = (), shift: int = 0) -> bytes:
    """The same packets in another container, some dropped, all moved in time."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(file, "w", format=container) as output,
    ):
        video = source.streams.video[0]
        stream = output.add_stream_from_template(video)
        for index, packet in enumerate(source.demux(video)):
            if packet.size == 0 or index in drop:
                continue
            assert packet.pts is not None and packet.dts is not None
            packet.pts += shift
            packet.dts += shift
            packet.stream = stream
            output.mux(packet)
    return file.getvalue()


def damaged(data: bytes, *, numbers: Sequence[int]) -> bytes:
    """The clip with the payload of those packets (in decoding order) overwritten."""
    changed = bytearray(data)
    with av.open(io.BytesIO(data)) as source:
        packets = [p for p in source.demux(source.streams.video[0]) if p.size]
    for number in numbers:
        packet = packets[number]
        assert packet.pos is not None
        payload = data.find(bytes(packet), max(0, packet.pos))
        assert payload >= 0
        # behind the length and the type of the unit, so that only its content is wrong
        for offset in range(payload + 6, payload + packet.size):
            changed[offset] = (changed[offset] ^ 0x5A) | 1
    return bytes(changed)


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def _add_tone(output: av.container.OutputContainer) -> av.AudioStream:
    tone = output.add_stream("aac", rate=8000, layout="mono")
    assert isinstance(tone, av.AudioStream)
    return tone


def _encode_tone(
    output: av.container.OutputContainer, tone: av.AudioStream, *, duration_s: Fraction
) -> None:
    num_samples = int(duration_s * 8000)
    wave = np.sin(np.arange(num_samples) * 0.3).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.sample_rate = 8000
    frame.pts = 0
    output.mux(tone.encode(frame))
    output.mux(tone.encode(None))


def _add_cover(output: av.container.OutputContainer) -> None:
    stream = output.add_mux_stream("mjpeg", rate=1, width=SIZE[0], height=SIZE[1])
    stream.disposition = Disposition.attached_pic
    output.start_encoding()
    packet: av.Packet[av.VideoStream] = av.Packet(_jpeg(numbered_frame(1023)))
    packet.stream = stream  # type: ignore[assignment]
    packet.pts = packet.dts = 0
    packet.time_base = Fraction(1, 1000)
    packet.is_keyframe = True
    output.mux(packet)
