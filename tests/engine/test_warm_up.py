"""The step's budget follows the device's speed, with a clock that only the work moves."""

from __future__ import annotations

import pytest

from server.engine.blocks import BlockPool
from server.engine.sequence import Batch, SpanOutput
from server.engine.warm_up import MAX_TOKENS_PER_STEP, MIN_TOKENS_BESIDE_ANSWERS, WarmUp, warm_up
from server.errors import CheckpointError, ConfigError
from tests.engine.samples import SPEC


class TimedRunner:
    """Takes `token_s` for a token and `tile_s` for a tile, and `fixed_s` for any step."""

    def __init__(self, *, token_s: float, tile_s: float = 0.0, fixed_s: float = 0.001) -> None:
        self.now_s = 0.0
        self.error_code: str | None = None
        self._costs = token_s, tile_s, fixed_s

    def run(self, batch: Batch) -> list[SpanOutput]:
        token_s, tile_s, fixed_s = self._costs
        num_tiles = sum(len(piece) for piece in batch.vision)
        self.now_s += fixed_s + token_s * batch.num_tokens + tile_s * num_tiles
        return [
            SpanOutput(token_id=7, error_code=self.error_code) if span.is_sampled else SpanOutput()
            for span in batch.spans
        ]


def measure(
    runner: TimedRunner,
    *,
    num_blocks: int = 64,
    max_tokens: int | None = None,
    has_vision: bool = True,
) -> WarmUp:
    pool = BlockPool(num_blocks=num_blocks, block_size=64)
    spec = SPEC if has_vision else None
    measured = warm_up(runner, pool, vision=spec, max_tokens=max_tokens, clock=lambda: runner.now_s)
    assert pool.num_free == num_blocks
    return measured


@pytest.mark.parametrize(
    ("token_s", "fitting"),
    [(1e-6, MAX_TOKENS_PER_STEP), (0.002, 500), (0.02, 50), (0.5, 16)],
    ids=["fast", "middling", "slow", "hopeless"],
)
def test_tokens_fit_the_target(token_s: float, fitting: int) -> None:
    budget = measure(TimedRunner(token_s=token_s)).budget
    assert budget.max_tokens == pytest.approx(fitting, rel=0.1)


@pytest.mark.parametrize("tile_s", [1e-4, 0.3, 8.0])
def test_a_tile_is_priced_by_its_time(tile_s: float) -> None:
    measured = measure(TimedRunner(token_s=1e-4, tile_s=tile_s))
    assert measured.budget.tokens_per_tile == pytest.approx(tile_s / 1e-4, rel=0.2, abs=20)
    assert measured.slowest_s >= tile_s


@pytest.mark.parametrize(
    ("fixed_s", "fitting"), [(0.1, 1000), (0.0001, MIN_TOKENS_BESIDE_ANSWERS)], ids=str
)
def test_beside_answers_fits_what_takes_as_long_as_they(fixed_s: float, fitting: int) -> None:
    budget = measure(TimedRunner(token_s=1e-4, fixed_s=fixed_s)).budget
    assert budget.max_tokens_beside_answers == pytest.approx(fitting, rel=0.6)


def test_a_fixed_cost_does_not_pass_for_slow_tokens() -> None:
    budget = measure(TimedRunner(token_s=1e-5, fixed_s=0.02)).budget
    assert budget.max_tokens > 1000


def test_an_explicit_setting_is_taken_as_it_is() -> None:
    budget = measure(TimedRunner(token_s=0.5), max_tokens=300).budget
    assert budget.max_tokens == 300


def test_a_small_cache_bounds_the_probes() -> None:
    budget = measure(TimedRunner(token_s=0.001), num_blocks=1, has_vision=False).budget
    assert budget.max_tokens == pytest.approx(970, rel=0.1)
    assert budget.tokens_per_tile == 1


def test_a_cache_smaller_than_one_tile_is_one_line() -> None:
    pool = BlockPool(num_blocks=1, block_size=SPEC.image_queries)
    runner = TimedRunner(token_s=0.001)
    with pytest.raises(ConfigError, match=r"model\.max_context"):
        warm_up(runner, pool, vision=SPEC, max_tokens=None, clock=lambda: runner.now_s)


def test_unusable_logits_stop_the_start() -> None:
    runner = TimedRunner(token_s=0.001)
    runner.error_code = "internal_error"
    with pytest.raises(CheckpointError, match="no usable logits"):
        measure(runner)
