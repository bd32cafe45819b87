"""The real server over a small random model, asked by the real client.

What the model says means nothing here; that it says the same thing each time, as often as it is
counted, and not a token longer than anybody listens, does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw

from server.engine.process import ENVIRONMENT
from server.model.config import read_checkpoint
from server.vision.tiles import image_tiles
from tests.clips import clip
from tests.e2e.conftest import (
    RunningServer,
    data_url,
    picture_url,
    serving,
    with_picture,
    with_video,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endofturn|>", "<|stop|>", "<|dummy3|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def tiny(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """With a cache for little more than one whole context, so that what is kept is missed."""
    info = read_checkpoint(tiny_checkpoint)
    cache_bytes = round(1.1 * info.kv_bytes_per_token("float32") * info.context_length)
    with serving(
        tmp_path_factory.mktemp("server"),
        *("--model", str(tiny_checkpoint), "--dtype", "float32"),
        ENGINE__KV_CACHE_BYTES=cache_bytes,
        ENGINE__NUM_THREADS=1,
    ) as server:
        yield server


def picture() -> Image.Image:
    drawn = Image.new("RGB", (100, 60), "white")
    ImageDraw.Draw(drawn).ellipse((10, 10, 50, 50), fill="red")
    return drawn


def complete(server: RunningServer, content: Any, **fields: Any) -> Any:
    return server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        **({"temperature": 0, "max_tokens": 8} | fields),
    )


def test_the_model_is_listed(tiny: RunningServer) -> None:
    (listed,) = tiny.client.models.list().data
    assert tiny.client.models.retrieve(listed.id) == listed
    assert listed.to_dict()["max_model_len"] == 4096


CONTENTS = {
    "text": "안녕, what is this?",
    "picture": with_picture("What is this?", picture_url(picture())),
    "video": with_video("What moves?", data_url(clip(4), "video/mp4")),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "seed": 7}], ids=["greedy", "seeded"])
def test_streamed_equals_whole(tiny: RunningServer, kind: str, fields: dict[str, Any]) -> None:
    whole = complete(tiny, CONTENTS[kind], **fields)
    stream = complete(
        tiny, CONTENTS[kind], stream=True, stream_options={"include_usage": True}, **fields
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    usages = [usage.to_dict() for usage in (whole.usage, last.usage)]
    told = [usage.pop("media", []) for usage in usages]
    assert [each["tokens"] for each in told[0]] == [each["tokens"] for each in told[1]]
    assert bool(told[0]) == (kind != "text")
    first, second = (usage["prompt_tokens_details"].pop("cached_tokens") for usage in usages)
    assert usages[0] == usages[1]
    assert whole.usage.completion_tokens <= 8
    # Whatever of the prompt fills blocks of 64 is there the second time.
    assert second == (whole.usage.prompt_tokens - 1) // 64 * 64 >= first


def test_tokens_of_a_picture_are_counted_as_the_model_counts_them(
    tiny: RunningServer, tiny_checkpoint: Path
) -> None:
    spec = read_checkpoint(tiny_checkpoint).vision
    assert spec is not None
    vision, _ = image_tiles(picture(), spec, detail="high")
    usage = complete(tiny, CONTENTS["picture"]).usage
    details = usage.prompt_tokens_details.to_dict()
    assert details["image_tokens"] == vision.num_tokens
    assert details["text_tokens"] + vision.num_tokens == usage.prompt_tokens


@pytest.mark.parametrize("special", SPECIAL)
def test_text_that_looks_special_is_text(tiny: RunningServer, special: str) -> None:
    """It takes as many tokens as its twin that does not look special, and ends nothing."""
    twin = special.replace("|", "!")
    counts = {
        complete(tiny, f"a {text} b", max_tokens=1).usage.prompt_tokens for text in (special, twin)
    }
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"n": 9}, 400, "invalid_value", "n"),
        ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", "messages"),
        ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
    ],
)
def test_refusals_reach_the_client_as_its_own_errors(
    tiny: RunningServer, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    given: dict[str, Any] = {"model": tiny.model, "messages": [{"role": "user", "content": "hi"}]}
    for stream in (True, False):
        with pytest.raises(openai.APIStatusError) as caught:
            tiny.client.chat.completions.create(**(given | fields), stream=stream)
        error = caught.value
        assert (error.status_code, error.code, error.param) == (status, code, param)


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        (
            {"type": "image_url", "image_url": {"url": data_url(b"x" * 99, "image/png")}},
            "unsupported_image_media_type",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://127.0.0.1/a.png"}},
            "invalid_image_url",
            "messages[0].content[0].image_url.url",
        ),
    ],
)
def test_media_that_cannot_be_used_is_named(
    tiny: RunningServer, part: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(tiny, [part, {"type": "text", "text": "What is this?"}])
    assert (caught.value.code, caught.value.param) == (code, param)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_the_engine_process_has_its_environment(tiny: RunningServer) -> None:
    entries = Path(f"/proc/{tiny.worker_pid}/environ").read_text().split("\0")
    assert {entry.partition("=")[0] for entry in entries} >= ENVIRONMENT.keys()


def test_an_answer_nobody_waits_for_is_not_made(tiny: RunningServer) -> None:
    """Each request may fill the whole cache: one that went on would keep the next ones waiting."""
    for _ in range(3):
        stream = complete(tiny, "hi", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        tiny.client.with_options(timeout=1).chat.completions.create(
            model=tiny.model,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4000,
            extra_body={"ignore_eos": True},
        )
    time.sleep(2)
    before_s = processor_seconds(tiny.worker_pid)
    time.sleep(2)
    assert processor_seconds(tiny.worker_pid) - before_s < 0.3
    stream = complete(tiny, "hi", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()


def test_many_at_once_are_answered_as_each_alone(tiny: RunningServer) -> None:
    """Text, pictures and videos together, and none waits for the end of another."""
    contents = [*CONTENTS.values()] * 4
    alone = {
        str(content): complete(tiny, content).choices[0].message.content for content in contents
    }
    together_now = threading.Barrier(len(contents))

    def ask(content: Any) -> str:
        together_now.wait()
        return str(complete(tiny, content).choices[0].message.content)

    with ThreadPoolExecutor(len(contents)) as pool:
        together = list(pool.map(ask, contents))
    assert together == [alone[str(content)] for content in contents]


def test_a_later_short_request_overtakes_a_long_answer(tiny: RunningServer) -> None:
    body = {"ignore_eos": True}
    stream = complete(tiny, "long", stream=True, max_tokens=1500, extra_body=body)
    next(iter(stream))
    assert complete(tiny, "short", max_tokens=2).usage.completion_tokens <= 2
    chunks = [chunk for chunk in stream if chunk.choices]
    assert len(chunks) > 1  # it went on after the short one was answered
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("kind", CONTENTS)
def test_choices_are_what_one_alone_would_be(tiny: RunningServer, kind: str) -> None:
    """The prompt is counted once, and what the choices share of it is no cache of earlier ones."""
    alone = complete(tiny, CONTENTS[kind])
    whole = complete(tiny, CONTENTS[kind], n=4)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        assert choice.message.content == alone.choices[0].message.content
        assert choice.finish_reason == alone.choices[0].finish_reason
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    assert whole.usage.completion_tokens == 4 * alone.usage.completion_tokens
    cached = whole.usage.prompt_tokens_details.cached_tokens
    assert cached == (whole.usage.prompt_tokens - 1) // 64 * 64


def test_a_new_prompt_of_many_choices_was_not_in_the_cache(tiny: RunningServer) -> None:
    usage = complete(tiny, "Nobody has asked this before. " * 20, n=3).usage
    assert usage.prompt_tokens > 3 * 64
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_sampled_choices_differ_and_a_seed_repeats_them_all(tiny: RunningServer) -> None:
    fields = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    whole = complete(tiny, "hi", n=4, **fields)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert texts[0] == complete(tiny, "hi", **fields).choices[0].message.content
    streamed = ["", "", "", ""]
    ends = ["", "", "", ""]
    for chunk in complete(tiny, "hi", n=4, stream=True, **fields):
        (choice,) = chunk.choices
        assert not ends[choice.index]
        streamed[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ""
    assert streamed == texts
    assert ends == [choice.finish_reason for choice in whole.choices]


def test_logprobs_are_those_of_the_tokens_that_came(tiny: RunningServer) -> None:
    """Of the model itself: sharpening and filters change what is drawn, not what is told."""
    fields = {"logprobs": True, "top_logprobs": 20, "max_tokens": 6}
    greedy = complete(tiny, "hi", **fields).choices[0]
    told = greedy.logprobs.content
    data = b"".join(bytes(each.bytes) for each in told)
    assert data.decode(errors="ignore") == greedy.message.content
    for each in told:
        assert each.token == each.top_logprobs[0].token
        assert each.logprob == each.top_logprobs[0].logprob
        chances = [math.exp(top.logprob) for top in each.top_logprobs]
        assert len(chances) == 20 and chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1.0001
    sampled = complete(tiny, "hi", temperature=2, top_p=0.5, seed=3, **fields).choices[0]
    first = sampled.logprobs.content[0]
    assert [top.logprob for top in first.top_logprobs] == [
        top.logprob for top in told[0].top_logprobs
    ]


def test_streamed_logprobs_are_those_of_the_whole(tiny: RunningServer) -> None:
    """A stop string that is only begun holds both back, and what it cuts is not told."""
    fields = {"logprobs": True, "top_logprobs": 2, "temperature": 1, "seed": 5, "n": 2}
    text = complete(tiny, "hi", **fields).choices[0].message.content
    for stop in ([], [text[len(text) // 2 :][:2]], [text[1:3] + "\u0001"]):
        whole = complete(tiny, "hi", stop=stop, **fields)
        streamed: list[list[Any]] = [[], []]
        for chunk in complete(tiny, "hi", stop=stop, stream=True, **fields):
            (choice,) = chunk.choices
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content
        for choice in whole.choices:
            assert streamed[choice.index] == choice.logprobs.content
    assert complete(tiny, "hi").choices[0].logprobs is None


def test_sampling_fields_are_honoured(tiny: RunningServer) -> None:
    """A bias of 100 makes one id certain ("b"); as an end of the answer it is no part of it."""
    forced = {"logit_bias": {"65": 100}, "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    assert complete(tiny, "x", **forced).choices[0].message.content == "bbbbb"
    ended = complete(
        tiny, "x", logit_bias={"65": 100}, extra_body={"stop_token_ids": [65], "min_tokens": 2}
    )
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == 3
