"""What clients may say: messages and content parts, from JSON values to typed, frozen ones.

`PART_TYPES` lists every kind of part. Whatever is not understood is refused with the path of the
value at fault, never ignored. Nothing here fetches, decodes or renders anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from server.chat.fields import as_object, as_string, refuse_unknown, required
from server.chat.options import NO_OPTIONS, MediaOptions, parse_detail, parse_options
from server.config import MediaConfig
from server.core import MediaKind
from server.errors import (
    ArrayTooLong,
    InvalidRequest,
    InvalidType,
    MissingParameter,
    UnsupportedParameter,
    quoted,
)

Role = Literal["system", "user", "assistant", "tool"]
OnError = Literal["fail", "skip", "placeholder"]
"""What becomes of a request whose medium cannot be used: it fails, or goes on without the medium,
or with a note in its place."""

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
UNSUPPORTED_ROLES = ("function",)

# Known message fields that this server has no use for, with the values that ask for nothing.
UNSUPPORTED_MESSAGE_FIELDS: Mapping[str, tuple[object, ...]] = {
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
}

# The fields that only messages of some role have, with the values that ask for nothing elsewhere.
FIELDS_OF_ROLE: Mapping[str, tuple[Role, tuple[object, ...]]] = {
    "name": ("tool", (None,)),
    "tool_calls": ("assistant", (None, [])),
    "tool_call_id": ("tool", (None,)),
}
UNSUPPORTED_PART_TYPES = ("input_audio", "audio", "refusal")

MAX_MESSAGES = 1_024
MAX_PARTS = 256
MAX_FILENAME_CHARS = 255
MAX_HINT_CHARS = 16_384
MAX_CALLS = 128
MAX_CALL_ID_CHARS = 512
MAX_NAME_CHARS = 64


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
FILE_SOURCES = ("file_id", "file_data")
MEDIA_FIELDS = (*HINT_FIELDS, "media_options", "on_error")
"""What every part with a medium may say beside where it is."""


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture or video: where its bytes are, and what is known about it.

    Where `is_kind_known` is not set only the bytes will say what it is. The sources of a
    list are the frames of a video. `param` is the path of the source and `path` that of the part,
    for errors.
    """

    kind: MediaKind
    sources: tuple[str, ...] = field(repr=False)
    param: str
    path: str
    hints: Hints = Hints()
    options: MediaOptions = NO_OPTIONS
    on_error: OnError = "fail"
    is_kind_known: bool = True
    is_list: bool = False


