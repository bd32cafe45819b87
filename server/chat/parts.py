"""What clients may say: messages and content parts, from JSON values to typed, frozen ones.

`PART_TYPES` lists every kind of part. Whatever is not understood is refused with the path of the
value at fault, never ignored. Nothing here fetches, decodes or renders anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from server.config import MediaConfig
from server.core import MediaKind
from server.errors import (
    ArrayTooLong,
    InvalidRequest,
    InvalidType,
    MissingParameter,
    StringTooLong,
    UnknownParameter,
    UnsupportedParameter,
    quoted,
)

Role = Literal["system", "user", "assistant"]
Detail = Literal["auto", "low", "high"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "assistant": "assistant",
}
UNSUPPORTED_ROLES = ("tool", "function")

# Known message fields that this server has no use for, with the values that ask for nothing.
UNSUPPORTED_MESSAGE_FIELDS: Mapping[str, tuple[object, ...]] = {
    "name": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
}
UNSUPPORTED_PART_TYPES = ("input_audio", "audio", "file", "refusal")

MAX_MESSAGES = 1_024
MAX_PARTS = 256
MAX_FILENAME_CHARS = 255
MAX_HINT_CHARS = 16_384


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client knows about a picture or video beside its pixels. Empty says nothing."""

    filename: str = ""
    ocr: str = ""
    lens_keywords: str = ""
    lens_local_keywords: str = ""
    speech_to_text: str = ""


