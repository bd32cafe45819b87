import math

import msgspec
import numpy as np
import pytest

from server.core import TokenEvent, TokenLogprobs
from server.engine.facts import EngineStats, EngineTotals
from server.engine.messages import (
    Abort,
    FromEngine,
    Joined,
    LoadFailed,
    Loading,
    Progress,
    Ready,
    Start,
    Stop,
    Submit,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
    submit_frames,
    tiles_of,
)
from tests.engine.samples import FACTS, PICTURE, VIDEO, make_request, make_tiles

START = Start(
    checkpoint="/models/한국어",
    device="cpu",
    dtype="auto",
    attention="auto",
    max_context=None,
    num_threads=2,
    block_size=64,
    kv_cache_bytes=1 << 40,
    encoder_cache_bytes=1 << 28,
    max_requests_running=256,
    max_tokens_per_step=512,
)


LOGPROBS = TokenLogprobs(7, -0.25, ((7, -0.25), (2, -math.inf)))


@pytest.mark.parametrize("message", [START, Abort("r"), Abort("r", 3), Stop()])
def test_messages_to_the_engine_arrive_as_they_were(message: ToEngine) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Loading(1, 2),
        LoadFailed("one line", is_config=True),
        Ready(FACTS),
        Joined(("a", "b")),
        Progress(),
        Progress((TokenEvent("r", 7), TokenEvent("r", None, "error", "internal_error"))),
        Progress((TokenEvent("r", 7, choice=3, logprobs=LOGPROBS),)),
        Progress((TokenEvent("r", 7, "stop", prompt_logprobs=(None, LOGPROBS)),)),
        Progress((), EngineStats(num_running=1, totals=EngineTotals(num_steps=2, steps_s=0.5))),
    ],
)
def test_messages_from_the_engine_arrive_as_they_were(message: FromEngine) -> None:
    assert decode_from_engine(encode(message)) == message


def test_a_request_arrives_with_its_pixels() -> None:
    request = make_request(prompt=(1, PICTURE, 2, VIDEO), seed=-(2**62), stop=(3,), priority=-7)
    tiles = make_tiles(request)
    head, *frames = submit_frames(request, tiles)
    message = decode_to_engine(bytes(head))
    assert isinstance(message, Submit) and message.request == request
    for sent, received in zip(tiles, tiles_of(message, frames), strict=True):
        np.testing.assert_array_equal(sent, received)


def test_pixels_that_are_not_contiguous_arrive_too() -> None:
    request = make_request(prompt=(1, PICTURE))
    mirrored = make_tiles(request)[0][:, :, ::-1]
    head, frame = submit_frames(request, [mirrored])
    message = decode_to_engine(bytes(head))
    assert isinstance(message, Submit)
    np.testing.assert_array_equal(tiles_of(message, [frame])[0], mirrored)


@pytest.mark.parametrize("frame", [b"", b"\x00", encode(Progress()), encode(Abort("r"))[:-1]])
def test_what_is_not_a_message_is_refused(frame: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_to_engine(frame)
