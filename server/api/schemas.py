"""What a chat or completion request may say: each field honoured, or refused by name.

`parse_chat_request` is the only way from a JSON object to a `ChatCompletionRequest`, and
`parse_completion_request` to a `CompletionRequest`. A field that
OpenAI or the engines beside us know and we do not honour yet stands in `UNSUPPORTED` with the
values that ask for nothing; any other value of it is an error, never silence. Must not know how an
answer is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.chat.fields import as_string
from server.chat.grammar import parse_constraint
from server.chat.options import parse_request_options
from server.chat.prepare import ChatRequest, RawPrompt
from server.chat.template import Ending
from server.chat.tools import parse_tools
from server.errors import (
    ArrayTooLong,
    InvalidRequest,
    InvalidType,
    MissingParameter,
    ServerError,
    StringTooLong,
    UnknownParameter,
    UnsupportedParameter,
    quoted,
)

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_USER_BYTES = 512
MAX_SALT_BYTES = 512
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
MAX_PROMPTS_TIMES_CHOICES = 128
MAX_COMPLETION_LOGPROBS = 5
DEFAULT_COMPLETION_TOKENS = 16
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    # OpenAI
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # OpenAI, older or of other endpoints
    "best_of": (1,),
    "prompt": (),
    "suffix": ("",),
    # vLLM
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "structural_tag": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # SGLang
    "custom_logit_processor": (),
    "custom_params": (),
    "data_parallel_rank": (),
    "ebnf": (),
    "extra_key": (),
    "input_embeds": (),
    "input_ids": (),
    "json_schema": (),
    "logprob_start_len": (-1,),
    "lora_path": (),
    "min_new_tokens": (0,),
    "no_stop_trim": (False,),
    "regex": (),
    "return_hidden_states": (False,),
    "rid": (),
    "separate_reasoning": (True,),
    "session_params": (),
    "stop_regex": ([],),
    "stream_reasoning": (True,),
    "typical_p": (1,),
}
"""Known fields that are not honoured -> the values, besides null, that ask for nothing."""


def _integral(value: object) -> object:
    """1.0 may stand where an integer is due; the JSON of some clients has no integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True), BeforeValidator(_integral)]
Text = Annotated[str, Field(strict=True)]
StopString = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(BaseModel):
    """`include_obfuscation` is a hint: nothing is padded, whatever it says."""

    model_config = ConfigDict(frozen=True)

    include_usage: Flag | None = None
    include_obfuscation: Flag | None = None
    continuous_usage_stats: Flag | None = None


class ChatCompletionRequest(BaseModel):
    """The body of POST /v1/chat/completions, as far as it is honoured. Null means not given."""

    model_config = ConfigDict(frozen=True)

    model: Text
    messages: Annotated[list[Any], Field(strict=True)]
    max_tokens: Annotated[Integer, Field(ge=1, le=_INT64_MAX)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1, le=_INT64_MAX)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[Number, Field(ge=-100, le=100)]],
            Field(strict=True, max_length=MAX_BIASES),
        ]
        | None
    ) = None
    stop: (
        Annotated[
            list[StopString],
            Field(strict=True, max_length=MAX_STOP_STRINGS),
            BeforeValidator(_as_list),
        ]
        | None
    ) = None
    stop_token_ids: (
        Annotated[
            list[Annotated[Integer, Field(ge=0, le=_INT64_MAX)]],
            Field(strict=True, max_length=MAX_STOP_IDS),
        ]
        | None
    ) = None
    min_tokens: Annotated[Integer, Field(ge=0, le=_INT64_MAX)] | None = None
    seed: Annotated[Integer, Field(ge=_INT64_MIN, le=_INT64_MAX)] | None = None
    ignore_eos: Flag | None = None
    priority: Annotated[Integer, Field(ge=_INT32_MIN, le=_INT32_MAX)] | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: Annotated[dict[str, Text], Field(strict=True, max_length=MAX_METADATA)] | None = None
    service_tier: Text | None = None
    response_format: Any = None
    structured_outputs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Flag | None = None
    media_options: Any = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    echo: Flag | None = None
    cache_salt: Annotated[Text, Field(min_length=1)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def answered_tier(self) -> str | None:
        """What the answer says of the tier: there is one, told to whom asks for any."""
        return None if self.service_tier is None else "default"

    def to_chat_request(self) -> ChatRequest:
        """What the answer depends on, without the wire's habits. Refuses faulty options."""
        options, token_budget = parse_request_options(self.media_options, "media_options")
        return ChatRequest(
            messages=self.messages,
            max_tokens=self.max_tokens or self.max_completion_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            # -1 is what other engines call "off".
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(key), bias) for key, bias in (self.logit_bias or {}).items()),
            seed=self.seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            priority=self.priority or 0,
            media_options=options,
            visual_token_budget=token_budget,
            num_choices=self.n or 1,
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            constraint=parse_constraint(self.response_format, self.structured_outputs),
            tools=parse_tools(self.tools, self.tool_choice, self.parallel_tool_calls),
            ending=parse_ending(self.add_generation_prompt, self.continue_final_message),
            is_echoing=bool(self.echo),
            cache_salt=self.cache_salt or "",
        )


