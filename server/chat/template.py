"""From parsed messages to prompt ids, with one placeholder id for each picture or video.

The checkpoint's own chat template is rendered by transformers in its sandbox. Special tokens come
from the template alone: before rendering, the characters of client text that could take part in one
are exchanged for numbers nobody can guess, and put back when the template's own special tokens have
been found. What lies between those is encoded in one piece, template and client text together, so
that ordinary text gets the ids of the official encoding. Nothing here sees pixels or HTTP.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import tokenizers

from server.chat.calls import ARROW
from server.chat.disguise import Disguise
from server.chat.parts import Call, Hints, MediaPart, Message, Part, Role, TextPart
from server.chat.tokenizer import Tokenizer
from server.chat.tools import Function
from server.core import MediaKind, VisionSpec
from server.errors import CheckpointError, InvalidPrompt, UnsupportedParameter

Form = Literal["list", "dict", "string"]
"""What a template takes as a message's content: a list of parts, one part, or only text."""

Capability: TypeAlias = MediaKind | Literal["tools"]
"""What a conversation may hold beside text."""

RevisionLayout = Literal["main", "v0.1.0", "text"]

Ending = Literal["assistant", "call", "none", "open"]
"""How a prompt ends: where the assistant is to speak or to call a function, after the last message,
or within it."""

FORMS: Mapping[RevisionLayout, tuple[Form, ...]] = {
    "main": ("list", "dict", "string"),
    "v0.1.0": ("dict", "list", "string"),
    "text": ("string", "list", "dict"),
}

