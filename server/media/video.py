"""From the bytes of a video to the few upright RGB frames that are looked at, and their times.

A video is a file, or a list of pictures. The only file that meets FFmpeg (through PyAV). Pure
functions of (bytes, settings) and of two callables that know what the frames are for:
`sample_times` names the moments wanted, and `fit` makes a decoded frame small at once, so that
full-size frames are never held.

All packets are read first, without decoding them. Their timestamps say which frame belongs to
which moment, and their keyframe flags from where each can be decoded, so that only those stretches
are decoded. Where that knowledge turns out wrong (no timestamps, damage, hidden frames),
everything is decoded instead; the result is the same by construction.
"""

from __future__ import annotations

import io
import math
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final, TypeAlias, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideData
from av.stream import Discard, Disposition
from PIL import Image

from server.errors import MediaError, MediaTooLarge, ServerError, UnsupportedMediaType
from server.media.formats import sniff_video
from server.media.image import decode_image, probe_image
from server.media.limits import DecodeLimits

SampleTimes: TypeAlias = Callable[[float], Sequence[float]]
"""From a duration to the wanted moments in seconds after the first frame, ascending."""
Fit: TypeAlias = Callable[[Image.Image], Image.Image]
"""From a full-size RGB frame to what is kept of it."""
_Packet: TypeAlias = "av.Packet[av.VideoStream]"
_T = TypeVar("_T")

_CODECS: Final = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif"}
_INPUT_OPTIONS: Final = {
    # Without these FFmpeg probes playlist-like bytes into demuxers that open files and sockets.
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif",
    "protocol_whitelist": "none",
    # Decoders that may run already while the streams are being probed.
    "codec_whitelist": ",".join(sorted(_CODECS)),
}
_NOT_THE_VIDEO: Final = Disposition.attached_pic | Disposition.timed_thumbnails
_SAME_MOMENT_S: Final = 1e-6


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """The chosen frames in time order, fitted; times in seconds after the video's first frame."""

    frames: tuple[Image.Image, ...]
    times_s: tuple[float, ...]
    duration_s: float
    size: tuple[int, int]  # (width, height) of the first chosen frame before it was fitted


@dataclass(frozen=True, slots=True)
class ProbedVideo:
    """What is known of a video without decoding it.

    `size` is the (width, height) of the stored frames, which a turned video shows turned.
    `num_frames` is how many different frames are shown in the window that was asked about.
    """

    size: tuple[int, int]
    duration_s: float
    num_frames: int


def decode_video(
    data: bytes, limits: DecodeLimits, *, sample_times: SampleTimes, fit: Fit
) -> DecodedVideo:
    """For each wanted moment the nearest frame at or before it, no frame twice."""
    deadline = time.monotonic() + limits.video_decode_timeout_s
    with _opened(data, limits, deadline) as (stream, packets, container_format):
        return _decode(
            _Decoder(stream, packets, limits, deadline),
            limits,
            is_avi=container_format == "avi",
            sample_times=sample_times,
            fit=fit,
        )


def probe_video(data: bytes, limits: DecodeLimits, *, sample_times: SampleTimes) -> ProbedVideo:
    """What `decode_video` would find, by the packets' times, without decoding any."""
    deadline = time.monotonic() + limits.video_decode_timeout_s
    with _opened(data, limits, deadline) as (stream, packets, _):
        size = stream.codec_context.width, stream.codec_context.height
        shown = _shown_packets(packets)
        if shown is None:  # the times tell nothing: at most so many frames by the header's duration
            duration_s = float((stream.duration or 0) * Fraction(stream.time_base or 0))
            most = min(len(packets), len(sample_times(duration_s)))
            return ProbedVideo(size, duration_s, most)
        timeline = _timeline_of(packets, shown, Fraction(stream.time_base or 0))
        _check_duration(timeline.duration_s, limits)
        duration_s = float(timeline.duration_s)
        times_s = timeline.seconds(timeline.ticks)
        num_frames = len(choose_frames(times_s, sample_times(duration_s)))
        return ProbedVideo(size, duration_s, num_frames)