Part: TypeAlias = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the assistant called: its `arguments` are what the client's JSON said."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Content that came as a plain string stays one: templates may treat it apart.

    A turn of the role "tool" answers an earlier `call`, and the assistant's may make `calls`.
    """

    role: Role
    content: str | tuple[Part, ...]
    calls: tuple[Call, ...] = ()
    call: Call | None = None

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
    calls: dict[str, Call] = {}
    parsed = tuple(
        _parse_message(message, f"messages[{index}]", calls)
        for index, message in enumerate(messages)
    )
    check_media_counts([part for message in parsed for part in message.media], limits)
    return parsed


def with_parts(
    messages: Sequence[Message], changed: Mapping[str, Part | None]
) -> tuple[Message, ...]:
    """The messages with other parts in the places of some (by their paths), or without them.

    InvalidRequest where nothing is left of what a user said.
    """
    result: list[Message] = []
    for index, message in enumerate(messages):
        if not isinstance(message.content, str):
            parts = [
                changed.get(part.path, part) if isinstance(part, MediaPart) else part
                for part in message.content
            ]
            message = replace(message, content=tuple(part for part in parts if part is not None))
            _check_user_content(message, f"messages[{index}]")
        result.append(message)
    return tuple(result)


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


def check_media_counts(media: Sequence[MediaPart], limits: MediaConfig) -> None:
    """Refuse more media than allowed; to be asked again when all kinds are known."""
    known = [part for part in media if part.is_kind_known]
    for kind, some, limit in (
        ("image", [part for part in known if part.kind == "image"], limits.max_images),
        ("video", [part for part in known if part.kind == "video"], limits.max_videos),
        ("picture and video", media, limits.max_images + limits.max_videos),
    ):
        if len(some) > limit:
            raise ArrayTooLong(
                f"At most {limit} {kind}s are accepted in a request, not {len(some)}.",
                param=some[limit].path,
            )


def _parse_message(value: object, path: str, calls: dict[str, Call]) -> Message:
    """`calls` are those made so far, by their ids; the message's own are added."""
    message = as_object(value, path)
    for name, neutral in UNSUPPORTED_MESSAGE_FIELDS.items():
        if name in message and message[name] not in neutral:
            raise UnsupportedParameter(
                f"The message field {name} is not supported.", param=f"{path}.{name}"
            )
    known = ("role", "content", *FIELDS_OF_ROLE, *UNSUPPORTED_MESSAGE_FIELDS)
    refuse_unknown(message, path, known)
    role = _parse_role(message, f"{path}.role")
    for name, (owner, neutral) in FIELDS_OF_ROLE.items():
        if role != owner and message.get(name) not in neutral:
            raise UnsupportedParameter(
                f"The field {name} is supported only in messages of the role {owner}.",
                param=f"{path}.{name}",
            )
    content = _parse_content(message.get("content"), role, f"{path}.content")
    made = _parse_calls(message.get("tool_calls"), f"{path}.tool_calls")
    answered = _parse_answered(message, path, calls) if role == "tool" else None
    calls |= {call.id: call for call in made}
    parsed = Message(role, content, made, answered)
    _check_user_content(parsed, path)
    if role != "user" and parsed.media:
        first = parsed.media[0]
        raise InvalidRequest(
            f"Only user messages may hold a picture or video, not {role} messages.",
            param=first.path,
        )
    return parsed


