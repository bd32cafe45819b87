"""Grammars as llguidance takes them, and its matchers over a checkpoint's vocabulary.

Whoever proves a grammar and whoever matches by it does so here, under the same limits: only so does
the proof hold. Must not know what a grammar was made from, nor who is answered.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.errors import CheckpointError

# A third of the library's own fuel for a step, some 10 ms, because all running answers may come to
# wait for it; and a fifth of its states, some 60 MB, because every matcher may come to have them.
# An object takes four items of a row for each member that may be missing: a thousand have to fit.
# The library's longer error texts would carry the grammar.
_LIMITS = LLParserLimits(
    step_lexer_fuel=70_000,
    max_lexer_states=50_000,
    max_items_in_row=5_000,
    verbose_errors=False,
)

MAX_TOKEN_S: Final = 0.05
"""Of a processor, for one token of an answer: others wait for it."""

PROOF_STACK_BYTES: Final = 16 << 20
ENGINE_STACK_BYTES: Final = 64 << 20
"""The library recurses over what the client wrote, by some 3 KB for each rule of a chain of rules.
What passes on the smaller stack has room on the larger one, also where it is followed further."""

_BYTES_OF_ANY_MATCHER = 768 * 1024
_BYTES_PER_CHARACTER = 512


class GrammarError(Exception):
    """A grammar that cannot be matched; the message is the library's and not for callers."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a `tokenizer.json`; `added_ids` are those that ordinary text never has."""

    tokenizer: LLTokenizer
    added_ids: frozenset[int]


def read_vocabulary(folder: Path) -> Vocabulary:
    """That of the checkpoint in `folder`."""
    try:
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added_ids = frozenset(token["id"] for token in description["added_tokens"])
        special = [token for token in description["added_tokens"] if token.get("special")]
        named = special or description["added_tokens"]
        text = json.dumps(_with_unknown_names(description, named))
        # It must be told an end. Whether an answer may end is asked of the matcher instead.
        tokenizer = LLTokenizer(text, eos_token=min(token["id"] for token in named))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("tokenizer.json cannot be used for structured output") from error
    return Vocabulary(tokenizer, added_ids)


def _with_unknown_names(
    description: dict[str, Any], special: list[dict[str, Any]]
) -> dict[str, Any]:
    """The tokenizer, its added tokens under names that nobody can write.

    Else a form that has one's own name in it, in a constant or as a member, could only be followed
    by the token, which stands for no text. Those that are not `special` are ordinary entries here:
    they are part of no answer of a form, and the library takes seconds over thousands of them.
    """
    secret = secrets.token_hex(16)
    added = description["added_tokens"]
    names = {token["content"]: f"<{secret}-{token['id']}>" for token in added}
    ids = {names[token["content"]]: token["id"] for token in added}
    model = description["model"]
    merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
    return description | {
        "added_tokens": [token | {"content": names[token["content"]]} for token in special],
        "model": model
        | {
            "vocab": {names.get(token, token): i for token, i in model["vocab"].items()} | ids,
            "merges": [
                [left, right]
                for left, right in merges
                if names.keys().isdisjoint((left, right, left + right))
            ],
        },
    }


def matcher_bytes(grammar: str) -> int:
    """More memory than a matcher of it holds that has seen nothing yet.

    Most have 60 KB and 150 bytes for each character, over a vocabulary of 110,000. A proof holds
    each against this, because Unicode's classes, for one, take thousands of bytes for a character.
    """
    return _BYTES_OF_ANY_MATCHER + _BYTES_PER_CHARACTER * len(grammar)


def start_matcher(vocabulary: Vocabulary, grammar: str) -> LLMatcher:
    """A matcher that has seen nothing yet. GrammarError where there is no way to begin."""
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        added = sum(1 << token_id for token_id in vocabulary.added_ids)
        if not (mask & ~added or matcher.is_accepting() or matcher.is_error()):
            raise GrammarError("nothing may come")
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher
