"""From a request to what the engine is asked for.

`Preparer.prepare` parses the messages, renders and encodes the prompt, reads the media, and puts
as many placeholder ids into the prompt as the media have features. It knows no HTTP and no
engine; the facts about the checkpoint come as plain values, so it never reads a checkpoint either.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import TypeVar, get_args

from server.chat.calls import CallFormat
from server.chat.grammar import Constraint
from server.chat.media import Attachments, LeftOut, MediaReader, MediaReport, Medium
from server.chat.options import NO_OPTIONS, MediaOptions, check_limits
from server.chat.parts import (
    MediaPart,
    Message,
    TextPart,
    check_media_counts,
    parse_messages,
    with_parts,
)
from server.chat.prompt_thread import PromptThread
from server.chat.template import ChatTemplate, Ending
from server.chat.tokenizer import Tokenizer
from server.chat.tools import NO_CALLS, Function, Tools, answer_form, arguments_form
from server.config import MediaConfig
from server.core import (
    GenerationRequest,
    MediaKind,
    SamplingDefaults,
    SamplingParams,
    Tiles,
    VisionSpec,
)
from server.errors import (
    CONTEXT_IS,
    InvalidPrompt,
    InvalidRequest,
    InvalidType,
    PromptTooLong,
    UnsupportedParameter,
)
from server.grammar.prover import Prover

MAX_BYTES_PER_CONTEXT_TOKEN = 16

TURN_START = "<|im_start|>"

MAX_ENCODES_WAITING = 1_024
"""Prompts that may wait for the thread that encodes them."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a prompt has to know of the model.

    `stop_token_ids` are the model's own ends. `im_end_id` ends a turn too as long as no tools are
    offered. `vision` is None for a text-only model.
    """

    context_length: int
    stop_token_ids: tuple[int, ...]
    im_end_id: int | None = None
    vision: VisionSpec | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """A prompt without a template, as the client sent it: text, or what should be a list of ids.

    `param` is its place in the request.
    """

    content: str | Sequence[object]
    param: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request whose scalar fields are in range; `messages` is as the client sent it.

    None means that the client said nothing. `stop` holds at most 4 non-empty strings. A `prompt`
    stands in place of the messages, of which there are none then. With `is_echoing` the answer is
    to be shown behind the last message's text.
    """

    messages: Sequence[object]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    num_choices: int = 1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    tools: Tools | None = None
    priority: int = 0
    media_options: MediaOptions = NO_OPTIONS
    visual_token_budget: int | None = None
    ending: Ending = "assistant"
    is_echoing: bool = False
    cache_salt: str = ""
    prompt: RawPrompt | None = None

    @property
    def functions(self) -> tuple[Function, ...]:
        """Those that the model is told of."""
        return () if self.tools is None else self.tools.functions


@dataclass(frozen=True, slots=True)
class PromptUsage:
    """The prompt's tokens by what they stand for."""

    text_tokens: int
    image_tokens: int
    video_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.image_tokens + self.video_tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for the engine with the pixels beside it, and what its answer is cut with.

    `reports` tell of each medium in the order of the request, with its place in `request.vision`.
    `calls` says how calls in the answer are told from its text; None where there can be none. Each
    choice is shown with the `echo` before it.
    """

    request: GenerationRequest
    tiles: tuple[Tiles, ...]
    stop: tuple[str, ...]
    usage: PromptUsage
    reports: tuple[tuple[MediaReport, int | None], ...] = ()
    calls: CallFormat | None = None
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids with the placeholders in them; the media in their order, with their first places."""

    ids: tuple[int, ...]
    media: tuple[Medium, ...] = ()
    starts: tuple[int, ...] = ()
    reports: tuple[tuple[MediaReport, int | None], ...] = ()


