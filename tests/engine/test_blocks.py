import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.blocks import BlockPool


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=30),
)
def test_blocks_are_free_or_held_by_one(num_blocks: int, actions: list[tuple[bool, int]]) -> None:
    pool = BlockPool(num_blocks=num_blocks, block_size=4)
    tables: list[list[int]] = []
    for is_allocation, number in actions:
        if is_allocation and number <= pool.num_free:
            tables.append(pool.allocate(number))
        elif tables and not is_allocation:
            pool.free(tables.pop(number % len(tables)))
        pool.check(tables)
        assert pool.num_used == sum(map(len, tables))
        held = [block_id for table in tables for block_id in table]
        assert len(held) == len(set(held))
    for table in tables:
        pool.free(table)
    assert pool.num_free == num_blocks


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(ValueError, match="not held"):
        pool.free(table)


def test_check_finds_a_leaked_and_a_doubly_held_block() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    table = pool.allocate(1)
    with pytest.raises(RuntimeError, match="1 counted, 0 hold it"):
        pool.check([])
    with pytest.raises(RuntimeError, match="1 counted, 2 hold it"):
        pool.check([table, table])


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_the_last_block_may_be_partly_used(num_tokens: int, blocks: int) -> None:
    assert BlockPool(num_blocks=9, block_size=4).blocks_for(num_tokens) == blocks
