"""Models by folder and by hub name, the latter against a stand-in of the hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.errors import CheckpointError
from server.hub import find_checkpoint, is_hub_name
from tools.random_checkpoint import write_checkpoint

REPOSITORY = Path(__file__).parent.parent
NAME = "example/tiny-model"
TOKEN = "hf_right"

COMMITS = {"main": "a" * 40, "v0.1.0": "b" * 40}
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model-00001-of-00001.safetensors": b"weights" * 1000,
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "README.md": b"# not needed",
    "pytorch_model.bin": b"not wanted",
    "onnx/config.json": b"for another program",
}
WANTED = {"config.json", "model-00001-of-00001.safetensors", "chat_template.jinja", "merges.txt"}


@dataclass
class HubStandIn:
    """What `snapshot_download` asks of the hub, for one repository that may want a token."""

    url: str
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    asked: list[str] = field(default_factory=list)

    def answer(
        self, method: str, path: str, token: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        path = path.split("?")[0]
        self.asked.append(f"{method} {path}")
        if not path.startswith((f"/api/models/{NAME}", f"/{NAME}/")):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if self.gated and token != f"Bearer {TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if path.startswith("/api/"):
            return self._about(path.removeprefix(f"/api/models/{NAME}"))
        _, commit, file = path.removeprefix(f"/{NAME}/").split("/", 2)
        if file not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.content(commit, file)
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit}
        return 200, headers, content

    def content(self, commit: str, file: str) -> bytes:
        return self.files[file] + commit.encode() if file == "merges.txt" else self.files[file]

    def _about(self, what: str) -> tuple[int, dict[str, str], bytes]:
        revision = what.split("/")[2] if what else "main"
        commit = revision if revision in COMMITS.values() else COMMITS.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if what.startswith("/tree/"):
            tree = []
            for name in self.files:
                content = self.content(commit, name)
                oid = _blob(content)
                tree.append({"type": "file", "path": name, "size": len(content), "oid": oid})
            return 200, {}, json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in self.files]
        about = {"_id": "1", "id": NAME, "modelId": NAME, "sha": commit, "siblings": siblings}
        return 200, {}, json.dumps(about).encode()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = stand_in.answer(
                self.command, self.path, self.headers.get("Authorization")
            )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stand_in = HubStandIn(url=f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield stand_in
        server.shutdown()
        thread.join()


def run(
    *command: str, hub_url: str, home: Path, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    """In its own process: huggingface_hub reads its environment once, when it is imported."""
    of_ours = ("HF_", "HCX_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    kept = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(of_ours)
    }
    environment = {**kept, "HF_ENDPOINT": hub_url, "HF_HOME": str(home)}
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fetch(
    hub_url: str,
    home: Path,
    *,
    name: str = NAME,
    revision: str | None = None,
    token: str | None = None,
) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\n"
        "from server.errors import CheckpointError\n"
        "from server.hub import find_checkpoint\n"
        "try:\n"
        "    found = find_checkpoint(sys.argv[1], revision=sys.argv[2] or None)\n"
        "    print(found.folder); print(found.name)\n"
        "except CheckpointError as error:\n"
        "    print(error); sys.exit(3)\n"
    )
    return run("-c", program, name, revision or "", hub_url=hub_url, home=home, token=token)


def fetched_files(result: subprocess.CompletedProcess[str]) -> dict[str, bytes]:
    assert result.returncode == 0, result.stdout + result.stderr
    folder = Path(result.stdout.splitlines()[0])
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_hub_name_is_fetched_with_only_the_files_that_are_needed(
    hub: HubStandIn, tmp_path: Path
) -> None:
    result = fetch(hub.url, tmp_path)
    files = fetched_files(result)
    assert files.keys() == WANTED
    assert files["config.json"] == FILES["config.json"]
    assert files["merges.txt"].endswith(COMMITS["main"].encode())
    assert result.stdout.splitlines()[1] == NAME


@pytest.mark.parametrize("revision", ["v0.1.0", COMMITS["v0.1.0"]])
def test_a_revision_can_be_pinned(hub: HubStandIn, tmp_path: Path, revision: str) -> None:
    files = fetched_files(fetch(hub.url, tmp_path, revision=revision))
    assert files["merges.txt"].endswith(COMMITS["v0.1.0"].encode())


def test_a_fetched_model_needs_no_hub(hub: HubStandIn, tmp_path: Path) -> None:
    first = fetch(hub.url, tmp_path)
    # Nothing listens on the discard port.
    again = fetch("http://127.0.0.1:9", tmp_path)
    assert fetched_files(again) == fetched_files(first)


def test_the_command_line_takes_a_hub_name(hub: HubStandIn, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ("-m", "server", "check", "--model", NAME, "--revision", "v0.1.0")
    result = run(*command, hub_url=hub.url, home=tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert COMMITS["v0.1.0"] in result.stdout.splitlines()[0]
    assert result.stderr == f"fetching {NAME} from the hub\n"


def test_a_token_opens_a_gated_model(hub: HubStandIn, tmp_path: Path) -> None:
    hub.gated = True
    refused = fetch(hub.url, tmp_path)
    assert refused.returncode == 3
    assert refused.stdout == (
        f"{NAME}: its owner asks for consent: accept the terms on the hub and set HF_TOKEN\n"
    )
    wrong = fetch(hub.url, tmp_path, token="hf_wrong")
    assert (wrong.returncode, "hf_wrong" in wrong.stdout + wrong.stderr) == (3, False)
    assert fetched_files(fetch(hub.url, tmp_path, token=TOKEN)).keys() == WANTED


def test_an_unknown_revision_is_one_line(hub: HubStandIn, tmp_path: Path) -> None:
    result = fetch(hub.url, tmp_path, revision="v9")
    assert (result.returncode, result.stdout) == (3, f"{NAME}: the hub has no revision v9\n")


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    result = fetch("http://127.0.0.1:9", tmp_path)
    assert result.returncode == 3
    assert result.stdout == f"{NAME}: the hub cannot be reached, and no complete copy is cached\n"


def test_a_name_the_hub_does_not_have_is_one_line(hub: HubStandIn, tmp_path: Path) -> None:
    result = fetch(f"{hub.url}/elsewhere", tmp_path)
    assert result.returncode == 3
    assert result.stdout == f"{NAME}: not on the hub, or HF_TOKEN is missing or may not read it\n"


@pytest.mark.parametrize("name", ["owner/na--me", "owner/name.git", "owner/" + "n" * 120])
def test_a_name_no_hub_can_have_is_one_line(hub: HubStandIn, tmp_path: Path, name: str) -> None:
    result = fetch(hub.url, tmp_path, name=name)
    assert result.returncode == 3
    assert result.stdout.startswith(f"{name}: cannot be fetched from the hub")


def test_an_address_that_is_no_address_is_one_line(tmp_path: Path) -> None:
    result = fetch("notaurl", tmp_path)
    assert result.returncode == 3
    assert result.stdout.startswith(f"{NAME}: ") and result.stdout.count("\n") == 1


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    found = find_checkpoint(str(tmp_path / "owner" / "model"))
    assert (found.folder, found.name) == (tmp_path / "owner" / "model", "model")
    # A relative folder that looks like a hub name is the folder.
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("owner/model")
    assert find_checkpoint("owner/model").folder == tmp_path / "owner" / "model"


def test_no_such_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder, and not a hub name \(owner/name\)"):
        find_checkpoint(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; the checkpoint's folder is needed"):
        find_checkpoint(str(tmp_path / "model.safetensors"))


def test_only_a_hub_name_has_revisions(tmp_path: Path) -> None:
    for model in (str(tmp_path), None):
        with pytest.raises(CheckpointError, match="only a hub name has revisions"):
            find_checkpoint(model, revision="v1")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("naver-hyperclovax/HyperCLOVAX-SEED-Vision-Instruct-3B", True),
        ("owner/name", True),
        ("name", False),
        ("./owner", False),
        ("../owner", False),
        ("/owner/name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("owner/..", False),
    ],
)
def test_hub_names(model: str, expected: bool) -> None:
    assert is_hub_name(model) is expected
