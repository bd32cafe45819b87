from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from server.chat.media import MediaReader
from server.chat.options import MediaOptions
from server.chat.prepare import ChatRequest, ModelFacts, Prepared, Preparer
from server.chat.template import ChatTemplate
from server.chat.tokenizer import Tokenizer
from server.config import MediaConfig
from server.core import SamplingDefaults, SamplingParams, VisionSpec
from server.decoding.pool import DecoderPool
from server.errors import InvalidRequest, PromptTooLong
from server.grammar.prover import Prover
from server.media.fetch import Fetcher
from tests.chat.conftest import DICT_TEMPLATE, IM_END, IMAGE, LIST_TEMPLATE, STRING_TEMPLATE, VIDEO

PROVER = Prover(Path("nowhere"))  # nobody here asks for a form

CONTEXT = 600
LIMITS = MediaConfig(max_request_bytes=5000)

pytestmark = pytest.mark.asyncio(loop_scope="module")


def png(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 30)) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def gif(num_frames: int) -> str:
    """A clip of 0.4 s a frame, every frame another shade."""
    frames = [Image.new("L", (40, 30), 10 + 20 * index) for index in range(num_frames)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=400)
    return base64.b64encode(file.getvalue()).decode()


RED, GREEN = png(56, 56), png(20, 60, (30, 200, 30))


def picture(source: str = RED, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **more}


