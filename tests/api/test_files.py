"""Uploads over real sockets, with the real client."""

from __future__ import annotations

import hashlib
import json
import resource
import socket
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from server.api.multipart import WRITE_BYTES
from server.config import HttpConfig, MediaConfig
from server.media.store import FileStore
from tests.conftest import Serve, Server, assert_error, chat, running, until

URL = "/v1/files"
QUOTA = 5 * WRITE_BYTES
CAP = 3 * WRITE_BYTES
TTL_S = 100_000.0
KEYS = {"ann": "sk-ann", "bob": "sk-bob"}
WITH_KEYS = HttpConfig(
    api_keys={name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()},
    max_body_bytes=10_000,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(serve: Serve, tmp_path: Path, clock: Clock) -> Callable[[], Server]:
    """Start a server on one and the same folder."""

    def started() -> Server:
        return serve(
            http=WITH_KEYS,
            media=MediaConfig(max_video_bytes=CAP),
            files=FileStore(tmp_path, TTL_S, QUOTA, clock),
        )

    return started


@pytest.fixture
def server(start: Callable[[], Server]) -> Server:
    return start()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `refusing` would keep files."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def refusing(build: Callable[..., FastAPI], folder: Path) -> Iterator[Server]:
    """For tests that leave no file, so that they need not wait for a server of their own."""
    app = build(
        http=WITH_KEYS,
        media=MediaConfig(max_video_bytes=CAP),
        files=FileStore(folder, TTL_S, QUOTA),
    )
    with running(app) as served:
        yield served


@pytest.fixture
def clients(server: Server) -> Iterator[dict[str, openai.OpenAI]]:
    made = {name: client_of(server, name) for name in KEYS}
    yield made
    for client in made.values():
        client.close()


@pytest.fixture
def ann(clients: dict[str, openai.OpenAI]) -> openai.OpenAI:
    return clients["ann"]


@pytest.fixture
def bob(clients: dict[str, openai.OpenAI]) -> openai.OpenAI:
    return clients["bob"]


def client_of(server: Server, name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[name], max_retries=0)


def bearer(name: str = "ann") -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def put(client: openai.OpenAI, data: bytes = b"data", name: str = "a.png") -> Any:
    return client.files.create(file=(name, data), purpose="vision")


Form = list[tuple[str, Any]]
GOOD: Form = [("purpose", (None, "vision")), ("file", ("a.png", b"data"))]


def post(server: Server, form: Form, **options: Any) -> httpx.Response:
    """`form` in the order given, a field's value as (None, text)."""
    return server.http.post(URL, files=form, headers=bearer(), **options)


def nothing_left(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_the_openai_client_finds_all_it_needs(ann: openai.OpenAI) -> None:
    data = bytes(range(256)) * 10_000
    file = ann.files.create(file=("clip.mp4", data), purpose="user_data")
    assert file.model_dump(exclude={"id"}, exclude_none=True) == {
        "object": "file",
        "bytes": len(data),
        "created_at": 1_700_000_000,
        "expires_at": 1_700_100_000,
        "filename": "clip.mp4",
        "purpose": "user_data",
        "status": "processed",
    }
    assert ann.files.retrieve(file.id) == file
    assert ann.files.content(file.id).read() == data
    assert [each.id for each in ann.files.list()] == [file.id]
    deleted = ann.files.delete(file.id)
    assert deleted.model_dump() == {"id": file.id, "object": "file", "deleted": True}
    assert list(ann.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        ann.files.retrieve(file.id)


def test_lists_in_pages(ann: openai.OpenAI, server: Server, clock: Clock) -> None:
    made = []
    for _ in range(5):
        clock.now_s += 1
        made.append(put(ann).id)
    assert [each.id for each in ann.files.list(limit=2)] == made[::-1]
    assert [each.id for each in ann.files.list(limit=2, order="asc", purpose="vision")] == made
    assert list(ann.files.list(purpose="user_data")) == []
    page = server.http.get(f"{URL}?limit=2&after={made[3]}", headers=bearer()).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[2], made[1])
    empty = server.http.get(f"{URL}?after={made[0]}", headers=bearer()).json()
    assert empty == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_content_is_handed_out_as_nothing_but_bytes(ann: openai.OpenAI, server: Server) -> None:
    file = put(ann, b"<script>", "고양이 \"';.html")
    response = server.http.get(f"{URL}/{file.id}/content", headers=bearer())
    assert (response.status_code, response.content) == (200, b"<script>")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-length"] == "8"
    assert response.headers["x-content-type-options"] == "nosniff"
    disposition = response.headers["content-disposition"]
    assert disposition.startswith("attachment; filename*=UTF-8''%EA") and disposition.isascii()
    assert '"' not in disposition and disposition.count(";") == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_korean_names_come_back_as_they_were(ann: openai.OpenAI, form: Any) -> None:
    name = unicodedata.normalize(form, "고양이 사진.png")
    file = put(ann, name=name)
    assert file.filename == name
    assert ann.files.retrieve(file.id).filename == name


def test_two_keys_cannot_see_each_others_files(
    ann: openai.OpenAI, bob: openai.OpenAI, server: Server
) -> None:
    file, other = put(ann), put(bob)
    assert [each.id for each in ann.files.list()] == [file.id]
    assert [each.id for each in bob.files.list()] == [other.id]
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answers = []
        for file_id in (file.id, "file-" + "x" * 32):
            response = server.http.request(method, f"{URL}/{file_id}{path}", headers=bearer("bob"))
            error = assert_error(response, 404, "file_not_found", param="file_id")
            answers.append(error["message"].replace(file_id, ""))
        assert answers[0] == answers[1]
    response = server.http.get(f"{URL}?after={file.id}", headers=bearer("bob"))
    assert_error(response, 404, "file_not_found", param="after")
    assert ann.files.content(file.id).read() == b"data"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", [URL, f"{URL}/file-x", f"{URL}/file-x/content"])
def test_without_a_key_there_is_nothing(refusing: Server, method: str, path: str) -> None:
    assert_error(refusing.http.request(method, path), 401, "invalid_api_key")


def test_a_full_quota_is_told_and_need_not_be_tried_again(
    ann: openai.OpenAI, bob: openai.OpenAI, tmp_path: Path
) -> None:
    first = put(ann, b"x" * CAP)
    with pytest.raises(openai.APIStatusError) as caught:
        put(ann, b"x" * CAP)
    assert caught.value.status_code == 507
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert_error(caught.value.response, 507, "storage_full")
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    put(bob, b"x" * CAP)
    ann.files.delete(first.id)
    put(ann, b"x" * CAP)


def test_expired_files_are_gone(ann: openai.OpenAI, clock: Clock) -> None:
    short = ann.files.create(
        file=("a.png", b"data"),
        purpose="vision",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    long = put(ann)
    assert short.expires_at == short.created_at + 3600
    clock.now_s += 3600
    assert [each.id for each in ann.files.list()] == [long.id]
    with pytest.raises(openai.NotFoundError):
        ann.files.content(short.id)
    clock.now_s += TTL_S
    assert list(ann.files.list()) == []


def test_files_survive_a_restart(
    ann: openai.OpenAI, server: Server, start: Callable[[], Server]
) -> None:
    file = put(ann, b"kept")
    server.uvicorn.should_exit = True
    with client_of(start(), "ann") as again:
        assert again.files.retrieve(file.id) == file
        assert again.files.content(file.id).read() == b"kept"


def test_fields_may_come_in_any_order(server: Server) -> None:
    expiry: Form = [
        ("expires_after[seconds]", (None, "3600")),
        ("expires_after[anchor]", (None, "created_at")),
    ]
    for form in (GOOD, GOOD[::-1], [GOOD[1], *expiry, GOOD[0]], [*expiry, *GOOD]):
        response = post(server, form)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json; charset=utf-8"


def field(name: str, text: str) -> tuple[str, Any]:
    return (name, (None, text))


FILE, PURPOSE = GOOD[1], GOOD[0]
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        ([PURPOSE], "missing_required_parameter", "file"),
        ([FILE], "missing_required_parameter", "purpose"),
        ([PURPOSE, ("file", ("a.png", b""))], "invalid_value", "file"),
        ([PURPOSE, field("file", "text")], "invalid_value", "file"),
        ([field("purpose", "batch"), FILE], "invalid_value", "purpose"),
        ([field("purpose", ""), FILE], "invalid_value", "purpose"),
        ([("purpose", (None, b"\xff")), FILE], "invalid_value", "purpose"),
        ([field("purpose", "x" * 1000), FILE], "invalid_value", "purpose"),
        ([*GOOD, field("metadata", "x")], "unknown_parameter", "metadata"),
        ([field("한", "x"), *GOOD], "unknown_parameter", "?"),
        ([*GOOD, PURPOSE], "invalid_value", None),
        ([*GOOD, FILE], "invalid_value", None),
        ([PURPOSE, ("file", ("..", b"data"))], "invalid_value", None),
        ([PURPOSE, ("file", ("x" * 256, b"data"))], "invalid_value", None),
        ([*GOOD, field(SECONDS, "3600")], "missing_required_parameter", ANCHOR),
        ([*GOOD, field(ANCHOR, "created_at")], "missing_required_parameter", SECONDS),
        ([*GOOD, field(ANCHOR, "now"), field(SECONDS, "3600")], "invalid_value", ANCHOR),
        *(
            ([*GOOD, field(ANCHOR, "created_at"), field(SECONDS, each)], "invalid_value", SECONDS)
            for each in ("", "3599", "2592001", "100001", "+3600", "3600.0", "９９９９", " 3600")
        ),
    ],
)
def test_bad_forms_are_refused(
    refusing: Server, folder: Path, form: Form, code: str, param: str | None
) -> None:
    assert_error(post(refusing, form), 400, code, param=param)
    until(lambda: nothing_left(folder))


@pytest.mark.parametrize(
    ("path", "code", "param"),
    [
        (f"{URL}?limit=0", "invalid_value", "limit"),
        (f"{URL}?limit=10001", "invalid_value", "limit"),
        (f"{URL}?limit=-1", "invalid_value", "limit"),
        (f"{URL}?limit=", "invalid_value", "limit"),
        (f"{URL}?limit=1&limit=2", "invalid_value", "limit"),
        (f"{URL}?order=up", "invalid_value", "order"),
        (f"{URL}?purpose=batch", "invalid_value", "purpose"),
        (f"{URL}?before=x", "unknown_parameter", "before"),
        (f"{URL}/file-x?limit=1", "unknown_parameter", "limit"),
        (f"{URL}/file-x/content?download=1", "unknown_parameter", "download"),
    ],
)
def test_bad_queries_are_refused(refusing: Server, path: str, code: str, param: str) -> None:
    assert_error(refusing.http.get(path, headers=bearer()), 400, code, param=param)


def test_a_query_is_refused_whatever_the_method(refusing: Server) -> None:
    assert_error(post(refusing, GOOD, params={"x": "1"}), 400, "unknown_parameter", param="x")
    response = refusing.http.delete(f"{URL}/file-x?x=1", headers=bearer())
    assert_error(response, 400, "unknown_parameter", param="x")


@pytest.mark.parametrize("file_id", ["file-x", "x" * 5000, "..%2F..%2Fetc%2Fpasswd", "%00", "한글"])
def test_ids_that_nobody_gave(refusing: Server, file_id: str) -> None:
    response = refusing.http.get(f"{URL}/{file_id}", headers=bearer())
    assert response.status_code == 404 and response.json()["error"]["code"] in (
        "file_not_found",
        "unknown_url",
    )


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", URL, "GET, HEAD, POST"),
        ("DELETE", URL, "GET, HEAD, POST"),
        ("POST", f"{URL}/file-x", "DELETE, GET, HEAD"),
        ("PATCH", f"{URL}/file-x", "DELETE, GET, HEAD"),
        ("DELETE", f"{URL}/file-x/content", "GET, HEAD"),
    ],
)
def test_the_wrong_method_is_told_all_right_ones(
    refusing: Server, method: str, path: str, allow: str
) -> None:
    response = refusing.http.request(method, path, headers=bearer())
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "text/plain", "multipart/mixed"]
)
def test_only_forms_are_taken(refusing: Server, content_type: str | None) -> None:
    headers = bearer() | ({} if content_type is None else {"content-type": content_type})
    response = refusing.http.post(URL, content=b"{}", headers=headers)
    assert_error(response, 415, "unsupported_content_type")


