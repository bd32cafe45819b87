"""What the first bytes of a file announce: decided here, before any decoder sees a byte.

The names are those of the libraries that decode: Pillow's of formats, FFmpeg's of demuxers.
"""

from __future__ import annotations

from typing import Final

_STILL_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"crx ")
_MOV_ATOMS: Final = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")


def sniff_image(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, among those accepted."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def sniff_video(data: bytes) -> str | None:
    """FFmpeg's name of the container that the first bytes announce, among those accepted."""
    if data[4:8] in _MOV_ATOMS:
        return None if data[4:12].startswith(b"ftyp") and data[8:12] in _STILL_BRANDS else "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return None
