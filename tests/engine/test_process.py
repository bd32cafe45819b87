import pytest

from server.config import environment_with
from server.engine.process import CRASH_WINDOW_S, ENVIRONMENT, RestartPolicy


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_pauses_double_and_the_fifth_crash_is_the_last() -> None:
    policy = RestartPolicy(max_delay_s=30, clock=Clock())
    assert [policy.delay_after_crash() for _ in range(5)] == [1, 2, 4, 8, None]


def test_a_pause_is_never_longer_than_the_longest() -> None:
    policy = RestartPolicy(max_delay_s=3, clock=Clock())
    assert [policy.delay_after_crash() for _ in range(4)] == [1, 2, 3, 3]


def test_crashes_of_long_ago_do_not_count() -> None:
    clock = Clock()
    policy = RestartPolicy(max_delay_s=30, clock=clock)
    for _ in range(20):
        assert policy.delay_after_crash() == 1
        clock.now_s += CRASH_WINDOW_S


def test_a_child_gets_what_the_environment_does_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    environment = environment_with(ENVIRONMENT)
    assert environment["GOMP_SPINCOUNT"] == "7"
    assert environment["GLIBC_TUNABLES"] == ENVIRONMENT["GLIBC_TUNABLES"]
