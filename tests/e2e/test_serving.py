"""The real server over a small random model, asked by the real client.

What the model says means nothing here; that it says the same thing each time, as often as it is
counted, and not a token longer than anybody listens, does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw

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
        ({"n": 2}, 400, "unsupported_parameter", "n"),
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
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
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


def test_sampling_fields_are_honoured(tiny: RunningServer) -> None:
    """A bias of 100 makes one id certain ("b"); as an end of the answer it is no part of it."""
    forced = {"logit_bias": {"65": 100}, "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    assert complete(tiny, "x", **forced).choices[0].message.content == "bbbbb"
    ended = complete(
        tiny, "x", logit_bias={"65": 100}, extra_body={"stop_token_ids": [65], "min_tokens": 2}
    )
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == 3
