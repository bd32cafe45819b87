"""From the bytes of a picture to upright 8-bit RGB pixels (Pillow).

The one rule of conversion, whatever the file's mode: samples are scaled to 8 bits (of deeper ones
the high byte is kept), the EXIF orientation is applied, every kind of transparency is flattened on
white, colour profiles are ignored (CMYK is converted without one), and of an animation the first
frame is taken.

Whether a BMP is transparent its header says, as viewers have it: only a 32-bit one with bit masks,
one of them for alpha (BITMAPV3 to V5), and only if not all of it is zero. The fourth byte of every
other 32-bit pixel is padding, whatever it holds.

Pure functions of (bytes, settings); must not know where bytes come from or what pixels are for.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from PIL import Image

from server.errors import MediaError, MediaTooLarge, UnsupportedMediaType
from server.media.formats import sniff_image
from server.media.limits import DecodeLimits

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""
NeededSize: TypeAlias = Callable[[Size], Size]
"""From a picture's upright size to the largest size it will be resized to, in each direction."""

_ORIENTATION_TAG: Final = 0x0112
_WHITE: Final = (255, 255, 255)
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IS_TURNED: Final = (5, 6, 7, 8)  # the orientations that exchange width and height
# How many times as wide and as high as needed a picture must be after it was decoded at a reduced
# scale. An antialiased resize by two or more averages over several pixels of its source, and the
# reduced scale is such an average itself; below two it would interpolate between averages, and the
# picture would be softer than the model's own preprocessing makes it.
_LEAST_REDUCED: Final = 2
_MAX_OPEN_PIXELS: Final = 2 * 89_478_485  # where Pillow's own bomb check begins to raise


# Samples a pixel by colour type, and the passes of an interlaced picture (PNG 11.2.2 and 8.2).
_PNG_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7: Final = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
# Where a BMP's headers hold what is read here, and the headers that can hold a mask for alpha.
_BMP_PIXELS_AT, _BMP_HEADER_AT, _BMP_BITS_AT = slice(10, 14), slice(14, 18), slice(28, 30)
_BMP_COLOURS_AT, _BMP_ALPHA_MASK_AT = slice(46, 50), slice(66, 70)
_BMP_WITH_ALPHA_MASK: Final = (56, 108, 124)


@dataclass(frozen=True, slots=True)
class Picture:
    """Upright pixels in mode RGB, and the size that they stand for where they are reduced."""

    pixels: Image.Image
    size: Size


def decode_image(
    data: bytes, limits: DecodeLimits, *, needed_size: NeededSize | None = None
) -> Picture:
    """The picture, upright, in mode RGB.

    A JPEG far larger than `needed_size` says is decoded at a half, a quarter or an eighth of its
    scale, which costs the less.
    """
    image_format = _accepted_format(data)
    if image_format == "JPEG" and not _has_jpeg_end(data):
        raise MediaError("The image is damaged or incomplete.", kind="image")
    if image_format == "BMP":
        data = _with_long_palette(data)
    try:
        with Image.open(io.BytesIO(data), formats=(image_format,)) as image:
            _check_size(image.size, limits)
            stored_size = image.size
            if image_format == "JPEG" and needed_size is not None and limits.jpeg_reduced_scale:
                _reduce(image, needed_size)
            image.load()
            if image_format == "PNG":
                if _may_lack_rows(image, data) and not _has_all_png_rows(data, image.size):
                    raise MediaError("The image is damaged or incomplete.", kind="image")
                _scale_transparent_colour(image, bit_depth=data[24])
            orientation = _orientation(image)
            if image_format == "BMP" and image.mode == "RGBA" and not _has_bmp_alpha(image, data):
                rgb = image.convert("RGB")
            else:
                rgb = to_rgb(image)
        upright = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
        return Picture(upright, _upright_size(stored_size, orientation))
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits) from error
    except Exception as error:  # decoders raise nearly anything; the text is not for the caller
        raise MediaError("The image is damaged or incomplete.", kind="image") from error


