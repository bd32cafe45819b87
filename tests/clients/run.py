"""Real clients, unmodified, against one real server on the demo model.

    python -m tests.clients.run [--only GROUP,GROUP]

A group is one client with the packages it brings, pinned in `GROUP.txt` (or, for Node, in
`openai-node/package-lock.json`) and installed into `build/clients/GROUP`, again only when its pins
or the interpreter changed. Its tests, `test_GROUP.py`, run with that environment's own
interpreter and are told by the environment where the server is (`conftest.py`). Any failure, of
an installation too, makes the exit status 1.

To move a client to another version: put the new version into the upper lines of its file, install
those alone into an empty environment, and write what `pip freeze` then says below them. For Node:
`npm install` in a copy of its folder, whose `.npmrc` keeps addresses out of the lock.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.e2e.conftest import REPOSITORY, serving

HERE = Path(__file__).parent
BUILD = REPOSITORY / "build" / "clients"
NODE = "openai-node"
GROUPS = (*sorted(path.stem for path in HERE.glob("*.txt")), NODE)

INSTALL_S = 600.0
TESTS_S = 300.0
API_KEY = "a-key-of-the-client-tests"

# So that clients talk to this server and to nobody else, whatever the caller's shell says.
KEPT_NAMES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH")
OFFLINE = {
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(BUILD / "huggingface"),
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one group; its verdict is "passed" or says what failed."""

    group: str
    installed_s: float
    tested_s: float
    verdict: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.run")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    asked = parser.parse_args().only.split(",")
    if unknown := set(asked) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    installed = {group: timed(partial(install, group)) for group in asked}
    with server_environment() as environment:
        tested = {
            group: timed(partial(test, group, environment)) if fault is None else (fault, 0.0)
            for group, (fault, _) in installed.items()
        }
    outcomes = [
        Outcome(group, installed[group][1], tested_s, fault or "passed")
        for group, (fault, tested_s) in tested.items()
    ]
    print("\n" + table(outcomes), flush=True)
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


def timed(step: Callable[[], str | None]) -> tuple[str | None, float]:
    """What the step says, and how long it took in seconds."""
    started_s = time.monotonic()
    return step(), time.monotonic() - started_s


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [f"{'group':<16} {'install':>9} {'tests':>9}  verdict"]
    for each in outcomes:
        lines.append(
            f"{each.group:<16} {each.installed_s:>7.1f} s {each.tested_s:>7.1f} s  {each.verdict}"
        )
    return "\n".join(lines)


def install(group: str) -> str | None:
    """Make the group's environment unless it is there; what failed, if anything did."""
    folder = BUILD / group
    stamp = folder / ".installed"
    wanted = fingerprint(group)
    if stamp.is_file() and stamp.read_text() == wanted:
        return None
    print(f"\n== installing {group}", flush=True)
    fault = install_node(folder) if group == NODE else install_python(group, folder)
    if fault is None:
        stamp.write_text(wanted)
    return fault


def fingerprint(group: str) -> str:
    pins = HERE / NODE / "package-lock.json" if group == NODE else HERE / f"{group}.txt"
    return f"{sys.version} {hashlib.sha256(pins.read_bytes()).hexdigest()}"


def install_python(group: str, folder: Path) -> str | None:
    if not finishes([sys.executable, "-m", "venv", "--clear", str(folder)], limit_s=INSTALL_S):
        return "no environment"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    patience = ["--quiet", "--timeout", "60", "--retries", "3"]
    if not finishes([*pip, *patience, "-r", str(HERE / f"{group}.txt")], limit_s=INSTALL_S):
        return "not installed"
    return None


def install_node(folder: Path) -> str | None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node or npm was not found: install Node 20 or newer, or leave it out with ONLY="
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / NODE, folder, ignore=shutil.ignore_patterns("node_modules"))
    patience = ["--fetch-timeout=60000", "--fetch-retries=3", "--no-audit", "--no-fund"]
    npm = ["npm", "ci", "--engine-strict", "--ignore-scripts", *patience]
    return None if finishes(npm, folder=folder, limit_s=INSTALL_S) else "not installed"


def test(group: str, environment: Mapping[str, str]) -> str | None:
    """Run the group's tests with its own interpreter; what failed, if anything did."""
    print(f"\n== testing {group}", flush=True)
    folder = BUILD / group
    if group == NODE:
        shutil.copytree(
            HERE / NODE,
            folder,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("node_modules"),
        )
        command = ["node", "--test", "--test-reporter=spec"]
    else:
        file = HERE / f"test_{group.replace('-', '_')}.py"
        command = [str(folder / "bin" / "python"), "-m", "pytest", "-c", str(HERE / "pytest.ini")]
        command += ["--rootdir", str(HERE), "--confcutdir", str(HERE), str(file)]
    done = finishes(command, folder=folder, environment=environment, limit_s=TESTS_S)
    return None if done else "tests failed"


def finishes(
    command: Sequence[str],
    *,
    folder: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    limit_s: float,
) -> bool:
    """Whether the command exits with 0 in time; whatever it started ends with it."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(timeout=limit_s) == 0
    except subprocess.TimeoutExpired:
        print(f"not finished after {limit_s:.0f} s: {' '.join(command)}", flush=True)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def server_environment() -> Iterator[dict[str, str]]:
    """A server that asks for a key and fetches from a host on this machine; how to reach both."""
    folder = BUILD / "server"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with (
        pictures() as host,
        serving(
            folder,
            api_key=API_KEY,
            HTTP__API_KEYS=json.dumps({"clients": hashlib.sha256(API_KEY.encode()).hexdigest()}),
            HTTP__DOCS="true",
            MEDIA__ALLOWED_PRIVATE_HOSTS='["127.0.0.1"]',
            MEDIA__ALLOWED_PORTS=json.dumps([host.server_port]),
            MEDIA__FILES_DIR=folder / "files",
        ) as server,
    ):
        kept = {name: value for name, value in os.environ.items() if name in KEPT_NAMES}
        yield (
            kept
            | OFFLINE
            | {
                "CLIENTS_URL": server.url,
                "CLIENTS_API_KEY": API_KEY,
                "CLIENTS_MODEL": server.model,
                "CLIENTS_PICTURE_URL": f"http://127.0.0.1:{host.server_port}/example.png",
                "CLIENTS_REPOSITORY": str(REPOSITORY),
            }
        )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def pictures() -> Iterator[ThreadingHTTPServer]:
    """The files of `docs/` over HTTP on a free port."""
    handler = partial(QuietHandler, directory=str(REPOSITORY / "docs"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        thread = threading.Thread(target=host.serve_forever, daemon=True)
        thread.start()
        try:
            yield host
        finally:
            host.shutdown()
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
