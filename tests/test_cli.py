"""The command line in processes of its own: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from server import __version__
from server.cli import cli
from tests.model.loading import change_tensors
from tools.random_checkpoint import write_checkpoint

REPOSITORY = Path(__file__).parent.parent
START_TIMEOUT_S = 90


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HCX_")}
    return {**kept, "HCX_ENGINE__NUM_THREADS": "1", "COLUMNS": "200", **(extra or {})}


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "server", *map(str, arguments)]


def run(*arguments: str | Path) -> Result:
    """A command in this process, with what it printed; `serve` only where it cannot start."""
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def refusal(*arguments: str | Path) -> str:
    """The one line that a command which cannot go on says."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("hcx-server: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("hcx-server: ").rstrip()


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(*arguments),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )


class Served:
    """A running `serve`, found by the address in its start-up line."""

    def __init__(self, process: subprocess.Popen[str], banner: str) -> None:
        self.process = process
        self.banner = banner
        address = banner.rsplit(" ", 1)[1]
        self.http = httpx.Client(base_url=address.replace("unix:", "http://unix"), timeout=30)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(
    *arguments: str | Path, env: Mapping[str, str] | None = None, stderr: int | None = None
) -> Iterator[Served]:
    process = subprocess.Popen(
        command_line("serve", "--port", "0", *arguments),
        cwd=REPOSITORY,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    overdue = threading.Timer(START_TIMEOUT_S, process.kill)
    overdue.start()
    try:
        banner = process.stdout.readline().rstrip()
        assert banner, "the server did not start"
        served = Served(process, banner)
        yield served
        served.http.close()
    finally:
        overdue.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def chat(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def workers_of(pid: int) -> list[int]:
    """The engine processes among the server's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(each)
        for each in children
        if b"server.engine.worker_main" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


# version ------------------------------------------------------------------------------------------


def test_version() -> None:
    result = run_process("version")
    assert (result.returncode, result.stdout) == (0, f"hcx-server {__version__}\n")


def test_version_and_changelog_agree() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert released[0] == __version__


# check --------------------------------------------------------------------------------------------


def check_lines(*arguments: str | Path) -> dict[str, str]:
    result = run("check", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    lines: dict[str, str] = {}
    for line in result.stdout.splitlines():
        name, found = line[:17].strip(), line[17:]
        lines[name] = f"{lines[name]}; {found}" if name in lines else found
    return lines


def test_check_prints_what_it_found(tiny: Path) -> None:
    found = check_lines("--model", tiny)
    assert found["checkpoint"] == str(tiny)
    assert found["revision layout"] == "main"
    assert "2 layers of 64" in found["decoder"]
    assert found["vision layer"] == "the output of layer 2 of 3"
    assert found["picture grids"].startswith("8, of at most 4 tiles of 56 pixels")
    # 16 and one newline; 16 for the thumbnail and 16 rows of 4 each with a newline.
    assert found["picture tokens"] == "17 at detail low, at most 96"
    assert found["video frames"].startswith("at most 108, on 12 canvases")
    # Twelve canvases of one slow and eight fast frames.
    assert found["video tokens"].endswith(f"at most {12 * (16 + 8 * 4)}")
    assert found["picture id"] == "258 <|dummy3|>"
    assert found["stop token ids"] == "256 <|endoftext|>, 261 <|stop|>, 262 <|endofturn|>"
    assert found["turn end id"] == "260 <|im_end|>"
    assert found["memory"].count("weights") == 3
    assert found["assumed"] == "nothing"


def test_check_names_each_assumption(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "old", layout="v0.1.0")
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    del preprocessor["image_mean"]
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = check_lines("--model", folder)
    assert found["revision layout"] == "v0.1.0"
    assert "the key 'image_mean' is missing: assumed 0.5 a channel" in found["assumed"]


def test_check_of_a_text_model_says_that_it_sees_nothing(tmp_path: Path) -> None:
    found = check_lines("--model", write_checkpoint(tmp_path / "text", layout="text"))
    assert found["revision layout"] == "text"
    assert found["vision"].startswith("none")
    assert "picture tokens" not in found


def test_check_names_the_tensors_that_do_not_fit(tmp_path: Path) -> None:
    """What `serve` would only find while it loads."""
    folder = write_checkpoint(tmp_path / "bad")
    lost = "language_model.model.layers.1.self_attn.q_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[lost]
        tensors["foo.bar"] = torch.ones(2)

    change_tensors(folder, spoil)
    line = refusal("check", "--model", folder)
    assert f"missing: {lost}" in line and "unexpected: foo.bar" in line


def test_more_layers_than_tensors_are_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bad")
    for section in ("text_config", "vision_config"):
        config = json.loads((folder / "config.json").read_text())
        config[section]["num_hidden_layers"] = 10**9
        (folder / "config.json").write_text(json.dumps(config))
        assert "1000000000 layers" in refusal("check", "--model", folder)


def test_a_bad_checkpoint_is_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bad")
    assert "no such folder" in refusal("check", "--model", tmp_path / "nothing")
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "GPT2LMHeadModel" in refusal("check", "--model", folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal("check", "--model", folder)


# serve --------------------------------------------------------------------------------------------


def status_of_endless_headers(port: int | None) -> int:
    """What is answered to 300 KB of headers that have not ended yet."""
    with socket.create_connection(("127.0.0.1", port or 0), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Padding: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                connection.sendall(b"x" * 10_000)
                time.sleep(0.001)
        return int(connection.recv(1024).split()[1])


def test_serve_from_start_to_end(tiny: Path, tmp_path: Path) -> None:
    with serving("--model", tiny, "--dtype", "float32", "--device", "cpu") as served:
        assert re.fullmatch(
            rf"hcx-server {re.escape(__version__)}: tiny on cpu in float32, context 4096 tokens, "
            r"at http://127\.0\.0\.1:[1-9]\d*",
            served.banner,
        )
        assert served.http.get("/ready").status_code == 200
        answer = served.http.post("/v1/chat/completions", json=chat("tiny", max_tokens=3))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 3
        assert "server" not in answer.headers
        assert status_of_endless_headers(served.http.base_url.port) == 400
        of_health = {"HCX_HTTP__PORT": str(served.http.base_url.port)}
        for unset in ({}, {"HCX_HTTP__UNIX_SOCKET": "null"}):
            assert health(tmp_path, {**of_health, **unset}).returncode == 0

        (worker,) = workers_of(served.process.pid)
        assert served.end() == 0
        assert served.process.stdout is not None
        assert served.process.stdout.read() == ""
        assert not is_running(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.0, 0.5])
def test_a_signal_while_the_engine_starts_leaves_nothing(
    tiny: Path, tmp_path: Path, after_s: float, number: signal.Signals
) -> None:
    with subprocess.Popen(
        command_line("serve", "--port", "0", "--model", tiny),
        cwd=REPOSITORY,
        env=environment({"TMPDIR": str(tmp_path)}),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        while not list(tmp_path.glob("hcx-*")):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(after_s)
        process.send_signal(number)
        try:
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert_nothing_is_left(process.pid, tmp_path)


def test_a_tokenizer_that_cannot_be_read_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """It is read while the engine process starts."""
    folder, temporary = tmp_path / "model", tmp_path / "temporary"
    shutil.copytree(tiny, folder)
    temporary.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    with subprocess.Popen(
        command_line("serve", "--port", "0", "--model", folder),
        cwd=REPOSITORY,
        env=environment({"TMPDIR": str(temporary)}),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.startswith("hcx-server: "), said
    assert said.count("\n") == 1, said
    assert_nothing_is_left(process.pid, temporary)


def assert_nothing_is_left(group: int, temporary: Path) -> None:
    """No process of a group, and no file in the folder for temporary ones."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("a process is left")
    assert not list(temporary.iterdir())


def test_a_stream_in_progress_survives_ctrl_c(tiny: Path) -> None:
    """On a terminal Ctrl-C reaches the whole group of processes."""
    with serving("--model", tiny) as served:
        body = chat("tiny", max_tokens=1500, ignore_eos=True, stream=True)
        with served.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.killpg(served.process.pid, signal.SIGINT)
            # At once: the same wish, told twice. It must neither be lost nor end the stream.
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert served.http.get("/ready").status_code == 503
            refused = served.http.post("/v1/chat/completions", json=chat("tiny"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert served.process.wait(timeout=10) == 0


def test_a_second_signal_ends_what_runs(tiny: Path) -> None:
    with serving("--model", tiny) as served:
        body = chat("tiny", max_tokens=4000, ignore_eos=True, stream=True)
        with served.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            served.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert rest[-1] == "data: [DONE]"
        assert served.process.wait(timeout=10) == 0


def test_a_request_that_never_arrives_is_answered_when_the_server_ends(tiny: Path) -> None:
    with serving("--model", tiny) as served:
        port = served.http.base_url.port
        with socket.create_connection(("127.0.0.1", port or 0), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
            )
            time.sleep(0.5)
            served.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            served.process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "shutting_down"
        assert served.process.wait(timeout=10) == 0


def test_a_connection_that_sends_no_request_in_time_is_closed(tiny: Path) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving("--model", tiny, env={"HCX_HTTP__HEADERS_TIMEOUT_S": "0.5"}) as served:
        address = ("127.0.0.1", served.http.base_url.port or 0)
        for is_second, sent in ((False, b""), (False, request[:-2]), (True, request[:-2])):
            with socket.create_connection(address, timeout=10) as connection:
                answer = b""
                if is_second:
                    connection.sendall(request)
                    while not answer.endswith(b"}"):
                        answer += connection.recv(65536)
                connection.sendall(sent)
                assert connection.recv(65536) == b""
                assert answer.startswith(b"HTTP/1.1 200 OK" if is_second else b"")
        with socket.create_connection(address, timeout=20) as connection:
            with contextlib.suppress(ConnectionError):
                for byte in request[:-2]:  # bytes that come give no more time
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(65536) == b""
        # Neither a long answer nor an idle connection has anything to do with it.
        body = chat("tiny", max_tokens=1200, ignore_eos=True)
        assert served.http.post("/v1/chat/completions", json=body).status_code == 200
        time.sleep(0.8)
        assert served.http.get("/health").status_code == 200


def answer_with(served: Served, status: int) -> httpx.Response:
    """The first answer with that status: the server may take a moment to notice connections."""
    deadline_s = time.monotonic() + 20
    while (response := served.http.get("/v1/models")).status_code != status:
        assert time.monotonic() < deadline_s, response.text
        time.sleep(0.05)
    return response


def test_too_many_connections_are_told_so(tiny: Path) -> None:
    with serving("--model", tiny, env={"HCX_HTTP__MAX_CONNECTIONS": "2"}) as served:
        address = ("127.0.0.1", served.http.base_url.port or 0)
        assert served.http.get("/v1/models").status_code == 200  # and this connection is kept
        with socket.create_connection(address), socket.create_connection(address):
            refused = answer_with(served, 503)
            assert refused.headers["connection"] == "close"
            assert refused.json()["error"]["code"] == "server_is_overloaded"
            assert served.http.get("/health").status_code == 200
        answer_with(served, 200)


def test_a_worker_that_stands_still_is_not_called_ready(tiny: Path) -> None:
    with serving("--model", tiny) as served:
        (worker,) = workers_of(served.process.pid)
        os.kill(worker, signal.SIGSTOP)
        try:
            deadline_s = time.monotonic() + 50  # ten times the contract's five seconds
            while (ready := served.http.get("/ready")).status_code == 200:
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            assert ready.json()["error"]["code"] == "worker_restarting"
        finally:
            os.kill(worker, signal.SIGCONT)
        while served.http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        assert workers_of(served.process.pid) == [worker]  # late, but it never was hung


def test_a_terminal_shows_a_bar_and_a_pipe_lines(tiny: Path) -> None:
    primary, secondary = pty.openpty()
    with serving("--model", tiny, stderr=secondary) as served:
        os.close(secondary)
        on_terminal = os.read(primary, 65_536).decode()
        served.end()
    os.close(primary)
    assert "loading weights" in on_terminal
    assert "━" in on_terminal

    with serving("--model", tiny, stderr=subprocess.PIPE) as served:
        served.end()
        assert served.process.stderr is not None
        in_pipe = served.process.stderr.read()
        served.process.stderr.close()
    assert re.search(r"^loading weights: 100 % of \d+\.\d MB$", in_pipe, re.MULTILINE)
    assert "\r" not in in_pipe and "\x1b" not in in_pipe


def test_settings_reach_the_server(tiny: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: {served_name: in-file, max_context: 1000, dtype: float16}")
    with serving(
        "--config", settings, "--dtype", "float32", env={"HCX_MODEL__PATH": str(tiny)}
    ) as served:
        assert ": in-file on cpu in float32, context 1000 tokens," in served.banner
        assert served.http.get("/v1/models").json()["data"][0]["id"] == "in-file"


def test_a_folder_for_files_that_cannot_be_used(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    settings = tmp_path / "settings.yaml"
    settings.write_text("media: {files_dir: plain/below}\n")
    line = refusal("serve", "--model", tiny, "--port", "0", "--config", settings)
    folder = tmp_path / "plain" / "below"
    assert line == f"media.files_dir: {folder} cannot be used: Not a directory"


def test_a_port_in_use_is_one_line(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("serve", "--model", tiny, "--port", str(port))
    assert line == f"cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_an_admin_port_in_use_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("HCX_HTTP__ADMIN_PORT", str(port))
        line = refusal("serve", "--model", tiny, "--port", "0")
    assert line == f"cannot listen on 127.0.0.1 port {port}: Address already in use"
    monkeypatch.setenv("HCX_HTTP__ADMIN_HOST", "256.0.0.1")
    assert refusal("serve", "--port", "0") == "256.0.0.1 is not an address to listen on"


def test_one_port_for_both_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once_taken:
        port = once_taken.getsockname()[1]
    monkeypatch.setenv("HCX_HTTP__ADMIN_PORT", str(port))
    line = refusal("serve", "--model", tiny, "--port", str(port))
    assert line == f"cannot listen on 127.0.0.1 port {port}: Address already in use"


def admin_address(served: Served) -> str | None:
    """Where the log says the metrics are; None where it ends without saying so."""
    assert served.process.stderr is not None
    for line in served.process.stderr:
        if found := re.search(r" metrics at (http://127\.0\.0\.1:[1-9]\d*/metrics)$", line):
            return found[1]
    return None


def test_metrics_are_answered_until_the_last_request_has_ended(tiny: Path) -> None:
    with serving("--model", tiny, stderr=subprocess.PIPE) as served:
        address = admin_address(served)
        assert address is not None
        assert "hcx_requests_running 0.0" in httpx.get(address).text
        body = chat("tiny", max_tokens=3000, ignore_eos=True, stream=True)
        with served.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            while served.http.get("/ready").status_code == 200:
                time.sleep(0.02)
            during = httpx.get(address).text
            assert "hcx_requests_running 1.0" in during
            assert 'hcx_engine_status{status="ready"} 1.0' in during
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert served.process.wait(timeout=10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
        assert served.process.stderr is not None
        served.process.stderr.close()


def test_without_an_admin_port_there_is_none(tiny: Path) -> None:
    env = {"HCX_HTTP__ADMIN_PORT": "null"}
    with serving("--model", tiny, env=env, stderr=subprocess.PIPE) as served:
        assert served.http.get("/ready").status_code == 200
        assert served.http.get("/metrics").status_code == 404
        served.end()
        assert admin_address(served) is None
        assert served.process.stderr is not None
        served.process.stderr.close()


def test_a_wrong_setting_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("serve", "--model", tiny, "--dtype", "fp8").startswith(
        "command line: model.dtype: "
    )
    assert refusal("serve", "--host", "256.0.0.1") == "256.0.0.1 is not an address to listen on"
    monkeypatch.setenv("HCX_ENGIN__X", "1")
    for command in ("serve", "check"):
        assert refusal(command).startswith(
            "environment: unknown setting HCX_ENGIN__X; did you mean HCX_ENGINE__"
        )


def test_a_checkpoint_that_is_not_there_ends_the_server_with_one_line(tmp_path: Path) -> None:
    result = run_process("serve", "--model", tmp_path / "nothing", "--port", "0")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"hcx-server: {tmp_path / 'nothing'}: no such folder, and not a hub name (owner/name)\n"
    )


def test_weights_that_do_not_load_end_the_server_with_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "untied", is_tied=False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    result = run_process("serve", "--model", folder, "--port", "0")
    assert result.returncode == 1
    assert result.stdout == ""
    last = result.stderr.rstrip().splitlines()[-1]
    assert last.startswith("hcx-server: ")
    assert "mlp" in last
    assert "Traceback" not in result.stderr


# TLS and Unix sockets -----------------------------------------------------------------------------


def make_certificate(folder: Path, name: str = "server", *, password: str = "") -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and its key, as paths."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("a certificate is made with the openssl command, which is not there")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        + ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        + ["-keyout", str(key), "-out", str(certificate)]
        + (["-passout", f"pass:{password}"] if password else ["-nodes"]),
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


def health(folder: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What the image's health check says, where it finds a Python beside itself."""
    (folder / "bin").mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "bin" / "python").symlink_to(sys.executable)
    script = shutil.copy(REPOSITORY / "docker" / "health.sh", folder)
    return subprocess.run([script], env=environment(env), capture_output=True, text=True)


def test_https(tiny: Path, tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    settings = tmp_path / "settings.yaml"
    settings.write_text("http: {tls_certificate_file: server.pem, tls_key_file: server.key}")
    with serving("--model", tiny, "--config", settings) as served:
        url = served.banner.rsplit(" ", 1)[1]
        assert re.fullmatch(r"https://127\.0\.0\.1:[1-9]\d*", url)
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=url, verify=trusted, timeout=30) as client:
            answer = client.post("/v1/chat/completions", json=chat("tiny", max_tokens=3))
            assert answer.status_code == 200, answer.text
            body = chat("tiny", max_tokens=3, stream=True)
            streamed = client.post("/v1/chat/completions", json=body).text
            assert streamed.rstrip().endswith("data: [DONE]")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health".replace("https", "http"))
        of_health = {
            "HCX_HTTP__PORT": url.rsplit(":", 1)[1],
            "HCX_HTTP__TLS_CERTIFICATE_FILE": certificate,
        }
        assert health(tmp_path, of_health).returncode == 0
        assert health(tmp_path, {**of_health, "HCX_HTTP__TLS_CERTIFICATE_FILE": "null"}).returncode
        assert served.end() == 0


def test_a_certificate_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path)
    _, other_key = make_certificate(tmp_path, "other")
    _, locked_key = make_certificate(tmp_path, "locked", password="secret")
    (tmp_path / "text").write_text("no certificate")
    text, missing = str(tmp_path / "text"), str(tmp_path / "missing")

    def said(certificate_file: str, key_file: str, **http: str) -> str:
        monkeypatch.setenv("HCX_HTTP__TLS_CERTIFICATE_FILE", certificate_file)
        monkeypatch.setenv("HCX_HTTP__TLS_KEY_FILE", key_file)
        for name, value in http.items():
            monkeypatch.setenv(f"HCX_HTTP__{name}", value)
        return refusal("serve", "--port", "0")

    together = "http.tls_certificate_file and http.tls_key_file belong together"
    assert said(certificate, "null") == said("null", key) == together
    unreadable = "cannot be read: No such file or directory"
    assert said(missing, key) == f"http.tls_certificate_file: {missing} {unreadable}"
    assert said(certificate, missing) == f"http.tls_key_file: {missing} {unreadable}"
    assert said(certificate, other_key) == f"{other_key} is not the key of {certificate}"
    assert said(certificate, locked_key) == f"http.tls_key_file: {locked_key} is encrypted"
    for pair in ((text, key), (certificate, text), (key, certificate)):
        assert "must hold a certificate and its key as PEM" in said(*pair)
    path = tmp_path / "socket"
    assert "http.unix_socket takes no TLS" in said(certificate, key, UNIX_SOCKET=str(path))
    assert not path.exists()


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """The path of a Unix socket may have about a hundred characters."""
    return tempfile.TemporaryDirectory(prefix="hcx-")


def test_a_unix_socket(tiny: Path) -> None:
    with short_folder() as folder:
        path = Path(folder, "socket")
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))  # and closed without being removed, as by a kill
        Path(folder, "settings.yaml").write_text("http: {unix_socket: socket}")
        settings = Path(folder, "settings.yaml")
        with serving("--model", tiny, "--config", settings) as served:
            assert served.banner.endswith(f", at unix:{path}")
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(
                transport=transport, base_url="http://localhost", timeout=30
            ) as client:
                assert client.get("/ready").status_code == 200
                answer = client.post("/v1/chat/completions", json=chat("tiny", max_tokens=3))
                assert answer.status_code == 200, answer.text
                body = chat("tiny", max_tokens=3, stream=True)
                streamed = client.post("/v1/chat/completions", json=body).text
                assert streamed.rstrip().endswith("data: [DONE]")
            of_health = {"HCX_HTTP__UNIX_SOCKET": str(path)}
            assert health(Path(folder), of_health).returncode == 0
            line = refusal("serve", "--model", tiny, "--config", settings)
            assert line == f"http.unix_socket: another server listens on {path}"
            assert path.is_socket()
            assert served.end() == 0
        assert not path.exists()
        assert health(Path(folder), of_health).returncode == 1


def test_a_unix_socket_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with short_folder() as folder:
        plain = Path(folder, "plain")
        plain.write_text("precious")
        missing = Path(folder, "missing", "socket")
        long = Path(folder, "x" * 150)
        for path, said in (
            (plain, f"{plain} exists and is not a socket"),
            (missing, f"cannot listen on {missing}: No such file or directory"),
            (long, f"cannot listen on {long}: AF_UNIX path too long"),
        ):
            monkeypatch.setenv("HCX_HTTP__UNIX_SOCKET", str(path))
            assert refusal("serve") == f"http.unix_socket: {said}"
        assert plain.read_text() == "precious"
        # A server that does not start leaves nothing behind.
        path = Path(folder, "socket")
        monkeypatch.setenv("HCX_HTTP__UNIX_SOCKET", str(path))
        assert "no such folder" in refusal("serve", "--model", tmp_path / "nothing")
        assert not path.exists()
