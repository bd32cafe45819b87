"""Text to token ids and token ids back to text.

Reads byte-level BPE `tokenizer.json` files. Encoding here never yields a special id: whatever may
become one is decided by `chat.template`. Decoding is incremental and holds text back only while it
is an incomplete character or may still become a stop string. It knows nothing of messages.
"""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import tokenizers

from server.chat.calls import ARROW, CallFormat, CallPiece, CallReader
from server.core import FinishReason, TokenEvent, TokenLogprobs
from server.errors import ANSWER_ERRORS, CheckpointError, ServerError

# Bytes that no UTF-8 text contains, so that a vocabulary may do without them.
BYTES_OUTSIDE_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token as it is shown: its text, its bytes, its log-probability, and the likeliest there."""

    text: str
    text_bytes: bytes
    logprob: float
    top: tuple[TokenChance, ...] = ()


EndReason: TypeAlias = FinishReason | Literal["tool_calls"]
"""How an answer ended: an engine knows of ids only, and not that they were calls."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one choice. The last one of a choice, and only it, has a finish reason.

    `num_tokens` counts the tokens generated since the choice's delta before, ends included, so that
    the sum over all deltas is the usage; `num_cached_tokens` likewise, of the prompt's that were
    not computed again. One delta has the `encode_times_s` of the prompt's media, and, where they
    were asked for, the `prompt_chances` of its ids, None where nothing is told of one. `chances`
    are of the tokens whose text is complete with this piece, and `starts` where each begins in the
    choice's text, in characters. `calls` are pieces of function calls, which come after the text.
    """

    text: str
    finish_reason: EndReason | None
    num_tokens: int
    num_cached_tokens: int = 0
    encode_times_s: tuple[float, ...] = ()
    choice: int = 0
    chances: tuple[TokenChance, ...] = ()
    starts: tuple[int, ...] = ()
    prompt_chances: tuple[TokenChance | None, ...] | None = None
    calls: tuple[CallPiece, ...] = ()


class TokenStream(Protocol):
    """The events of all choices; closing it, or one of them, before its last one aborts that."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def close_choice(self, choice: int) -> None: ...

    def close(self) -> None: ...


def byte_symbols() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {chr(byte): byte for byte in visible}
    hidden = sorted(set(range(0x100)) - set(visible))
    return symbols | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