class Preparer:
    """Turns chat requests into requests for the engine.

    Prompts are rendered and encoded in a thread of their own, so that text never waits for a video.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        facts: ModelFacts,
        limits: MediaConfig,
        media: MediaReader | None,
        prover: Prover,
    ) -> None:
        """`media` is None exactly for a text-only model."""
        self.facts = facts
        self.tokenizer = tokenizer
        self._template = template
        self._limits = limits
        self._media = media
        self.prover = prover
        self._thread = PromptThread(max_waiting=MAX_ENCODES_WAITING)

    @property
    def named_special_tokens(self) -> Mapping[str, str]:
        """The special tokens by what they are for (`eos_token`), as the checkpoint names them."""
        return self._template.named_special_tokens

    def close(self) -> None:
        """Drop what waits for the thread; what runs ends by itself."""
        self._thread.close()

    async def prepare(
        self,
        request: ChatRequest,
        *,
        request_id: str,
        tenant: str,
        attachments: Attachments | None = None,
    ) -> Prepared:
        """Everything that can be found wrong with a request before it is admitted is found here."""
        constraint, calls, echo = None, None, ""
        param = "messages" if request.prompt is None else request.prompt.param
        if request.prompt is None:
            messages = parse_messages(request.messages, self._limits)
            self._check_text_bytes(messages, request.functions)
            echo = _echo(messages[-1], request) if request.is_echoing else ""
            calls = self._call_format(request)
            constraint = _form(request, calls)
            if constraint is not None:
                await self._prove(constraint, request, calls, tenant)
            prompt = await self._prompt(messages, request, tenant=tenant, attachments=attachments)
        else:
            prompt = Prompt(tuple(await self.encode_raw(request.prompt, tenant=tenant)))
        num_prompt_tokens = len(prompt.ids)
        max_tokens = self._check_context(num_prompt_tokens, request.max_tokens, param=param)
        media = prompt.media
        return Prepared(
            request=GenerationRequest(
                request_id=request_id,
                tenant=tenant,
                prompt_ids=prompt.ids,
                sampling=self._sampling(
                    request, max_tokens=max_tokens, has_calls=calls is not None
                ),
                vision=tuple(medium.vision for medium in media),
                vision_starts=prompt.starts,
                num_choices=request.num_choices,
                grammar=None if constraint is None else constraint.grammar,
                grammar_special_ids=() if calls is None else calls.special_ids,
                priority=request.priority,
                cache_salt=request.cache_salt,
            ),
            tiles=tuple(medium.tiles for medium in media),
            stop=request.stop,
            usage=PromptUsage(
                text_tokens=num_prompt_tokens - sum(medium.vision.num_tokens for medium in media),
                image_tokens=_num_tokens(media, "image"),
                video_tokens=_num_tokens(media, "video"),
            ),
            reports=prompt.reports,
            calls=calls,
            echo=echo,
        )

    async def encode_raw(
        self, prompt: RawPrompt, *, tenant: str, add_special_tokens: bool = True
    ) -> list[int]:
        """The ids of a prompt without a template, however many: text as ordinary text.

        What the tokenizer's own rules put around a text is there with `add_special_tokens`; ids
        are as they are. InvalidRequest where an id is none, or stands for a medium.
        """
        content = prompt.content
        if not isinstance(content, str):
            ids = await self.check_ids(content, prompt.param, tenant=tenant)
            _refuse_placeholders(ids, prompt.param, self.facts.vision)
            return ids
        self._check_bytes(len(content.encode("utf-8")), prompt.param)
        tokenizer = self.tokenizer
        encode = tokenizer.encode_prompt if add_special_tokens else tokenizer.encode_text
        return await self._thread.run(partial(encode, content), tenant=tenant)

    async def encode_messages(self, request: ChatRequest, *, tenant: str) -> Prompt:
        """The prompt of a conversation with its media, however many ids that are."""
        messages = parse_messages(request.messages, self._limits)
        self._check_text_bytes(messages, request.functions)
        self._call_format(request)  # what a chat refuses
        return await self._prompt(messages, request, tenant=tenant, must_fit=False)

    async def decode(self, ids: Sequence[object], param: str, *, tenant: str) -> str:
        """Their text, to which special tokens add nothing."""
        checked = await self.check_ids(ids, param, tenant=tenant)
        return await self._thread.run(partial(self.tokenizer.decode, checked), tenant=tenant)

    async def check_ids(self, ids: Sequence[object], param: str, *, tenant: str) -> list[int]:
        """The same, each the id of a token; else InvalidRequest or InvalidType.

        PromptTooLong, before any is looked at, where they are more than the context.
        """
        if len(ids) > self.facts.context_length:
            raise PromptTooLong(
                f"{CONTEXT_IS} {self.facts.context_length} tokens; {param} has {len(ids)}.",
                param=param,
            )
        return await self._thread.run(partial(self._checked_ids, ids, param), tenant=tenant)

    def _checked_ids(self, ids: Sequence[object], param: str) -> list[int]:
        checked: list[int] = []
        for index, value in enumerate(ids):
            path = f"{param}[{index}]"
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidType(f"{path} must be an integer: the id of a token.", param=path)
            if not self.tokenizer.has_token(value):
                raise InvalidRequest(
                    f"{path} is {value}, which is the id of no token: they are below "
                    f"{self.tokenizer.size}.",
                    param=path,
                )
            checked.append(value)
        return checked

    def _call_format(self, request: ChatRequest) -> CallFormat | None:
        """How the answer's calls will look; None where it may make none."""
        tools = request.tools
        if tools is None or tools.mode == "none":
            return None
        if request.ending == "none" or (request.ending == "open" and tools.mode == "required"):
            raise InvalidRequest(
                "Functions can be called only where the assistant's turn begins, and with the mode "
                "auto where it goes on.",
                param="tool_choice",
            )
        start, end = self.tokenizer.special.get(TURN_START), self.facts.im_end_id
        if start is None or end is None:
            raise UnsupportedParameter(
                "This model's tokenizer lacks the tokens that calls are made of.", param="tools"
            )
        if tools.mode == "required":
            return CallFormat(start, end, at="calls")
        return CallFormat(start, end, at="within" if request.ending == "open" else "turn")

    async def _prove(
        self,
        constraint: Constraint,
        request: ChatRequest,
        calls: CallFormat | None,
        tenant: str,
    ) -> None:
        """That an answer can be made by it; refuses what else is asked for and cannot be kept."""
        for name, said in (
            ("stop_token_ids", request.stop_token_ids),
            ("ignore_eos", request.ignore_eos),
        ):
            if said:
                raise InvalidRequest(
                    f"{name} cannot be combined with {constraint.param}: the form says where an "
                    "answer may end.",
                    param=name,
                )
        # Each function by itself, so that the one at fault is told; of the whole the proof sees
        # only the beginning.
        callables = () if request.tools is None or calls is None else request.tools.callables
        for form in (*map(arguments_form, callables), constraint):
            await self.prover.prove(form.grammar, param=form.param, tenant=tenant)

    async def _prompt(
        self,
        messages: tuple[Message, ...],
        request: ChatRequest,
        *,
        tenant: str,
        attachments: Attachments | None = None,
        must_fit: bool = True,
    ) -> Prompt:
        encode = partial(self._encode, request=request, tenant=tenant, must_fit=must_fit)
        parts = _media_of(messages)
        self._check_options(request, parts)
        if not parts or self._media is None:
            return Prompt(tuple(await encode(messages)))
        reading = self._media.begin(
            tenant=tenant, cache_salt=request.cache_salt, attachments=attachments
        )
        messages = with_parts(messages, await reading.kinds(parts))
        parts = _media_of(messages)
        check_media_counts(parts, self._limits)

        # The prompt first: it is cheap, and a prompt that cannot be served saves the decoding.
        ids = await encode(messages)
        outcomes = await reading.read(
            parts, request.media_options, token_budget=request.visual_token_budget
        )
        left_out = [each for each in outcomes if isinstance(each, LeftOut)]
        if left_out:
            notes = {each.part.path: _in_place_of(each.part) for each in left_out}
            ids = await encode(with_parts(messages, notes))
        media = [each for each in outcomes if isinstance(each, Medium)]
        placeholder_ids = {
            kind: self._template.placeholder_id(kind) for kind in get_args(MediaKind)
        }
        prompt_ids, ordered, starts = _with_placeholders(ids, media, placeholder_ids)
        places = {medium.part.path: place for place, medium in enumerate(ordered)}
        reports = tuple((each.report, places.get(each.part.path)) for each in outcomes)
        return Prompt(prompt_ids, tuple(ordered), starts, reports)

    def _check_options(self, request: ChatRequest, parts: Sequence[MediaPart]) -> None:
        """Also where there are no media: what is said must make sense."""
        spec = self.facts.vision
        if spec is not None:
            check_limits(request.media_options, spec, "media_options")
            return
        if parts:
            raise UnsupportedParameter(
                f"This model takes no {parts[0].kind}s, only text.", param=parts[0].path
            )
        if request.media_options != NO_OPTIONS or request.visual_token_budget is not None:
            raise UnsupportedParameter(
                "This model takes no pictures or videos, only text.", param="media_options"
            )

    async def _encode(
        self, messages: Sequence[Message], *, request: ChatRequest, tenant: str, must_fit: bool
    ) -> list[int]:
        """The prompt's ids with one placeholder for each medium."""
        ending: Ending = request.ending
        if request.tools is not None and request.tools.mode == "required":
            ending = "call"
        encode = partial(self._template.encode, messages, request.functions, ending=ending)
        ids = await self._thread.run(encode, tenant=tenant)
        if must_fit:
            self._check_context(len(ids), request.max_tokens, param="messages")
        return ids

    def _check_text_bytes(
        self, messages: Sequence[Message], functions: Sequence[Function] = ()
    ) -> None:
        """Refuse text that cannot fit whatever it says, without encoding it."""
        num_bytes = sum(_num_bytes((each.description, _json(each.schema))) for each in functions)
        self._check_bytes(num_bytes, "tools")
        for index, message in enumerate(messages):
            hints = (text for part in message.media for text in astuple(part.hints))
            arguments = (_json(call.arguments) for call in message.calls)
            num_bytes += _num_bytes((*message.texts, *hints, *arguments))
            self._check_bytes(num_bytes, f"messages[{index}].content")

    def _check_bytes(self, num_bytes: int, param: str) -> None:
        limit = MAX_BYTES_PER_CONTEXT_TOKEN * self.facts.context_length
        if num_bytes > limit:
            raise PromptTooLong(
                f"{CONTEXT_IS} {self.facts.context_length} tokens; the text has more than {limit} "
                "bytes and cannot fit.",
                param=param,
            )

    def _check_context(self, num_prompt_tokens: int, max_tokens: int | None, *, param: str) -> int:
        """How many tokens the answer may have."""
        if not num_prompt_tokens:
            raise InvalidRequest(f"{param} must not be empty.", param=param)
        context = self.facts.context_length
        if num_prompt_tokens >= context:
            raise PromptTooLong(
                f"{CONTEXT_IS} {context} tokens; the prompt alone takes {num_prompt_tokens} and "
                "leaves no room for an answer.",
                param=param,
            )
        if max_tokens is None:
            return context - num_prompt_tokens
        if num_prompt_tokens + max_tokens > context:
            raise PromptTooLong(
                f"{CONTEXT_IS} {context} tokens; {num_prompt_tokens} in the prompt and "
                f"{max_tokens} for the answer are {num_prompt_tokens + max_tokens}.",
                param=param,
            )
        return max_tokens

    def _sampling(
        self, request: ChatRequest, *, max_tokens: int, has_calls: bool
    ) -> SamplingParams:
        defaults, neutral = self.facts.defaults, SamplingParams(max_tokens)
        if request.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {request.min_tokens}, more than the {max_tokens} tokens that the "
                "answer may have.",
                param="min_tokens",
            )
        ends = list(request.stop_token_ids)
        if not request.ignore_eos:
            ends += self.facts.stop_token_ids
            if self.facts.im_end_id is not None and not has_calls:
                ends.append(self.facts.im_end_id)  # nothing but a call can follow it
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_first(request.temperature, defaults.temperature, neutral.temperature),
            top_p=_first(request.top_p, defaults.top_p, neutral.top_p),
            top_k=_first(request.top_k, defaults.top_k, neutral.top_k),
            repetition_penalty=_first(
                request.repetition_penalty, defaults.repetition_penalty, neutral.repetition_penalty
            ),
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=request.logit_bias,
            min_tokens=request.min_tokens,
            seed=request.seed,
            stop_token_ids=tuple(dict.fromkeys(ends)),
            num_logprobs=request.num_logprobs,
            num_prompt_logprobs=request.num_prompt_logprobs,
        )