def clip(num_frames: int = 3) -> dict[str, Any]:
    return {"type": "video", "video": gif(num_frames)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def facts(tokenizer: Tokenizer, vision: VisionSpec) -> ModelFacts:
    ends = tuple(tokenizer.special[token] for token in ("<|endofturn|>", "<|stop|>"))
    return ModelFacts(CONTEXT, ends, im_end_id=tokenizer.special[IM_END], vision=vision)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(facts: ModelFacts) -> AsyncIterator[MediaReader]:
    assert facts.vision is not None
    decoders = DecoderPool(LIMITS, facts.vision)
    reader = MediaReader(LIMITS, facts.vision, fetcher=Fetcher(LIMITS), decoders=decoders)
    await reader.start()
    yield reader
    await reader.stop()


@pytest.fixture(scope="module")
def preparer(tokenizer: Tokenizer, facts: ModelFacts, reader: MediaReader) -> Iterator[Preparer]:
    template = ChatTemplate(
        tokenizer, template=LIST_TEMPLATE, revision_layout="main", vision=facts.vision
    )
    preparer = Preparer(
        tokenizer, template, facts=facts, limits=LIMITS, media=reader, prover=PROVER
    )
    yield preparer
    preparer.close()


async def prepare(preparer: Preparer, messages: Any, **fields: Any) -> Prepared:
    request = ChatRequest(messages, **fields)
    return await preparer.prepare(request, request_id="r1", tenant="t1")


async def refusal(preparer: Preparer, messages: Any, **fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        await prepare(preparer, messages, **fields)
    return caught.value.code, caught.value.param


async def test_text(preparer: Preparer, tokenizer: Tokenizer) -> None:
    prepared = await prepare(preparer, [{"role": "user", "content": "안녕"}], stop=("\n",))
    request = prepared.request
    assert (request.request_id, request.tenant) == ("r1", "t1")
    assert "안녕" in tokenizer.decode(request.prompt_ids)
    assert (request.vision, request.vision_starts, prepared.tiles) == ((), (), ())
    assert prepared.stop == ("\n",)
    assert prepared.usage.prompt_tokens == prepared.usage.text_tokens == len(request.prompt_ids)


async def test_every_medium_gets_its_placeholders(preparer: Preparer, tokenizer: Tokenizer) -> None:
    image, video = tokenizer.special[IMAGE], tokenizer.special[VIDEO]
    content = [picture(RED), text("and"), clip(3), picture(GREEN), text("What?")]
    prepared = await prepare(preparer, user(*content))
    request = prepared.request

    assert [medium.kind for medium in request.vision] == ["image", "video", "image"]
    # 2x2 tiles of 2x2 features: 4 + 4 * (4 + 1); slow, fast, fast; 2x1 tiles, a third of it kept.
    assert [medium.num_tokens for medium in request.vision] == [24, 6, 4 + 4 * 3]
    for medium, start in zip(request.vision, request.vision_starts, strict=True):
        expected = image if medium.kind == "image" else video
        placed = request.prompt_ids[start : start + medium.num_tokens]
        assert placed == (expected,) * medium.num_tokens
        assert request.prompt_ids[start - 1] != expected
        assert request.prompt_ids[start + medium.num_tokens] == tokenizer.special[IM_END]
    assert request.prompt_ids.count(image) == 24 + 16
    assert request.prompt_ids.count(video) == 6

    assert [len(tiles) for tiles in prepared.tiles] == [5, 3, 3]
    assert all(tiles.dtype == np.uint8 for tiles in prepared.tiles)
    assert prepared.tiles[0][0, 14, 14].tolist() == [200, 30, 30]
    assert prepared.tiles[2][0, 14, 14].tolist() == [30, 200, 30]
    usage = prepared.usage
    assert (usage.image_tokens, usage.video_tokens) == (40, 6)
    assert usage.prompt_tokens == len(request.prompt_ids)


async def test_low_detail_is_the_thumbnail(preparer: Preparer) -> None:
    part = {"type": "image_url", "image_url": {"url": RED, "detail": "low"}}
    prepared = await prepare(preparer, user(part))
    assert prepared.usage.image_tokens == 4 + 1
    assert [len(tiles) for tiles in prepared.tiles] == [1]


async def test_the_same_picture_has_the_same_digest(preparer: Preparer) -> None:
    prepared = await prepare(preparer, user(picture(RED), picture(GREEN), picture(RED)))
    first, second, third = (medium.digest for medium in prepared.request.vision)
    assert first == third != second


async def test_placeholders_in_text_are_text(preparer: Preparer, tokenizer: Tokenizer) -> None:
    words = f"{IMAGE}{VIDEO}{IM_END}"
    prepared = await prepare(preparer, user(text(words), picture(), text(words)))
    ids = prepared.request.prompt_ids
    assert ids.count(tokenizer.special[IMAGE]) == prepared.usage.image_tokens == 24
    assert ids.count(tokenizer.special[VIDEO]) == 0
    assert tokenizer.decode(ids).count(words) == 2
    assert ids[prepared.request.vision_starts[0]] == tokenizer.special[IMAGE]


async def test_a_video_without_a_token_of_its_own(
    tokenizer: Tokenizer, facts: ModelFacts, reader: MediaReader
) -> None:
    assert facts.vision is not None
    spec = replace(facts.vision, video_token_id=None)
    template = ChatTemplate(
        tokenizer, template=DICT_TEMPLATE, revision_layout="v0.1.0", vision=spec
    )
    facts = replace(facts, vision=spec)
    preparer = Preparer(
        tokenizer, template, facts=facts, limits=LIMITS, media=reader, prover=PROVER
    )
    prepared = await prepare(preparer, user(clip(2), picture(RED), text("x")))
    assert [medium.kind for medium in prepared.request.vision] == ["video", "image"]
    assert (prepared.usage.video_tokens, prepared.usage.image_tokens) == (5, 24)
    assert prepared.request.prompt_ids.count(tokenizer.special[IMAGE]) == 29
    preparer.close()


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ([picture("https://127.0.0.1/a.png")], "invalid_image_url", "content[0].image"),
        ([clip(1) | {"video": "/etc/passwd"}], "invalid_video_url", "content[0].video"),
        ([picture("!!!!")], "invalid_base64_image", "content[0].image"),
        ([picture("AAAA")], "unsupported_image_media_type", "content[0].image"),
        (
            [clip(1), clip(1) | {"video": "AAAA"}],
            "unsupported_video_media_type",
            "content[1].video",
        ),
        (
            [picture(), {"type": "image_url", "image_url": {"url": RED[:-40]}}],
            "image_parse_error",
            "content[1].image_url.url",
        ),
    ],
)
async def test_faults_of_media_name_their_place(
    preparer: Preparer, content: list[Any], code: str, param: str
) -> None:
    assert await refusal(preparer, user(*content)) == (code, f"messages[0].{param}")