class Tokenizer:
    """One checkpoint's vocabulary.

    `special` maps each added-token string, and each of the `reserved_ids`, to its id. None of
    these ids ever comes out of `encode_text`, whatever the text says. The `size` is one more than
    the largest id.
    """

    def __init__(self, text: str, *, reserved_ids: Collection[int] = ()) -> None:
        try:
            data = json.loads(text)
            model = data["model"]
            vocabulary: dict[str, int] = model["vocab"]
            added: list[dict[str, Any]] = data.get("added_tokens") or []
            kind = model.get("type")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("tokenizer.json is not a tokenizer description") from error
        if kind != "BPE" or "ByteLevel" not in _step_types(data.get("pre_tokenizer")):
            raise CheckpointError("tokenizer.json is not a byte-level BPE, the only kind served")

        tokens_by_id = {token_id: token for token, token_id in vocabulary.items()}
        self._token_bytes = _token_bytes(tokens_by_id, added)
        self.size = max(self._token_bytes, default=-1) + 1
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added}
        for token_id in reserved_ids:
            if token_id not in self.special.values():
                if token_id not in tokens_by_id:
                    raise CheckpointError(f"tokenizer.json has no token with the id {token_id}")
                name = self._token_bytes[token_id].decode("utf-8", errors="replace")
                self.special[name] = token_id
                self._token_bytes[token_id] = b""
        self.special_ids = frozenset(self.special.values())
        # Whether the official encoding swallows the white space left or right of a special token.
        self.swallows = {
            token["content"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in added
        }
        self._without_special = _without_special(data, self.special_ids)

    @classmethod
    def from_folder(cls, folder: Path, *, reserved_ids: Collection[int] = ()) -> Tokenizer:
        """Read the folder's tokenizer.json."""
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError("the checkpoint has no readable tokenizer.json") from error
        return cls(text, reserved_ids=reserved_ids)

    def encode_text(self, text: str) -> list[int]:
        """The ids of ordinary text; special-token strings in it are spelled out."""
        return list(self._without_special.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a whole prompt of ordinary text.

        As `encode_text`, with the beginning or ending that the file's own rules (its
        post-processor) put around a text.
        """
        return list(self._without_special.encode(text, add_special_tokens=True).ids)

    def has_token(self, token_id: int) -> bool:
        return token_id in self._token_bytes

    def token_of(self, token_id: int) -> str | None:
        """The special-token string with this id."""
        return next((token for token, known in self.special.items() if known == token_id), None)

    def token_bytes(self, token_id: int) -> bytes:
        """The text bytes of a token: none for special tokens and for ids without a token."""
        return self._token_bytes.get(token_id, b"")

    def chance_of(self, logprobs: TokenLogprobs) -> TokenChance:
        """Log-probabilities of ids as they are shown; a special token by its name."""
        top = (self._chance(token_id, logprob) for token_id, logprob in logprobs.top)
        return self._chance(logprobs.token_id, logprobs.logprob, tuple(top))

    def starts_of(self, token_ids: Sequence[int]) -> list[int]:
        """Where each token begins in the text of all of them (`decode`), in characters."""
        detokenizer = Detokenizer(self)
        starts = []
        for token_id in token_ids:
            starts.append(detokenizer.num_decoded)
            detokenizer.push(token_id)
        return starts

    def _chance(
        self, token_id: int, logprob: float, top: tuple[TokenChance, ...] = ()
    ) -> TokenChance:
        text_bytes = self.token_bytes(token_id) or (self.token_of(token_id) or "").encode()
        return TokenChance(text_bytes.decode("utf-8", errors="replace"), text_bytes, logprob, top)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text at once, without special tokens."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")


def _step_types(step: Any) -> set[str]:
    """The type names of a pre-tokenizer, those inside a Sequence included."""
    if not isinstance(step, dict):
        return set()
    inner = step.get("pretokenizers") or []
    return {str(step.get("type"))}.union(*(_step_types(one) for one in inner))


def _token_bytes(tokens_by_id: Mapping[int, str], added: list[dict[str, Any]]) -> dict[int, bytes]:
    symbols = byte_symbols()
    table: dict[int, bytes] = {}
    for token_id, token in tokens_by_id.items():
        try:
            table[token_id] = bytes(symbols[character] for character in token)
        except KeyError:  # an entry that is not written in byte symbols
            table[token_id] = token.encode("utf-8")
    for entry in added:
        table[entry["id"]] = b"" if entry.get("special") else entry["content"].encode("utf-8")
    return table


def _without_special(data: dict[str, Any], special_ids: Collection[int]) -> tokenizers.Tokenizer:
    """The same tokenizer, unable to produce a special id but by its own post-processor.

    Some vocabularies list special tokens as ordinary entries too, so they go from there as well,
    with every merge that would make or use one.
    """
    model = data["model"]
    dropped = {token for token, token_id in model["vocab"].items() if token_id in special_ids}
    vocabulary = {token: i for token, i in model["vocab"].items() if token not in dropped}
    missing = [
        byte
        for symbol, byte in byte_symbols().items()
        if byte not in BYTES_OUTSIDE_UTF8 and symbol not in vocabulary
    ]
    if missing:
        raise CheckpointError(
            f"tokenizer.json has no ordinary token for {len(missing)} of the bytes, "
            f"the first is 0x{missing[0]:02X}: such text could not be encoded"
        )
    merges = []
    for merge in model.get("merges") or []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if dropped.isdisjoint((left, right, left + right)):
            merges.append(merge)
    plain = data | {
        "added_tokens": [],
        "truncation": None,
        "padding": None,
        "model": model | {"vocab": vocabulary, "merges": merges, "dropout": None},
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError("tokenizer.json cannot be loaded") from error


class Detokenizer:
    """Ids of one answer in, text out, as soon as it is certain.

    Held back are only the bytes of an unfinished character and a tail that may become a stop
    string. Of several stop strings the one that is complete first wins, and of those that end
    together the longest; it and all after it is dropped. A character left unfinished at the end
    is no text and is dropped too.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False
        self.num_decoded = 0
        """The characters of all tokens so far, shown or not."""

    @property
    def is_inside_character(self) -> bool:
        """Whether the last token ended before its last character did."""
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Take one token; the text that is now certain. One that may not stop is text at once."""
        return self.release(self.decode(token_id), may_stop=may_stop)

    def decode(self, token_id: int) -> str:
        """The characters that a token completes, which `release` has to be given."""
        new = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self.num_decoded += len(new)
        return new

    def release(self, new: str, *, may_stop: bool = True) -> str:
        """The text that is certain now that these characters have come."""
        if self.is_stopped:
            return ""
        if not self._stop or not may_stop:
            return self.finish() + new
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = len(text) - self._length_of_possible_stop(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """The answer is over: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _length_of_possible_stop(self, text: str) -> int:
        """How long the longest tail is with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                longest = max(longest, len(text) - at)
        return longest


class _Choice:
    """One answer on its way to text: what is held back, and what is counted until the next delta.

    Lengths are in characters of the answer's text. A token whose last character is incomplete ends
    with that character.
    """

    def __init__(
        self,
        number: int,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        calls: CallFormat | None,
        tells_end: bool,
    ) -> None:
        self._number = number
        self._tells_end = tells_end
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, stop)
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._encode_times_s: tuple[float, ...] = ()
        self._prompt_chances: tuple[TokenChance | None, ...] | None = None
        self._shown = 0
        self._held_chances: deque[tuple[int, int, TokenChance]] = deque()  # start, end, chance
        self.num_generated = 0
        self._call_format = calls
        # What reads calls once they have begun.
        self._reader = CallReader() if calls is not None and calls.at == "calls" else None
        # Held back while it may become the head of a turn of calls; None where it cannot.
        self._opening: str | None = "" if calls is not None and calls.at == "turn" else None

    def take(self, event: TokenEvent, *, min_tokens: int) -> Delta | None:
        """The delta that an event completes, if any; after the last one nothing may be taken."""
        self._num_cached_tokens += event.num_cached_tokens
        self._encode_times_s += event.encode_times_s
        if event.prompt_logprobs is not None:
            told = event.prompt_logprobs
            self._prompt_chances = tuple(
                None if each is None else self._tokenizer.chance_of(each) for each in told
            )
        text = ""
        pieces: tuple[CallPiece, ...] = ()
        may_stop = self.num_generated >= min_tokens
        if event.token_id is not None:
            self._num_tokens += 1
            self.num_generated += 1
            # The token that ends an answer is no part of its text, even an ordinary one.
            if event.finish_reason != "stop":
                text, pieces = self._read(event, may_stop=may_stop)
            elif self._tells_end and event.logprobs is not None:
                at = self._detokenizer.num_decoded
                self._held_chances.append((at, at, self._tokenizer.chance_of(event.logprobs)))
        if event.finish_reason is not None:
            text += self._end_text(may_stop=may_stop)
        if self._detokenizer.is_stopped:
            return self._delta(text, (), "stop")
        if event.finish_reason is not None:
            has_calls = self._reader is not None and self._reader.num_calls > 0
            is_whole = event.finish_reason == "stop"
            reason: EndReason = "tool_calls" if has_calls and is_whole else event.finish_reason
            return self._delta(text, pieces, reason)
        return self._delta(text, pieces, None) if text or pieces else None

    def _read(self, event: TokenEvent, *, may_stop: bool) -> tuple[str, tuple[CallPiece, ...]]:
        """The text, or the pieces of calls, that are certain with this token."""
        assert event.token_id is not None
        if self._reader is not None:
            return "", self._reader.push(self._detokenizer.decode(event.token_id))
        if self._call_format is not None and event.token_id == self._call_format.turn_end_id:
            self._reader = CallReader()
            return self._end_text(may_stop=may_stop), ()
        text = self._decode(event)
        if self._opening is not None:
            text, self._opening = self._opening + text, None
            if text.startswith(ARROW):
                self._held_chances.clear()
                self._reader = CallReader()
                return "", self._reader.push(text[len(ARROW) :])
            if ARROW.startswith(text):
                self._opening = text
                return "", ()
        return self._detokenizer.release(text, may_stop=may_stop), ()

    def _end_text(self, *, may_stop: bool) -> str:
        """No more text will come: what was held back of it."""
        opening, self._opening = self._opening or "", None
        return self._detokenizer.release(opening, may_stop=may_stop) + self._detokenizer.finish()

    def _decode(self, event: TokenEvent) -> str:
        """The characters that the token completes; its chance waits for them to be shown."""
        assert event.token_id is not None
        start = self._detokenizer.num_decoded
        text = self._detokenizer.decode(event.token_id)
        if event.logprobs is not None:
            end = self._detokenizer.num_decoded + int(self._detokenizer.is_inside_character)
            self._held_chances.append((start, end, self._tokenizer.chance_of(event.logprobs)))
        return text

    def _delta(self, text: str, pieces: tuple[CallPiece, ...], reason: EndReason | None) -> Delta:
        self._shown += len(text)
        chances, starts = [], []
        while self._held_chances:
            start, end, chance = self._held_chances[0]
            # Of what a stop string cuts, the tokens that begin behind the cut are not shown.
            is_shown = end <= self._shown if reason is None else self._is_kept(start)
            if not is_shown:
                break
            self._held_chances.popleft()
            chances.append(chance)
            starts.append(start)
        delta = Delta(
            text,
            reason,
            self._num_tokens,
            self._num_cached_tokens,
            self._encode_times_s,
            self._number,
            tuple(chances),
            tuple(starts),
            self._prompt_chances,
            pieces,
        )
        self._num_tokens = self._num_cached_tokens = 0
        self._encode_times_s = ()
        self._prompt_chances = None
        return delta

    def _is_kept(self, start: int) -> bool:
        return not self._detokenizer.is_stopped or start < self._shown


async def detokenize(
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    stop: Sequence[str] = (),
    min_tokens: int = 0,
    num_choices: int = 1,
    calls: CallFormat | None = None,
    tells_end: bool = False,
) -> AsyncGenerator[Delta, None]:
    """The choices' texts as they become certain; each whole answer is the sum of its deltas.

    With `tells_end` the chance of the token that ends an answer is told too.

    With `calls` an answer may go on, after its text, with function calls.

    A stop string in a text closes its choice, which aborts it; one within the first `min_tokens`
    is text. An error event is raised as the `ServerError` of its code.
    """
    choices = {
        number: _Choice(number, tokenizer, stop, calls=calls, tells_end=tells_end)
        for number in range(num_choices)
    }
    try:
        async for event in stream:
            if event.finish_reason == "error":
                raise ANSWER_ERRORS.get(event.error_code or "", ServerError)()
            delta = choices[event.choice].take(event, min_tokens=min_tokens)
            if delta is None:
                continue
            if delta.finish_reason is not None:
                del choices[event.choice]
                # Now: nobody has to resume this generator after its last delta.
                stream.close_choice(event.choice)
            yield delta
            if not choices:
                return
    finally:
        stream.close()