def decode_frame_list(
    frames: Sequence[bytes],
    limits: DecodeLimits,
    *,
    fps: float,
    sample_times: SampleTimes,
    fit: Fit,
) -> DecodedVideo:
    """The same of a video that came as a list of pictures, so many for each second.

    Only those that are chosen are decoded. One that cannot be is refused: here nothing was lost on
    the way, as it is in a damaged file.
    """
    duration = _check_frame_list(frames, limits, fps)
    times_s = [index / fps for index in range(len(frames))]
    chosen = choose_frames(times_s, sample_times(float(duration)))
    if len(chosen) > limits.max_video_frames_decoded:
        raise _too_many_decoded(limits)
    deadline = time.monotonic() + limits.video_decode_timeout_s
    kept = _Kept(fit)
    for index in chosen:
        _check_deadline(deadline, limits)
        kept.add(_listed_frame(index, frames[index], limits), times_s[index])
    return kept.video(duration)


def probe_frame_list(
    frames: Sequence[bytes], limits: DecodeLimits, *, fps: float, sample_times: SampleTimes
) -> ProbedVideo:
    """The same of a list; of the first picture the header is read."""
    duration_s = float(_check_frame_list(frames, limits, fps))
    size = _of_frame(0, lambda: probe_image(frames[0], _limits_of_frame(limits)))
    times_s = [index / fps for index in range(len(frames))]
    return ProbedVideo(size, duration_s, len(choose_frames(times_s, sample_times(duration_s))))


@contextmanager
def _opened(
    data: bytes, limits: DecodeLimits, deadline: float
) -> Iterator[tuple[av.VideoStream, list[_Packet], str]]:
    """The video stream of a file, its packets, and the file's container.

    Whatever goes wrong until it is closed again is told as damage, unless we said it ourselves.
    """
    container_format = sniff_video(data)
    if container_format is None:  # decided before FFmpeg sees a byte
        raise UnsupportedMediaType(
            "The video is in no accepted container: MP4, MOV, MKV, WebM, AVI or GIF.", kind="video"
        )
    try:
        with av.open(
            io.BytesIO(data),
            mode="r",
            format=container_format,
            options=_INPUT_OPTIONS,
            metadata_errors="replace",
            timeout=limits.video_decode_timeout_s,
        ) as container:
            stream = _video_stream(container)
            _check_header(container, stream, limits)
            yield stream, _read_packets(container, stream, limits, deadline), container_format
    except ServerError:
        raise
    except Exception as error:  # decoders raise nearly anything; the text is not for the caller
        _check_deadline(deadline, limits)  # FFmpeg's own time-out reads like damage
        raise MediaError("The video is damaged or incomplete.", kind="video") from error


def _check_frame_list(frames: Sequence[bytes], limits: DecodeLimits, fps: float) -> Fraction:
    """The duration in seconds of a list that is within the limits."""
    if not frames:
        raise MediaError("The video has no frames.", kind="video")
    if len(frames) > limits.max_video_packets:
        raise _too_many_packets(limits)
    duration = len(frames) / Fraction(fps)
    _check_duration(duration, limits)
    return duration


def _listed_frame(index: int, data: bytes, limits: DecodeLimits) -> Image.Image:
    return _of_frame(index, lambda: decode_image(data, _limits_of_frame(limits)).pixels)


def _limits_of_frame(limits: DecodeLimits) -> DecodeLimits:
    return replace(limits, max_image_pixels=min(limits.max_image_pixels, limits.max_video_pixels))


def _of_frame(index: int, read: Callable[[], _T]) -> _T:
    """What is wrong with a picture of a list is wrong with the video."""
    try:
        return read()
    except MediaError as error:
        message = f"Frame {index + 1} of the video: {error.message}"
        raise type(error)(message, kind="video") from error


