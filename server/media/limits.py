"""What decoding one picture or video may cost, as plain values.

They travel to the processes that decode, so they hold nothing else of the settings: no address, no
credential. Must not know where they come from.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Named and meant like the settings of the same names."""

    max_image_pixels: int
    max_image_side: int
    max_image_aspect: float
    max_video_pixels: int
    max_video_duration_s: float
    max_video_packets: int
    max_video_frames_decoded: int
    image_decode_timeout_s: float
    video_decode_timeout_s: float
    image_decode_memory_bytes: int
    video_decode_memory_bytes: int
    jpeg_reduced_scale: bool