def parse_ending(add_generation_prompt: bool | None, continue_final_message: bool | None) -> Ending:
    """What the two say together; whoever continues need not say that nothing else begins."""
    if not continue_final_message:
        return "none" if add_generation_prompt is False else "assistant"
    if add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true.",
            param="continue_final_message",
        )
    return "open"


SHARED_FIELDS: Final = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "seed",
    "ignore_eos",
    "priority",
    "n",
    "stream",
    "stream_options",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "metadata",
    "service_tier",
    "cache_salt",
)
"""The fields of a chat request that mean the same in a completion request."""


class CompletionFields(BaseModel):
    """What a completion request has to itself."""

    model_config = ConfigDict(frozen=True)

    prompt: Any
    max_tokens: Annotated[Integer, Field(ge=0, le=_INT64_MAX)] | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: Flag | None = None


COMPLETION_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    name: UNSUPPORTED.get(name, ())
    for name in (*UNSUPPORTED, *ChatCompletionRequest.model_fields)
    if name not in SHARED_FIELDS and name not in CompletionFields.model_fields
} | {
    "add_special_tokens": (True,),
    "add_generation_prompt": (False,),
    "continue_final_message": (False,),
}
"""The same as `UNSUPPORTED` for completions: no template, and always the tokenizer's own rules."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """The body of POST /v1/completions: `shared` holds the `SHARED_FIELDS`, and no messages."""

    shared: ChatCompletionRequest
    own: CompletionFields
    prompts: tuple[RawPrompt, ...]

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.shared.n or 1

    @property
    def is_echoing(self) -> bool:
        return bool(self.own.echo)

    @property
    def is_only_scored(self) -> bool:
        """Whether nothing is to come after the prompt."""
        return self.own.max_tokens == 0

    def to_chat_requests(self) -> tuple[ChatRequest, ...]:
        """One for each prompt."""
        max_tokens = self.own.max_tokens
        asked = replace(
            self.shared.to_chat_request(),
            # The engine tells of a prompt with the first token after it: one is made and dropped.
            max_tokens=DEFAULT_COMPLETION_TOKENS if max_tokens is None else max(max_tokens, 1),
            num_logprobs=self.own.logprobs,
            num_prompt_logprobs=self.own.logprobs if self.is_echoing else None,
        )
        return tuple(replace(asked, prompt=prompt) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class ParsedCompletion:
    """A valid request, and how many of its fields nobody knows."""

    request: CompletionRequest
    num_unknown: int


@dataclass(frozen=True, slots=True)
class ParsedChat:
    """A valid request, and how many of its fields nobody knows."""

    request: ChatCompletionRequest
    num_unknown: int


def parse_chat_request(body: Mapping[str, Any], *, is_strict: bool) -> ParsedChat:
    """The request in `body`; raises the contract's 400 for the first thing wrong with it."""
    honoured = ChatCompletionRequest.model_fields
    num_unknown = check_names(body, honoured, UNSUPPORTED, is_strict=is_strict)
    try:
        request = ChatCompletionRequest.model_validate(
            {name: body[name] for name in honoured if name in body}
        )
    except ValidationError as error:
        raise translated(error, body) from None
    check_together(request)
    return ParsedChat(request, num_unknown)


