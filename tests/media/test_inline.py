"""Sources to bytes: what is accepted, and that every other string gets its own refusal."""

from __future__ import annotations

import base64
import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import MediaConfig
from server.errors import (
    EmptyMediaFile,
    InvalidBase64,
    InvalidMediaUrl,
    MediaError,
    MediaFileTooLarge,
    MediaTooLarge,
)
from server.media.inline import (
    SourceForm,
    frame_list,
    is_frame_list,
    read_source,
    source_form,
)
from server.media.kinds import SourceKind

CONFIG = MediaConfig()
DATA = bytes(range(256)) * 3 + b"\xfb\xef\xff"
STANDARD = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()


@pytest.mark.parametrize(
    "source",
    [
        STANDARD,
        URL_SAFE,
        f"data:image/png;base64,{STANDARD}",
        f"data:image/png;base64,{URL_SAFE}",
        f"DATA:IMAGE/PNG;BASE64,{STANDARD}",
        f"data:;base64,{STANDARD}",
        f" \n data:image/png;base64,{STANDARD}\n",
        f"data:image/png;charset=utf-8; base64 ,{STANDARD}",
        f"data:text/html;base64,{STANDARD}",  # the declared type decides nothing
        "data:image/png;base64," + "\r\n".join(STANDARD[i : i + 76] for i in range(0, 1024, 76)),
        f"\t {STANDARD[:100]} \x0b\x0c\n{STANDARD[100:]}\n",
    ],
)
def test_accepted_spellings(source: str) -> None:
    assert read_source(source, CONFIG, kind="image") == DATA


@given(data=st.binary(min_size=1, max_size=200), url_safe=st.booleans(), padded=st.booleans())
def test_any_bytes_survive_with_and_without_padding(
    data: bytes, url_safe: bool, padded: bool
) -> None:
    encoded = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    if not padded:
        encoded = encoded.rstrip("=")
    assert read_source(f"data:image/png;base64,{encoded}", CONFIG, kind="image") == data


@given(text=st.text(alphabet=st.characters(max_codepoint=0x17F), max_size=60))
@settings(max_examples=300)
def test_what_is_accepted_is_never_shortened(text: str) -> None:
    try:
        data = read_source("data:image/png;base64," + text, CONFIG, kind="image")
    except MediaError:
        return
    digits = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    assert base64.b64encode(data).decode().rstrip("=")[:-1] == digits[:-1]
    assert len(data) == len(digits) * 3 // 4


