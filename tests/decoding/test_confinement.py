"""What a decoder that was taken over can still do: tried from inside, on hosts of both kinds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from server.decoding.jobs import ImageJob
from server.errors import MediaError, MediaTooLarge
from server.media.file import MediaFile
from tests.decoding import bare_forker, hostile_forker, unfiltered_forker
from tests.decoding.pools import running_pool

MEMORY_BYTES = 64 << 20


async def outcome(module: str, deed: str) -> str:
    async with running_pool(
        module,
        image_decode_timeout_s=0.5,
        image_decode_memory_bytes=MEMORY_BYTES,
        video_decode_memory_bytes=MEMORY_BYTES,
    ) as pool:
        with pytest.raises(MediaError) as caught:
            file = MediaFile.of_bytes(f"do:{deed}".encode())
            await pool.decode(ImageJob(), file, tenant="")
        return (
            type(caught.value).__name__
            if "longer" in caught.value.message
            else (caught.value.message)
        )


DENIED = "PermissionError"
GONE = "FileNotFoundError"
COUNTED = (
    "3 descriptors, "
    "variables LC_CTYPE MKL_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS PYTHONPATH"
)
TOO_SLOW = MediaTooLarge.__name__


@pytest.mark.parametrize(
    ("deed", "confined", "bare"),
    [
        ("open {secret}", DENIED, DENIED),
        ("open /etc/passwd", DENIED, None),
        ("open /proc/self/maps", DENIED, None),
        ("list /", DENIED, None),
        ("create {folder}/new", DENIED, DENIED),
        ("connect {port}", DENIED, None),
        ("bind", DENIED, None),
        ("fork", DENIED, "BlockingIOError"),
        ("exec /bin/true", DENIED, None),
        ("signal {pid}", DENIED, DENIED),
        ("write", DENIED, DENIED),
        ("count", COUNTED, COUNTED),
        ("duplicate", "OSError", "OSError"),
        (f"allocate {2 * MEMORY_BYTES}", "MemoryError", "MemoryError"),
        (
            f"allocate {MEMORY_BYTES // 8}",
            f"{MEMORY_BYTES // 8} bytes",
            f"{MEMORY_BYTES // 8} bytes",
        ),
        ("spin", TOO_SLOW, TOO_SLOW),
        ("sleep 60", TOO_SLOW, TOO_SLOW),
    ],
)
async def test_attempts(deed: str, confined: str, bare: str | None, tmp_path: Path) -> None:
    """Without namespaces and filters some doors stay open (None); the server then says so."""
    secret = tmp_path / "secret"
    secret.write_text("canary")
    secret.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        deed = deed.format(secret=secret, folder=tmp_path, port=port, pid=os.getpid())
        assert (await outcome(hostile_forker.MODULE, deed)).startswith(confined)
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        if bare is not None and os.geteuid() == 0:  # without root, all belongs to one user
            assert (await outcome(bare_forker.MODULE, deed)).startswith(bare)
    assert os.listdir(tmp_path) == ["secret"]


async def test_what_a_host_denies_is_told() -> None:
    async with running_pool() as pool:
        assert pool.missing_protections == ()
    async with running_pool(bare_forker.MODULE) as pool:
        assert pool.missing_protections == (
            "namespaces without network and files",
            "a filter of system calls",
        )


async def test_the_namespaces_are_empty_without_the_filter() -> None:
    """Each protection holds without the other."""
    for deed, expected in (
        ("open /etc/passwd", GONE),
        ("open /proc/self/maps", GONE),
        ("list /", "listed 0"),
        ("create /new", "OSError"),
    ):
        assert await outcome(unfiltered_forker.MODULE, deed) == expected
    with socket.create_server(("127.0.0.1", 0)) as listener:
        deed = f"connect {listener.getsockname()[1]}"
        assert await outcome(unfiltered_forker.MODULE, deed) == "OSError"
