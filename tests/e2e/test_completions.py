"""POST /v1/completions over the demo model: what it says of a text's likelihood is so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import RunningServer, serving


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("demo")
    with serving(folder, MODEL__ALIASES='["an alias"]') as server:
        yield server
    assert "limits: {" in (folder / "server.log").read_text()


def tokens_of(demo: RunningServer, **body: Any) -> list[int]:
    response = httpx.post(f"{demo.url}/tokenize", json=body, timeout=60)
    tokens: list[int] = response.raise_for_status().json()["tokens"]
    return tokens


def score(demo: RunningServer, context: list[int], *continuations: list[int]) -> list[float]:
    """The log-likelihood of each after the context, asked for as evaluation harnesses do."""
    completion = demo.client.completions.create(
        model=demo.model,
        prompt=[[*context, *continuation] for continuation in continuations],
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    scores = []
    for choice, continuation in zip(completion.choices, continuations, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        told = choice.logprobs.token_logprobs
        assert len(told) == len(context) + len(continuation) + 1
        scores.append(math.fsum(told[len(context) : -1]))
    return scores


def test_an_echo_is_as_likely_as_the_answer_was(demo: RunningServer) -> None:
    """The chat's own prompt and answer, given back as ids, are scored as they were made."""
    messages: list[Any] = [{"role": "user", "content": "안녕하세요"}]
    whole = demo.client.chat.completions.create(
        model=demo.model, messages=messages, temperature=0, max_tokens=40, logprobs=True
    )
    answer = whole.choices[0]
    assert answer.logprobs is not None and answer.logprobs.content
    made = math.fsum(each.logprob for each in answer.logprobs.content)
    context = tokens_of(demo, messages=messages)
    assert whole.usage is not None and whole.usage.prompt_tokens == len(context)
    said = tokens_of(demo, prompt=answer.message.content)
    assert len(said) == len(answer.logprobs.content)
    (scored,) = score(demo, context, said)
    assert scored == pytest.approx(made, abs=1e-3)
    # Scored alone, nothing comes after it.
    alone = demo.client.completions.create(
        model="an alias", prompt=[*context, *said], max_tokens=0, logprobs=0, echo=True
    )
    assert alone.model == "an alias"
    logprobs = alone.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert math.fsum(logprobs.token_logprobs[len(context) :]) == pytest.approx(made, abs=1e-3)
    assert alone.usage is not None and alone.usage.completion_tokens == 0


def test_the_likelier_of_two_continuations_is_told(demo: RunningServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "안녕하세요"}]
    likely = demo.ask("안녕하세요")
    context = tokens_of(demo, messages=messages)
    right, wrong = tokens_of(demo, prompt=likely), tokens_of(demo, prompt="qzx 7 wvk")
    scores = score(demo, context, wrong, right)
    assert scores[1] > scores[0] + 5
    assert score(demo, context, right) == pytest.approx(scores[1:], abs=1e-3)


def test_a_raw_prompt_goes_on_as_the_chat_does(demo: RunningServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "안녕하세요"}]
    context = tokens_of(demo, messages=messages)
    completion = demo.client.completions.create(
        model=demo.model, prompt=context, max_tokens=100, temperature=0
    )
    assert completion.choices[0].text == demo.ask("안녕하세요")
    assert completion.choices[0].finish_reason == "stop"


def test_models_and_limits_tell_what_the_checkpoint_takes(demo: RunningServer) -> None:
    first, second = demo.client.models.list().data
    assert second.id == "an alias"
    told: Any = first.to_dict()
    assert told["modalities"] == ["text", "image", "video"]
    for kind in ("image", "video"):
        assert 0 < told["media_tokens"][kind]["least"] < told["media_tokens"][kind]["most"]
    limits = httpx.get(f"{demo.url}/v1/limits", timeout=60).json()
    assert limits["chat"]["max_context_tokens"] == told["max_model_len"]
    assert limits["engine"]["kv_cache_tokens"] >= told["max_model_len"]