def _parse_calls(value: object, path: str) -> tuple[Call, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidType("This must be an array.", param=path)
    if len(value) > MAX_CALLS:
        raise ArrayTooLong(f"At most {MAX_CALLS} calls are accepted in a message.", param=path)
    calls = tuple(_parse_call(call, f"{path}[{index}]") for index, call in enumerate(value))
    seen: set[str] = set()
    for index, call in enumerate(calls):
        if call.id in seen:
            raise InvalidRequest("Two calls have this id.", param=f"{path}[{index}].id")
        seen.add(call.id)
    return calls


def _parse_call(value: object, path: str) -> Call:
    call = as_object(value, path)
    if call.get("type") not in (None, "function"):
        raise UnsupportedParameter(
            "Only calls of the type function are supported.", param=f"{path}.type"
        )
    # `index` is what a streamed call has, which some clients send back as it came.
    refuse_unknown(call, path, ("id", "type", "function", "index"))
    if not isinstance(call.get("index"), int | None):
        raise InvalidType("This must be an integer.", param=f"{path}.index")
    call_id = as_string(
        required(call, "id", f"{path}.id"), f"{path}.id", max_chars=MAX_CALL_ID_CHARS
    )
    path = f"{path}.function"
    function = as_object(required(call, "function", path), path)
    refuse_unknown(function, path, ("name", "arguments"))
    name = as_string(
        required(function, "name", f"{path}.name"), f"{path}.name", max_chars=MAX_NAME_CHARS
    )
    arguments = _parse_arguments(function.get("arguments"), f"{path}.arguments")
    return Call(call_id, name, arguments)


def _parse_arguments(value: object, path: str) -> Mapping[str, Any]:
    """What the JSON text says. None and no text are no arguments: so do clients write that."""
    text = "" if value is None else as_string(value, path)
    if not text.strip():
        return {}
    try:
        arguments = json.loads(text, object_pairs_hook=_without_repeats)
        # What is no JSON (NaN, 1e999) or no text (half of a surrogate pair) is found only here.
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest("This must be the JSON of an object.", param=path)
    return arguments


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As in the request itself, ambiguity is refused."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _parse_answered(message: Mapping[str, Any], path: str, calls: Mapping[str, Call]) -> Call:
    """The call whose result a tool message is."""
    id_path = f"{path}.tool_call_id"
    call = calls.get(as_string(required(message, "tool_call_id", id_path), id_path))
    if call is None:
        raise InvalidRequest("No call before this message has this id.", param=id_path)
    if message.get("name") not in (None, call.name):
        raise InvalidRequest("The call with this id is of another name.", param=f"{path}.name")
    return call


def _check_user_content(message: Message, path: str) -> None:
    is_empty = not message.media and not any(text.strip() for text in message.texts)
    if message.role == "user" and is_empty:
        raise InvalidRequest("The content of a user message is empty.", param=f"{path}.content")


def _parse_role(message: Mapping[str, Any], path: str) -> Role:
    role = as_string(required(message, "role", path), path)
    if role in UNSUPPORTED_ROLES:
        raise UnsupportedParameter(f"Messages of the role {role} are not supported.", param=path)
    if role not in ROLES:
        raise InvalidRequest(f"{quoted(role)} is not a role: use {', '.join(ROLES)}.", param=path)
    return ROLES[role]


def _parse_content(value: object, role: Role, path: str) -> str | tuple[Part, ...]:
    if value is None:
        if role == "assistant":
            return ""
        raise MissingParameter(f"A {role} message needs content.", param=path)
    if isinstance(value, str):
        return as_string(value, path)
    if isinstance(value, Mapping):
        return (_parse_part(value, path),)
    if isinstance(value, list | tuple):
        return tuple(_parse_part(part, f"{path}[{index}]") for index, part in enumerate(value))
    raise InvalidType("content must be a string, an array of parts, or one part.", param=path)


def _parse_part(value: object, path: str) -> Part:
    part = as_object(value, path)
    name = as_string(required(part, "type", f"{path}.type"), f"{path}.type")
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
    refuse_unknown(part, path, ("type", "text"))
    return TextPart(as_string(required(part, "text", f"{path}.text"), f"{path}.text"))


def _parse_image_url(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", "image_url", *MEDIA_FIELDS))
    value, value_path = required(part, "image_url", f"{path}.image_url"), f"{path}.image_url"
    if isinstance(value, str):
        return _media("image", value, part, param=value_path, path=path)
    image_url = as_object(value, value_path)
    refuse_unknown(image_url, value_path, ("url", "detail"))
    url = required(image_url, "url", f"{value_path}.url")
    detail = image_url.get("detail"), f"{value_path}.detail"
    return _media("image", url, part, detail=detail, param=f"{value_path}.url", path=path)


def _parse_video_url(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", "video_url", *MEDIA_FIELDS))
    value, value_path = required(part, "video_url", f"{path}.video_url"), f"{path}.video_url"
    if isinstance(value, str):
        return _media("video", value, part, param=value_path, path=path)
    video_url = as_object(value, value_path)
    refuse_unknown(video_url, value_path, ("url",))
    url = required(video_url, "url", f"{value_path}.url")
    return _media("video", url, part, param=f"{value_path}.url", path=path)


def _parse_image(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", "image", *MEDIA_FIELDS))
    source = required(part, "image", f"{path}.image")
    return _media("image", source, part, param=f"{path}.image", path=path)


def _parse_video(part: Mapping[str, Any], path: str) -> MediaPart:
    """One source, or a list of pictures, which are its frames."""
    refuse_unknown(part, path, ("type", "video", *MEDIA_FIELDS))
    source = required(part, "video", f"{path}.video")
    return _media("video", source, part, param=f"{path}.video", path=path)


def _parse_file(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", "file", *MEDIA_FIELDS))
    file_path = f"{path}.file"
    file = as_object(required(part, "file", file_path), file_path)
    refuse_unknown(file, file_path, (*FILE_SOURCES, "filename"))
    return _file(file, part, file_path, path)


def _parse_input_image(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", "image_url", "file_id", "detail", *MEDIA_FIELDS))
    name = _one_of(part, ("image_url", "file_id"), path)
    detail = part.get("detail"), f"{path}.detail"
    return _media("image", part[name], part, detail=detail, param=f"{path}.{name}", path=path)


def _parse_input_file(part: Mapping[str, Any], path: str) -> MediaPart:
    refuse_unknown(part, path, ("type", *FILE_SOURCES, "file_url", *MEDIA_FIELDS))
    return _file(part, part, path, path, sources=(*FILE_SOURCES, "file_url"))


PART_TYPES: Mapping[str, Callable[[Mapping[str, Any], str], Part]] = {
    "text": _parse_text,
    "image_url": _parse_image_url,
    "video_url": _parse_video_url,
    "file": _parse_file,
    # the model card's own spelling
    "image": _parse_image,
    "video": _parse_video,
    # the spelling of OpenAI's Responses
    "input_text": _parse_text,
    "input_image": _parse_input_image,
    "input_file": _parse_input_file,
}


def _file(
    file: Mapping[str, Any],
    part: Mapping[str, Any],
    file_path: str,
    path: str,
    *,
    sources: Sequence[str] = FILE_SOURCES,
) -> MediaPart:
    """An uploaded file, or one that is sent along; its bytes say what it is."""
    name = _one_of(file, sources, file_path)
    filename = file.get("filename")
    if filename is not None:
        as_string(filename, f"{file_path}.filename", max_chars=MAX_FILENAME_CHARS)
        part = {"filename": filename, **part}
    return _media(None, file[name], part, param=f"{file_path}.{name}", path=path)


def _one_of(values: Mapping[str, Any], names: Sequence[str], path: str) -> str:
    """Which of some fields is given; it must be exactly one."""
    given = [name for name in names if values.get(name) is not None]
    if not given:
        raise MissingParameter(f"{' or '.join(names)} is missing.", param=f"{path}.{names[0]}")
    if len(given) > 1:
        raise InvalidRequest(
            f"{given[0]} and {given[1]} cannot both be given.", param=f"{path}.{given[1]}"
        )
    return given[0]


def _media(
    kind: MediaKind | None,
    source: object,
    part: Mapping[str, Any],
    *,
    param: str,
    path: str,
    detail: tuple[object, str] = (None, ""),
) -> MediaPart:
    """Without a kind the bytes will say it. `detail` is OpenAI's own field and its path."""
    given = source if kind == "video" and isinstance(source, list) else [source]
    if not given:
        raise InvalidRequest("The list of frames is empty.", param=param)
    sources: list[str] = []
    for each in given:
        # Sources are long; that they are proper text is found out where they are read.
        if not isinstance(each, str):
            raise InvalidType("This must be a string.", param=param)
        if not each:
            raise InvalidRequest(f"The source of the {kind or 'file'} is empty.", param=param)
        sources.append(each)
    hints = {
        name: as_string(part[name], f"{path}.{name}", max_chars=max_chars)
        for name, max_chars in HINT_FIELDS.items()
        if part.get(name) is not None
    }
    options = parse_options(part.get("media_options"), f"{path}.media_options", kind=kind)
    said = parse_detail(*detail)
    if said is not None and options.detail is not None and said != options.detail:
        raise InvalidRequest("detail is given twice, and differs.", param=detail[1])
    return MediaPart(
        kind or "image",
        tuple(sources),
        param=param,
        path=path,
        hints=Hints(**hints),
        options=options if said is None else replace(options, detail=said),
        on_error=_parse_on_error(part.get("on_error"), f"{path}.on_error"),
        is_kind_known=kind is not None,
        is_list=source is given,
    )


def _parse_on_error(value: object, path: str) -> OnError:
    if value is None:
        return "fail"
    if not isinstance(value, str):
        raise InvalidType("This must be a string.", param=path)
    for each in get_args(OnError):
        if value == each:
            said: OnError = each
            return said
    raise InvalidRequest(
        f"on_error must be fail, skip or placeholder, not {quoted(value)}.", param=path
    )
