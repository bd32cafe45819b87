"""Both caches: bounds, order, age, keys that keep tenants apart, and disks that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.media.cache import ENTRY_BYTES, DiskCache, MediaCache, cache_key

REPOSITORY = Path(__file__).parents[2]
FIELDS = st.lists(st.binary(max_size=4) | st.text(max_size=4), max_size=4)


def key(number: int) -> str:
    return cache_key(str(number))


@given(one=FIELDS, other=FIELDS)
def test_different_fields_have_different_keys(
    one: list[bytes | str], other: list[bytes | str]
) -> None:
    assert (cache_key(*one) == cache_key(*other)) is (one == other)


def test_keys_are_plain_and_differ_by_secret() -> None:
    assert (
        cache_key("a")
        == cache_key("a")
        != cache_key("a", secret=b"s")
        != cache_key("a", secret=b"t")
    )
    assert len(cache_key("\ud800")) == 64
    assert cache_key("ab", "c") != cache_key("a", "bc") != cache_key("abc")
    assert cache_key("a") != cache_key(b"a")


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["get", "put", "remove"]), st.integers(0, 4), st.integers(0, 900))
    )
)
def test_memory_against_a_plain_model(steps: list[tuple[str, int, int]]) -> None:
    max_bytes = 3 * ENTRY_BYTES
    cache: MediaCache[int] = MediaCache(max_bytes, 10)
    model: dict[str, tuple[int, int]] = {}  # in the order of use
    for action, number, num_bytes in steps:
        name = key(number)
        if action == "get":
            expected = model.get(name)
            assert cache.get(name) == (None if expected is None else expected[0])
            if expected is not None:
                model[name] = model.pop(name)
        elif action == "remove":
            cache.remove(name)
            model.pop(name, None)
        else:
            cache.put(name, num_bytes, num_bytes)
            model.pop(name, None)
            if num_bytes + ENTRY_BYTES <= max_bytes:
                model[name] = (num_bytes, num_bytes + ENTRY_BYTES)
                while sum(size for _, size in model.values()) > max_bytes:
                    del model[next(iter(model))]
        assert len(cache) == len(model)
        assert cache.num_bytes == sum(size for _, size in model.values()) <= max_bytes


def test_memory_forgets_what_is_too_old() -> None:
    times = [0.0]
    cache: MediaCache[str] = MediaCache(10_000, 5, clock=lambda: times[0])
    cache.put("a", "old", 1)
    times[0] = 4.9
    cache.put("b", "young", 1)
    assert cache.get("a") == "old"
    times[0] = 5.0
    assert (cache.get("a"), cache.get("b")) == (None, "young")
    assert len(cache) == 1


def test_a_memory_of_nothing() -> None:
    cache: MediaCache[str] = MediaCache(0, 5)
    cache.put("a", "x", 0)
    assert cache.get("a") is None and cache.num_bytes == 0


def test_the_disk_keeps_bytes_for_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    cache = DiskCache(folder, 10_000, 60)
    cache.put(key(1), b"one")
    cache.put(key(2), b"")
    cache.put(key(1), b"uno")
    for each in (cache, DiskCache(folder, 10_000, 60)):
        assert [each.get(key(number)) for number in (1, 2, 3)] == [b"uno", b"", None]
    cache.remove(key(1))
    assert cache.get(key(1)) is None
    assert len(list(folder.iterdir())) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())


def test_the_disk_is_bounded_and_forgets_the_least_recently_used(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3_300, 60)
    for number in range(3):
        cache.put(key(number), bytes(1_000))
    assert cache.get(key(0)) is not None
    cache.put(key(3), bytes(1_000))
    assert [cache.get(key(number)) is None for number in range(4)] == [False, True, False, False]
    cache.put(key(4), bytes(4_000))  # fits nowhere
    assert cache.get(key(4)) is None
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3_300
    for number, age_s in [(0, 10), (2, 30), (3, 20)]:
        file = tmp_path / f"{key(number)}.media"
        os.utime(file, (file.stat().st_atime - age_s, file.stat().st_mtime - age_s))
    smaller = DiskCache(tmp_path, 2_200, 60)
    assert [smaller.get(key(number)) is None for number in (0, 2, 3)] == [False, True, False]


@pytest.mark.parametrize("later_s", [61, -1])
def test_the_disk_uses_nothing_old_nor_from_the_future(tmp_path: Path, later_s: float) -> None:
    times = [1_000_000.0]
    cache = DiskCache(tmp_path, 10_000, 60, clock=lambda: times[0])
    cache.put(key(1), b"one")
    times[0] += later_s
    assert cache.get(key(1)) is None
    assert list(tmp_path.iterdir()) == [] and cache.is_on


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


@pytest.mark.parametrize(
    "spoil",
    [
        damage(lambda data: b""),
        damage(lambda data: data[:20]),
        damage(lambda data: data[:-1]),
        damage(lambda data: data + b"x"),
        damage(lambda data: data[:-1] + b"x"),
        damage(lambda data: b"x" + data[1:]),
        lambda file: file.unlink(),
    ],
)
def test_a_damaged_file_is_removed_and_nothing_else(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    cache = DiskCache(tmp_path, 10_000, 60)
    cache.put(key(1), b"one")
    cache.put(key(2), b"two")
    spoil(tmp_path / f"{key(1)}.media")
    assert cache.get(key(1)) is None and cache.get(key(2)) == b"two"
    assert [file.name for file in tmp_path.iterdir()] == [f"{key(2)}.media"]
    cache.put(key(1), b"again")
    assert cache.get(key(1)) == b"again" and cache.is_on


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["notes.txt", "a.media", f"{key(1)}.media.bak"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(9_000))
    (tmp_path / f"{key(7)}.media").symlink_to(tmp_path / "notes.txt")
    abandoned, recent = tmp_path / f"{key(8)}.1.part", tmp_path / f"{key(9)}.2.part"
    abandoned.touch()
    recent.touch()
    os.utime(abandoned, (0, 0))
    cache = DiskCache(tmp_path, 1_000, 60)
    assert cache.get(key(7)) is None
    cache.put(key(1), b"one")
    assert cache.get(key(1)) == b"one"
    assert all((tmp_path / name).stat().st_size == 9_000 for name in others)
    assert recent.exists() and not abandoned.exists()


def assert_off(cache: DiskCache, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    assert not cache.is_on
    cache.put(key(5), b"five")
    cache.remove(key(5))
    assert cache.get(key(5)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "off until the next start" in caplog.text and str(folder) not in caplog.text


def test_a_file_where_the_folder_should_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        caplog.clear()
        cache = DiskCache(folder, 1_000, 60)
        assert cache.get(key(1)) is None
        assert_off(cache, caplog, tmp_path)


def test_a_folder_that_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path / "cache", 1_000, 60)
    cache.put(key(1), b"one")
    shutil.rmtree(tmp_path / "cache")
    assert cache.get(key(1)) is None
    cache.put(key(2), b"two")
    assert_off(cache, caplog, tmp_path)


@pytest.mark.parametrize("number", ["EROFS", "EIO", "ENOSPC"])
def test_turned_off_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture, number: str) -> None:
    cache = DiskCache(tmp_path, 1_000, 60)
    cache.put(key(1), b"one")
    cache.turn_off(number)
    cache.turn_off(number)
    assert_off(cache, caplog, tmp_path)
    assert number in caplog.text and cache.get(key(1)) is None


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from server.media.cache import DiskCache, cache_key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
cache = DiskCache(Path(sys.argv[1]), 1 << 20, 60)
cache.put(cache_key("small"), bytes(100))
cache.put(cache_key("large"), bytes(100_000))
assert not cache.is_on
assert cache.get(cache_key("small")) is None
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], cwd=REPOSITORY, check=True, timeout=60
    )
    # What was whole stays, what was not leaves nothing.
    assert [file.name for file in tmp_path.iterdir()] == [f"{cache_key('small')}.media"]
    assert DiskCache(tmp_path, 1 << 20, 60).get(cache_key("small")) == bytes(100)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_may_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o500)
    cache = DiskCache(tmp_path, 1_000, 60)
    cache.put(key(1), b"one")
    assert_off(cache, caplog, tmp_path)
