from dataclasses import replace

import pytest

from server.core import GenerationRequest
from server.engine.validation import check_request
from server.errors import InvalidPrompt, InvalidRequest, PromptTooLong
from tests.engine.samples import (
    FACTS,
    IMAGE_ID,
    PICTURE,
    SPEC,
    VIDEO,
    VIDEO_ID,
    make_request,
    make_tiles,
)

GOOD = make_request(prompt=(1, PICTURE, 2, VIDEO, VIDEO, 3))


def check(request: GenerationRequest) -> None:
    check_request(request, make_tiles(request), facts=FACTS, vision=SPEC)


def test_what_can_be_computed_passes() -> None:
    check(GOOD)
    check(make_request(prompt=(0, FACTS.logits_width - 1), max_tokens=254))


@pytest.mark.parametrize("prompt", [(1, -1), (FACTS.logits_width,), (2**40,)])
def test_ids_the_model_does_not_have_are_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPrompt, match="token id"):
        check(make_request(prompt=prompt))


def test_ids_are_checked_against_the_embedding_too() -> None:
    facts = replace(FACTS, embedding_rows=10)
    with pytest.raises(InvalidPrompt, match="token id"):
        check_request(make_request(prompt=(10,)), [], facts=facts, vision=None)


def test_an_empty_prompt_and_an_empty_answer_are_refused() -> None:
    with pytest.raises(InvalidPrompt, match="empty"):
        check(make_request(prompt=()))
    with pytest.raises(InvalidRequest, match="at least one token"):
        check(make_request(max_tokens=0))


def test_what_follows_a_grammar_must_be_able_to_end() -> None:
    check(replace(make_request(stop=(1,)), grammar="a grammar"))
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        check(replace(make_request(), grammar="a grammar"))


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
@pytest.mark.parametrize("token_id", [-1, FACTS.logits_width, 2**62])
def test_ids_that_would_index_the_logits_are_checked(name: str, token_id: int) -> None:
    ids = ((token_id, 1.0),) if name == "logit_bias" else (token_id,)
    good = make_request()
    with pytest.raises(InvalidRequest) as raised:
        check(replace(good, sampling=replace(good.sampling, **{name: ids})))
    assert raised.value.param == name


def test_prompt_and_answer_together_must_fit() -> None:
    check(make_request(prompt=(1,) * 200, max_tokens=56))
    with pytest.raises(PromptTooLong, match="256 tokens"):
        check(make_request(prompt=(1,) * 200, max_tokens=57))


@pytest.mark.parametrize(
    "request_",
    [
        make_request(prompt=(1, IMAGE_ID, 2)),  # a place without a medium
        make_request(prompt=(1, PICTURE, IMAGE_ID)),  # one place too many
        make_request(prompt=(1, PICTURE, VIDEO_ID)),
        replace(GOOD, vision_starts=(2, *GOOD.vision_starts[1:])),  # shifted
        replace(GOOD, vision_starts=(-1, *GOOD.vision_starts[1:])),
        replace(GOOD, vision_starts=(1, 1, 1)),  # one on top of the other
        replace(GOOD, vision_starts=GOOD.vision_starts[:2]),
        replace(GOOD, vision=(VIDEO, *GOOD.vision[1:])),  # the wrong kind
        replace(GOOD, prompt_ids=GOOD.prompt_ids[:-2]),  # cut off inside a medium
    ],
)
def test_media_and_their_places_must_agree(request_: GenerationRequest) -> None:
    with pytest.raises(InvalidPrompt):
        check(request_)


def test_tiles_must_be_those_the_layout_promises() -> None:
    tiles = make_tiles(GOOD)
    for wrong in ([*tiles[:-1], tiles[-1][:-1]], tiles[:-1], [*tiles[:-1], tiles[-1][:, :2]]):
        with pytest.raises(InvalidPrompt):
            check_request(GOOD, wrong, facts=FACTS, vision=SPEC)


def test_a_text_model_takes_no_media() -> None:
    with pytest.raises(InvalidPrompt, match="no pictures"):
        check_request(GOOD, make_tiles(GOOD), facts=FACTS, vision=None)
