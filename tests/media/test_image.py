"""Pictures to upright RGB: every mode against values worked out by hand, and every refusal."""

from __future__ import annotations

import colorsys
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from server.errors import MediaError, MediaTooLarge, UnsupportedMediaType
from server.media.formats import sniff_image
from server.media.image import decode_image, probe_image, to_rgb
from tests.limits import limits

CONFIG = limits()
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png(
    size: tuple[int, int],
    rows: Sequence[bytes],
    *,
    depth: int = 8,
    colour_type: int = RGB,
    chunks: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG written chunk by chunk, for what Pillow does not write."""

    def chunk(name: bytes, payload: bytes) -> bytes:
        crc = zlib.crc32(name + payload)
        return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(name, payload) for name, payload in chunks)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def decoded(data: bytes) -> list[tuple[int, int, int]]:
    """The pixels, row by row."""
    image = decode_image(data, CONFIG).pixels
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def on_white(value: int, alpha: int) -> int:
    return round((value * alpha + 255 * (255 - alpha)) / 255)


def grey(*values: int) -> list[tuple[int, int, int]]:
    return [(value, value, value) for value in values]


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_plain_picture_of_each_format(image_format: str) -> None:
    picture = Image.new("RGB", (20, 10), (200, 30, 40))
    picture.paste((10, 60, 220), (10, 0, 20, 10))
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {}
    if image_format == "WEBP":
        options = {"lossless": True}
    image = decode_image(saved(picture, image_format, **options), CONFIG).pixels
    assert (image.mode, image.size) == ("RGB", (20, 10))
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(picture))
    assert difference.max() <= (3 if image_format == "JPEG" else 0)


def test_rgba_is_flattened_on_white() -> None:
    alphas = [0, 1, 63, 127, 128, 200, 254, 255]
    row = b"".join(bytes([10, 128, 250, alpha]) for alpha in alphas)
    expected = [(on_white(10, a), on_white(128, a), on_white(250, a)) for a in alphas]
    assert decoded(png((8, 1), [row], colour_type=RGBA)) == expected
    webp = saved(Image.frombytes("RGBA", (8, 1), row), "WEBP", lossless=True, exact=True)
    assert decoded(webp) == expected


def test_la_is_flattened_on_white() -> None:
    row = bytes([0, 0, 0, 100, 200, 50, 255, 255])
    expected = grey(255, on_white(0, 100), on_white(200, 50), 255)
    assert decoded(png((4, 1), [row], colour_type=GREY_ALPHA)) == expected


def test_deep_alpha_is_flattened_on_white() -> None:
    la = struct.pack(">8H", 0, 0xFFFF, 0, 0, 0x8000, 0x40FF, 0xFFFF, 0)
    expected = grey(0, 255, on_white(0x80, 0x40), 255)
    assert decoded(png((4, 1), [la], depth=16, colour_type=GREY_ALPHA)) == expected
    rgba = struct.pack(">8H", 0x1000, 0x20FF, 0x3000, 0xFFFF, 0x1000, 0x2000, 0x3000, 0)
    expected = [(0x10, 0x20, 0x30), (255, 255, 255)]
    assert decoded(png((2, 1), [rgba], depth=16, colour_type=RGBA)) == expected


def test_rgb_with_a_transparent_colour() -> None:
    row = bytes([1, 2, 3, 1, 2, 4, 9, 9, 9])
    data = png((3, 1), [row], chunks=[(b"tRNS", struct.pack(">3H", 1, 2, 3))])
    assert decoded(data) == [(255, 255, 255), (1, 2, 4), (9, 9, 9)]


def test_deep_rgb_with_and_without_a_transparent_colour() -> None:
    row = struct.pack(">6H", 0x0100, 0x02FF, 0x0300, 0x0500, 0x0600, 0x0700)
    assert decoded(png((2, 1), [row], depth=16)) == [(1, 2, 3), (5, 6, 7)]
    chunks = [(b"tRNS", struct.pack(">3H", 0x0500, 0x0600, 0x0700))]
    assert decoded(png((2, 1), [row], depth=16, chunks=chunks)) == [(1, 2, 3), (255, 255, 255)]


def test_grey_with_a_transparent_colour() -> None:
    chunks = [(b"tRNS", struct.pack(">H", 7))]
    data = png((3, 1), [bytes([7, 8, 0])], colour_type=GREY, chunks=chunks)
    assert decoded(data) == grey(255, 8, 0)


@pytest.mark.parametrize(
    ("depth", "row", "values"),
    [(1, 0b10000000, (255, 0)), (2, 0b01100000, (85, 170)), (4, 0x1E, (17, 238))],
)
def test_shallow_grey(depth: int, row: int, values: tuple[int, int]) -> None:
    data = png((2, 1), [bytes([row])], depth=depth, colour_type=GREY)
    assert decoded(data) == grey(*values)
    for index in (0, 1):
        sample = row >> 8 - depth * (index + 1) & (1 << depth) - 1
        chunks = [(b"tRNS", struct.pack(">H", sample))]
        data = png((2, 1), [bytes([row])], depth=depth, colour_type=GREY, chunks=chunks)
        expected = list(values)
        expected[index] = 255
        assert decoded(data) == grey(*expected)


def test_16_bit_grey_keeps_the_high_byte() -> None:
    row = struct.pack(">4H", 0, 0x12FF, 0xFF00, 0x8001)
    data = png((4, 1), [row], depth=16, colour_type=GREY)
    assert decoded(data) == grey(0, 0x12, 0xFF, 0x80)
    chunks = [(b"tRNS", struct.pack(">H", 0x12FF))]
    data = png((4, 1), [row], depth=16, colour_type=GREY, chunks=chunks)
    assert decoded(data) == grey(0, 255, 0xFF, 0x80)


@pytest.mark.parametrize(
    ("alphas", "expected"),
    [
        (None, [(255, 0, 0), (0, 0, 0), (0, 0, 255)]),
        (bytes([255, 0]), [(255, 0, 0), (255, 255, 255), (0, 0, 255)]),
        (bytes([128, 0, 64]), [(255, 127, 127), (255, 255, 255), (191, 191, 255)]),
    ],
)
def test_palettes(alphas: bytes | None, expected: list[tuple[int, int, int]]) -> None:
    palette = bytes([255, 0, 0, 0, 0, 0, 0, 0, 255])
    chunks = [(b"PLTE", palette)] + ([(b"tRNS", alphas)] if alphas else [])
    data = png((3, 1), [bytes([0, 1, 2])], colour_type=PALETTE, chunks=chunks)
    assert decoded(data) == expected


def test_gif_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 250, 120, 0])
    image.putpixel((1, 0), 1)
    assert decoded(saved(image, "GIF", transparency=0)) == [(255, 255, 255), (250, 120, 0)]
    assert decoded(saved(image, "GIF")) == [(9, 9, 9), (250, 120, 0)]


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow
    red, green, blue = decoded(saved(image, "JPEG", quality=100))[0]
    assert red >= 250 and green <= 5 and blue <= 5


def test_grey_jpeg() -> None:
    image = Image.new("L", (8, 8), 77)
    assert decoded(saved(image, "JPEG", quality=100))[0] == (77, 77, 77)


def test_modes_that_no_accepted_format_opens_in() -> None:
    """The rule covers them all the same, should a format come to use them."""
    floats = Image.fromarray(np.array([[-5, 0, 99.6, 255, 1e9, np.nan]], dtype=np.float32))
    assert np.asarray(to_rgb(floats))[0, :, 0].tolist() == [0, 0, 100, 255, 255, 0]
    integers = Image.fromarray(np.array([[-1, 0, 0x1234, 0xFFFF, 1 << 20]], dtype=np.int32))
    assert np.asarray(to_rgb(integers))[0, :, 0].tolist() == [0, 0, 0x12, 0xFF, 0xFF]
    pa = Image.new("PA", (2, 1))
    pa.putpalette([10, 20, 30, 40, 50, 60])
    pa.putpixel((0, 0), (1, 255))
    pa.putpixel((1, 0), (1, 0))
    assert np.asarray(to_rgb(pa)).tolist() == [[[40, 50, 60], [255, 255, 255]]]
    assert np.asarray(to_rgb(Image.new("RGBa", (1, 1), (0, 0, 0, 0)))).tolist() == [[[255] * 3]]


def from_ycbcr(y: int, cb: int, cr: int) -> tuple[float, ...]:
    """JFIF's formula."""
    blue, red = cb - 128, cr - 128
    return y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue


def from_hsv(hue: int, saturation: int, value: int) -> tuple[float, ...]:
    return tuple(255 * x for x in colorsys.hsv_to_rgb(hue / 255, saturation / 255, value / 255))


def from_lab(lightness: int, a: int, b: int) -> tuple[float, ...]:
    """CIE L*a*b* with the white of D50, by way of XYZ, to sRGB. `a` and `b` are signed bytes."""
    y = (lightness / 255 * 100 + 16) / 116
    factors = (y + (a ^ 128) / 500 - 128 / 500, y, y - (b ^ 128) / 200 + 128 / 200)
    cubes = [f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29) for f in factors]
    xyz = np.array(cubes) * (0.9642, 1.0, 0.8249)
    matrix = [  # sRGB's primaries, adapted to D50
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(matrix @ xyz, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(255 * curved)


@pytest.mark.parametrize(
    ("mode", "reference"),
    [
        ("YCbCr", from_ycbcr),
        ("HSV", from_hsv),
        ("LAB", from_lab),
        ("RGBX", lambda red, green, blue, _: (red, green, blue)),
    ],
)
def test_colour_spaces(mode: str, reference: Callable[..., tuple[float, ...]]) -> None:
    first = others = [0, 30, 77, 128, 166, 201, 255]
    if mode == "LAB":  # colours well within sRGB: at its edges the converter's table is coarse
        first, others = [120, 140, 166, 201], [0, 6, 12, 244, 250]
    samples = np.array(list(product(first, others, others)), dtype=np.uint8)
    if mode == "RGBX":
        padding = np.arange(len(samples), dtype=np.uint8)[:, None]
        samples = np.concatenate([samples, padding], axis=1)
    image = Image.frombytes(mode, (len(samples), 1), samples.tobytes())
    result = to_rgb(image)
    assert result.mode == "RGB"
    expected = np.clip([reference(*sample) for sample in samples.tolist()], 0, 255)
    tolerance = {"YCbCr": 1.5, "HSV": 1, "LAB": 2, "RGBX": 0}[mode]
    assert np.abs(np.asarray(result)[0] - expected).max() <= tolerance


def cmyk_gradients() -> Image.Image:
    """Left to right one ink after the other and all at once grow, on paper and on other inks."""
    ramp = np.arange(0, 256, 2, dtype=np.uint8)
    rows = np.zeros((80, 128, 4), dtype=np.uint8)
    for ink in range(4):
        rows[16 * ink : 16 * ink + 8, :, ink] = ramp
        rows[16 * ink + 8 : 16 * ink + 16] = (40, 90, 150, 60)
        rows[16 * ink + 8 : 16 * ink + 16, :, ink] = ramp
    rows[64:72] = ramp[:, None]
    rows[72:, :, 3] = ramp
    rows[72:, :, 1] = ramp[::-1]
    return Image.fromarray(rows, "CMYK")


def from_cmyk(image: Image.Image) -> list[list[list[float]]]:
    """Ink lets through what it does not cover, and so does black. Pixel by pixel."""
    return [
        [[(255 - ink) * (255 - black) / 255 for ink in inks] for *inks, black in row]
        for row in np.asarray(image).tolist()
    ]


def test_cmyk() -> None:
    image = cmyk_gradients()
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert np.abs(np.asarray(result) - np.array(from_cmyk(image))).max() <= 2


def test_cmyk_jpeg_gradients() -> None:
    image = cmyk_gradients()
    data = saved(image, "JPEG", quality=100)
    assert b"Adobe" in data[:64]  # its inks are stored inverted
    result = np.asarray(decode_image(data, CONFIG).pixels)
    assert np.abs(result - np.array(from_cmyk(image))).max() <= 2


BMP_MASKS = (0xFF0000, 0xFF00, 0xFF)


def bmp(
    bits: int,
    rows: Sequence[bytes],
    *,
    width: int,
    palette: Sequence[tuple[int, int, int]] = (),
    num_colours: int | None = None,
    compression: int = 0,
    header_size: int = 40,
    masks: Sequence[int] = (),
    pixels_at: int | None = None,
    is_top_down: bool = False,
) -> bytes:
    """A BMP written by hand. Rows come from the top; behind a header of 40 bytes lie the masks."""
    height = -len(rows) if is_top_down else len(rows)
    colours = len(palette) if num_colours is None else num_colours
    header = struct.pack(
        "<IiiHHIIiiII", header_size, width, height, 1, bits, compression, 0, 0, 0, colours, 0
    )
    header += struct.pack(f"<{len(masks)}I", *masks).ljust(header_size - 40, b"\0")
    header += b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    order = rows if is_top_down else rows[::-1]
    pixels = b"".join(row + bytes(-len(row) % 4) for row in order)
    start = 14 + len(header)
    file_header = struct.pack(
        "<IHHI", start + len(pixels), 0, 0, start if pixels_at is None else pixels_at
    )
    return b"BM" + file_header + header + pixels


BLACK_WHITE = [(0, 0, 0), (255, 255, 255)]
PAINTS = [(10, 20, 30), (200, 0, 90), (0, 255, 0), (255, 255, 255)]
INDICES = [[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]]


def packed(indices: Sequence[int], bits: int) -> bytes:
    """A row of palette indices, the first in the highest bits."""
    text = "".join(f"{index:0{bits}b}" for index in indices)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


@pytest.mark.parametrize("is_top_down", [False, True])
@pytest.mark.parametrize(
    "palette",
    [
        BLACK_WHITE,
        BLACK_WHITE[::-1],
        PAINTS[:2],
        [(0, 0, 0), (1, 1, 1)],
    ],
)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_of_two_colours(
    bits: int, palette: list[tuple[int, int, int]], is_top_down: bool
) -> None:
    rows = [packed(row, bits) for row in INDICES]
    expected = [palette[index] for row in INDICES for index in row]
    data = bmp(bits, rows, width=5, palette=palette, is_top_down=is_top_down)
    assert decoded(data) == expected
    assert decoded(data[:10] + bytes(4) + data[14:]) == expected  # where the pixels lie is not said


@pytest.mark.parametrize("says_how_many", [False, True])
@pytest.mark.parametrize(("bits", "length"), [(4, 16), (8, 256)])
@pytest.mark.parametrize("kind", ["colours", "all greys", "dark greys"])
def test_bmp_of_a_full_palette(bits: int, length: int, kind: str, says_how_many: bool) -> None:
    step = {"colours": 0, "all greys": 255 // (length - 1), "dark greys": 1}[kind]
    palette = [(index * step,) * 3 for index in range(length)]
    if kind == "colours":
        palette = [(index, 255 - index, index * 7 % 256) for index in range(length)]
    indices = [index * 37 % length for index in range(42)]
    rows = [packed(indices[at : at + 3], bits) for at in range(0, 42, 3)]
    data = bmp(bits, rows, width=3, palette=palette, num_colours=length if says_how_many else 0)
    assert decoded(data) == [palette[index] for index in indices]


def test_bmp_of_a_short_palette() -> None:
    indices = [0, 1, 2, 3, 2, 1, 0, 3, 3]
    for bits in (4, 8):
        data = bmp(bits, [packed(indices, bits)], width=9, palette=PAINTS)
        assert decoded(data) == [PAINTS[index] for index in indices]


@pytest.mark.parametrize("palette", [BLACK_WHITE, PAINTS])
def test_bmp_in_runs(palette: list[tuple[int, int, int]]) -> None:
    eight = bmp(8, [bytes([3, 1, 2, 0, 0, 1])], width=5, palette=palette, compression=1)
    four = bmp(4, [bytes([3, 0x11, 2, 0, 0, 1])], width=5, palette=palette, compression=2)
    expected = [palette[1]] * 3 + [palette[0]] * 2
    assert decoded(eight) == expected
    assert decoded(four) == expected


def test_bmp_of_true_colours() -> None:
    rows = [bytes([3, 2, 1, 6, 5, 4, 9, 8, 7]), bytes([0, 0, 255, 0, 255, 0, 255, 0, 0])]
    expected = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for is_top_down in (False, True):
        assert decoded(bmp(24, rows, width=3, is_top_down=is_top_down)) == expected
    sixteen = struct.pack("<3H", 0x1F, 0x3E0, 0x7C00)
    assert decoded(bmp(16, [sixteen], width=3)) == [(0, 0, 255), (0, 255, 0), (255, 0, 0)]


ALPHA = 0xFF000000


@pytest.mark.parametrize(
    ("header_size", "compression", "masks", "has_alpha"),
    [
        (40, 0, (), False),
        (40, 3, BMP_MASKS, False),
        (52, 3, BMP_MASKS, False),
        (56, 3, (*BMP_MASKS, 0), False),
        (56, 3, (*BMP_MASKS, ALPHA), True),
        (108, 0, (*BMP_MASKS, ALPHA), False),  # without compression by masks they do not count
        (108, 3, (*BMP_MASKS, 0), False),
        (108, 3, (0, 0, 0, 0), False),
        (108, 3, (*BMP_MASKS, ALPHA), True),
        (124, 0, (), False),
        (124, 3, (*BMP_MASKS, 0), False),
        (124, 3, (*BMP_MASKS, ALPHA), True),
    ],
)
@pytest.mark.parametrize("alphas", [(0, 0, 0), (255, 255, 255), (0, 100, 255)])
def test_bmp_alpha(
    header_size: int,
    compression: int,
    masks: tuple[int, ...],
    has_alpha: bool,
    alphas: tuple[int, int, int],
) -> None:
    """Only a mask makes the fourth byte alpha; nothing at all to see is not meant either."""
    colours = [(10, 20, 30), (200, 100, 0), (1, 2, 3)]
    row = b"".join(
        bytes([blue, green, red, alpha])
        for (red, green, blue), alpha in zip(colours, alphas, strict=True)
    )
    data = bmp(32, [row], width=3, compression=compression, header_size=header_size, masks=masks)
    if has_alpha and any(alphas):
        colours = [
            (on_white(colour[0], alpha), on_white(colour[1], alpha), on_white(colour[2], alpha))
            for colour, alpha in zip(colours, alphas, strict=True)
        ]
    assert decoded(data) == colours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, image_format: str) -> None:
    upright = Image.new("RGB", (48, 32), (20, 20, 20))
    upright.paste((240, 20, 20), (0, 0, 16, 16))
    upright.paste((20, 240, 20), (32, 0, 48, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    turner = Image.Exif()
    turner[0x0112] = undo
    turned = ImageOps.exif_transpose(_with_exif(upright, turner))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(
        image_format, {}
    )
    image = decode_image(saved(turned, image_format, exif=exif, **options), CONFIG).pixels
    assert image.size == upright.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).max() < 20


def _with_exif(image: Image.Image, exif: Image.Exif) -> Image.Image:
    return Image.open(io.BytesIO(saved(image, "PNG", exif=exif)))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_unknown_orientation_changes_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    image = decode_image(saved(Image.new("RGB", (4, 2)), "JPEG", exif=exif), CONFIG).pixels
    assert image.size == (4, 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_exif_does_not_spoil_the_picture() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage, no header"):
        data = saved(Image.new("RGB", (4, 2), (255, 255, 255)), "JPEG", exif=exif)
        assert decoded(data) == [(255, 255, 255)] * 8


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(image_format: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (6, 4), colour) for colour in colours]
    options: dict[str, object] = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(
        frames[0], image_format, save_all=True, append_images=frames[1:], duration=100, **options
    )
    assert decoded(data) == [(250, 0, 0)] * 24
    if image_format == "GIF":  # the later frames are never read
        second = data.index(b"\x2c", data.index(b"\x2c") + 30)
        assert decoded(data[:second] + b"\xff" * 40) == [(250, 0, 0)] * 24


def test_the_format_is_that_of_the_first_bytes() -> None:
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    names = {name: sniff_image(saved(picture, name)) for name in FORMATS}
    assert names == {name: name for name in FORMATS}


def test_a_jpeg_with_a_second_picture_in_it() -> None:
    """Phones store a depth or gain map behind the picture (MPO)."""
    first, second = Image.new("RGB", (16, 8), (250, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 250))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    image = decode_image(data, CONFIG).pixels
    assert image.size == (16, 8)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(first)).max() < 10


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"%PDF-1.7\n",
        b"II*\0" + bytes(40),
        b"MM\0*" + bytes(40),
        b"8BPS\0\1" + bytes(40),
        b"SIMPLE  =                    T",
        b"\0\0\0\x18ftypheic" + bytes(40),
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        b"RIFF\0\0\0\0AVI " + bytes(40),
        b"#EXTM3U\n",
        b"\0",
        b"P6 1 1 255\n\0\0\0",
        bytes(100),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        decode_image(data, CONFIG)
    assert caught.value.code == "unsupported_image_media_type"


@pytest.mark.parametrize("image_format", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000", "DDS", "SGI"])
def test_what_else_pillow_could_read_is_refused(image_format: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        decode_image(saved(Image.new("RGB", (16, 16)), image_format), CONFIG)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_truncated_picture_is_refused_or_whole(image_format: str) -> None:
    """Wherever the file ends: never a half-grey picture."""
    noise = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), image_format)
    whole = decoded(data)
    for length in range(1, len(data)):
        try:
            pixels = decoded(data[:length])
        except MediaError as error:
            assert error.code in ("image_parse_error", "unsupported_image_media_type")
            continue
        assert pixels == whole


def png_of(
    rows: bytes, size: tuple[int, int], *, depth: int, colour: int, interlaced: bool
) -> bytes:
    """A PNG whose compressed stream holds just these bytes, in two chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, int(interlaced))
    stream = zlib.compress(rows)
    half = len(stream) // 2
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", stream[:half]), chunk(b"IDAT", stream[half:])]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "depth", "colour", "interlaced", "num_bytes"),
    [
        ((10, 6), 8, 2, False, 6 * 31),
        ((10, 6), 1, 0, False, 6 * 3),
        ((10, 6), 16, 6, False, 6 * 81),
        # Passes of 2x1, 1x1, 3x1, 2x2, 5x1, 5x3 and 10x3 pixels, and a byte for each of their rows.
        ((10, 6), 8, 0, True, 3 + 2 + 4 + 6 + 6 + 18 + 33),
    ],
)
def test_a_png_that_lacks_rows_is_refused(
    size: tuple[int, int], depth: int, colour: int, interlaced: bool, num_bytes: int
) -> None:
    def png(length: int) -> bytes:
        return png_of(bytes(length), size, depth=depth, colour=colour, interlaced=interlaced)

    assert len(decoded(png(num_bytes))) == size[0] * size[1]  # black all over, and whole
    for length in (num_bytes - 1, num_bytes // 2, 1):
        with pytest.raises(MediaError, match="damaged or incomplete"):
            decoded(png(length))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_jpeg_whose_end_is_zeros_is_refused(progressive: bool, part: float) -> None:
    """As a download leaves it that was broken off in a file of full length."""
    noise = np.random.default_rng(3).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", progressive=progressive, quality=80)
    assert decoded(data)
    cut = int(len(data) * part)
    with pytest.raises(MediaError, match="damaged or incomplete"):
        decoded(data[:cut] + bytes(len(data) - cut))


def test_what_follows_a_jpegs_end_and_what_its_thumbnail_holds_do_not_count() -> None:
    thumbnail = saved(Image.new("RGB", (8, 8)), "JPEG")
    data = saved(Image.new("RGB", (32, 24), (9, 200, 9)), "JPEG", exif=_exif_holding(thumbnail))
    assert decoded(data + bytes(100)) == decoded(data)
    with pytest.raises(MediaError, match="damaged or incomplete"):
        decoded(data.removesuffix(b"\xff\xd9") + bytes(100))


def _exif_holding(payload: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif[0x927C] = payload  # the maker's note
    return exif


@given(
    bits=st.sampled_from([1, 4, 8, 16, 24, 32]),
    header=st.binary(min_size=0, max_size=130),
    known=st.booleans(),
    numbers=st.lists(
        st.sampled_from([0, 1, 2, 16, 40, 54, 108, 2**32 - 1]), min_size=3, max_size=3
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_bmp_header_gives_pixels_or_a_media_error(
    bits: int, header: bytes, known: bool, numbers: list[int]
) -> None:
    """Also where its numbers point nowhere."""
    colours, size, start = numbers
    data = bmp(bits, [bytes(20)] * 3, width=4, palette=BLACK_WHITE, num_colours=colours)
    changed = bytearray(data)
    changed[10:18] = struct.pack("<II", start, 40 if known else size)
    for whole in (bytes(changed), bytes(changed[:30]) + header, bytes(changed[: len(header)])):
        try:
            decoded(whole)
        except MediaError as error:
            assert error.status == 400


@given(
    image_format=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_picture_gives_pixels_or_a_media_error(
    image_format: str, changes: list[tuple[float, int]]
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    data = bytearray(saved(Image.fromarray(noise), image_format))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode_image(bytes(data), CONFIG).pixels
    except MediaError as error:
        assert error.status == 400 and "0x" not in error.message
        return
    assert image.mode == "RGB" and image.size[0] * image.size[1] <= CONFIG.max_image_pixels


def test_the_text_of_the_decoder_is_not_told() -> None:
    with pytest.raises(MediaError) as caught:
        decode_image(b"\x89PNG\r\n\x1a\n" + bytes(50), CONFIG)
    assert caught.value.message == "The image is damaged or incomplete."
    assert caught.value.code == "image_parse_error"


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_the_metadata(kind: bytes) -> None:
    bomb = b"x\0\0" + zlib.compress(bytes(100_000_000), 9)
    data = png((1, 1), [bytes(3)], chunks=[(kind, bomb)])
    with pytest.raises(MediaError):
        decode_image(data, CONFIG)


def header_only(width: int, height: int) -> bytes:
    """A PNG that promises a size and has no pixels: only its header can be judged."""
    return png((width, height), [])


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((8000, 5001), "more than 40000000 pixels"),
        ((9500, 9500), "more than 40000000 pixels"),  # where Pillow would warn
        ((20_000, 20_000), "more than 40000000 pixels"),  # where Pillow would raise
        ((16_385, 100), "a side may have 16384"),
        ((100, 16_385), "a side may have 16384"),
        ((201, 1), "at most 200 times"),
        ((1, 201), "at most 200 times"),
    ],
)
def test_too_large_by_the_header(size: tuple[int, int], said: str) -> None:
    with pytest.raises(MediaTooLarge, match=said) as caught:
        decode_image(header_only(*size), CONFIG)
    assert caught.value.code == "image_too_large"


def test_sizes_at_the_limits() -> None:
    config = limits(max_image_pixels=200, max_image_side=50, max_image_aspect=12.5)
    for size in ((20, 10), (40, 5), (50, 4), (5, 40), (20, 2), (1, 12)):
        assert decode_image(png(size, [bytes(3 * size[0])] * size[1]), config).size == size
    for size in ((21, 10), (51, 3), (26, 2), (1, 13)):
        with pytest.raises(MediaTooLarge):
            decode_image(header_only(*size), config)


def test_a_picture_without_pixels() -> None:
    for size in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(MediaError) as caught:
            decode_image(header_only(*size), CONFIG)
        assert caught.value.code == "image_parse_error"


def test_the_colour_profile_is_ignored() -> None:
    picture = Image.new("RGB", (1, 1), (12, 200, 90))
    with_profile = saved(picture, "PNG", icc_profile=b"not even a profile")
    assert decoded(with_profile) == [(12, 200, 90)]


# Reduced scales and headers.


def smooth(size: tuple[int, int]) -> Image.Image:
    small = np.random.default_rng(8).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("needed", "scale"),
    [((100, 80), 4), ((101, 80), 2), ((100, 76), 4), ((200, 160), 2), ((201, 10), 1), ((1, 1), 8)],
)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_large_jpeg_is_decoded_at_a_reduced_scale(
    needed: tuple[int, int], scale: int, orientation: int
) -> None:
    """Never below twice what is needed, in either direction of the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (800, 640) if orientation < 5 else (640, 800)
    for mode in ("RGB", "CMYK", "L"):
        data = saved(smooth(stored).convert(mode), "JPEG", exif=exif, quality=95)
        full = decode_image(data, CONFIG)
        reduced = decode_image(data, CONFIG, needed_size=lambda size: needed)
        assert full.size == full.pixels.size == reduced.size == (800, 640)
        assert reduced.pixels.size == (800 // scale, 640 // scale)
        expected = np.asarray(full.pixels.resize(reduced.pixels.size, Image.Resampling.BOX))
        difference = np.abs(np.asarray(reduced.pixels).astype(int) - expected)
        assert difference.mean() < 2


def test_only_a_jpeg_is_reduced_and_only_if_allowed() -> None:
    picture = smooth((800, 640))
    assert decode_image(
        saved(picture, "JPEG"), limits(jpeg_reduced_scale=False), needed_size=lambda size: (1, 1)
    ).pixels.size == (800, 640)
    for image_format in ("PNG", "WEBP", "BMP"):
        data = saved(picture, image_format)
        assert decode_image(data, CONFIG, needed_size=lambda size: (1, 1)).pixels.size == (800, 640)


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 8])
@pytest.mark.parametrize("image_format", FORMATS)
def test_the_header_tells_the_upright_size(image_format: str, orientation: int | None) -> None:
    options: dict[str, object] = {}
    if orientation is not None and image_format in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    data = saved(Image.new("RGB", (40, 24)), image_format, **options)
    size = probe_image(data, CONFIG)
    assert size == decode_image(data, CONFIG).size
    assert size == ((24, 40) if options and orientation in (5, 8) else (40, 24))


def test_metadata_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("RGB", (40, 24)), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    assert probe_image(moved, CONFIG) == decode_image(moved, CONFIG).size == (24, 40)


def test_headers_are_held_to_the_same_limits() -> None:
    with pytest.raises(MediaTooLarge, match="pixels"):
        probe_image(header_only(8000, 5001), CONFIG)
    with pytest.raises(MediaTooLarge, match="pixels"):
        probe_image(header_only(20_000, 20_000), CONFIG)
    with pytest.raises(UnsupportedMediaType):
        probe_image(b"%PDF-1.7", CONFIG)
    with pytest.raises(MediaError, match="damaged"):
        probe_image(b"\x89PNG\r\n\x1a\n" + bytes(50), CONFIG)
    assert probe_image(header_only(4000, 3000), CONFIG) == (4000, 3000)