def choose_frames(times_s: Sequence[float], wanted_s: Sequence[float]) -> list[int]:
    """Ascending indices into `times_s` (ascending): the nearest at or before each moment, once."""
    chosen: list[int] = []
    for moment in wanted_s:
        index = max(0, bisect_right(times_s, moment + _SAME_MOMENT_S) - 1)
        if not chosen or index > chosen[-1]:
            chosen.append(index)
    return chosen


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first stream of an accepted codec that is a video; cover art is not."""
    streams = [s for s in container.streams.video if not s.disposition & _NOT_THE_VIDEO]
    if not streams:
        raise MediaError("The file has no video stream.", kind="video")
    # there is no codec context where FFmpeg does not know the codec
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise MediaError("The video's codec is unknown, or the file is incomplete.", kind="video")
    for stream in known:
        if stream.codec_context.codec.name in _CODECS:
            return stream
    raise UnsupportedMediaType(
        "The video's codec is not accepted; accepted are H.264, HEVC, VP8, VP9, AV1, MPEG-4, "
        "Motion JPEG and GIF.",
        kind="video",
    )


def _check_header(
    container: av.container.InputContainer, stream: av.VideoStream, limits: DecodeLimits
) -> None:
    """Refuse by what the header says, before anything is decoded. It need not be the truth."""
    _check_frame_size(stream.codec_context.width, stream.codec_context.height, limits)
    if stream.duration is not None and stream.time_base is not None:
        _check_duration(stream.duration * stream.time_base, limits)
    elif container.duration is not None:
        _check_duration(Fraction(container.duration, av.time_base), limits)


def _check_frame_size(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_video_pixels:
        raise MediaTooLarge(
            f"The video's frames are {width} x {height} pixels; the limit is "
            f"{limits.max_video_pixels} pixels.",
            kind="video",
        )


def _check_duration(duration_s: Fraction, limits: DecodeLimits) -> None:
    if duration_s > limits.max_video_duration_s:
        raise MediaTooLarge(
            f"The video lasts {float(duration_s):.1f} s; the limit is "
            f"{limits.max_video_duration_s:g} s.",
            kind="video",
        )


def _check_deadline(deadline: float, limits: DecodeLimits) -> None:
    if time.monotonic() > deadline:
        raise MediaTooLarge(
            f"The video takes longer to decode than {limits.video_decode_timeout_s:g} s.",
            kind="video",
        )


def _read_packets(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    limits: DecodeLimits,
    deadline: float,
) -> list[_Packet]:
    """The stream's packets in decoding order, as far as the file can be read."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    packets: list[_Packet] = []
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed)
        except (StopIteration, av.FFmpegError):  # a truncated file is served as far as it goes
            break
        _check_deadline(deadline, limits)
        # an empty packet would end the decoding; a cut one would give half a frame
        if packet.size == 0 or packet.is_corrupt:
            continue
        if len(packets) == limits.max_video_packets:
            raise _too_many_packets(limits)
        packets.append(packet)
    if not packets:
        raise MediaError("The video has no frames.", kind="video")
    return packets


def _too_many_packets(limits: DecodeLimits) -> MediaTooLarge:
    return MediaTooLarge(
        f"The video has more than {limits.max_video_packets} packets.", kind="video"
    )


def _too_many_decoded(limits: DecodeLimits) -> MediaTooLarge:
    return MediaTooLarge(
        "More frames of the video would have to be decoded than the limit of "
        f"{limits.max_video_frames_decoded}.",
        kind="video",
    )


@dataclass(frozen=True, slots=True)
class _Timeline:
    """When the frames of a video are shown, first to last, in ticks of the stream's time base."""

    ticks: tuple[int, ...]
    last_duration: int
    time_base: Fraction

    @property
    def duration_s(self) -> Fraction:
        """From the first frame to the end of the last, which at least lasts as the average does."""
        span = self.ticks[-1] - self.ticks[0]
        last: int | Fraction = self.last_duration
        if last <= 0 and len(self.ticks) > 1:
            last = Fraction(span, len(self.ticks) - 1)
        return (span + max(last, 0)) * self.time_base

    def seconds(self, ticks: Sequence[int]) -> list[float]:
        numerator, denominator = self.time_base.as_integer_ratio()
        return [(tick - self.ticks[0]) * numerator / denominator for tick in ticks]


def _shown_packets(packets: list[_Packet]) -> list[int] | None:
    """Indices of the packets whose frames are shown, in the order of their presentation times.

    None where those times are not a frame's name: unknown or used twice. An edit list discards
    packets that are needed for decoding only.
    """
    times: dict[int, int] = {}
    for index, packet in enumerate(packets):
        if packet.is_discard:
            continue
        if packet.pts is None or packet.pts in times:
            return None
        times[packet.pts] = index
    return [times[tick] for tick in sorted(times)] or None


