"""Keeps client text from becoming, or becoming part of, a special token.

Before a template sees client text, the characters of it that could take part in a special token
are exchanged for numbers nobody can guess; once the template's own special tokens have been found
in what it rendered, they are put back. It knows no templates and no messages.
"""

from __future__ import annotations

import re
import secrets

from server.chat.tokenizer import Tokenizer


class Disguise:
    """Keeps client text from taking part in a special token, at whatever place it is rendered.

    Hidden are every character with which a special token begins, so that none begins in client
    text, and the first character of a text if any special token contains it, so that none begun in
    the template's own text goes on in it. Each becomes a number that starts with the nonce: digits
    pass through a template's filters (trim, tojson) like the letters around them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokens = sorted((token for token in tokenizer.special if token), key=len, reverse=True)
        self._characters = sorted({character for token in tokens for character in token})
        self._numbers = {character: i for i, character in enumerate(self._characters)}
        self._width = len(str(len(self._characters)))
        first = "".join(re.escape(c) for c in sorted({token[0] for token in tokens}))
        # An empty alternative would match everywhere, this one nowhere.
        self._first = re.compile(f"[{first}]" if first else r"(?!)")
        self._special = re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")

    def new_nonce(self) -> str:
        """Sixteen digits, unknown to whoever wrote the text."""
        return f"{secrets.randbelow(10**16):016d}"

    def hide(self, text: str, *, nonce: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = len(text) - len(text.lstrip())

        def disguise(character: str) -> str:
            number = self._numbers.get(character)
            return character if number is None else f"{nonce}{number:0{self._width}d}"

        rest = self._first.sub(lambda match: disguise(match[0]), core[1:])
        return text[:start] + disguise(core[0]) + rest + text[start + len(core) :]

    def encode(self, rendered: str, *, nonce: str) -> list[int]:
        """The ids of a rendered prompt: special tokens where the template wrote them."""
        ids: list[int] = []
        run: list[str] = []
        swallow_left = False

        def end_run(*, swallow_right: bool) -> None:
            text = "".join(run)
            text = text.lstrip() if swallow_left else text
            text = text.rstrip() if swallow_right else text
            ids.extend(self._tokenizer.encode_text(text))
            run.clear()

        pieces = re.split(f"{nonce}([0-9]{{{self._width}}})", rendered)
        for index, piece in enumerate(pieces):
            if index % 2 == 1:
                run.append(self._characters[int(piece)])
                continue
            end = 0
            for match in self._special.finditer(piece):
                token = match[0]
                left, right = self._tokenizer.swallows.get(token, (False, False))
                run.append(piece[end : match.start()])
                end_run(swallow_right=left)
                ids.append(self._tokenizer.special[token])
                end, swallow_left = match.end(), right
            run.append(piece[end:])
        end_run(swallow_right=False)
        return ids
