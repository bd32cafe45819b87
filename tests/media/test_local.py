"""Local files: what lies under the root is found, and everything else reads the same."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from server.config import MediaConfig
from server.errors import EmptyMediaFile, InvalidMediaUrl, MediaFileTooLarge
from server.media.local import open_local

DATA = b"\x89PNG" + bytes(3_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "cat.png").write_bytes(DATA)
    (root / "folder" / "a b%?#.png").write_bytes(DATA)
    (root / "link.png").symlink_to("cat.png")
    (tmp_path / "secret.png").write_bytes(DATA)
    (tmp_path / "root-too").mkdir()
    (tmp_path / "root-too" / "cat.png").write_bytes(DATA)
    return root


def config(root: Path) -> MediaConfig:
    return MediaConfig(local_root=root, max_image_bytes=10_000, max_video_bytes=20_000)


@pytest.mark.parametrize(
    "source",
    [
        "cat.png",
        "./cat.png",
        " ./cat.png\n",
        "{root}/cat.png",
        "file://{root}/cat.png",
        "FILE://localhost{root}/cat.png",
        "file:{root}/cat.png",
        "{root}/.//cat.png",
        "file://{root}/c%61t.png",
        "file://{root}/folder/a%20b%25%3F%23.png",
        "folder/a b%?#.png",
        "link.png",
    ],
)
def test_files_under_the_root(root: Path, source: str) -> None:
    file = open_local(source.format(root=root), config(root), kind="image")
    assert file.read() == DATA
    assert file.num_bytes == len(DATA)
    assert file.digest == hashlib.sha256(DATA).hexdigest()


def test_a_root_that_is_itself_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    for source in ("cat.png", f"{tmp_path}/alias/cat.png", f"{root}/cat.png"):
        assert open_local(source, config(tmp_path / "alias"), kind="image").read() == DATA


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_korean_names_in_both_forms(root: Path, form: str, asked: str) -> None:
    folder = root / unicodedata.normalize("NFD", "사진") / unicodedata.normalize("NFC", "모음")
    folder.mkdir(parents=True)
    name = "고양이.png"
    (folder / unicodedata.normalize(form, name)).write_bytes(DATA)
    path = unicodedata.normalize(asked, f"사진/모음/{name}")
    for source in (path, f"./{path}", f"{root}/{path}", f"file://{quote(f'{root}/{path}')}"):
        assert open_local(source, config(root), kind="image").read() == DATA


def refusal(source: str, settings: MediaConfig) -> str:
    with pytest.raises(InvalidMediaUrl) as caught:
        open_local(source, settings, kind="video")
    assert caught.value.code == "invalid_video_url"
    return caught.value.message


def test_everything_else_reads_the_same(root: Path, tmp_path: Path) -> None:
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "up").symlink_to("..")
    (root / "null").symlink_to("/dev/null")
    (root / "environment").symlink_to("/proc/self/environ")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    sources = [
        "",
        "missing.png",
        "folder",
        ".",
        "/",
        "../secret.png",
        "folder/../../secret.png",
        "../root-too/cat.png",
        "folder/../cat.png",
        "../root/cat.png",
        f"{root}/folder/../cat.png",
        f"file://{root}/folder/%2e%2e/cat.png",
        f"{tmp_path}/secret.png",
        f"{tmp_path}/root-too/cat.png",
        f"file://{tmp_path}/secret.png",
        "out.png",
        "loop.png",
        "dangling.png",
        "up/secret.png",
        "null",
        "environment",
        "fifo",
        "socket",
        "/dev/zero",
        "/proc/self/environ",
        "/etc/passwd",
        "//etc/passwd",
        "~/cat.png",
        "~root/cat.png",
        "cat.png\0",
        "file:///%00",
        f"file://{root}/%ff",
        f"file://{root}/cat.png?x",
        f"file://{root}/cat.png#x",
        f"file://example.com{root}/cat.png",
        f"file://127.0.0.1{root}/cat.png",
        f"file://user@localhost{root}/cat.png",
        "file:",
        "file://",
        "a" * 300,
        "a/" * 4_000,
        "a" * 10_000,
        "\ud800",
    ]
    texts = {refusal(source, config(root)) for source in sources}
    texts |= {refusal(source, MediaConfig()) for source in ("cat.png", f"file://{root}/cat.png")}
    texts |= {refusal("cat.png", config(tmp_path / "missing"))}
    assert len(texts) == 1


@pytest.mark.parametrize("path", ["/proc/self/status", "/proc/version", "/dev/null"])
def test_a_root_of_everything_still_has_no_system_files(path: str) -> None:
    refusal(path, config(Path("/")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(root: Path) -> None:
    (root / "cat.png").chmod(0)
    assert refusal("cat.png", config(root)) == refusal("missing.png", config(root))


def test_sizes(root: Path) -> None:
    for kind, limit in (("image", 10_000), ("video", 20_000)):
        (root / "x").write_bytes(bytes(limit))
        assert open_local("x", config(root), kind=kind).num_bytes == limit  # type: ignore[arg-type]
        (root / "x").write_bytes(bytes(limit + 1))
        with pytest.raises(MediaFileTooLarge) as caught:
            open_local("x", config(root), kind=kind)  # type: ignore[arg-type]
        assert caught.value.code == f"{kind}_file_too_large"
    (root / "x").write_bytes(b"")
    with pytest.raises(EmptyMediaFile):
        open_local("x", config(root), kind="image")


def test_a_folder_that_is_swapped_for_a_link_never_leads_out(root: Path, tmp_path: Path) -> None:
    """A race that is lost now and then: whatever is opened holds what lies under the root."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "cat.png").write_bytes(b"outside")
    (root / "real").mkdir()
    (root / "real" / "cat.png").write_bytes(b"inside")
    (root / "way").symlink_to("real")
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            for goal in (tmp_path / "outside", root / "real"):
                (root / "new").symlink_to(goal)
                os.replace(root / "new", root / "way")

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen: set[bytes] = set()
    try:
        for _ in range(1_500):
            try:
                seen.add(open_local("way/cat.png", config(root), kind="image").read())
            except InvalidMediaUrl:
                seen.add(b"refused")
    finally:
        is_over.set()
        swapper.join()
    assert b"outside" not in seen and b"inside" in seen


def test_no_descriptor_is_left(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "large").write_bytes(bytes(30_000))
    (root / "empty").touch()
    before = len(os.listdir("/proc/self/fd"))
    for source in ("fifo", "large", "empty", "folder", "missing"):
        with pytest.raises((InvalidMediaUrl, MediaFileTooLarge, EmptyMediaFile)):
            open_local(source, config(root), kind="image")
    assert open_local("cat.png", config(root), kind="image").num_bytes == len(DATA)
    assert len(os.listdir("/proc/self/fd")) == before