HINT_FIELDS: Mapping[str, int] = {
    "filename": MAX_FILENAME_CHARS,
    "ocr": MAX_HINT_CHARS,
    "lens_keywords": MAX_HINT_CHARS,
    "lens_local_keywords": MAX_HINT_CHARS,
    "speech_to_text": MAX_HINT_CHARS,
}


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture or video: where its bytes are, and what is known about it.

    `param` is the path of the source and `path` that of the part, for errors.
    """

    kind: MediaKind
    source: str = field(repr=False)
    detail: Detail
    hints: Hints
    param: str
    path: str


Part: TypeAlias = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Content that came as a plain string stays one: templates may treat it apart."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def media(self) -> tuple[MediaPart, ...]:
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if isinstance(part, MediaPart))

    @property
    def texts(self) -> tuple[str, ...]:
        if isinstance(self.content, str):
            return (self.content,)
        return tuple(part.text for part in self.content if isinstance(part, TextPart))


def parse_messages(messages: Sequence[object], limits: MediaConfig) -> tuple[Message, ...]:
    """All messages of a request, or the first fault in them."""
    if not isinstance(messages, list | tuple):
        raise InvalidType("messages must be an array.", param="messages")
    if not messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise ArrayTooLong(
            f"At most {MAX_MESSAGES} messages are accepted, not {len(messages)}.", param="messages"
        )
    _check_part_count(messages)
    parsed = tuple(
        _parse_message(message, f"messages[{index}]") for index, message in enumerate(messages)
    )
    _check_media_count(parsed, "image", limits.max_images)
    _check_media_count(parsed, "video", limits.max_videos)
    return parsed


def _check_part_count(messages: Sequence[object]) -> None:
    num_parts = 0
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            num_parts += len(content)
            if num_parts > MAX_PARTS:
                raise ArrayTooLong(
                    f"At most {MAX_PARTS} content parts are accepted in a request.",
                    param=f"messages[{index}].content",
                )


def _check_media_count(messages: Sequence[Message], kind: MediaKind, limit: int) -> None:
    parts = [part for message in messages for part in message.media if part.kind == kind]
    if len(parts) > limit:
        raise ArrayTooLong(
            f"At most {limit} {kind}s are accepted in a request, not {len(parts)}.",
            param=parts[limit].path,
        )


def _parse_message(value: object, path: str) -> Message:
    message = _object(value, path)
    for name, neutral in UNSUPPORTED_MESSAGE_FIELDS.items():
        if name in message and message[name] not in neutral:
            raise UnsupportedParameter(
                f"The message field {name} is not supported.", param=f"{path}.{name}"
            )
    _refuse_unknown(message, path, ("role", "content", *UNSUPPORTED_MESSAGE_FIELDS))
    role = _parse_role(message, f"{path}.role")
    content = _parse_content(message.get("content"), role, f"{path}.content")
    parsed = Message(role, content)
    if role == "user" and not parsed.media and not any(text.strip() for text in parsed.texts):
        raise InvalidRequest("The content of a user message is empty.", param=f"{path}.content")
    if role != "user" and parsed.media:
        first = parsed.media[0]
        raise InvalidRequest(
            f"Only user messages may hold a picture or video, not {role} messages.",
            param=first.path,
        )
    return parsed


def _parse_role(message: Mapping[str, Any], path: str) -> Role:
    role = _string(_required(message, "role", path), path)
    if role in UNSUPPORTED_ROLES:
        raise UnsupportedParameter(f"Messages of the role {role} are not supported.", param=path)
    if role not in ROLES:
        raise InvalidRequest(
            f"{quoted(role)} is not a role: use system, developer, user or assistant.", param=path
        )
    return ROLES[role]


def _parse_content(value: object, role: Role, path: str) -> str | tuple[Part, ...]:
    if value is None:
        if role == "assistant":
            return ""
        raise MissingParameter(f"A {role} message needs content.", param=path)
    if isinstance(value, str):
        return _string(value, path)
    if isinstance(value, Mapping):
        return (_parse_part(value, path),)
    if isinstance(value, list | tuple):
        return tuple(_parse_part(part, f"{path}[{index}]") for index, part in enumerate(value))
    raise InvalidType("content must be a string, an array of parts, or one part.", param=path)


def _parse_part(value: object, path: str) -> Part:
    part = _object(value, path)
    name = _string(_required(part, "type", f"{path}.type"), f"{path}.type")
    if name in UNSUPPORTED_PART_TYPES:
        raise UnsupportedParameter(
            f"Content parts of the type {name} are not supported.", param=f"{path}.type"
        )
    if name not in PART_TYPES:
        raise InvalidRequest(
            f"{quoted(name)} is not a content part type: use {', '.join(PART_TYPES)}.",
            param=f"{path}.type",
        )
    return PART_TYPES[name](part, path)


def _parse_text(part: Mapping[str, Any], path: str) -> TextPart:
    _refuse_unknown(part, path, ("type", "text"))
    return TextPart(_string(_required(part, "text", f"{path}.text"), f"{path}.text"))


def _parse_image_url(part: Mapping[str, Any], path: str) -> MediaPart:
    _refuse_unknown(part, path, ("type", "image_url", *HINT_FIELDS))
    value, value_path = _required(part, "image_url", f"{path}.image_url"), f"{path}.image_url"
    if isinstance(value, str):
        return _media("image", value, part, param=value_path, path=path)
    image_url = _object(value, value_path)
    _refuse_unknown(image_url, value_path, ("url", "detail"))
    detail = _parse_detail(image_url.get("detail"), f"{value_path}.detail")
    url = _required(image_url, "url", f"{value_path}.url")
    return _media("image", url, part, detail=detail, param=f"{value_path}.url", path=path)


def _parse_video_url(part: Mapping[str, Any], path: str) -> MediaPart:
    _refuse_unknown(part, path, ("type", "video_url", *HINT_FIELDS))
    value, value_path = _required(part, "video_url", f"{path}.video_url"), f"{path}.video_url"
    if isinstance(value, str):
        return _media("video", value, part, param=value_path, path=path)
    video_url = _object(value, value_path)
    _refuse_unknown(video_url, value_path, ("url",))
    url = _required(video_url, "url", f"{value_path}.url")
    return _media("video", url, part, param=f"{value_path}.url", path=path)


def _parse_image(part: Mapping[str, Any], path: str) -> MediaPart:
    _refuse_unknown(part, path, ("type", "image", *HINT_FIELDS))
    source = _required(part, "image", f"{path}.image")
    return _media("image", source, part, param=f"{path}.image", path=path)


def _parse_video(part: Mapping[str, Any], path: str) -> MediaPart:
    _refuse_unknown(part, path, ("type", "video", *HINT_FIELDS))
    source = _required(part, "video", f"{path}.video")
    return _media("video", source, part, param=f"{path}.video", path=path)


PART_TYPES: Mapping[str, Callable[[Mapping[str, Any], str], Part]] = {
    "text": _parse_text,
    "image_url": _parse_image_url,
    "video_url": _parse_video_url,
    # the model card's own spelling
    "image": _parse_image,
    "video": _parse_video,
}


def _media(
    kind: MediaKind,
    source: object,
    part: Mapping[str, Any],
    *,
    param: str,
    path: str,
    detail: Detail = "auto",
) -> MediaPart:
    # Sources are long; that they are proper text is found out where they are read.
    if not isinstance(source, str):
        raise InvalidType("This must be a string.", param=param)
    if not source:
        raise InvalidRequest(f"The source of the {kind} is empty.", param=param)
    hints = {
        name: _string(part[name], f"{path}.{name}", max_chars=max_chars)
        for name, max_chars in HINT_FIELDS.items()
        if part.get(name) is not None
    }
    return MediaPart(kind, source, detail, Hints(**hints), param=param, path=path)


def _parse_detail(value: object, path: str) -> Detail:
    if value is None or value == "auto":
        return "auto"
    if value == "low":
        return "low"
    if value == "high":
        return "high"
    if not isinstance(value, str):
        raise InvalidType("This must be a string.", param=path)
    raise InvalidRequest(f"detail must be auto, low or high, not {quoted(value)}.", param=path)


def _object(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidType("This must be an object.", param=path)
    return value


def _required(values: Mapping[str, Any], name: str, path: str) -> object:
    if values.get(name) is None:
        raise MissingParameter(f"{name} is missing.", param=path)
    value: object = values[name]
    return value


def _refuse_unknown(values: Mapping[str, Any], path: str, known: Collection[str]) -> None:
    for name in values:
        if name not in known:
            # The name is the client's, so that the path shows no more of it than a message may.
            raise UnknownParameter(
                f"{quoted(name)} is not known here.", param=f"{path}.{quoted(name)[1:-1]}"
            )


def _string(value: object, path: str, *, max_chars: int | None = None) -> str:
    if not isinstance(value, str):
        raise InvalidType("This must be a string.", param=path)
    if max_chars is not None and len(value) > max_chars:
        raise StringTooLong(
            f"At most {max_chars} characters are accepted here, not {len(value)}.", param=path
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("This text holds half of a surrogate pair.", param=path) from None
    return value
