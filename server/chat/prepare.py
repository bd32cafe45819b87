"""From a chat request to what the engine is asked for.

`Preparer.prepare` parses the messages, renders and encodes the prompt, reads the media, and puts
as many placeholder ids into the prompt as the media have features. It knows no HTTP and no
engine; the facts about the checkpoint come as plain values, so it never reads a checkpoint either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Literal, TypeVar

from server.chat.parts import MediaPart, Message, parse_messages
from server.chat.template import ChatTemplate
from server.chat.tokenizer import Tokenizer
from server.config import MediaConfig
from server.core import (
    GenerationRequest,
    MediaKind,
    SamplingDefaults,
    SamplingParams,
    Tiles,
    VisionInput,
    VisionSpec,
)
from server.errors import (
    InvalidPrompt,
    InvalidRequest,
    MediaFileTooLarge,
    PromptTooLong,
    ServerError,
    UnsupportedParameter,
)
from server.media.image import decode_image
from server.media.inline import read_source
from server.media.video import decode_video
from server.vision.frames import sample_times, video_tiles
from server.vision.tiles import fit_to_tile, image_tiles

MAX_BYTES_PER_CONTEXT_TOKEN = 16

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
class ChatRequest:
    """A chat request whose scalar fields are in range; `messages` is as the client sent it.

    None means that the client said nothing. `stop` holds at most 4 non-empty strings.
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
    priority: int = 0


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
    """A request for the engine with the pixels beside it, and what its answer is cut with."""

    request: GenerationRequest
    tiles: tuple[Tiles, ...]
    stop: tuple[str, ...]
    usage: PromptUsage


@dataclass(frozen=True, slots=True)
class _Medium:
    """A picture or video ready for the engine."""

    vision: VisionInput
    tiles: Tiles


