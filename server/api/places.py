"""Where in the caller's request the parts of a chat request came from.

What is found wrong with a message is named by its place in the chat request. Where an endpoint made
that from a request of another form, the caller is told the place in the request that was sent.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from server.errors import ServerError

# A path that begins with a field that is made here: nothing else has these names and an index.
_PATH = re.compile(r"\b(?:messages|tools)\[[0-9]+\](?:\.[A-Za-z_]+|\[[0-9]+\])*")


@dataclass(frozen=True, slots=True)
class Places:
    """`sent` maps paths in the chat request to paths in the caller's."""

    sent: Mapping[str, str] = field(default_factory=dict)

    def of(self, path: str) -> str:
        """The caller's path: the longest part of it that is known is replaced."""
        known = path
        while known and known not in self.sent:
            known = known[: max(known.rfind("."), known.rfind("["), 0)]
        return self.sent[known] + path[len(known) :] if known else path

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """A ServerError within is raised with the caller's paths, in `param` and message."""
        try:
            yield
        except ServerError as error:
            if error.param is not None:
                error.param = self.of(error.param)
            error.message = _PATH.sub(lambda found: self.of(found[0]), error.message)
            raise


SAME_PLACES = Places()
"""Of a caller who sent a chat request."""