def probe_image(data: bytes, limits: DecodeLimits) -> Size:
    """The upright size that the header tells, within the same limits; no pixel is decoded.

    Only a PNG with metadata behind its pixels is decoded: its orientation may be there.
    """
    image_format = _accepted_format(data)
    try:
        with Image.open(io.BytesIO(data), formats=(image_format,)) as image:
            _check_size(image.size, limits)
            if image_format == "PNG" and "exif" not in image.info and not _may_be_turned(data):
                return image.size
            return _upright_size(image.size, _orientation(image))
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits) from error
    except Exception as error:
        raise MediaError("The image is damaged or incomplete.", kind="image") from error


def _accepted_format(data: bytes) -> str:
    image_format = sniff_image(data)
    if image_format is None:
        raise UnsupportedMediaType(
            "The image is in no accepted format: JPEG, PNG, WebP, GIF or BMP.", kind="image"
        )
    return image_format


def _reduce(image: Image.Image, needed_size: NeededSize) -> None:
    orientation = _orientation(image)
    width, height = needed_size(_upright_size(image.size, orientation))
    if orientation in _IS_TURNED:
        width, height = height, width
    image.draft(None, (_LEAST_REDUCED * width, _LEAST_REDUCED * height))


def _upright_size(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation in _IS_TURNED else size


def _may_be_turned(data: bytes) -> bool:
    """Whether a PNG holds metadata that Pillow reads an orientation from."""
    return any(name in data for name in (b"eXIf", b"Raw profile type exif", b"com.adobe.xmp"))


def _has_jpeg_end(data: bytes) -> bool:
    """Whether an end marker follows the first scan. The decoder fills what is missing with grey.

    Within a scan 0xFF is always followed by a zero or a restart marker, so none is found there.
    """
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xda":
            return data.find(b"\xff\xd9", position) >= 0
        if marker == b"\xff":  # a fill byte before the marker
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # no scan where one should be: the decoder says what is wrong


def _may_lack_rows(image: Image.Image, data: bytes) -> bool:
    """Rows that no data came for are zeros; in an interlaced picture they lie among the others."""
    width, height = image.size
    is_interlaced = data[28] == 1
    last_row = image.crop((0, height - 1, width, height))
    return is_interlaced or last_row.getbbox(alpha_only=False) is None


def _has_all_png_rows(data: bytes, size: tuple[int, int]) -> bool:
    """Whether the compressed stream holds every row: the decoder is content with fewer."""
    bits = data[24] * _PNG_CHANNELS[data[25]]
    expected = 0
    for left, top, right_step, down_step in _ADAM7 if data[28] == 1 else ((0, 0, 1, 1),):
        columns = -(-(size[0] - left) // right_step)
        rows = -(-(size[1] - top) // down_step)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * bits // 8))
    stream, found, position = zlib.decompressobj(), 0, 8
    while position < len(data) and found < expected:
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            piece = data[position + 8 : position + 8 + length]
            while piece and not stream.eof:  # never more in memory than one piece at a time
                found += len(stream.decompress(piece, 1 << 20))
                piece = stream.unconsumed_tail
        position += 12 + length
    return found >= expected


def _has_bmp_alpha(image: Image.Image, data: bytes) -> bool:
    """Whether the fourth channel of a 32-bit BMP means alpha. `image` is in mode RGBA."""
    if int.from_bytes(data[_BMP_HEADER_AT], "little") not in _BMP_WITH_ALPHA_MASK:
        return False
    return any(data[_BMP_ALPHA_MASK_AT]) and image.getchannel("A").getbbox() is not None


def _with_long_palette(data: bytes) -> bytes:
    """A BMP of 4 or 8 bits a pixel whose palette is short and grey, with a palette of 256 colours.

    Pillow takes a palette that looks like a plain scale of greys for none at all, and then reads
    one bit or one byte a pixel, whatever the depth: of a picture in black and white only black is
    left. Padded with black it is no scale any more.
    """
    header_size, bits, num_colours, pixels_at = (
        int.from_bytes(data[place], "little")
        for place in (_BMP_HEADER_AT, _BMP_BITS_AT, _BMP_COLOURS_AT, _BMP_PIXELS_AT)
    )
    if not 40 <= header_size <= 124 or bits not in (4, 8):
        return data
    num_colours = num_colours or 1 << bits
    if num_colours > (2 if bits == 8 else 16):
        return data
    scale = (0, 255) if num_colours == 2 else range(num_colours)
    start, stop = 14 + header_size, 14 + header_size + 4 * num_colours
    palette = data[start:stop]
    if any(palette[4 * i : 4 * i + 3] != bytes([level] * 3) for i, level in enumerate(scale)):
        return data
    headers = bytearray(data[:start])
    headers[_BMP_COLOURS_AT] = (256).to_bytes(4, "little")
    headers[_BMP_PIXELS_AT] = (start + 4 * 256).to_bytes(4, "little")
    # where it is not said where the pixels lie, they follow the palette
    pixels = data[pixels_at if pixels_at > start else stop :]
    return bytes(headers) + palette.ljust(4 * 256, b"\0") + pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB by the rule at the head of this file."""
    transparent = image.info.get("transparency")
    match image.mode:
        case "RGB" if transparent is None:
            return image.copy()
        case "RGB":
            pixels = np.array(image)
            pixels[(pixels == np.asarray(transparent)).all(axis=-1)] = _WHITE
            return Image.fromarray(pixels)
        case "1" | "L" | "I;16" | "I;16L" | "I;16B" | "I;16N" | "I" | "F":
            return _grey_to_rgb(image, transparent)
        case "P" | "PA" | "LA" | "La" | "RGBA" | "RGBa":
            if image.mode == "P" and transparent is None and not image.has_transparency_data:
                return image.convert("RGB")
            rgba = image.convert("RGBA")
            white = Image.new("RGB", image.size, _WHITE)
            white.paste(rgba, mask=rgba.getchannel("A"))
            return white
        case _:  # CMYK, YCbCr, LAB, HSV, RGBX: no transparency
            return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, transparent: object) -> Image.Image:
    samples = np.asarray(image)
    if image.mode == "1":
        grey = np.where(samples, 255, 0).astype(np.uint8)
        is_transparent = grey == transparent
    else:
        is_transparent = samples == transparent
        if image.mode == "L":
            grey = samples.copy()
        elif image.mode == "F":  # floats have no agreed range: they are taken as 0 to 255
            grey = np.rint(np.clip(np.nan_to_num(samples), 0, 255)).astype(np.uint8)
        else:
            grey = (np.clip(samples.astype(np.int32), 0, 65_535) >> 8).astype(np.uint8)
    if transparent is not None:
        grey[is_transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _check_size(size: tuple[int, int], limits: DecodeLimits) -> None:
    """Refuse by the header, before any pixel is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError("The image has no pixels.", kind="image")
    if width * height > limits.max_image_pixels:
        raise _too_many_pixels(limits)
    if max(size) > limits.max_image_side:
        raise MediaTooLarge(
            f"The image is {width} x {height} pixels; a side may have {limits.max_image_side}.",
            kind="image",
        )
    if max(size) > limits.max_image_aspect * min(size):
        raise MediaTooLarge(
            f"The image is {width} x {height} pixels; its longer side may be at most "
            f"{limits.max_image_aspect:g} times its shorter.",
            kind="image",
        )


def _too_many_pixels(limits: DecodeLimits) -> MediaTooLarge:
    limit = min(limits.max_image_pixels, _MAX_OPEN_PIXELS)
    return MediaTooLarge(f"The image has more than {limit} pixels.", kind="image")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; a viewer shows a picture with unreadable EXIF as it lies."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _scale_transparent_colour(image: Image.Image, *, bit_depth: int) -> None:
    """Pillow scales a PNG's samples to its mode but leaves the transparent colour unscaled."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and bit_depth < 8 and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and bit_depth == 16 and transparent is not None:
        # of 16-bit colours only the high bytes are left to compare
        image.info["transparency"] = tuple(sample >> 8 for sample in transparent)
