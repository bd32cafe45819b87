"""Starting servers to measure them from outside: how long until they answer, what memory they take.

Memory is read from /proc and therefore known on Linux only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parent.parent
PEER_SCRIPT = Path(__file__).parent / "peer_vllm_cpu.sh"

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class RunningServer:
    """`first_answer_s` is from the command to the end of the first answer, of one token."""

    url: str
    model: str
    process_id: int | None
    first_answer_s: float | None


def our_command(model: str | None, port: int, *, dtype: str | None = None) -> list[str]:
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    command += ["--model", model] if model else []
    return command + (["--dtype", dtype] if dtype else [])


def peer_command(model: str, port: int) -> list[str]:
    return [str(PEER_SCRIPT), model, str(port)]


@contextlib.contextmanager
def started(
    command: Sequence[str], port: int, *, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server that answers, until the end of the block. What it says goes to `log`."""
    url = f"http://127.0.0.1:{port}"
    # Made before the clock starts, because making a client takes a moment too.
    with httpx.Client(base_url=url, headers=_headers(), timeout=60) as client:
        started_s = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        try:
            model = _first_answer(client, process, log)
            yield RunningServer(url, model, process.pid, time.perf_counter() - started_s)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def already_running(url: str) -> RunningServer:
    with httpx.Client(base_url=url, headers=_headers(), timeout=30) as client:
        response = client.get("/v1/models")
        response.raise_for_status()
        return RunningServer(url.rstrip("/"), response.json()["data"][0]["id"], None, None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _first_answer(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> str:
    """Asks until there is an answer; the name of the model that gave it."""
    deadline_s = time.perf_counter() + START_TIMEOUT_S
    model = None
    while process.poll() is None and time.perf_counter() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            model = model or _listed_model(client)
            if model is not None and _answers(client, model):
                return model
        time.sleep(POLL_INTERVAL_S)
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the server did not answer; it said:\n{last_lines}")


def _listed_model(client: httpx.Client) -> str | None:
    response = client.get("/v1/models")
    if response.status_code != 200:
        return None
    name: str = response.json()["data"][0]["id"]
    return name


def _answers(client: httpx.Client, model: str) -> bool:
    response = client.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "temperature": 0,
        },
    )
    return response.status_code == 200


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


# Memory -------------------------------------------------------------------------------------------


def process_tree(process_id: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            parent = _parent(folder)
            if parent is not None:
                children.setdefault(parent, []).append(int(folder.name))
    found, open_ends = [], [process_id]
    while open_ends:
        each = open_ends.pop()
        found.append(each)
        open_ends += children.get(each, [])
    return found


def tree_pss_bytes(process_id: int) -> int:
    """The memory of a tree of processes; what several share is counted once."""
    return sum(_pss_bytes(each) for each in process_tree(process_id))


def _parent(folder: Path) -> int | None:
    try:
        # The name, second and in brackets, may hold anything.
        fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:  # it has ended meanwhile
        return None
    return int(fields[1])


def _pss_bytes(process_id: int) -> int:
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