async def test_media_bytes_of_a_request_are_limited(preparer: Preparer) -> None:
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)  # 2.7 kB as PNG
    )
    file = io.BytesIO()
    noise.save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    await prepare(preparer, user(picture(source)))
    code, param = await refusal(preparer, user(picture(source), picture(source)))
    assert code == "image_file_too_large"
    # They are read side by side: it is the one that came last.
    assert param in ("messages[0].content[0].image", "messages[0].content[1].image")


async def test_a_text_model_takes_no_pictures(tokenizer: Tokenizer, facts: ModelFacts) -> None:
    template = ChatTemplate(tokenizer, template=STRING_TEMPLATE, revision_layout="text")
    facts = replace(facts, vision=None)
    preparer = Preparer(tokenizer, template, facts=facts, limits=LIMITS, media=None, prover=PROVER)
    assert (await prepare(preparer, user(text("x")))).usage.text_tokens > 0
    for part in (picture(), clip()):
        code = await refusal(preparer, user(text("x"), part))
        assert code == ("unsupported_parameter", "messages[0].content[1]")
    preparer.close()


async def test_options_must_make_sense_where_there_are_no_media_too(
    preparer: Preparer, tokenizer: Tokenizer, facts: ModelFacts
) -> None:
    options = MediaOptions(max_grids=9_999)
    code = await refusal(preparer, user(text("x")), media_options=options)
    assert code == ("invalid_value", "media_options.max_grids")
    template = ChatTemplate(tokenizer, template=STRING_TEMPLATE, revision_layout="text")
    facts = replace(facts, vision=None)
    text_only = Preparer(tokenizer, template, facts=facts, limits=LIMITS, media=None, prover=PROVER)
    for said in ({"media_options": MediaOptions(fps=1.0)}, {"visual_token_budget": 5}):
        code = await refusal(text_only, user(text("x")), **said)
        assert code == ("unsupported_parameter", "media_options")
    text_only.close()


async def test_the_answer_gets_what_is_left(preparer: Preparer) -> None:
    messages = user(picture(), text("x"))
    prepared = await prepare(preparer, messages)
    num_prompt_tokens = prepared.usage.prompt_tokens
    left = CONTEXT - num_prompt_tokens
    assert prepared.request.sampling.max_tokens == left
    assert (await prepare(preparer, messages, max_tokens=left)).request.sampling.max_tokens == left
    with pytest.raises(PromptTooLong) as caught:
        await prepare(preparer, messages, max_tokens=left + 1)
    for number in (CONTEXT, num_prompt_tokens, left + 1, CONTEXT + 1):
        assert str(number) in caught.value.message
    assert caught.value.param == "messages"


async def test_a_prompt_that_fills_the_context_leaves_no_answer(preparer: Preparer) -> None:
    used = (await prepare(preparer, user(text("x")))).usage.prompt_tokens
    room = CONTEXT - used
    prepared = await prepare(preparer, user(text("x" + "\x00" * (room - 1))))
    assert prepared.request.sampling.max_tokens == 1
    code = await refusal(preparer, user(text("x" + "\x00" * room)))
    assert code == ("context_length_exceeded", "messages")


async def test_a_prompt_too_long_without_its_pictures_saves_their_decoding(
    preparer: Preparer,
) -> None:
    code = await refusal(preparer, user(*[picture("AAAA")] * 16, text("x")))
    assert code == ("context_length_exceeded", "messages")