# The documented layout. Two things in it are ours: a client's hints about a video get an aux block
# like a picture's, and so does speech_to_text beside a picture; both only where there are any.
DOCUMENTED_LAYOUT: Final = """
{%- macro block(role, text) -%}
{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>' }}
{%- endmacro -%}
{%- macro functions_of(tools) -%}
[
{%- for tool in tools -%}
{{ ('' if loop.first else ', ') + tool.function | tojson }}
{%- endfor -%}
]
{%- endmacro -%}
{{- block('tool_list', functions_of(tools) if tools else '') + '\n' -}}
{%- if messages[0].role != 'system' -%}
{{- block('system', '') + '\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- block('tool/function_call', message.content) + '\n' -}}
{%- elif message.tool_calls -%}
{%- if message.content -%}
{{- block('assistant', message.content) + '\n' -}}
{%- endif -%}
{{- block('assistant -> tool/function_call', functions_of(message.tool_calls)) + pause + '\n' -}}
{%- elif message.role != 'user' -%}
{{- block(message.role, message.content) -}}
{{- (end_of_turn if message.role == 'assistant' else '') + '\n' -}}
{%- elif message.content is string -%}
{{- block('user', message.content) + '\n' -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{- block('user', part.text) + '\n' -}}
{%- elif part.type == 'image' -%}
{{- block('user (mime)', '{"type": "image/jpeg", "filename": ' + part.filename | tojson + '}') -}}
{{- '\n' + block('user (vector)', image_token) + '\n' -}}
{%- set hints = {
    'ocr': part.ocr,
    'lens_keywords': part.lens_keywords,
    'lens_local_keywords': part.lens_local_keywords,
} -%}
{%- if 'speech_to_text' in part -%}
{%- set hints = dict(hints, speech_to_text=part.speech_to_text) -%}
{%- endif -%}
{{- block('image/aux', '다음 중 ocr은 사진에서 검출된 글자이고, lens_keyword는 사진에서 추출된 '
    + 'keyword와 bbox 위치입니다. bbox는 0~1 사이로 정규화된 [x1, y1, x2, y2]의 형태입니다. '
    + '참고하여 답변하세요. ' + hints | tojson) + '\n' -}}
{%- else -%}
{{- block('user (mime)', '{"type": "video/mp4", "filename": ' + part.filename | tojson + '}') -}}
{{- '\n' + block('user (vector)', video_token) + '\n' -}}
{%- if 'ocr' in part or part.lens_keywords or part.lens_local_keywords or part.speech_to_text -%}
{%- set hints = {
    'lens_keywords': part.lens_keywords,
    'lens_local_keywords': part.lens_local_keywords,
    'speech_to_text': part.speech_to_text,
} -%}
{%- if 'ocr' in part -%}
{%- set hints = dict(hints, ocr=part.ocr) -%}
{%- endif -%}
{{- block('video/aux', hints | tojson) + '\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

# The hints a template may count on, empty where the client gave none; others come only if given.
USUAL_HINTS: Mapping[MediaKind, tuple[str, ...]] = {
    "image": ("filename", "ocr", "lens_keywords", "lens_local_keywords"),
    "video": ("filename", "lens_keywords", "lens_local_keywords", "speech_to_text"),
}

_WORDS: Final[Mapping[frozenset[Capability], str]] = {
    frozenset(): "text",
    frozenset({"image"}): "pictures",
    frozenset({"image", "video"}): "videos",
    frozenset({"tools"}): "tools",
}

_FUNCTION_WORDS: Final = frozenset(
    {
        *("name", "description", "parameters"),
        *("type", "properties", "required", "items", "enum", "default", "anyOf"),
        *("object", "array", "string", "integer", "number", "boolean", "null"),
    }
)
"""What a template may look for in a function: such texts are shown as they stand."""

_PROBE: Final = "probe7f3a"
# Behind the mark of an open end; a template that leaves it there has trimmed nothing before it.
_BEHIND_MARK: Final = "   "
# How content looks that a template printed as it stands instead of reading it.
_PRINTED_PART: Final = re.compile(r"""['"]type['"]: ?['"](?:text|image|video)['"]""")

_Content: TypeAlias = str | dict[str, str] | list[dict[str, str]]
_RenderedMessage: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Way:
    """A template and how it wants to be fed, as found by trying."""

    template: str
    form: Form
    variables: Mapping[str, str] = field(default_factory=dict)
    # The roles whose messages it renders from parts, and those it renders from a plain string.
    part_roles: frozenset[Role] = frozenset()
    string_roles: frozenset[Role] = frozenset()
    # For each medium it can place: what it is handed over as, and the hints it makes use of.
    rendered_as: Mapping[MediaKind, MediaKind] = field(default_factory=dict)
    hints: Mapping[MediaKind, frozenset[str]] = field(default_factory=dict)
    # Whether it shows functions, calls of them and their results.
    has_tools: bool = False
    # Whether `add_generation_prompt` makes a difference to it.
    can_end_with_message: bool = False

    def can_render(self, what: frozenset[Capability]) -> bool:
        able: set[Capability] = {*self.rendered_as}
        if self.has_tools:
            able.add("tools")
        return "user" in self.part_roles | self.string_roles and what <= able


class ChatTemplate:
    """The prompts of one checkpoint, and its special tokens by what they are for.

    `encode` gives the ids of a conversation. `notes` says, for the operator, where the documented
    layout stands in for the checkpoint's own template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str | None,
        revision_layout: RevisionLayout,
        vision: VisionSpec | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.named_special_tokens = dict(special_tokens or {})
        self._tokenizer = tokenizer
        self._disguise = Disguise(tokenizer)
        # Not above: it takes half a second, and by now the engine process loads beside it.
        from transformers import PreTrainedTokenizerFast

        # Only the sandboxed renderer is wanted of it; the vocabulary stays with our Tokenizer.
        self._renderer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
            **self.named_special_tokens,
        )
        self._placeholders = _placeholders(tokenizer, vision)

        candidates = [] if template is None else self._ways(template, FORMS[revision_layout], {})
        own = len(candidates)
        if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys():
            candidates += self._ways(DOCUMENTED_LAYOUT, ("list",), self._layout_variables())
        levels: list[frozenset[Capability]] = [frozenset()]
        if vision is not None:
            levels += [frozenset({"image"}), frozenset({"image", "video"})]
        self._chosen: dict[frozenset[Capability], _Way] = {}
        tools: frozenset[Capability] = frozenset({"tools"})
        for level in (*levels, *(level | tools for level in levels)):
            able = [way for way in candidates if way.can_render(level)]
            if able:
                self._chosen[level] = able[0]
        if frozenset() not in self._chosen:
            raise CheckpointError(
                "the checkpoint's chat template cannot render a conversation, and its tokenizer "
                "lacks <|im_start|> and <|im_end|> for the documented layout"
            )
        levels.append(tools)
        self.notes = self._describe(template, levels, candidates[:own])
        for note in self.notes:
            logging.getLogger(__name__).warning(note)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        revision_layout: RevisionLayout,
        vision: VisionSpec | None = None,
    ) -> ChatTemplate:
        """With the template and the named special tokens that the folder's files give."""
        template, special_tokens = read_template(folder)
        return cls(
            tokenizer,
            template=template,
            revision_layout=revision_layout,
            vision=vision,
            special_tokens=special_tokens,
        )

    def placeholder_id(self, kind: MediaKind) -> int:
        """The id that stands for a medium of this kind. A video's may be that of a picture."""
        return self._tokenizer.special[self._placeholders[kind]]

    def encode(
        self,
        messages: Sequence[Message],
        functions: Sequence[Function] = (),
        *,
        ending: Ending = "assistant",
    ) -> list[int]:
        """The ids of the whole prompt; each medium is one placeholder, in the order of parts.

        With an open end it stops behind the last message's text, which has to be there.
        """
        way = self._way_for(messages, functions)
        _refuse_unused_hints(way, messages)
        _check_ending(way, messages, ending)
        nonce = self._disguise.new_nonce()
        try:
            rendered = self._render(
                way,
                messages,
                functions,
                hide=lambda text: self._disguise.hide(text, nonce=nonce),
                ending=ending,
            )
        except InvalidPrompt:
            raise
        except Exception as error:
            # A template is the checkpoint's code and raises what it likes, about client text too.
            raise InvalidPrompt(
                "The model's chat template cannot render this conversation.", param="messages"
            ) from error
        if ending == "call":
            rendered = _with_call_head(rendered)
        ids = self._disguise.encode(rendered, nonce=nonce)
        self._check_placeholders(ids, messages)
        return ids

    def _way_for(self, messages: Sequence[Message], functions: Sequence[Function]) -> _Way:
        kinds: set[MediaKind] = {part.kind for message in messages for part in message.media}
        level: frozenset[Capability] = frozenset({"image", *kinds}) if kinds else frozenset()
        if level not in self._chosen:
            first = next(part for message in messages for part in message.media)
            raise UnsupportedParameter(
                f"This model's chat template has no place for {first.kind}s."
                if self._placeholders
                else f"This model takes no {first.kind}s, only text.",
                param=first.path,
            )
        if functions or any(message.calls for message in messages):
            level |= {"tools"}
        if level not in self._chosen:
            raise UnsupportedParameter(
                "This model's chat template has no place for tools here.",
                param="tools" if functions else "messages",
            )
        return self._chosen[level]

    def _check_placeholders(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        media = [part for message in messages for part in message.media]
        for placeholder in {self.placeholder_id(kind) for kind in self._placeholders}:
            expected = sum(self.placeholder_id(part.kind) == placeholder for part in media)
            found = ids.count(placeholder)
            if found != expected:
                raise InvalidPrompt(
                    f"The model's chat template made {found} media places for {expected} items.",
                    param="messages",
                )

    def _layout_variables(self) -> dict[str, str]:
        names = {f"{kind}_token": token for kind, token in self._placeholders.items()}
        for name, token in (("end_of_turn", "<|endofturn|>"), ("pause", "<|stop|>")):
            names[name] = token if token in self._tokenizer.special else ""
        return names

    def _describe(
        self,
        template: str | None,
        levels: Sequence[frozenset[Capability]],
        own: Sequence[_Way],
    ) -> tuple[str, ...]:
        if template is None:
            return ("the checkpoint ships no chat template: the documented layout is used",)
        missing = [
            _WORDS[level] for level in levels if not any(way.can_render(level) for way in own)
        ]
        if not missing:
            return ()
        has_layout = all(level in self._chosen for level in levels)
        return (
            f"the checkpoint's chat template cannot render {' and '.join(missing)}: "
            + ("the documented layout is used for" if has_layout else "the server refuses")
            + " such conversations",
        )

    def _ways(
        self, template: str, forms: Sequence[Form], variables: Mapping[str, str]
    ) -> list[_Way]:
        tried = [self._try(_Way(template, form, variables)) for form in forms]
        return [replace(way, can_end_with_message=self._has_head_apart(way)) for way in tried]

    def _has_head_apart(self, way: _Way) -> bool:
        """Whether the template leaves out the head of the assistant's turn when it is told to."""
        user = Message("user", (TextPart("x"),) if "user" in way.part_roles else "x")
        endings: tuple[Ending, ...] = ("assistant", "none")
        with_head, without_head = (
            self._rendered_or_none(way, [user], hide=lambda text: text, ending=ending)
            for ending in endings
        )
        return without_head is not None and without_head != with_head

    def _try(self, blank: _Way) -> _Way:
        """The way with everything filled in that its template turns out to be able to do."""
        roles: tuple[Role, ...] = ("system", "user", "assistant", "tool")
        everyone = frozenset(roles)
        as_strings = replace(blank, part_roles=frozenset(), string_roles=everyone)
        as_parts = replace(blank, part_roles=everyone, string_roles=frozenset())
        string_roles, part_roles = set[Role](), set[Role]()
        if self._shows(as_strings, "user"):
            string_roles.add("user")
        if blank.form != "string" and self._shows(as_parts, "user"):
            part_roles.add("user")
        if blank.form != "string" and "user" not in part_roles:
            return blank
        others: tuple[Role, ...] = ("system", "assistant", "tool")
        for role in others:
            # The user's turn beside it is written as is known to work.
            known = replace(
                blank, part_roles=frozenset(part_roles), string_roles=frozenset(string_roles)
            )
            with_string = replace(known, string_roles=known.string_roles | {role})
            with_parts = replace(known, part_roles=known.part_roles | {role})
            if self._shows(with_string, role):
                string_roles.add(role)
            if blank.form != "string" and self._shows(with_parts, role):
                part_roles.add(role)
        way = replace(blank, part_roles=frozenset(part_roles), string_roles=frozenset(string_roles))
        way = replace(way, has_tools=self._shows_tools(way))
        if blank.form == "string":
            return way
        kinds: tuple[MediaKind, ...] = ("image", "video")
        rendered_as: dict[MediaKind, MediaKind] = {}
        hints: dict[MediaKind, frozenset[str]] = {}
        for kind in kinds:
            if kind not in self._placeholders:
                continue
            # The older release, which has no video token, shows a video as an image entry.
            shares_token = self._placeholders[kind] == self._placeholders["image"]
            for shown_as in (kind, "image") if shares_token else (kind,):
                trial = replace(way, rendered_as={kind: shown_as})
                found = self._hints_shown(trial, kind)
                if found is not None:
                    rendered_as[kind], hints[kind] = shown_as, found
                    break
        return replace(way, rendered_as=rendered_as, hints=hints)

    def _shows(self, way: _Way, role: Role) -> bool:
        """Whether text of this role appears, once and read properly."""
        # With characters that have to be disguised: a template that measures or alters its text
        # would do so to the disguise.
        nonce = self._disguise.new_nonce()
        text = f"{_PROBE} <|a|> {_PROBE}"
        shown = self._disguise.hide(text, nonce=nonce)
        content: str | tuple[Part, ...] = (TextPart(text),) if role in way.part_roles else text
        user = Message("user", (TextPart("x"),) if "user" in way.part_roles else "x")
        call = Call("call_0", "f", {})
        conversations: Mapping[Role, list[Message]] = {
            "system": [Message("system", content), user],
            "user": [Message("user", content)],
            "assistant": [user, Message("assistant", content), user],
            "tool": [user, Message("assistant", "", (call,)), Message("tool", content, call=call)],
        }
        rendered = self._rendered_or_none(
            way, conversations[role], hide=lambda text: self._disguise.hide(text, nonce=nonce)
        )
        return (
            rendered is not None
            and rendered.count(shown) == 1
            and rendered.count(_PROBE[1:]) == 2  # a first character may be disguised
            and not _PRINTED_PART.search(rendered)
        )

    def _shows_tools(self, way: _Way) -> bool:
        """Whether functions, calls of them and their results all appear."""
        if "tool" not in way.part_roles | way.string_roles:
            return False
        nonce = self._disguise.new_nonce()
        told = [f"{_PROBE}{index} <|a|>" for index in range(6)]
        name, description, parameter, argument, value, result = told
        schema = {"type": "object", "properties": {parameter: {"type": "string"}}}
        function = Function(name, description, schema, "")
        call = Call("call_0", name, {argument: value})
        conversation = [
            Message("user", "x"),
            Message("assistant", "", (call,)),
            Message("tool", result, call=call),
        ]

        def hide(text: str) -> str:
            return self._disguise.hide(text, nonce=nonce)

        rendered = self._rendered_or_none(way, conversation, [function], hide=hide)
        # The name is said of the function and of the call, and may be said of the result.
        return rendered is not None and all(
            rendered.count(hide(text)) >= (2 if text is name else 1) for text in told
        )

    def _hints_shown(self, way: _Way, kind: MediaKind) -> frozenset[str] | None:
        """The hints that reach the prompt; None if the medium does not get exactly one place."""
        probes = {name: f"{_PROBE}{name}" for name in Hints.__dataclass_fields__}
        shown: frozenset[str] = frozenset()
        for hints in (Hints(), Hints(**probes)):
            part = MediaPart(kind, ("",), param="", path="", hints=hints)
            message = Message("user", (part, TextPart(f"{_PROBE}text")))
            rendered = self._rendered_or_none(way, [message], hide=lambda text: text)
            if (
                rendered is None
                or f"{_PROBE}text" not in rendered
                or _PRINTED_PART.search(rendered)
            ):
                return None
            nonce = self._disguise.new_nonce()
            placeholder = self.placeholder_id(kind)
            if self._disguise.encode(rendered, nonce=nonce).count(placeholder) != 1:
                return None
            shown = frozenset(name for name, probe in probes.items() if probe in rendered)
        return shown

    def _rendered_or_none(
        self,
        way: _Way,
        messages: Sequence[Message],
        functions: Sequence[Function] = (),
        *,
        hide: Callable[[str], str],
        ending: Ending = "assistant",
    ) -> str | None:
        try:
            return self._render(way, messages, functions, hide=hide, ending=ending)
        except Exception:  # whatever a template raises, it cannot do this
            return None

    def _render(
        self,
        way: _Way,
        messages: Sequence[Message],
        functions: Sequence[Function],
        *,
        hide: Callable[[str], str],
        ending: Ending,
    ) -> str:
        fed: list[_RenderedMessage] = []
        for message in messages:
            contents = _contents(way, message, hide=hide)
            fed += [{"role": message.role, "content": content} for content in contents]
            fed[-1] |= _fed_calls(message, hide=hide)
        mark = self._disguise.new_nonce()
        last_text = _mark_end(fed[-1], mark) if ending == "open" else ""
        rendered = self._renderer.apply_chat_template(
            fed,
            tools=[_fed_function(function, hide=hide) for function in functions] or None,
            chat_template=way.template,
            tokenize=False,
            add_generation_prompt=ending in ("assistant", "call"),
            **dict[str, Any](way.variables),
        )
        if not isinstance(rendered, str):
            raise TypeError("the chat template gave no text")
        return _cut(rendered, mark, last_text) if ending == "open" else rendered


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template of a checkpoint folder, if any, and its named special tokens."""
    settings = _json_object(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
    special_tokens: dict[str, str] = {}
    for name in names:
        value = settings.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            special_tokens[name] = token
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None:
        template = _json_object(folder / "chat_template.json").get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError("chat_template.jinja cannot be read") from error
    return (template if isinstance(template, str) else None), special_tokens


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is not readable JSON") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file.name} does not hold an object")
    return loaded


def _placeholders(tokenizer: Tokenizer, vision: VisionSpec | None) -> dict[MediaKind, str]:
    if vision is None:
        return {}
    image = tokenizer.token_of(vision.image_token_id)
    video = image
    if vision.video_token_id is not None:
        video = tokenizer.token_of(vision.video_token_id)
    if image is None or video is None:
        raise CheckpointError("tokenizer.json has no token for the media placeholder ids")
    return {"image": image, "video": video}


def _refuse_unused_hints(way: _Way, messages: Sequence[Message]) -> None:
    for part in (part for message in messages for part in message.media):
        for name, value in asdict(part.hints).items():
            # A file name is a label: a template without a place for it loses nothing.
            if value and name != "filename" and name not in way.hints[part.kind]:
                raise UnsupportedParameter(
                    f"This model's chat template has no place for {name} with {part.kind}s.",
                    param=f"{part.path}.{name}",
                )


def _check_ending(way: _Way, messages: Sequence[Message], ending: Ending) -> None:
    if ending == "none" and not way.can_end_with_message:
        raise UnsupportedParameter(
            "This model's chat template does not heed add_generation_prompt.",
            param="add_generation_prompt",
        )
    content = messages[-1].content
    has_text_last = isinstance(content, str) or (content and isinstance(content[-1], TextPart))
    if ending == "open" and (messages[-1].calls or not has_text_last):
        raise InvalidPrompt(
            "The last message does not end with a text that could be continued.",
            param="continue_final_message",
        )


def _mark_end(message: _RenderedMessage, mark: str) -> str:
    """Puts the mark behind the text with which a message ends; that text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + mark + _BEHIND_MARK
        return content
    last = content[-1] if isinstance(content, list) else content
    text: str = last["text"]
    last["text"] = text + mark + _BEHIND_MARK
    return text


def _cut(rendered: str, mark: str, last_text: str) -> str:
    """All that comes before the mark.

    White space at the end of the text that is continued goes where the template would have
    trimmed it. InvalidPrompt where the text is not there as it is, once.
    """
    before, found, behind = rendered.partition(mark)
    if not before.rstrip().endswith(last_text.strip()) or not found or mark in behind:
        raise InvalidPrompt(
            "The model's chat template cannot leave the last message open.",
            param="continue_final_message",
        )
    if behind.startswith(_BEHIND_MARK):
        return before
    return before.removesuffix(last_text[len(last_text.rstrip()) :])


def _contents(way: _Way, message: Message, *, hide: Callable[[str], str]) -> list[_Content]:
    """The message's content as the template takes it; one message may have to become several."""
    content = message.content
    if message.role not in way.part_roles or (
        isinstance(content, str) and message.role in way.string_roles
    ):
        return [hide("\n".join(message.texts))]
    parts = (TextPart(content),) if isinstance(content, str) else content
    if message.call is not None:
        parts = (TextPart("\n".join(message.texts)),)  # one result, however many parts it came in
    fed = [_fed_part(way, part, hide=hide) for part in parts]
    if way.form == "list":
        return [fed]
    return [*fed] if fed else [{"type": "text", "text": ""}]


def _fed_part(way: _Way, part: Part, *, hide: Callable[[str], str]) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": hide(part.text)}
    shown_as = way.rendered_as[part.kind]
    # The source itself stays out: no template has a use for it, and it may be long or secret.
    fed: dict[str, str] = {"type": shown_as, shown_as: part.kind}
    for name, text in asdict(part.hints).items():
        if text or name in USUAL_HINTS[shown_as]:
            fed[name] = hide(text)
    return fed


def _fed_function(function: Function, *, hide: Callable[[str], str]) -> dict[str, Any]:
    """A function as chat templates expect it, which is OpenAI's form."""
    told = {
        "name": function.name,
        "description": function.description,
        "parameters": function.schema,
    }
    return {"type": "function", "function": _hidden(told, hide=hide, kept=_FUNCTION_WORDS)}


def _fed_calls(message: Message, *, hide: Callable[[str], str]) -> dict[str, Any]:
    """What a message has beside its content."""
    if message.call is not None:
        return {"tool_call_id": hide(message.call.id), "name": hide(message.call.name)}
    if not message.calls:
        return {}
    return {
        "tool_calls": [
            {
                "id": hide(call.id),
                "type": "function",
                "function": {
                    "name": hide(call.name),
                    "arguments": _hidden(call.arguments, hide=hide, kept=frozenset()),
                },
            }
            for call in message.calls
        ]
    }


def _hidden(value: object, *, hide: Callable[[str], str], kept: frozenset[str]) -> Any:
    """JSON with all its texts hidden, but for these."""
    if isinstance(value, str):
        return value if value in kept else hide(value)
    if isinstance(value, Mapping):
        return {
            _hidden(key, hide=hide, kept=kept): _hidden(each, hide=hide, kept=kept)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_hidden(each, hide=hide, kept=kept) for each in value]
    return value


def _with_call_head(rendered: str) -> str:
    """The prompt, with the head of a turn of calls in the place of that of a turn of text."""
    bare = rendered.removesuffix("\n")
    if bare.endswith("<|im_start|>assistant"):
        return bare + ARROW
    return f"{rendered}<|im_end|>\n<|im_start|>assistant{ARROW}"