@pytest.mark.parametrize(
    "payload",
    [
        "QUJ$RA==",  # alphabet
        "QUJDR é",
        "QUJD\x00RA==",
        "QUJDR",  # one digit more than a whole number of bytes
        "QUJDRA=",  # half of the padding
        "QUJDRA===",
        "QUJD=",
        "QUJD====",
        "QU==JDRA",  # padding inside
        "=QUJD",
        "====",
        "-_+/",  # both alphabets
        "QUJDRA==QUJDRA==",  # two pieces
        "%51UJD",
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_bad_base64(payload: str, kind: str) -> None:
    for source in (f"data:{kind}/x;base64,{payload}", payload):
        with pytest.raises(InvalidBase64) as caught:
            read_source(source, CONFIG, kind=kind)  # type: ignore[arg-type]
        assert caught.value.code == f"invalid_base64_{kind}"
        assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "source",
    [
        "data:image/png;base64",
        f"data:{STANDARD}",
        "data:image/png,QUJD",
        "data:,QUJD",
        "data:image/png;base64;x=y,QUJD",
        "data:image/png;" + "x" * 2000 + ";base64,QUJD",
    ],
)
def test_a_data_url_without_comma_or_base64(source: str) -> None:
    with pytest.raises(InvalidBase64):
        read_source(source, CONFIG, kind="image")


@pytest.mark.parametrize("source", ["", " \n", "data:image/png;base64,", "data:;base64, \r\n"])
def test_nothing(source: str) -> None:
    with pytest.raises(EmptyMediaFile) as caught:
        read_source(source, CONFIG, kind="video")
    assert caught.value.code == "empty_video_file"


@pytest.mark.parametrize(
    "source",
    [
        "http://example.com/cat.png",
        "https://example.com/cat.png?size=large",
        "HTTPS://EXAMPLE.COM/",
        "file:///etc/passwd",
        "ftp://example.com/x",
        "gopher://127.0.0.1:6379/_x",
        "javascript:alert(1)",
        "blob:https://example.com/1",
        "attachment:photo",
        "concat:/etc/passwd|/etc/hosts",
        "C:\\pictures\\cat.png",
        "\\\\host\\share\\cat",
        "//example.com/cat",
        "/etc/passwd",
        "/etc",
        "~/cat",
        "./cat",
        "../../cat",
        "pictures/cat.jpg",
        "cat.png",
        " https://example.com/",
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_other_places_are_refused(source: str, kind: str) -> None:
    with pytest.raises(InvalidMediaUrl) as caught:
        read_source(source, CONFIG, kind=kind)  # type: ignore[arg-type]
    assert caught.value.code == f"invalid_{kind}_url"
    assert "data:" in caught.value.message and "base64" in caught.value.message
    assert "passwd" not in caught.value.message


def test_a_plain_jpeg_is_not_taken_for_a_path() -> None:
    data = b"\xff\xd8\xff\xe0" + bytes(20)
    source = base64.b64encode(data).decode()
    assert source.startswith("/9j/")
    assert read_source(source, CONFIG, kind="image") == data


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0 one").decode()


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("http://example.com/cat.png", "url"),
        (" HTTPS://EXAMPLE.COM/\n", "url"),
        ("http:", "url"),
        ("file:///pictures/cat.png", "local"),
        ("FILE:cat", "local"),
        ("/pictures/cat.png", "local"),
        ("//example.com/cat", "local"),
        ("./cat.png", "local"),
        ("../cat.png", "local"),
        ("~/cat.png", "local"),
        ("attachment:photo", "attachment"),
        ("file-abcdEFGH", "file_id"),
        ("file-" + "a" * 64, "file_id"),
        ("file-" + "a" * 65, "inline"),
        ("file-short", "inline"),
        ("file-abcdefgé", "inline"),
        ("file-abcd_efgh", "inline"),
        (JPEG, "inline"),
        (STANDARD, "inline"),
        (f"data:image/png;base64,{STANDARD}", "inline"),
        ("", "inline"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_form_of_a_source(source: str, form: SourceForm, kind: SourceKind) -> None:
    assert source_form(source, kind=kind) == form


@pytest.mark.parametrize(
    "source",
    ["ftp://example.com/x", "gopher://127.0.0.1:6379/_x", "javascript:alert(1)", ":x", "cat.png"],
)
def test_a_source_without_a_form(source: str) -> None:
    with pytest.raises(InvalidMediaUrl) as caught:
        source_form(source, kind="video")
    assert caught.value.code == "invalid_video_url"


@pytest.mark.parametrize(
    ("source", "is_list"),
    [
        ("data:video/jpeg;base64,QUJD,QUJD", True),
        (" DATA:Video/JPEG ;x=y;base64,QUJD", True),
        ("data:video/mp4;base64,QUJD", False),
        ("data:image/jpeg;base64,QUJD", False),
        ("video/jpeg", False),
        ("", False),
    ],
)
def test_frame_lists_are_told_apart(source: str, is_list: bool) -> None:
    assert is_frame_list(source) is is_list
    if is_list:
        assert source_form(source, kind="video") == "frames"
        assert source_form(source, kind="image") == "inline"  # the type declared decides nothing
        with pytest.raises(InvalidMediaUrl):
            read_source(source, CONFIG, kind="video")


@given(frames=st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=5))
def test_frames_come_in_order(frames: list[bytes]) -> None:
    texts = [base64.b64encode(frame).decode() for frame in frames]
    assert frame_list("data:video/jpeg;base64," + ",\n".join(texts), CONFIG) == frames


def test_limits_of_a_frame_list() -> None:
    config = MediaConfig(max_video_bytes=6, max_video_frames_decoded=3)
    prefix = "data:video/jpeg;base64,"
    assert frame_list(prefix + "QUJD,QUJD", config) == [b"ABC", b"ABC"]
    assert len(frame_list(prefix + "QQ,QQ,QQ", config)) == 3
    for payload, error in [
        ("QUJD,QUJD,QQ", MediaFileTooLarge),
        ("QUJDQUJDQUJD", MediaFileTooLarge),
        ("QQ,QQ,QQ,QQ", MediaTooLarge),
        ("QUJD,", InvalidBase64),
        ("QUJD,,QUJD", InvalidBase64),
        (",", InvalidBase64),
        ("QUJD,QUJ$", InvalidBase64),
        ("", EmptyMediaFile),
    ]:
        with pytest.raises(MediaError) as caught:
            frame_list(prefix + payload, config)
        assert type(caught.value) is error and caught.value.kind == "video", payload
    with pytest.raises(InvalidBase64):
        frame_list("data:video/jpeg,QUJD", config)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_size_limits(kind: str) -> None:
    config = MediaConfig(max_image_bytes=10, max_video_bytes=20)
    limit = {"image": 10, "video": 20}[kind]
    for prefix in ("", f"data:{kind}/x;base64,"):
        at_limit = prefix + base64.b64encode(bytes(limit)).decode()
        beyond = prefix + base64.b64encode(bytes(limit + 1)).decode()
        assert read_source(at_limit, config, kind=kind) == bytes(limit)  # type: ignore[arg-type]
        with pytest.raises(MediaFileTooLarge) as caught:
            read_source(beyond, config, kind=kind)  # type: ignore[arg-type]
        assert caught.value.code == f"{kind}_file_too_large"


def test_size_is_checked_before_the_alphabet() -> None:
    config = MediaConfig(max_image_bytes=10)
    with pytest.raises(MediaFileTooLarge):
        read_source("data:image/png;base64," + "$" * 100, config, kind="image")


@pytest.mark.parametrize("unit", ["A", " ", "=", "-+", "A=", ".", "/", "data:", ";", ",", "é"])
def test_long_strings_take_linear_time(unit: str) -> None:
    """A quadratic step would take minutes where these take tenths of a second."""
    text = unit * (8_000_000 // len(unit))
    began = time.perf_counter()
    for source in (text, "data:video/mp4;base64," + text, "data:" + text):
        try:
            read_source(source, CONFIG, kind="video")
        except MediaError:
            continue
    with contextlib.suppress(MediaError):
        frame_list("data:video/jpeg;base64," + text, CONFIG)
    assert time.perf_counter() - began < 5