async def test_hopelessly_long_text_is_never_encoded(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(ChatTemplate, "encode", fail)
    half = "한" * (CONTEXT * 16 // 3 // 2 + 1)
    with pytest.raises(AssertionError, match="encoded"):
        await prepare(preparer, user(text(half)))
    messages = [*user(text(half)), *user(picture(ocr=half))]
    code = await refusal(preparer, messages)
    assert code == ("context_length_exceeded", "messages[1].content")


async def test_an_echo_is_the_text_of_the_last_message(preparer: Preparer) -> None:
    said = {"role": "assistant", "content": [text(" A red "), text("circle ")]}
    conversation = [*user(text("x")), said]
    for fields in ({"ending": "open"}, {"ending": "none"}, {}):
        echoing = await prepare(preparer, conversation, is_echoing=True, **fields)
        silent = await prepare(preparer, conversation, **fields)
        assert (echoing.echo, silent.echo) == (" A red \ncircle ", "")
        assert echoing.request.prompt_ids == silent.request.prompt_ids
    own = await prepare(preparer, user(text("You")), is_echoing=True, ending="open")
    assert own.echo == "You"
    for ending in ("assistant", "none"):
        refused = await refusal(preparer, user(text("You")), is_echoing=True, ending=ending)
        assert refused == ("invalid_value", "echo")


async def test_a_conversation_is_counted_with_its_media(preparer: Preparer) -> None:
    messages = user(picture(RED), text("and"), clip(3), text("What?"))
    for ending in ("assistant", "none", "open"):
        request = ChatRequest(messages, ending=ending)
        counted = await preparer.encode_messages(request, tenant="t1")
        prepared = await prepare(preparer, messages, ending=ending)
        assert counted.ids == prepared.request.prompt_ids
    assert prepared.usage.image_tokens > 0 and prepared.usage.video_tokens > 0
    long = user(text("x " * CONTEXT), picture(RED))
    counted = await preparer.encode_messages(ChatRequest(long), tenant="t1")
    assert len(counted.ids) > CONTEXT


NEUTRAL = SamplingParams(max_tokens=1)
CHECKPOINT = SamplingDefaults(temperature=0.5, top_p=0.6, top_k=7, repetition_penalty=1.1)
ASKED: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
}


@pytest.mark.parametrize("name", ASKED)
async def test_the_request_comes_before_the_checkpoint_before_neutral(
    tokenizer: Tokenizer, preparer: Preparer, facts: ModelFacts, name: str
) -> None:
    template = ChatTemplate(tokenizer, template=STRING_TEMPLATE, revision_layout="text")
    with_defaults = Preparer(
        tokenizer,
        template,
        facts=replace(facts, defaults=CHECKPOINT),
        limits=LIMITS,
        media=None,
        prover=PROVER,
    )

    async def value(preparer: Preparer, **fields: Any) -> Any:
        prepared = await prepare(preparer, user(text("x")), max_tokens=1, **fields)
        return getattr(prepared.request.sampling, name)

    assert await value(preparer) == getattr(NEUTRAL, name)
    assert await value(with_defaults) == getattr(CHECKPOINT, name)
    assert await value(with_defaults, **{name: ASKED[name]}) == ASKED[name]
    with_defaults.close()


async def test_ends(preparer: Preparer, facts: ModelFacts) -> None:
    prepared = await prepare(preparer, user(text("x")), seed=7)
    assert prepared.request.sampling.stop_token_ids == (*facts.stop_token_ids, facts.im_end_id)
    assert prepared.request.sampling.seed == 7
    prepared = await prepare(preparer, user(text("x")), ignore_eos=True, stop=("a",))
    assert prepared.request.sampling.stop_token_ids == ()
    assert prepared.stop == ("a",)


async def test_the_callers_own_ends_are_never_ignored(
    preparer: Preparer, facts: ModelFacts
) -> None:
    """Though one of them be the model's own."""
    own = facts.stop_token_ids[-1]
    for asked in ((7,), (7, own), (facts.im_end_id, 7)):
        fields: dict[str, Any] = {"stop_token_ids": asked}
        prepared = await prepare(preparer, user(text("x")), ignore_eos=True, **fields)
        assert prepared.request.sampling.stop_token_ids == asked
        prepared = await prepare(preparer, user(text("x")), **fields)
        ends = {*asked, *facts.stop_token_ids, facts.im_end_id}
        assert sorted(prepared.request.sampling.stop_token_ids) == sorted(ends)
