"""What a source string is, and the bytes of those that carry their own.

`data:` URLs, lists of frames and plain base64 are read here; every other form is only told apart.
Nothing is opened, resolved or dialled. Every step is linear in the length of the string: no regular
expression ever meets it. Must not know what a request, a model or a pixel is.
"""

import binascii
from typing import Literal

import pybase64

from server.config import MediaConfig
from server.errors import (
    EmptyMediaFile,
    InvalidBase64,
    InvalidMediaUrl,
    MediaFileTooLarge,
    MediaTooLarge,
    quoted,
)
from server.media.kinds import MAX_LISTED_FRAMES, SourceKind, max_bytes

SourceForm = Literal["inline", "frames", "url", "local", "file_id", "attachment"]

_ACCEPTED = (
    "Accepted are http: and https: URLs, data: URLs (data:{kind}/...;base64,...), plain base64 and "
    "the ids of uploaded files."
)
_FORM_OF_SCHEME: dict[str, SourceForm] = {
    "http": "url",
    "https": "url",
    "file": "local",
    "attachment": "attachment",
    "data": "inline",
}
_MAX_DATA_HEADER_CHARS = 1_024
_MAX_PATH_CHARS = 8_192
_SCHEME_CHARS = 64
_FILE_ID_PREFIX = "file-"
_FILE_ID_CHARS = range(8, 65)
_FRAMES_TYPE = "video/jpeg"
_WHITESPACE = b" \t\n\r\f\v"


def source_form(source: str, *, kind: SourceKind) -> SourceForm:
    """How the bytes of a source are got; InvalidMediaUrl where there is no way to."""
    source = source.strip()
    scheme, colon, _ = source[:_SCHEME_CHARS].partition(":")
    if colon:
        form = _FORM_OF_SCHEME.get(scheme.lower())
        if form is None:
            raise InvalidMediaUrl(
                f"The server does not fetch {quoted(scheme + colon)} sources. "
                f"{_ACCEPTED.format(kind=kind)}",
                kind=kind,
            )
        return "frames" if kind == "video" and is_frame_list(source) else form
    if _is_file_id(source):
        return "file_id"
    # No accepted format begins with the byte 0xFC or above but JPEG, which reads "/9j/" in base64.
    is_rooted = source.startswith("/") and not source.startswith("/9j/")
    if is_rooted or source.startswith(("~", "./", "../")):
        return "local"
    if len(source) <= _MAX_PATH_CHARS and ("." in source or "\\" in source):
        raise InvalidMediaUrl(
            f"The server does not guess incomplete URLs. {_ACCEPTED.format(kind=kind)}", kind=kind
        )
    return "inline"


def is_frame_list(source: str) -> bool:
    """Whether a video's source is a list of pictures: data:video/jpeg;base64,first,second,..."""
    header, _, _ = source.lstrip()[:_MAX_DATA_HEADER_CHARS].partition(",")
    scheme, _, rest = header.partition(":")
    media_type, _, _ = rest.partition(";")
    return scheme.lower() == "data" and media_type.strip().lower() == _FRAMES_TYPE


def read_source(source: str, config: MediaConfig, *, kind: SourceKind) -> bytes:
    """The bytes an inline source stands for: at least one, at most the limit of its kind."""
    source = source.strip()
    form = source_form(source, kind=kind)
    if form != "inline":
        raise InvalidMediaUrl(
            f"The {kind} must be sent in the request itself: as a data: URL "
            f"(data:{kind}/...;base64,...) or as plain base64.",
            kind=kind,
        )
    if source[:5].lower() == "data:":
        source = _data_url_payload(source, kind)
    return _decode_base64(source, kind=kind, max_bytes=max_bytes(config, kind))


def frame_list(source: str, config: MediaConfig) -> list[bytes]:
    """The pictures of a list of frames, in order; together at most the limit of a video."""
    payload = _data_url_payload(source.strip(), "video")
    num_frames = payload.count(",") + 1
    limit = min(MAX_LISTED_FRAMES, config.max_video_frames_decoded)
    if num_frames > limit:
        raise MediaTooLarge(
            f"The video has {num_frames} frames; the limit is {limit}.", kind="video"
        )
    frames: list[bytes] = []
    num_bytes = 0
    for text in payload.split(","):
        if num_frames > 1 and not text.strip():
            raise _invalid("video", "an empty frame")
        frame = _decode_base64(text, kind="video", max_bytes=config.max_video_bytes)
        num_bytes += len(frame)
        if num_bytes > config.max_video_bytes:
            raise MediaFileTooLarge(
                f"The frames of the video have more than {config.max_video_bytes} bytes together.",
                kind="video",
            )
        frames.append(frame)
    return frames


def _is_file_id(source: str) -> bool:
    rest = source[len(_FILE_ID_PREFIX) :] if source.startswith(_FILE_ID_PREFIX) else ""
    return len(rest) in _FILE_ID_CHARS and rest.isascii() and rest.isalnum()


def _data_url_payload(url: str, kind: SourceKind) -> str:
    comma = url.find(",", 0, _MAX_DATA_HEADER_CHARS)
    if comma < 0:
        raise InvalidBase64("The data: URL has no comma before its data.", kind=kind)
    _, *parameters = (part.strip().lower() for part in url[5:comma].split(";"))
    # The declared type decides nothing else: the first bytes of the data do.
    if not parameters or parameters[-1] != "base64":
        raise InvalidBase64(f"The data: URL must be base64: data:{kind}/...;base64,...", kind=kind)
    return url[comma + 1 :]


def _decode_base64(text: str, *, kind: SourceKind, max_bytes: int) -> bytes:
    """Strict base64: whitespace is dropped, missing padding added, and nothing else forgiven."""
    try:
        encoded = text.encode("ascii")
    except UnicodeEncodeError:
        raise _invalid(kind, "characters outside its alphabet") from None
    if any(space in encoded for space in _WHITESPACE):
        encoded = encoded.translate(None, _WHITESPACE)
    digits = encoded.rstrip(b"=")
    num_padding = len(encoded) - len(digits)
    if not digits:
        if num_padding:
            raise _invalid(kind, "padding without data")
        raise EmptyMediaFile(f"The {kind} is empty.", kind=kind)

    num_bytes = len(digits) * 3 // 4
    if num_bytes > max_bytes:
        raise MediaFileTooLarge(
            f"The {kind} has {num_bytes} bytes; the limit is {max_bytes}.", kind=kind
        )
    if len(digits) % 4 == 1:
        raise _invalid(kind, "an impossible length")
    if num_padding not in (0, -len(digits) % 4):
        raise _invalid(kind, "wrong padding")
    is_url_safe = b"-" in digits or b"_" in digits
    if is_url_safe and (b"+" in digits or b"/" in digits):
        raise _invalid(kind, "a mixture of the standard and the URL-safe alphabet")
    try:
        data = pybase64.b64decode(
            digits + b"=" * (-len(digits) % 4),
            altchars=b"-_" if is_url_safe else None,
            validate=True,
        )
    except binascii.Error:
        raise _invalid(kind, "characters outside its alphabet") from None
    if len(data) != num_bytes:
        raise _invalid(kind, "characters outside its alphabet")
    return data


def _invalid(kind: SourceKind, what: str) -> InvalidBase64:
    return InvalidBase64(f"The {kind} is not valid base64: it has {what}.", kind=kind)