def parse_completion_request(body: Mapping[str, Any], *, is_strict: bool) -> ParsedCompletion:
    """The request in `body`; raises the contract's 400 for the first thing wrong with it.

    Of the prompts only their number and their forms are looked at.
    """
    honoured = (*SHARED_FIELDS, *CompletionFields.model_fields)
    num_unknown = check_names(body, honoured, COMPLETION_UNSUPPORTED, is_strict=is_strict)
    given = {name: body[name] for name in SHARED_FIELDS if name in body}
    try:
        shared = ChatCompletionRequest.model_validate(given | {"messages": []})
        own = CompletionFields.model_validate(
            {name: body[name] for name in CompletionFields.model_fields if name in body}
        )
    except ValidationError as error:
        raise translated(error, body) from None
    check_together(shared)
    request = CompletionRequest(shared, own, _prompts(own.prompt))
    num_choices = len(request.prompts) * request.num_choices
    if num_choices > MAX_PROMPTS_TIMES_CHOICES:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts with n {request.num_choices} are {num_choices} "
            f"choices; at most {MAX_PROMPTS_TIMES_CHOICES} are made.",
            param="n",
        )
    if request.is_only_scored and not request.is_echoing:
        raise InvalidRequest("max_tokens may be 0 only with echo.", param="max_tokens")
    return ParsedCompletion(request, num_unknown)


def _prompts(value: object) -> tuple[RawPrompt, ...]:
    """OpenAI's four forms: a text, texts, the ids of a prompt, the ids of several."""
    if isinstance(value, str):
        return (RawPrompt(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidType("prompt must be a string or an array.", param="prompt")
    if not value:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    kind = type(value[0])
    if kind not in (str, list):
        return (RawPrompt(value, "prompt"),)
    if len(value) > MAX_PROMPTS:
        raise ArrayTooLong(f"prompt must have at most {MAX_PROMPTS} items.", param="prompt")
    for index, each in enumerate(value):
        if type(each) is not kind:
            raise InvalidType(
                f"prompt[{index}] must be {'a string' if kind is str else 'an array of token ids'},"
                " like the others.",
                param=f"prompt[{index}]",
            )
    return tuple(RawPrompt(each, f"prompt[{index}]") for index, each in enumerate(value))


def check_names(
    body: Mapping[str, Any],
    honoured: Collection[str],
    unsupported: Mapping[str, tuple[object, ...]],
    *,
    is_strict: bool,
) -> int:
    """Refuse what is known and not honoured; how many fields nobody knows."""
    for name, neutral in unsupported.items():
        if not is_neutral(body.get(name), neutral):
            raise UnsupportedParameter(f"{name} is not supported by this server.", param=name)
    unknown = [name for name in body if name not in honoured and name not in unsupported]
    options = body.get("stream_options")
    for name in options if isinstance(options, dict) else ():
        if name not in StreamOptions.model_fields:
            unknown.append(f"stream_options.{name}")
    if unknown and is_strict:
        raise UnknownParameter(f"Unknown parameter {quoted(unknown[0])}.", param=unknown[0][:64])
    return len(unknown)


def check_together(request: ChatCompletionRequest) -> None:
    """What no field shows by itself."""
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) == 2:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens mean the same here and must not differ.",
            param="max_tokens",
        )
    for key in request.logit_bias or ():
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest(
                f"The keys of logit_bias must be token ids; {quoted(key)} is none.",
                param="logit_bias",
            )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "top_logprobs is allowed only when logprobs is true.", param="top_logprobs"
        )
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest(
                "stream_options is allowed only when stream is true.", param="stream_options"
            )
        if request.stream_options.continuous_usage_stats:
            raise UnsupportedParameter(
                "stream_options.continuous_usage_stats is not supported by this server.",
                param="stream_options.continuous_usage_stats",
            )
    check_salt(request.cache_salt)
    _check_hints(request)