def _timeline_of(packets: list[_Packet], shown: list[int], time_base: Fraction) -> _Timeline:
    return _Timeline(
        ticks=tuple(packets[index].pts or 0 for index in shown),
        last_duration=packets[shown[-1]].duration or 0,
        time_base=time_base,
    )


def _stretches(packets: list[_Packet], wanted: Sequence[int]) -> list[range]:
    """The least of the packets that decodes the wanted ones, each stretch from a keyframe on.

    A frame that is shown before a keyframe may need what lies before that keyframe, even where it
    is stored after it (open groups of pictures). Where no keyframe serves, from the first packet.
    """
    last_keyframe: list[int] = []
    for index, packet in enumerate(packets):
        last_keyframe.append(
            index if packet.is_keyframe else last_keyframe[-1] if last_keyframe else -1
        )
    spans: list[tuple[int, int]] = []
    for index in wanted:
        start = last_keyframe[index]
        shown_at = packets[index].pts or 0
        while start >= 0 and not _is_at_or_before(packets[start], shown_at):
            start = last_keyframe[start - 1] if start else -1
        spans.append((max(start, 0), index + 1))
    stretches: list[range] = []
    for start, stop in sorted(spans):
        if stretches and start <= stretches[-1].stop:
            stretches[-1] = range(stretches[-1].start, max(stop, stretches[-1].stop))
        else:
            stretches.append(range(start, stop))
    return stretches


def _is_at_or_before(packet: _Packet, tick: int) -> bool:
    return packet.pts is not None and packet.pts <= tick


class _Decoder:
    """One stream's packets, decodable in ascending stretches. `num_damaged` counts trouble."""

    def __init__(
        self,
        stream: av.VideoStream,
        packets: list[_Packet],
        limits: DecodeLimits,
        deadline: float,
    ) -> None:
        self.packets = packets
        self.time_base = Fraction(stream.time_base or 0)
        self.num_damaged = 0
        self._limits = limits
        self._deadline = deadline
        self._context = stream.codec_context
        self._context.thread_count = 1
        # Sizes are checked frame by frame; this stops FFmpeg from making a monstrous one first.
        # Four times the limit, because it counts the padding that decoders add.
        self._context.options = {"max_pixels": str(4 * limits.max_video_pixels)}

    def frames(self, stretches: Sequence[range]) -> Iterator[av.VideoFrame]:
        """The frames of those packets in the order they are shown; undecodable ones are missing."""
        if sum(map(len, stretches)) > self._limits.max_video_frames_decoded:
            raise _too_many_decoded(self._limits)
        for stretch in stretches:
            self._context.flush_buffers()
            for index in stretch:
                yield from self._decoded(self.packets[index])
            yield from self._decoded(None)

    def _decoded(self, packet: _Packet | None) -> list[av.VideoFrame]:
        _check_deadline(self._deadline, self._limits)
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError:
            self.num_damaged += 1
            return []
        for frame in frames:
            _check_frame_size(frame.width, frame.height, self._limits)
            self.num_damaged += frame.is_corrupt
        return frames