def _form(request: ChatRequest, calls: CallFormat | None) -> Constraint | None:
    """That of the whole answer, which nothing has proved yet."""
    tools = request.tools
    if tools is None:
        return request.constraint
    if calls is not None:
        return answer_form(tools, request.constraint, calls)
    return request.constraint or (NO_CALLS if request.ending == "assistant" else None)


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _refuse_placeholders(ids: Sequence[int], param: str, spec: VisionSpec | None) -> None:
    placeholders = () if spec is None else (spec.image_token_id, spec.video_token_id)
    for index, token_id in enumerate(ids):
        if token_id in placeholders:
            raise InvalidRequest(
                f"{param}[{index}] is {token_id}, an id that stands for a picture or video.",
                param=f"{param}[{index}]",
            )


def _media_of(messages: Sequence[Message]) -> list[MediaPart]:
    return [part for message in messages for part in message.media]


def _echo(last: Message, request: ChatRequest) -> str:
    if last.role != "assistant" and request.ending != "open":
        raise InvalidRequest(
            "echo repeats the last message, which must be one of the assistant's or be continued.",
            param="echo",
        )
    return "\n".join(last.texts)


def _in_place_of(part: MediaPart) -> TextPart | None:
    """What stands where a medium was that its request can do without."""
    return TextPart(f"[{part.kind} unavailable]") if part.on_error == "placeholder" else None