def test_a_form_without_boundary_is_no_form(refusing: Server) -> None:
    headers = bearer() | {"content-type": "multipart/form-data"}
    assert_error(refusing.http.post(URL, content=b"x", headers=headers), 400, "invalid_value")


def test_without_a_folder_there_are_no_such_urls(shared_server: Server) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        for path in (URL, f"{URL}/file-x", f"{URL}/file-x/content"):
            assert_error(shared_server.http.request(method, path), 404, "unknown_url")


# Bodies while they arrive -------------------------------------------------------------------------


def test_the_two_routes_take_longer_forms_than_json(server: Server) -> None:
    assert post(server, [PURPOSE, ("file", ("a", b"x" * 20_000))]).status_code == 200
    long = chat("x" * 20_000)
    response = server.http.post("/v1/chat/completions", json=long, headers=bearer())
    assert_error(response, 413, "request_too_large")
    headers = bearer() | {"content-type": "application/json"}
    response = server.http.post(URL, content=b"x" * 20_000, headers=headers)
    assert_error(response, 413, "request_too_large")


def test_a_form_has_a_limit_too(serve: Serve, tmp_path: Path) -> None:
    http = WITH_KEYS.model_copy(update={"max_multipart_bytes": 20_000})
    server = serve(http=http, files=FileStore(tmp_path, TTL_S, QUOTA))
    large: Form = [PURPOSE, ("file", ("a", b"x" * 20_000))]
    assert_error(post(server, large), 413, "request_too_large")
    request = server.http.build_request("POST", URL, files=large, headers=bearer())
    headers = {key: value for key, value in request.headers.items() if key != "content-length"}
    response = server.http.post(URL, content=iter([request.read()]), headers=headers)
    assert_error(response, 413, "request_too_large")
    until(lambda: nothing_left(tmp_path))


