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


def test_what_was_let_go_is_found_by_its_key_until_its_room_is_needed() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    table = pool.allocate(3)
    for block_id, key in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.name(block_id, key)
    pool.free(table)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 3, 0)
    assert pool.find([b"a", b"b", b"x", b"c"]) == table[:2]

    pool.share(table[:1])
    pool.check([table[:1]])
    assert pool.num_cached == 2
    taken = pool.allocate(1)  # the end of the prefix goes first
    assert taken == table[2:]
    pool.check([table[:1], taken])
    assert pool.find([b"a", b"b", b"c"]) == table[:2]


def test_a_held_block_is_shared_and_goes_back_with_its_last_holder() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    table = pool.allocate(1)
    pool.name(table[0], b"a")
    pool.share(table)
    pool.check([table, table])
    pool.free(table)
    assert (pool.num_used, pool.num_cached) == (1, 0)
    pool.free(table)
    assert (pool.num_used, pool.num_cached) == (0, 1)


def test_of_two_blocks_with_one_key_the_first_is_found() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.free([first, second])
    pool.check([])
    assert pool.num_cached == 1


def test_only_a_block_with_a_key_is_shared_and_only_a_held_one_named() -> None:
    pool = BlockPool(num_blocks=1, block_size=4)
    with pytest.raises(ValueError, match="no key"):
        pool.share([0])
    with pytest.raises(ValueError, match="not held"):
        pool.name(0, b"a")
