"""From the source string of a picture or video to its bytes, within limits.

Sources are `data:` URLs and plain base64. Nothing is opened, resolved or dialled here, and whatever
names another place is refused. Every step is linear in the length of the string: no regular
expression ever meets it. Must not know what a request, a model or a pixel is.
"""

import binascii
from typing import Literal

from server.config import MediaConfig
from server.errors import (
    EmptyMediaFile,
    InvalidBase64,
    InvalidMediaUrl,
    MediaFileTooLarge,
    quoted,
)

SourceKind = Literal["image", "video"]

_ACCEPTED = "Accepted are data: URLs (data:{kind}/...;base64,...) and plain base64."
_MAX_DATA_HEADER_CHARS = 1_024
_MAX_URL_CHARS = 8_192
_SCHEME_CHARS = 64
_WHITESPACE = b" \t\n\r\f\v"
_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


def read_source(source: str, config: MediaConfig, *, kind: SourceKind) -> bytes:
    """The bytes a source stands for: at least one, at most the limit of its kind."""
    source = source.strip()
    if source[:5].lower() == "data:":
        return _decode_base64(_data_url_payload(source, kind), config, kind=kind)
    _refuse_places(source, kind)
    return _decode_base64(source, config, kind=kind)


def _data_url_payload(url: str, kind: SourceKind) -> str:
    comma = url.find(",", 0, _MAX_DATA_HEADER_CHARS)
    if comma < 0:
        raise InvalidBase64("The data: URL has no comma before its data.", kind=kind)
    media_type, *parameters = (part.strip().lower() for part in url[5:comma].split(";"))
    if not parameters or parameters[-1] != "base64":
        raise InvalidBase64(f"The data: URL must be base64: data:{kind}/...;base64,...", kind=kind)
    # the declared type decides nothing else: the first bytes of the data do
    if kind == "video" and media_type == "video/jpeg":
        raise InvalidMediaUrl(
            "Lists of frames (data:video/jpeg) are not accepted; send a video file.", kind=kind
        )
    return url[comma + 1 :]


def _refuse_places(source: str, kind: SourceKind) -> None:
    """Refuse what reads as a URL or a path rather than as base64."""
    accepted = _ACCEPTED.format(kind=kind)
    scheme, colon, _ = source[:_SCHEME_CHARS].partition(":")
    if colon:
        raise InvalidMediaUrl(
            f"The server does not fetch {quoted(scheme + colon)} sources. {accepted}", kind=kind
        )
    # No accepted format begins with the byte 0xFC or above but JPEG, which reads "/9j/" in base64.
    is_rooted = source.startswith(("/", "~")) and not source.startswith("/9j/")
    if is_rooted or (len(source) <= _MAX_URL_CHARS and ("." in source or "\\" in source)):
        raise InvalidMediaUrl(
            f"The server does not read local files or incomplete URLs. {accepted}", kind=kind
        )


def _decode_base64(text: str, config: MediaConfig, *, kind: SourceKind) -> bytes:
    """Strict base64: whitespace is dropped, missing padding added, and nothing else forgiven."""
    try:
        encoded = text.encode("ascii").translate(None, _WHITESPACE)
    except UnicodeEncodeError:
        raise _invalid(kind, "characters outside its alphabet") from None
    digits = encoded.rstrip(b"=")
    num_padding = len(encoded) - len(digits)
    if not digits:
        if num_padding:
            raise _invalid(kind, "padding without data")
        raise EmptyMediaFile(f"The {kind} is empty.", kind=kind)

    max_bytes = config.max_image_bytes if kind == "image" else config.max_video_bytes
    num_bytes = len(digits) * 3 // 4
    if num_bytes > max_bytes:
        raise MediaFileTooLarge(
            f"The {kind} has {num_bytes} bytes; the limit is {max_bytes}.", kind=kind
        )
    if len(digits) % 4 == 1:
        raise _invalid(kind, "an impossible length")
    if num_padding not in (0, -len(digits) % 4):
        raise _invalid(kind, "wrong padding")
    if b"-" in digits or b"_" in digits:
        if b"+" in digits or b"/" in digits:
            raise _invalid(kind, "a mixture of the standard and the URL-safe alphabet")
        digits = digits.translate(_URL_SAFE_TO_STANDARD)
    try:
        data = binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except binascii.Error:
        raise _invalid(kind, "characters outside its alphabet") from None
    if len(data) != num_bytes:
        raise _invalid(kind, "characters outside its alphabet")
    return data


def _invalid(kind: SourceKind, what: str) -> InvalidBase64:
    return InvalidBase64(f"The {kind} is not valid base64: it has {what}.", kind=kind)