def check_salt(salt: object) -> str:
    """The same, "" where there is none."""
    if salt is None:
        return ""
    text = as_string(salt, "cache_salt")
    if not text:
        raise InvalidRequest("cache_salt must not be empty.", param="cache_salt")
    if len(text.encode()) > MAX_SALT_BYTES:
        raise StringTooLong(
            f"cache_salt must be at most {MAX_SALT_BYTES} bytes long.", param="cache_salt"
        )
    return text


def _check_hints(request: ChatCompletionRequest) -> None:
    """Nothing here is used; what would be more than a hint is refused."""
    for name, text in (
        ("user", request.user),
        ("safety_identifier", request.safety_identifier),
        ("prompt_cache_key", request.prompt_cache_key),
    ):
        if text is not None and len(text.encode()) > MAX_USER_BYTES:
            raise StringTooLong(f"{name} must be at most {MAX_USER_BYTES} bytes long.", param=name)
    for key, value in (request.metadata or {}).items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise StringTooLong(
                f"The keys of metadata must be at most {MAX_METADATA_KEY_CHARS} characters long.",
                param="metadata",
            )
        if len(value) > MAX_METADATA_VALUE_CHARS:
            raise StringTooLong(
                f"The values of metadata must be at most {MAX_METADATA_VALUE_CHARS} characters "
                "long.",
                param=f"metadata.{quoted(key)[1:-1]}",
            )
    if request.service_tier not in (None, "auto", "default"):
        raise UnsupportedParameter(
            "service_tier must be auto or default: this server has one tier.", param="service_tier"
        )


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    if value is None:
        return True
    # In Python true equals 1; on the wire they are different answers.
    return any(
        isinstance(value, bool) == isinstance(each, bool) and value == each for each in neutral
    )


_EXPECTED: Final[Mapping[str, str]] = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "int_type": "must be an integer",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "string_type": "must be a string",
}


def translated(error: ValidationError, body: Mapping[str, Any]) -> ServerError:
    """The first fault in our words; pydantic's own may repeat what the client sent."""
    first = error.errors(include_url=False)[0]
    kind, limits = first["type"], first.get("ctx", {})
    param = _path_sent(first["loc"], body)
    if kind == "missing":
        return MissingParameter(f"{param} is required.", param=param)
    if kind in _EXPECTED:
        return InvalidType(f"{param} {_EXPECTED[kind]}.", param=param)
    if kind == "too_long":
        most = limits["max_length"]
        return ArrayTooLong(f"{param} must have at most {most} items.", param=param)
    if kind == "string_too_long":
        most = limits["max_length"]
        return StringTooLong(f"{param} must be at most {most} characters long.", param=param)
    if kind in ("too_short", "string_too_short"):
        return InvalidRequest(f"{param} must not be empty.", param=param)
    for name, words in (
        ("ge", "at least"),
        ("gt", "greater than"),
        ("le", "at most"),
    ):
        if name in limits:
            return InvalidRequest(
                f"{param} must be {words} {limits[name]}; {first['input']!r} was given.",
                param=param,
            )
    return InvalidRequest(f"{param} is invalid.", param=param)


def _path_sent(location: tuple[int | str, ...], body: Mapping[str, Any]) -> str:
    """The place of a fault in what the client sent: `stop` may be a string where we hold a list."""
    path = ""
    value: Any = body
    for step in location:
        if isinstance(step, int):
            if not isinstance(value, list):
                break
            path += f"[{step}]"
            value = value[step]
        else:
            path += f".{step}" if path else step
            value = value.get(step) if isinstance(value, dict) else None
    return path
