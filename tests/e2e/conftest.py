"""Real server processes, started as an operator starts them, and the `openai` client."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
READY_S = 240.0
ANSWER_S = 120.0


@dataclass(frozen=True)
class RunningServer:
    """A server process that said it is ready."""

    process: subprocess.Popen[bytes]
    url: str
    admin_url: str
    client: openai.OpenAI
    model: str

    @property
    def worker_pid(self) -> int:
        """The engine process: the child that uses most memory."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return max(map(int, children.read_text().split()), key=resident_pages)

    def metrics(self) -> dict[str, float]:
        """What a scraper reads now, by name and labels as they are printed."""
        text = httpx.get(f"{self.admin_url}/metrics", timeout=ANSWER_S).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def ask(self, content: object, **fields: Any) -> str:
        """The greedy answer to one user message, cut short where it does not end."""
        completion = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
            **({"temperature": 0, "max_tokens": 100} | fields),
        )
        return completion.choices[0].message.content or ""


def resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


@contextlib.contextmanager
def serving(
    folder: Path, *flags: str, api_key: str = "none", **settings: object
) -> Iterator[RunningServer]:
    """`hcx-server serve` on a free port until the block ends; then it must exit with 0."""
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("HCX_")}
    environment |= {f"HCX_{name}": str(value) for name, value in settings.items()}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "server", "serve", "--port", "0", *flags],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = address_in(log, process)
            found = re.search(r"metrics at (http://\S+)/metrics$", log.read_text(), re.MULTILINE)
            assert found, log.read_text()
            client = openai.OpenAI(
                base_url=f"{url}/v1", api_key=api_key, timeout=ANSWER_S, max_retries=0
            )
            with client:
                yield RunningServer(process, url, found[1], client, client.models.list().data[0].id)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that the server's one line names when it is ready."""
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        found = re.search(r"^hcx-server .* at (http://\S+)$", log.read_text(), re.MULTILINE)
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready in time:\n{log.read_text()}")


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def picture_url(picture: Image.Image, picture_format: str = "PNG", **options: Any) -> str:
    """The picture as a `data:` URL in one of the formats that Pillow writes."""
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **options)
    return data_url(encoded.getvalue(), f"image/{picture_format.lower()}")


def with_picture(question: str, url: str) -> list[dict[str, object]]:
    """The content of a message: a picture, then a question."""
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]


def with_video(question: str, url: str) -> list[dict[str, object]]:
    return [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": question},
    ]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the official layout with random weights and two thin layers."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    subprocess.run(
        [sys.executable, "tools/random_checkpoint.py", str(folder), "--size", "tiny"],
        cwd=REPOSITORY,
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    return folder
