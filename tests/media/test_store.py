"""Uploaded files: quota, expiry, restarts and what else may lie in their folder."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from server.errors import FileNotFound, StorageFull
from server.media.store import FileStore, FileWriter, StoredFile, owner_digest

ANN, BOB = owner_digest("ann"), owner_digest("bob")
TTL_S = 1000.0
QUOTA = 100


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> FileStore:
    return opened(tmp_path / "files", clock)


def opened(folder: Path, clock: Clock, *, quota: int = QUOTA) -> FileStore:
    return FileStore(folder, TTL_S, quota, clock)


def put(
    store: FileStore,
    data: bytes = b"data",
    *,
    owner: str = ANN,
    filename: str = "a.png",
    purpose: str = "vision",
    ttl_s: float | None = None,
) -> StoredFile:
    writer = store.begin(owner)
    try:
        writer.write(data)
        return writer.finish(filename=filename, purpose=purpose, ttl_s=ttl_s)
    finally:
        writer.discard()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def ids(store: FileStore, owner: str = ANN, **query: object) -> list[str]:
    return [file.id for file in store.page(owner, **{"limit": 100, **query}).files]  # type: ignore[arg-type]


def test_what_was_put_comes_back(store: FileStore, clock: Clock) -> None:
    file = put(store, b"12345", filename="고양이.png")
    assert store.get(file.id, ANN) == file
    assert (file.filename, file.purpose, file.num_bytes) == ("고양이.png", "vision", 5)
    assert (file.created_at_s, file.expires_at_s) == (clock.now_s, clock.now_s + TTL_S)
    content = store.open(file.id, ANN)
    assert (content.read(), content.num_bytes, content.digest) == (b"12345", 5, file.digest)


def test_ids_tell_nothing(store: FileStore) -> None:
    given = [put(store, b"").id for _ in range(20)]
    assert len(set(given)) == 20
    for each in given:
        assert each.startswith("file-") and len(each) >= 29 and each[5:].isalnum()


def test_owners_are_digests_that_differ() -> None:
    owners = [owner_digest(name) for name in ("", "a", "aa", "a\x00")]
    assert len(set(owners)) == 4
    assert all(len(each) == 64 for each in owners)


def test_nobody_else_can_read_it(store: FileStore, tmp_path: Path) -> None:
    put(store)
    assert stat.S_IMODE((tmp_path / "files").stat().st_mode) == 0o700
    for each in (tmp_path / "files").iterdir():
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
        assert b"ann" not in each.read_bytes()


@pytest.mark.parametrize(
    "case", ["missing", "foreign", "expired", "deleted", "path", "description"]
)
def test_what_is_not_there_is_always_the_same(
    store: FileStore, clock: Clock, tmp_path: Path, case: str
) -> None:
    file = put(store)
    file_id, owner = file.id, ANN
    if case == "missing":
        file_id = "file-" + "x" * 32
    elif case == "foreign":
        owner = BOB
    elif case == "expired":
        clock.now_s += TTL_S
    elif case == "deleted":
        store.delete(file_id, ANN)
    elif case == "path":
        file_id = f"../files/{file_id}"
    else:
        file_id += ".json"
    messages = set()
    for ask in (store.get, store.open, store.delete):
        with pytest.raises(FileNotFound) as caught:
            ask(file_id, owner)
        messages.add(caught.value.message)
    with pytest.raises(FileNotFound):
        store.page(owner, limit=1, after=file_id)
    assert messages == {FileNotFound.default_message}


def test_a_deleted_file_stays_readable_for_its_reader(store: FileStore, tmp_path: Path) -> None:
    file = put(store, b"still here")
    content = store.open(file.id, ANN)
    store.delete(file.id, ANN)
    assert names(tmp_path / "files") == []
    assert content.read() == b"still here"


def test_a_writer_that_is_dropped_leaves_nothing(store: FileStore, tmp_path: Path) -> None:
    for _ in range(3):
        writer = store.begin(ANN)
        writer.write(b"x" * QUOTA)
        assert len(names(tmp_path / "files")) == 1
        writer.discard()
        writer.discard()
        with pytest.raises(ValueError, match="discarded"):
            writer.write(b"x")
    assert names(tmp_path / "files") == []
    put(store, b"x" * QUOTA)


def test_a_finished_file_cannot_be_discarded(store: FileStore) -> None:
    writer = store.begin(ANN)
    file = writer.finish(filename="a", purpose="vision")
    writer.discard()
    assert store.get(file.id, ANN) == file


def test_the_quota_counts_what_arrives(store: FileStore) -> None:
    put(store, b"x" * 40)
    first, second = store.begin(ANN), store.begin(ANN)
    first.write(b"x" * 30)
    second.write(b"x" * 30)
    with pytest.raises(StorageFull, match=str(QUOTA)):
        first.write(b"x")
    put(store, b"x" * QUOTA, owner=BOB)
    second.discard()
    first.write(b"x" * 30)
    first.finish(filename="a", purpose="vision")


def test_expiry_and_deletion_give_the_quota_back(store: FileStore, clock: Clock) -> None:
    file = put(store, b"x" * QUOTA)
    with pytest.raises(StorageFull):
        put(store, b"x")
    store.delete(file.id, ANN)
    put(store, b"x" * QUOTA)
    clock.now_s += TTL_S
    put(store, b"x" * QUOTA)


def test_the_number_of_files_is_limited(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.media.store.MAX_FILES_PER_OWNER", 2)
    store = opened(tmp_path, clock)
    put(store, b"")
    writer = store.begin(ANN)
    with pytest.raises(StorageFull):
        store.begin(ANN)
    writer.discard()
    put(store, b"")


def test_a_caller_may_only_shorten_the_time(store: FileStore, clock: Clock) -> None:
    short, long = put(store, ttl_s=10), put(store, ttl_s=10 * TTL_S)
    assert (short.expires_at_s, long.expires_at_s) == (clock.now_s + 10, clock.now_s + TTL_S)


def test_the_sweep_removes_what_has_expired(store: FileStore, clock: Clock, tmp_path: Path) -> None:
    put(store, ttl_s=10)
    kept = put(store)
    clock.now_s += 10
    assert len(names(tmp_path / "files")) == 4
    store.sweep()
    assert names(tmp_path / "files") == sorted([kept.id, f"{kept.id}.json"])


def test_pages(store: FileStore, clock: Clock) -> None:
    made = []
    for index in range(6):
        clock.now_s += 1
        purpose = "vision" if index % 2 else "user_data"
        made.append(put(store, b"", purpose=purpose).id)
    put(store, b"", owner=BOB)
    assert ids(store, order="asc") == made
    assert ids(store) == made[::-1]
    assert ids(store, order="asc", purpose="vision") == made[1::2]
    assert ids(store, order="asc", after=made[2]) == made[3:]
    assert ids(store, after=made[2], purpose="user_data") == [made[0]]
    walked, after = [], None
    while True:
        page = store.page(ANN, limit=4, after=after)
        walked += [file.id for file in page.files]
        if not page.has_more:
            break
        after = walked[-1]
    assert walked == made[::-1]


def test_files_survive_a_restart(store: FileStore, clock: Clock, tmp_path: Path) -> None:
    file, other = put(store, b"12345"), put(store, b"67", owner=BOB)
    half = store.begin(ANN)
    half.write(b"half")
    again = opened(tmp_path / "files", clock)
    assert again.get(file.id, ANN) == file
    assert again.get(other.id, BOB) == other
    assert again.open(file.id, ANN).read() == b"12345"
    assert len(names(tmp_path / "files")) == 4  # the half one is gone
    with pytest.raises(StorageFull):
        put(again, b"x" * (QUOTA - 4))
    clock.now_s += TTL_S
    assert ids(opened(tmp_path / "files", clock)) == []
    assert names(tmp_path / "files") == []
    half.discard()


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "not json": lambda path: path.write_bytes(b"{"),
    "not utf-8": lambda path: path.write_bytes(b'{"id": "\xff"}'),
    "no object": lambda path: path.write_bytes(b"[]"),
    "wrong types": lambda path: path.write_bytes(path.read_bytes().replace(b'"vision"', b"17")),
    "another's id": lambda path: path.write_bytes(path.read_bytes().replace(b"file-", b"elif-")),
    "huge": lambda path: path.write_bytes(b" " * 10_000_000),
    "wrong length": lambda path: path.with_suffix("").write_bytes(b"longer than it was"),
    "no bytes": lambda path: path.with_suffix("").unlink(),
    "no description": lambda path: path.unlink(),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    "bytes are a link": lambda path: (
        path.with_suffix("").unlink(),
        path.with_suffix("").symlink_to("/etc/passwd"),
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_harms_no_other(
    store: FileStore, clock: Clock, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "files"
    good, bad = put(store, b"good"), put(store, b"bad")
    DAMAGE[damage](folder / f"{bad.id}.json")
    again = opened(folder, clock)
    assert ids(again) == [good.id]
    assert again.open(good.id, ANN).read() == b"good"
    if damage not in ("a link", "a folder"):  # what could not be read is not touched
        assert names(folder) == sorted([good.id, f"{good.id}.json"])
    assert Path("/etc/passwd").stat().st_size > 0


def test_what_is_somebody_elses_stays(store: FileStore, clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    foreign = ["notes.txt", "file-short", "file-short.json", "x.part", "한글.json"]
    for name in foreign:
        (folder / name).write_bytes(b"mine")
    (folder / "folder").mkdir()
    put(opened(folder, clock))
    opened(folder, clock)
    for name in foreign:
        assert (folder / name).read_bytes() == b"mine"
    assert (folder / "folder").is_dir()


def test_bytes_that_changed_are_not_served(store: FileStore, tmp_path: Path) -> None:
    for change in (b"", b"something longer", None):
        file = put(store, b"1234")
        path = tmp_path / "files" / file.id
        path.unlink() if change is None else path.write_bytes(change)
        with pytest.raises(FileNotFound):
            store.open(file.id, ANN)
        store.delete(file.id, ANN)


def test_a_folder_that_cannot_be_used(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "plain").write_bytes(b"")
    for folder in (tmp_path / "plain", tmp_path / "plain" / "below", Path("/proc/nope")):
        with pytest.raises(OSError):
            opened(folder, clock)


@pytest.fixture
def full_disk() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield 100_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, clock: Clock, full_disk: int
) -> None:
    store = opened(tmp_path, clock, quota=10 * full_disk)
    with pytest.raises(StorageFull):
        put(store, b"x" * (full_disk + 1))
    assert names(tmp_path) == []
    put(store, b"x" * full_disk)


def test_other_faults_of_the_disk_are_not_hidden(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "files").rename(tmp_path / "moved")
    with pytest.raises(OSError) as caught:
        store.begin(ANN)
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "moved").rename(tmp_path / "files")
    put(store, b"x" * QUOTA)  # and count for nothing


def test_discard_waits_for_a_write_in_another_thread(store: FileStore, tmp_path: Path) -> None:
    for _ in range(20):
        writer = store.begin(ANN)

        def write(writer: FileWriter = writer) -> None:
            try:
                for _ in range(QUOTA):
                    writer.write(b"x")
            except ValueError:
                pass

        thread = threading.Thread(target=write)
        thread.start()
        writer.discard()
        thread.join()
        assert names(tmp_path / "files") == []
    put(store, b"x" * QUOTA)


class StoreMachine(RuleBasedStateMachine):
    """The store against a dictionary, whatever is done in whatever order."""

    files = Bundle("files")
    writers = Bundle("writers")
    folder: Path  # set by the test that runs it

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.path = self.folder / os.urandom(8).hex()
        self.store = opened(self.path, self.clock)
        self.known: dict[str, tuple[StoredFile, bytes]] = {}
        self.arriving: dict[FileWriter, tuple[str, bytes]] = {}

    def used(self, owner: str) -> int:
        now_s = self.clock.now_s
        kept = [f for f, _ in self.known.values() if f.owner == owner and f.expires_at_s > now_s]
        arriving = [data for each, data in self.arriving.values() if each == owner]
        return sum(f.num_bytes for f in kept) + sum(map(len, arriving))

    @rule(target=writers, owner=st.sampled_from([ANN, BOB]))
    def begin(self, owner: str) -> FileWriter:
        writer = self.store.begin(owner)
        self.arriving[writer] = (owner, b"")
        return writer

    @rule(writer=writers, data=st.binary(max_size=60))
    def write(self, writer: FileWriter, data: bytes) -> None:
        if writer not in self.arriving:
            return
        owner, before = self.arriving[writer]
        if self.used(owner) + len(data) > QUOTA:
            with pytest.raises(StorageFull):
                writer.write(data)
        else:
            writer.write(data)
            self.arriving[writer] = (owner, before + data)

    @rule(target=files, writer=consumes(writers), ttl_s=st.sampled_from([None, 5.0]))
    def finish(self, writer: FileWriter, ttl_s: float | None) -> str:
        if writer not in self.arriving:
            return "file-none"
        owner, data = self.arriving.pop(writer)
        file = writer.finish(filename="a", purpose="vision", ttl_s=ttl_s)
        assert file.owner == owner
        self.known[file.id] = (file, data)
        return file.id

    @rule(writer=consumes(writers))
    def discard(self, writer: FileWriter) -> None:
        if self.arriving.pop(writer, None) is not None:
            writer.discard()

    @rule(file_id=files, owner=st.sampled_from([ANN, BOB]))
    def delete(self, file_id: str, owner: str) -> None:
        known = self.known.get(file_id)
        is_there = (
            known is not None
            and known[0].owner == owner
            and known[0].expires_at_s > self.clock.now_s
        )
        if is_there:
            self.store.delete(file_id, owner)
            del self.known[file_id]
        else:
            with pytest.raises(FileNotFound):
                self.store.delete(file_id, owner)

    @rule(seconds=st.sampled_from([1.0, 6.0, TTL_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def sweep(self) -> None:
        self.store.sweep()

    @rule()
    def restart(self) -> None:
        for writer in self.arriving:
            writer.discard()
        self.arriving.clear()
        self.store = opened(self.path, self.clock)

    @invariant()
    def what_is_there_is_what_is_known(self) -> None:
        now_s = self.clock.now_s
        for owner in (ANN, BOB):
            expected = {
                file.id: data
                for file, data in self.known.values()
                if file.owner == owner and file.expires_at_s > now_s
            }
            assert set(ids(self.store, owner)) == set(expected)
            for file_id, data in expected.items():
                assert self.store.open(file_id, owner).read() == data

    def teardown(self) -> None:
        for writer in self.arriving:
            writer.discard()


def test_any_course_of_events(tmp_path: Path) -> None:
    StoreMachine.folder = tmp_path
    run_state_machine_as_test(
        StoreMachine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None)
    )
