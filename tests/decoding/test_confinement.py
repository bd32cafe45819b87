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


async def outcomes(module: str, deeds: list[str]) -> list[str]:
    """What came of each deed, each in a decoder of its own."""
    async with running_pool(
        module,
        image_decode_timeout_s=0.5,
        image_decode_memory_bytes=MEMORY_BYTES,
        video_decode_memory_bytes=MEMORY_BYTES,
    ) as pool:
        found = []
        for deed in deeds:
            with pytest.raises(MediaError) as caught:
                file = MediaFile.of_bytes(f"do:{deed}".encode())
                await pool.decode(ImageJob(), file, tenant="")
            is_late = isinstance(caught.value, MediaTooLarge)
            found.append(MediaTooLarge.__name__ if is_late else caught.value.message)
        return found


DENIED = "PermissionError"
GONE = "FileNotFoundError"
COUNTED = (
    "3 descriptors, "
    "variables LC_CTYPE MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MKL_NUM_THREADS "
    "OMP_NUM_THREADS OPENBLAS_NUM_THREADS PYTHONPATH"
)
TOO_SLOW = MediaTooLarge.__name__


ATTEMPTS: list[tuple[str, str, str | None]] = [
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
]
"""The deed, and what comes of it where all protections are there and where only some are.

Without namespaces and filters some doors stay open (None); the server then says so.
"""


@pytest.mark.parametrize("module", [hostile_forker.MODULE, bare_forker.MODULE])
async def test_attempts(module: str, tmp_path: Path) -> None:
    is_confined = module == hostile_forker.MODULE
    if not is_confined and os.geteuid() != 0:
        pytest.skip("without root, decoders and files belong to one user")
    expected = {deed: confined if is_confined else bare for deed, confined, bare in ATTEMPTS}
    deeds = [deed for deed, outcome in expected.items() if outcome is not None]
    secret = tmp_path / "secret"
    secret.write_text("canary")
    secret.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        places = {
            "secret": secret,
            "folder": tmp_path,
            "port": listener.getsockname()[1],
            "pid": os.getpid(),
        }
        found = await outcomes(module, [deed.format(**places) for deed in deeds])
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert dict(zip(deeds, found, strict=True)) == {deed: expected[deed] for deed in deeds}
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
    expected = {
        "open /etc/passwd": GONE,
        "open /proc/self/maps": GONE,
        "list /": "listed 0",
        "create /new": "OSError",
        "connect {port}": "OSError",
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        deeds = [deed.format(port=port) for deed in expected]
        found = await outcomes(unfiltered_forker.MODULE, deeds)
    assert dict(zip(expected, found, strict=True)) == expected