def test_a_file_over_the_cap_is_refused_as_it_arrives(server: Server, tmp_path: Path) -> None:
    response = post(server, [PURPOSE, ("file", ("a", b"x" * (CAP + 1)))])
    assert_error(response, 413, "request_too_large", param="file")
    until(lambda: nothing_left(tmp_path))
    assert post(server, [PURPOSE, ("file", ("a", b"x" * CAP))]).status_code == 200


def head(length: int) -> bytes:
    return (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['ann']}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    ).encode()


def test_a_client_that_leaves_takes_its_file_along(
    server: Server, ann: openai.OpenAI, tmp_path: Path
) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head(50 * WRITE_BYTES) + b"x" * (2 * WRITE_BYTES))
            until(lambda: any(each.stat().st_size >= WRITE_BYTES for each in tmp_path.iterdir()))
        until(lambda: nothing_left(tmp_path))
    put(ann, b"x" * CAP)
    put(ann, b"x" * (QUOTA - CAP))


def test_a_body_that_stops_is_not_waited_for(serve: Serve, tmp_path: Path) -> None:
    http = WITH_KEYS.model_copy(update={"receive_timeout_s": 0.3})
    server = serve(http=http, files=FileStore(tmp_path, TTL_S, QUOTA))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(1000) + b"x")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")
    until(lambda: nothing_left(tmp_path))


