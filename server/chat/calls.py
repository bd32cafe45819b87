"""Function calls in an answer, read while it is being written.

The family writes a call as a turn of its own, after the text if there is any:

    text<|im_end|>\\n<|im_start|>assistant -> tool/function_call\\n[{"name": "f", "arguments": {}}]

or right after the head of the answer's turn, ` -> tool/function_call\\n[...]`. It is one object or
a list of them, and `arguments` may also be `input` or `parameters` (Think-14B's model card, and the
parser of NAVER's plugin for vLLM). That it is one of these forms the grammar of `chat.tools` sees
to. Must not know which functions there are, nor how ids become text.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from server.chat.fields import NAME_PATTERN

ARROW: Final = " -> tool/function_call\n"
"""What follows the word `assistant` at the head of a turn of calls."""

ARGUMENT_KEYS: Final = ("arguments", "input", "parameters")

_HEAD: Final = re.compile(
    rf'\{{"name": ?"({NAME_PATTERN})", ?"(?:{"|".join(ARGUMENT_KEYS)})": ?(?=\{{)'
)


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The next piece of one call: the first has its id and name, the others JSON of its arguments.

    `index` numbers the calls of one choice.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class WholeCall:
    """A call of which all pieces have come, or as many as there was room for."""

    id: str
    name: str
    arguments: str


def added_up(pieces: Iterable[CallPiece]) -> list[WholeCall]:
    """The calls of one choice, of which these are all the pieces, in their order."""
    calls: dict[int, list[CallPiece]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return [
        WholeCall(of_one[0].id or "", of_one[0].name or "", "".join(p.arguments for p in of_one))
        for of_one in calls.values()
    ]


Place = Literal["turn", "within", "calls"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How calls are told from text: the ids of `<|im_start|>` and `<|im_end|>`.

    The answer begins `at` the beginning of a turn, "within" a text, or in the "calls", the head of
    whose turn is in the prompt.
    """

    turn_start_id: int
    turn_end_id: int
    at: Place = "turn"

    @property
    def special_ids(self) -> tuple[int, int]:
        """Those that the answer is made of beside text."""
        return self.turn_start_id, self.turn_end_id


class CallReader:
    """The calls in the text of an answer's turns of calls, piece by piece.

    What is not a call (heads of turns, brackets, commas) is passed over.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._unread = ""
        self._is_in_arguments = False
        self._depth = 0  # of braces
        self._is_in_string = False
        self._is_escaped = False

    def push(self, text: str) -> tuple[CallPiece, ...]:
        """What is certain now."""
        self._unread += text
        return tuple(self._pieces())

    def _pieces(self) -> Iterator[CallPiece]:
        while self._unread:
            if self._is_in_arguments:
                end = self._end_of_arguments()
                yield CallPiece(self.num_calls - 1, arguments=self._unread[:end])
                self._unread = self._unread[end:]
                continue
            head = _HEAD.search(self._unread)
            if head is None:
                return
            yield CallPiece(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", head[1])
            self.num_calls += 1
            self._is_in_arguments = True
            self._unread = self._unread[head.end() :]

    def _end_of_arguments(self) -> int:
        """How much of the unread text is part of the arguments that have begun."""
        for position, character in enumerate(self._unread, start=1):
            if self._is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_in_string = False
            elif character == '"':
                self._is_in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    self._is_in_arguments = False
                    return position
        return len(self._unread)
