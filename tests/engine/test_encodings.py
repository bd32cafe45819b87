"""Encodings are shared while held, kept while there is room, and counted to the byte."""

from __future__ import annotations

import pytest

from server.core import VisionInput, VisionLayout
from server.engine.encodings import EncoderCache

OWNER = ("t", "")


def picture(name: str, num_tokens: int = 10) -> VisionInput:
    return VisionInput("image", VisionLayout((num_tokens,)), digest=name)


def encode(cache: EncoderCache, name: str, *, tenant: str = "t", num_tokens: int = 10) -> None:
    encoding = cache.acquire((tenant, ""), picture(name, num_tokens))
    encoding.num_stages_encoded = 1
    cache.release(encoding)


def test_who_shows_the_same_shares_it_before_and_after_it_is_complete() -> None:
    cache = EncoderCache(max_bytes=1000, bytes_per_token=2)
    first = cache.acquire(OWNER, picture("a"))
    assert cache.acquire(OWNER, picture("a")) is first
    assert cache.num_bytes == cache.held_bytes == 20
    cache.check([first, first])
    first.num_stages_encoded = 1
    cache.release(first)
    cache.release(first)
    cache.check([])
    assert (cache.num_bytes, cache.held_bytes) == (20, 0)
    assert cache.acquire(OWNER, picture("a")) is first


def test_owners_share_nothing() -> None:
    cache = EncoderCache(max_bytes=1000, bytes_per_token=1)
    owners = [("a", ""), ("b", ""), ("a", "b"), ("", "ab"), ("ab", "")]
    encodings = [cache.acquire(owner, picture("x")) for owner in owners]
    assert len({id(encoding) for encoding in encodings}) == len(owners)


def test_what_is_not_complete_is_not_kept() -> None:
    cache = EncoderCache(max_bytes=1000, bytes_per_token=1)
    cache.release(cache.acquire(OWNER, picture("a")))
    assert cache.num_bytes == 0


def test_the_one_used_longest_ago_makes_room() -> None:
    cache = EncoderCache(max_bytes=30, bytes_per_token=1)
    for name in "abc":
        encode(cache, name)
    encode(cache, "a")  # used again
    encode(cache, "d")
    assert cache.num_bytes == 30
    complete = {
        name for name in "acd" if (e := cache.acquire(OWNER, picture(name))) and e.is_complete
    }
    assert complete == {"a", "c", "d"}
    assert not cache.acquire(OWNER, picture("b")).is_complete


def test_held_ones_push_out_kept_ones_and_leave_no_room_for_more() -> None:
    cache = EncoderCache(max_bytes=30, bytes_per_token=1)
    encode(cache, "kept")
    large = cache.acquire(OWNER, picture("large", 25))
    assert cache.num_bytes == 25
    assert not cache.has_room(OWNER, [picture("other", 10)])
    assert cache.has_room(OWNER, [picture("other", 5)])
    assert cache.has_room(OWNER, [picture("large", 25)])
    cache.check([large])


def test_the_first_may_be_larger_than_all_room() -> None:
    cache = EncoderCache(max_bytes=30, bytes_per_token=1)
    assert cache.has_room(OWNER, [picture("huge", 1000)])
    encode(cache, "huge", num_tokens=1000)
    assert cache.num_bytes == 0


def test_letting_go_twice_is_an_error() -> None:
    cache = EncoderCache(max_bytes=30, bytes_per_token=1)
    encoding = cache.acquire(OWNER, picture("a"))
    cache.release(encoding)
    with pytest.raises(ValueError, match="not held"):
        cache.release(encoding)


def test_check_finds_a_holder_too_many() -> None:
    cache = EncoderCache(max_bytes=30, bytes_per_token=1)
    cache.acquire(OWNER, picture("a"))
    with pytest.raises(RuntimeError, match="counted wrongly"):
        cache.check([])
