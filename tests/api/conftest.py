"""The demo's own tokenizer and template, and a server whose engine answers by a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import openai
import pytest
from fastapi import FastAPI

from server.chat.prepare import Preparer
from server.chat.tokenizer import Tokenizer
from server.core import GenerationRequest
from tests.api.demo import demo_preparer
from tests.conftest import Server, running
from tests.fakes import FakeEngine


def client_of(server: Server) -> openai.OpenAI:
    """It refuses what is not exactly of OpenAI's shapes."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=20,
        _strict_response_validation=True,
    )


@pytest.fixture(scope="module")
def preparer() -> Iterator[Preparer]:
    prepared = demo_preparer()
    yield prepared
    prepared.close()


Scripted = Callable[..., Server]


@pytest.fixture(scope="module")
def scripted_preparer() -> Preparer:
    return demo_preparer(4096)


@pytest.fixture(scope="module")
def scripted(build: Callable[..., FastAPI], scripted_preparer: Preparer) -> Iterator[Scripted]:
    """A server whose engine answers with these texts and special tokens."""
    script: list[Sequence[str]] = []

    def tokens(request: GenerationRequest, choice: int) -> list[int]:
        return ids_of(scripted_preparer.tokenizer, script[choice % len(script)])

    engine = FakeEngine(tokens)
    app = build(engine=engine, preparer=scripted_preparer, prover=scripted_preparer.prover)
    with running(app) as server:

        def scripted(*answers: Sequence[str]) -> Server:
            script[:] = answers
            engine.submitted.clear()
            return server

        yield scripted


def ids_of(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Text one character a token at a time, so that pieces begin and end anywhere."""
    ids: list[int] = []
    for piece in pieces:
        special = tokenizer.special.get(piece)
        if special is not None:
            ids.append(special)
        else:
            ids += [
                token_id for character in piece for token_id in tokenizer.encode_text(character)
            ]
    return ids