def _first(asked: _T | None, default: _T | None, neutral: _T) -> _T:
    """The request, then the checkpoint, then the value that changes nothing."""
    if asked is not None:
        return asked
    return neutral if default is None else default


def _num_tokens(media: Sequence[Medium], kind: MediaKind) -> int:
    return sum(medium.vision.num_tokens for medium in media if medium.vision.kind == kind)


def _with_placeholders(
    ids: Sequence[int], media: Sequence[Medium], placeholder_ids: Mapping[MediaKind, int]
) -> tuple[tuple[int, ...], list[Medium], tuple[int, ...]]:
    """Each lone placeholder repeated as often as its medium has features.

    Media take the places of their placeholder in the order in which they came. Also returned: the
    media in the order of the prompt, and where each one's placeholders start.
    """
    waiting: dict[int, deque[Medium]] = {token: deque() for token in placeholder_ids.values()}
    for medium in media:
        waiting[placeholder_ids[medium.vision.kind]].append(medium)
    prompt: list[int] = []
    ordered: list[Medium] = []
    starts: list[int] = []
    for token_id in ids:
        if token_id not in waiting:
            prompt.append(token_id)
            continue
        if not waiting[token_id]:
            raise InvalidPrompt("The prompt has more media places than media.", param="messages")
        medium = waiting[token_id].popleft()
        ordered.append(medium)
        starts.append(len(prompt))
        prompt.extend([token_id] * medium.vision.num_tokens)
    if any(waiting.values()):
        raise InvalidPrompt("The prompt has fewer media places than media.", param="messages")
    return tuple(prompt), ordered, tuple(starts)
