from __future__ import annotations

from dataclasses import replace

from server.engine.quarantine import KEPT_S, MAX_KEPT, Quarantine
from tests.engine.samples import make_request


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_met_two_crashes_is_barred_for_a_while() -> None:
    clock = Clock()
    quarantine = Quarantine(clock=clock)
    request, other = make_request("a", prompt=(1, 2)), make_request("b", prompt=(1, 3))
    quarantine.meet_crash([request, other])
    assert not quarantine.is_barred(request)
    clock.now_s = 100.0
    quarantine.meet_crash([request])
    assert quarantine.is_barred(request) and not quarantine.is_barred(other)
    quarantine.bar(make_request("c", prompt=(7,)))
    assert quarantine.is_barred(make_request("d", prompt=(7,)))
    clock.now_s = KEPT_S + 1
    assert not quarantine.is_barred(request)  # the first crash is forgotten
    quarantine.meet_crash([request])
    assert quarantine.is_barred(request)


def test_it_is_the_same_whoever_sends_it() -> None:
    quarantine = Quarantine()
    request = make_request("a", prompt=(1, 2))
    for name, seed in (("a", 1), ("b", None)):
        sampling = replace(request.sampling, seed=seed)
        quarantine.meet_crash([replace(request, request_id=name, tenant=name, sampling=sampling)])
    assert quarantine.is_barred(replace(request, request_id="c", cache_salt="x", priority=1))
    assert not quarantine.is_barred(replace(request, grammar="x"))
    assert not quarantine.is_barred(replace(request, prompt_ids=(1, 2, 3)))


def test_alike_requests_of_one_crash_count_once_and_memory_is_bounded() -> None:
    quarantine = Quarantine()
    twins = [make_request("a", prompt=(1,)), make_request("b", prompt=(1,))]
    quarantine.meet_crash(twins)
    assert not quarantine.is_barred(twins[0])
    quarantine.meet_crash(twins)
    assert quarantine.is_barred(twins[0])
    quarantine.meet_crash([make_request(prompt=(2, i)) for i in range(MAX_KEPT)])
    assert not quarantine.is_barred(twins[0])