class Preparer:
    """Turns chat requests into requests for the engine.

    Whatever takes time runs in one of two pools of threads: prompts are rendered and encoded in
    one, media are read, decoded and cut in the other, so that text never waits for a video.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, facts: ModelFacts, media: MediaConfig
    ) -> None:
        self.facts = facts
        self.tokenizer = tokenizer
        self._template = template
        self._media = media
        self._prompt_pool = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._media_pool = ThreadPoolExecutor(media.decode_processes, thread_name_prefix="media")

    def close(self) -> None:
        """Drop what waits in the pools; what runs ends by itself."""
        self._prompt_pool.shutdown(wait=False, cancel_futures=True)
        self._media_pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, request: ChatRequest, *, request_id: str, tenant: str) -> Prepared:
        """Everything that can be found wrong with a request before it is admitted is found here."""
        messages = parse_messages(request.messages, self._media)
        parts = [part for message in messages for part in message.media]
        self._refuse_media_of_text_model(parts)
        self._check_text_bytes(messages)

        # The prompt first: it is cheap, and a prompt that cannot be served saves the decoding.
        ids = await _run(self._prompt_pool, partial(self._template.encode, messages))
        self._check_context(len(ids), request.max_tokens)
        media = await self._read_media(parts)
        placeholder_ids: dict[MediaKind, int] = {
            part.kind: self._template.placeholder_id(part.kind) for part in parts
        }
        prompt_ids, ordered, starts = _with_placeholders(ids, media, placeholder_ids)
        max_tokens = self._check_context(len(prompt_ids), request.max_tokens)
        return Prepared(
            request=GenerationRequest(
                request_id=request_id,
                tenant=tenant,
                prompt_ids=prompt_ids,
                sampling=self._sampling(request, max_tokens=max_tokens),
                vision=tuple(medium.vision for medium in ordered),
                vision_starts=starts,
                num_choices=request.num_choices,
                priority=request.priority,
            ),
            tiles=tuple(medium.tiles for medium in ordered),
            stop=request.stop,
            usage=PromptUsage(
                text_tokens=len(ids) - len(media),
                image_tokens=_num_tokens(ordered, "image"),
                video_tokens=_num_tokens(ordered, "video"),
            ),
        )

    def _refuse_media_of_text_model(self, parts: Sequence[MediaPart]) -> None:
        if parts and self.facts.vision is None:
            raise UnsupportedParameter(
                f"This model takes no {parts[0].kind}s, only text.", param=parts[0].path
            )

    def _check_text_bytes(self, messages: Sequence[Message]) -> None:
        """Refuse text that cannot fit whatever it says, without encoding it."""
        limit = MAX_BYTES_PER_CONTEXT_TOKEN * self.facts.context_length
        num_bytes = 0
        for index, message in enumerate(messages):
            hints = (text for part in message.media for text in astuple(part.hints))
            num_bytes += sum(len(text.encode("utf-8")) for text in (*message.texts, *hints))
            if num_bytes > limit:
                raise PromptTooLong(
                    f"The model's context is {self.facts.context_length} tokens; the text of the "
                    f"messages has more than {limit} bytes and cannot fit.",
                    param=f"messages[{index}].content",
                )

    def _check_context(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens the answer may have."""
        context = self.facts.context_length
        if num_prompt_tokens >= context:
            raise PromptTooLong(
                f"The model's context is {context} tokens; the messages alone take "
                f"{num_prompt_tokens} and leave no room for an answer.",
                param="messages",
            )
        if max_tokens is None:
            return context - num_prompt_tokens
        if num_prompt_tokens + max_tokens > context:
            raise PromptTooLong(
                f"The model's context is {context} tokens; {num_prompt_tokens} in the messages "
                f"and {max_tokens} for the answer are {num_prompt_tokens + max_tokens}.",
                param="messages",
            )
        return max_tokens

    async def _read_media(self, parts: Sequence[MediaPart]) -> list[_Medium]:
        """All media at once. Of several faults the first in the request is told."""
        fetched = await self._each(parts, [partial(self._fetch, part) for part in parts])
        num_bytes = 0
        for part, data in zip(parts, fetched, strict=True):
            num_bytes += len(data)
            if num_bytes > self._media.max_request_bytes:
                raise MediaFileTooLarge(
                    "The media of one request may have at most "
                    f"{self._media.max_request_bytes} bytes together.",
                    kind=part.kind,
                    param=part.param,
                )
        return await self._each(
            parts, [partial(self._cut, *pair) for pair in zip(parts, fetched, strict=True)]
        )

    async def _each(self, parts: Sequence[MediaPart], work: Sequence[Callable[[], _T]]) -> list[_T]:
        """The results in order, or the first part's error with the place it belongs to."""
        running = [_run(self._media_pool, one) for one in work]
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        results: list[_T] = []
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, ServerError) and outcome.param is None:
                outcome.param = part.param
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    def _fetch(self, part: MediaPart) -> bytes:
        return read_source(part.source, self._media, kind=part.kind)

    def _cut(self, part: MediaPart, data: bytes) -> _Medium:
        """Decode and cut in one go, so that no full-size picture waits for its turn."""
        spec = self.facts.vision
        assert spec is not None  # media of text models were refused
        if part.kind == "image":
            detail: Literal["low", "high"] = "low" if part.detail == "low" else "high"
            return _Medium(*image_tiles(decode_image(data, self._media), spec, detail=detail))
        video = decode_video(
            data,
            self._media,
            sample_times=partial(sample_times, spec=spec),
            fit=partial(fit_to_tile, spec=spec),
        )
        return _Medium(*video_tiles(video.frames, spec))

    def _sampling(self, request: ChatRequest, *, max_tokens: int) -> SamplingParams:
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
            if self.facts.im_end_id is not None:
                ends.append(self.facts.im_end_id)  # without tools nothing can follow it
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
        )


async def _run(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _first(asked: _T | None, default: _T | None, neutral: _T) -> _T:
    """The request, then the checkpoint, then the value that changes nothing."""
    if asked is not None:
        return asked
    return neutral if default is None else default


def _num_tokens(media: Sequence[_Medium], kind: MediaKind) -> int:
    return sum(medium.vision.num_tokens for medium in media if medium.vision.kind == kind)


def _with_placeholders(
    ids: Sequence[int], media: Sequence[_Medium], placeholder_ids: Mapping[MediaKind, int]
) -> tuple[tuple[int, ...], list[_Medium], tuple[int, ...]]:
    """Each lone placeholder repeated as often as its medium has features.

    Media take the places of their placeholder in the order in which they came. Also returned: the
    media in the order of the prompt, and where each one's placeholders start.
    """
    waiting: dict[int, deque[_Medium]] = {token: deque() for token in placeholder_ids.values()}
    for medium in media:
        waiting[placeholder_ids[medium.vision.kind]].append(medium)
    prompt: list[int] = []
    ordered: list[_Medium] = []
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