class _Kept:
    """The frames chosen so far, fitted."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._size: tuple[int, int] | None = None
        self._frames: list[Image.Image] = []
        self._times_s: list[float] = []

    def add(self, picture: Image.Image, time_s: float) -> None:
        """`picture` is upright RGB of any size."""
        if self._size is None:
            self._size = picture.size
        elif picture.size != self._size:  # the size may change in mid-stream
            picture = picture.resize(self._size, Image.Resampling.BICUBIC)
        self._frames.append(self._fit(picture))
        self._times_s.append(time_s)

    def video(self, duration_s: Fraction) -> DecodedVideo:
        if self._size is None:
            raise MediaError("No frame of the video can be decoded.", kind="video")
        return DecodedVideo(
            tuple(self._frames), tuple(self._times_s), float(duration_s), self._size
        )


def _decode(
    decoder: _Decoder,
    limits: DecodeLimits,
    *,
    is_avi: bool,
    sample_times: SampleTimes,
    fit: Fit,
) -> DecodedVideo:
    """Decode what the packets' times call for; everything, where they cannot be relied on."""
    shown = _shown_packets(decoder.packets)
    if shown is None:
        return _decode_everything(decoder, None, limits, sample_times=sample_times, fit=fit)
    timeline = _timeline_of(decoder.packets, shown, decoder.time_base)
    _check_duration(timeline.duration_s, limits)
    times_s = timeline.seconds(timeline.ticks)
    chosen = choose_frames(times_s, sample_times(float(timeline.duration_s)))
    kept = _Kept(fit)
    num_decoded = 0
    if is_avi:
        # AVI stores no presentation times: FFmpeg's are in the order of decoding, right as a set
        # and wrong as names. So frames are counted.
        wanted = {index: times_s[index] for index in chosen}
        for num_decoded, frame in enumerate(decoder.frames([range(len(decoder.packets))]), 1):
            if num_decoded - 1 in wanted:
                kept.add(_upright_rgb(frame), wanted.pop(num_decoded - 1))
        is_as_planned = num_decoded == len(decoder.packets)
    else:
        wanted = {timeline.ticks[index]: times_s[index] for index in chosen}
        stretches = _stretches(decoder.packets, [shown[index] for index in chosen])
        # A packet marked as a keyframe may be none (H.264 with gradual refresh); then its own
        # frame is not shown when decoding begins there.
        entries = {decoder.packets[stretch.start].pts for stretch in stretches if stretch.start}
        is_in_order, previous = True, -math.inf
        for frame in decoder.frames(stretches):
            if frame.pts is None or frame.pts <= previous:
                is_in_order = False
                break
            previous = frame.pts
            if frame.key_frame:
                entries.discard(frame.pts)
            if frame.pts in wanted:
                kept.add(_upright_rgb(frame), wanted.pop(frame.pts))
        is_as_planned = is_in_order and not wanted and not entries
    if is_as_planned and not decoder.num_damaged:
        return kept.video(timeline.duration_s)
    return _decode_everything(decoder, timeline, limits, sample_times=sample_times, fit=fit)


def _decode_everything(
    decoder: _Decoder,
    timeline: _Timeline | None,
    limits: DecodeLimits,
    *,
    sample_times: SampleTimes,
    fit: Fit,
) -> DecodedVideo:
    """Two passes over all packets: for the times of what decodes, then for the frames chosen."""
    everything = [range(len(decoder.packets))]
    ticks: list[int] = []
    last_duration = 0
    for frame in decoder.frames(everything):
        after_previous = ticks[-1] + max(last_duration, 1) if ticks else 0
        ticks.append(after_previous if frame.pts is None else frame.pts)
        last_duration = frame.duration or 0
    if not ticks:
        raise MediaError("No frame of the video can be decoded.", kind="video")
    ticks.sort()  # shown in this order, whatever the file says
    if timeline is None:
        timeline = _Timeline(tuple(ticks), last_duration, decoder.time_base)
        _check_duration(timeline.duration_s, limits)
    times_s = timeline.seconds(ticks)
    chosen = choose_frames(times_s, sample_times(float(timeline.duration_s)))
    wanted = {index: times_s[index] for index in chosen}
    kept = _Kept(fit)
    for index, frame in enumerate(decoder.frames(everything)):
        if index in wanted:
            kept.add(_upright_rgb(frame), wanted.pop(index))
        if not wanted:
            break
    return kept.video(timeline.duration_s)


def _upright_rgb(frame: av.VideoFrame) -> Image.Image:
    """8-bit RGB: alpha on white, turned by the display matrix; pixels count as square."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = Image.fromarray(_converted(frame, "rgba"))
        picture = Image.new("RGB", pixels.size, (255, 255, 255))
        picture.paste(pixels, mask=pixels.getchannel("A"))
    else:
        picture = Image.fromarray(_converted(frame, "rgb24"))
    side_data: Mapping[str, object] = frame.side_data  # its type names one key only
    matrix = side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return picture
    # x' = a x + c y, y' = b x + d y, with y downwards; taken to the nearest quarter turn
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    is_transposed = abs(b) + abs(c) > abs(a) + abs(d)
    if is_transposed:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    if (c if is_transposed else a) < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if (b if is_transposed else d) < 0:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


def _converted(frame: av.VideoFrame, pixel_format: str) -> npt.NDArray[np.uint8]:
    # The number of threads is by default that of the machine; where it decodes none may be started.
    return frame.reformat(format=pixel_format, threads=1).to_ndarray().astype(np.uint8, copy=False)