def test_a_malformed_form_leaves_nothing(refusing: Server, folder: Path) -> None:
    headers = bearer() | {"content-type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx'
    for body in (start, start + b"\r\n--b\r\nbad", b"", b"x", start + b"\r\n--b \x00"):
        response = refusing.http.post(URL, content=body, headers=headers)
        assert_error(response, 400, "invalid_value")
    until(lambda: nothing_left(folder))


def test_a_full_disk_is_told(server: Server, ann: openai.OpenAI, tmp_path: Path) -> None:
    """As where the quota ends, but the disk says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITE_BYTES, hard))
    try:
        response = post(server, [PURPOSE, ("file", ("a", b"x" * (WRITE_BYTES + 1)))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = assert_error(response, 507, "storage_full")
    assert response.headers["x-should-retry"] == "false"
    assert str(tmp_path) not in json.dumps(error)
    until(lambda: nothing_left(tmp_path))
    put(ann)


def test_a_reader_that_leaves_harms_nobody(server: Server, ann: openai.OpenAI) -> None:
    file = put(ann, b"x" * CAP)
    for _ in range(3):
        with server.http.stream("GET", f"{URL}/{file.id}/content", headers=bearer()) as response:
            next(response.iter_raw())
    ann.files.delete(file.id)
    until(lambda: server.app.state.lifecycle.num_running == 0)
