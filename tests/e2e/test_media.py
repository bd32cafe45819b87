"""Media by every way that a request can send them, through the real server and clients."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageDraw

from tests.e2e.conftest import REPOSITORY, RunningServer, picture_url, serving

QUESTION = {"type": "text", "text": "What is in the picture?"}
CLIP = (REPOSITORY / "docs" / "example.mp4").read_bytes()
SECRET = b"nobody may read this"


def picture() -> bytes:
    return (REPOSITORY / "docs" / "example.png").read_bytes()


class Host:
    """Files over HTTP on this machine; counts what it was asked for."""

    def __init__(self, files: dict[str, bytes], headers: dict[str, str] | None = None) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                data = files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("content-length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    files = {"/a.png": picture(), "/clip.mp4": CLIP, "/text": b"hello"}
    host = Host(files, {"cache-control": "max-age=60"})
    yield host
    host.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "local").mkdir()
    (folder / "local" / "그림.png").write_bytes(picture())
    (folder / "secret").write_bytes(SECRET)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, host: Host) -> Iterator[RunningServer]:
    with serving(
        folder,
        MEDIA__ALLOWED_PRIVATE_HOSTS='["127.0.0.0/8"]',
        MEDIA__ALLOWED_PORTS=json.dumps([host.port]),
        MEDIA__LOCAL_ROOT=folder / "local",
        MEDIA__FILES_DIR=folder / "files",
        MEDIA__SPOOL_DIR=folder,
    ) as server:
        yield server


def ask(server: RunningServer, *content: Any, **more: Any) -> httpx.Response:
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": [*content, QUESTION]}],
        "temperature": 0,
        "max_tokens": 40,
        **more,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def answered(response: httpx.Response) -> tuple[str, list[dict[str, Any]]]:
    assert response.status_code == 200, response.text
    completion = response.json()
    media: list[dict[str, Any]] = completion["usage"].get("media", [])
    return completion["choices"][0]["message"]["content"], media


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **more}


def test_every_way_to_send_a_picture_gives_one_answer(
    server: RunningServer, host: Host, folder: Path
) -> None:
    encoded = base64.b64encode(picture()).decode()
    stored = server.client.files.create(file=("그림.png", picture()), purpose="vision")
    ways: list[dict[str, Any]] = [
        image(f"data:image/png;base64,{encoded}"),
        image(encoded),
        image(host.url("/a.png")),
        image("./그림.png"),
        image((folder / "local" / "그림.png").as_uri()),
        image(stored.id),
        {"type": "file", "file": {"file_id": stored.id}},
        {"type": "file", "file": {"file_data": f"data:image/png;base64,{encoded}"}},
        {"type": "input_image", "file_id": stored.id},
        {"type": "input_file", "file_data": encoded, "filename": "그림.png"},
    ]
    answers = {answered(ask(server, way))[0] for way in ways if "filename" not in way}
    assert len(answers) == 1, answers
    assert "red" in answers.pop()
    assert answered(ask(server, ways[-1]))[1][0]["width"] == 320


def test_what_is_told_of_media(server: RunningServer, host: Host) -> None:
    host.asked.clear()
    clip = {"type": "video_url", "video_url": {"url": host.url("/clip.mp4")}}
    response = ask(server, image(host.url("/a.png")), clip, media_options={"max_frames": 3})
    _, (first, second) = answered(response)
    assert (first["type"], first["width"], first["height"]) == ("image", 320, 240)
    assert first["grids"] == 1
    assert (second["type"], second["frames"], second["path"]) == (
        "video",
        3,
        "messages[0].content[1]",
    )
    assert second["duration_s"] == pytest.approx(2.4)
    assert second["options"]["max_frames"] == 3
    details = response.json()["usage"]["prompt_tokens_details"]
    assert (first["tokens"], second["tokens"]) == (
        details["image_tokens"],
        details["video_tokens"],
    )
    timings = dict(each.split(";dur=") for each in response.headers["server-timing"].split(", "))
    assert list(timings) == ["fetch", "decode", "preprocess", "encode"]
    for stage in timings:
        total = first[f"{stage}_ms"] + second[f"{stage}_ms"]
        assert float(timings[stage]) == pytest.approx(total, abs=0.2)
    assert second["encode_ms"] > 0

    _, again = answered(
        ask(server, image(host.url("/a.png")), clip, media_options={"max_frames": 3})
    )
    assert [each["cache"] for each in again] == ["hit", "hit"]
    assert [each["encode_ms"] for each in again] == [0, 0]
    assert host.asked.count("/clip.mp4") == 1  # it may be kept for a minute

    _, other = answered(ask(server, clip, media_options={"max_frames": 2}))
    assert other[0]["cache"] == "bytes"
    metrics = server.metrics()
    assert metrics['hcx_media_total{kind="video",outcome="hit"}'] >= 1
    assert metrics['hcx_media_stage_seconds_count{kind="video",stage="encode"}'] >= 2
    assert metrics["hcx_decoder_processes"] == 2
    assert metrics["hcx_finished_cache_bytes"] > 0


def test_a_stream_tells_the_same_in_its_last_chunk(server: RunningServer) -> None:
    content: Any = [image(picture_url(Image.new("RGB", (300, 200), (9, 200, 90)))), QUESTION]
    with server.client.chat.completions.with_streaming_response.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=8,
    ) as response:
        assert "encode;dur=" in response.headers["server-timing"]
        frames = [line for line in response.iter_lines() if line.startswith("data: {")]
    usage = json.loads(frames[-1].removeprefix("data: "))["usage"]
    assert usage["media"][0]["width"] == 300


def form(
    server: RunningServer, *parts: tuple[str, Any], stream: bool = False, content: Any = None
) -> httpx.Response:
    content = content or [{"type": "video_url", "video_url": {"url": "attachment:clip"}}]
    request = {
        "model": server.model,
        "messages": [{"role": "user", "content": [*content, QUESTION]}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": stream,
    }
    files = [("request", (None, json.dumps(request), "application/json")), *parts]
    return httpx.post(f"{server.url}/v1/chat/completions", files=files, timeout=60)


def test_a_request_may_bring_its_files_as_they_are(server: RunningServer) -> None:
    whole = form(server, ("clip", ("영상.mp4", CLIP)))
    said, media = answered(whole)
    assert "circle" in said
    assert media[0]["frames"] == 6
    streamed = form(server, ("clip", ("a.mp4", CLIP)), stream=True)
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in streamed.text.splitlines()
        if line.startswith("data: {")
    ]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no part named 'clip'"),
        ([("clip", ("a", CLIP)), ("more", ("b", b"x"))], "refers to the part 'more'"),
        ([("clip", ("a", CLIP)), ("clip", ("b", CLIP))], "two parts named 'clip'"),
        ([("clip", ("a", b"text"))], "no accepted container"),
        ([("clip", ("a", CLIP[:200]))], "messages[0].content[0], decode"),
    ],
)
def test_faulty_forms_are_refused(
    server: RunningServer, parts: list[Any], message: str, stream: bool
) -> None:
    response = form(server, *parts, stream=stream)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_form_is_decoded_while_the_rest_arrives(server: RunningServer) -> None:
    """A first file that cannot be used is told before the second has been sent."""
    content = [image("attachment:a"), image("attachment:b")]
    request = {"model": server.model, "messages": [{"role": "user", "content": content}]}

    head = b'--x\r\ncontent-disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n'
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            b"content-type: multipart/form-data; boundary=x\r\n\r\n"
            + head % (b"request", json.dumps(request).encode())
            + head % (b"a", b"no picture")
            + head % (b"b", b"of which there would be more")
        )
        answer = connection.makefile("rb").read()  # it closes: the body is not complete
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"unsupported_image_media_type" in answer


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("http://127.0.0.1:1/a.png", "invalid_image_url"),
        ("http://169.254.169.254/latest/meta-data", "invalid_image_url"),
        ("http://user:key@example.com/a.png", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        ("../secret", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("file:///proc/self/environ", "invalid_image_url"),
        ("./missing.png", "invalid_image_url"),
        ("file-00000000000000000000000000000000", "file_not_found"),
        ("attachment:a", "invalid_value"),
    ],
)
def test_what_may_not_be_read_is_not(server: RunningServer, source: str, code: str) -> None:
    response = ask(server, image(source))
    error = response.json()["error"]
    assert error["code"] == code
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert error["message"].startswith("messages[0].content[0], fetch: ")
    assert SECRET.decode() not in response.text


def test_what_a_host_gives_wrongly_is_the_client_s_error(server: RunningServer, host: Host) -> None:
    missing = ask(server, image(host.url("/none"))).json()["error"]
    assert missing["code"] == "failed_to_download_image"
    assert "404" in missing["message"]
    text = ask(server, image(host.url("/text"))).json()["error"]
    assert text["code"] == "unsupported_image_media_type"


def test_a_request_may_go_on_without_a_medium(server: RunningServer, host: Host) -> None:
    bad = image(host.url("/none"), on_error="skip")
    said, media = answered(ask(server, image("./그림.png"), bad))
    assert media[1]["error"] == "failed_to_download_image"
    assert said == answered(ask(server, image("./그림.png")))[0]
    _, media = answered(ask(server, bad | {"on_error": "placeholder"}))
    assert [each["tokens"] for each in media] == [0]
    with pytest.raises(openai.BadRequestError, match="empty"):
        server.client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": [bad]}],  # type: ignore[list-item]
        )


def test_a_budget_of_tokens(server: RunningServer) -> None:
    large = Image.new("RGB", (900, 700), (200, 200, 200))
    ImageDraw.Draw(large).ellipse((100, 100, 500, 500), fill=(200, 20, 20))
    part = image(picture_url(large))
    _, (full,) = answered(ask(server, part))
    _, (less,) = answered(
        ask(server, part, media_options={"visual_token_budget": full["tokens"] - 1})
    )
    assert less["tokens"] < full["tokens"]
    assert less["grids"] < full["grids"]
    refused = ask(server, part, media_options={"visual_token_budget": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "media_options.visual_token_budget"


def test_many_hostile_files_leave_everything_as_it_was(server: RunningServer) -> None:
    """While they come, an answer is what it is alone."""
    alone = server.ask("Tell.", max_tokens=60)
    before = files_open(server)
    bombs = io.BytesIO()
    Image.new("1", (12_000, 3_000)).save(bombs, "PNG")
    hostile = [
        bombs.getvalue(),
        picture()[:-60],
        b"\x89PNG\r\n\x1a\n" + bytes(300),
        b"GIF89a" + bytes(range(256)),
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"<svg/>",
    ]
    statuses = []
    beside: list[str] = []
    for index, data in enumerate(hostile):
        asking = threading.Thread(target=lambda: beside.append(server.ask("Tell.", max_tokens=60)))
        asking.start()
        kind = "video" if index % 2 else "image"
        part = {
            "type": f"{kind}_url",
            f"{kind}_url": {"url": base64.b64encode(data).decode()},
        }
        statuses.append(ask(server, part).status_code)
        asking.join()
    assert set(statuses) <= {200, 400}
    assert set(beside) == {alone}
    deadline_s = time.monotonic() + 10
    while files_open(server) != before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert files_open(server) == before
    assert httpx.get(f"{server.url}/ready").status_code == 200


def files_open(server: RunningServer) -> list[str]:
    """What the server's descriptors refer to, without its connections."""
    found = []
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(descriptor))
    return sorted(each for each in found if not each.startswith(("socket:", "pipe:")))


def test_a_dry_run_tells_what_the_answer_would_take(server: RunningServer) -> None:
    part = image("./그림.png")
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": [part, part, QUESTION]}],
        "max_tokens": 5,
    }
    url = f"{server.url}/v1/chat/completions"
    told = httpx.post(f"{url}?dry_run=true", json=body, timeout=60).json()
    answered = httpx.post(url, json=body, timeout=60).json()["usage"]
    assert told["usage"]["prompt_tokens"] == answered["prompt_tokens"]
    assert [each["tokens"] for each in told["usage"]["media"]] == [
        each["tokens"] for each in answered["media"]
    ]
    assert told["prompt"].count("<|im_start|>user (vector)") == 2
    assert told["sampling"]["max_tokens"] == 5
