"""Forms as they arrive: any pieces give the same events, and nothing malformed gets further."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from server.api.middleware import ClientGone
from server.api.multipart import (
    WRITE_BYTES,
    AttachmentLimits,
    Attachments,
    End,
    Event,
    MultipartReader,
    PartBegin,
    PartData,
    PartEnd,
)
from server.errors import InvalidRequest, MediaFileTooLarge, RequestReceiveTimeout, StorageFull

TYPE = "multipart/form-data; boundary=edge"
KOREAN = "고양이 사진.jpg"


def part(name: str, data: bytes = b"", *, filename: str | None = None) -> bytes:
    extra = "" if filename is None else f'; filename="{filename}"'
    return headed(f'Content-Disposition: form-data; name="{name}"{extra}', data)


def headed(headers: str, data: bytes = b"") -> bytes:
    return b"--edge\r\n" + headers.encode() + b"\r\n\r\n" + data + b"\r\n"


CLOSE = b"--edge--\r\n"


def read(chunks: list[bytes], *, content_type: str = TYPE, max_parts: int = 4) -> list[Event]:
    """The events of a whole body, the data of each part joined."""
    reader = MultipartReader(content_type, max_parts=max_parts)
    events: list[Event] = []
    for chunk in chunks:
        for event in reader.feed(chunk):
            last = events[-1] if events else None
            if isinstance(event, PartData) and isinstance(last, PartData):
                events[-1] = PartData(last.data + event.data)
            else:
                events.append(event)
    reader.finish()
    return events


def outcome(chunks: list[bytes]) -> list[Event] | None:
    """None where the body is refused."""
    try:
        return read(chunks)
    except InvalidRequest as error:
        assert error.status == 400 and error.code == "invalid_value"
        assert "expected" not in error.message.lower()
        return None


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(body)) for place in places), len(body)]
    return [body[start:stop] for start, stop in itertools.pairwise(edges)]


def test_parts_come_in_order_with_names_and_types() -> None:
    body = (
        part("a", b"1")
        + headed(
            'content-disposition: Form-Data; NAME="b c"; filename="x.PNG"\r\n'
            "Content-Type: Image/PNG\r\nX-Other: ignored",
            b"\x00\xff\r\n",
        )
        + headed("Content-Disposition: form-data; name=d")
        + CLOSE
    )
    assert read([body]) == [
        PartBegin("a", None, None),
        PartData(b"1"),
        PartEnd(),
        PartBegin("b c", "x.PNG", "image/png"),
        PartData(b"\x00\xff\r\n"),
        PartEnd(),
        PartBegin("d", None, None),
        PartEnd(),
        End(),
    ]


def test_a_form_may_be_empty() -> None:
    assert read([CLOSE]) == [End()]


@pytest.mark.parametrize("rest", [b"", b"trailing", b"\r\n--edge\r\nnot: headers", b"\xff" * 100])
def test_what_follows_the_closing_boundary_is_ignored(rest: bytes) -> None:
    body = part("a", b"1") + CLOSE
    assert read([body, rest]) == read([body + rest]) == read([body])


# What looks like the boundary and is not, and what brushes against it.
NEAR = [
    b"\r\n",
    b"\r",
    b"\n",
    b"-",
    b"--edge",
    b"\r\n--",
    b"\r\n--edg",
    b"\r\n--edgf",
    b"edge",
    b"x",
]
CONTENTS = st.lists(st.sampled_from(NEAR) | st.binary(max_size=5), max_size=12).map(b"".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(CONTENTS, max_size=3), CUTS)
def test_any_pieces_give_the_same_events(contents: list[bytes], places: list[int]) -> None:
    contents = [each for each in contents if b"\r\n--edge" not in b"\r\n" + each]
    body = b"".join(part(f"p{i}", each) for i, each in enumerate(contents)) + CLOSE
    events = read([body])
    assert [event.data for event in events if isinstance(event, PartData)] == [
        each for each in contents if each
    ]
    assert read(cut(body, places)) == events
    assert read([bytes([each]) for each in body]) == events


MARKS = [
    b"--edge",
    b"\r\n--edge",
    b"\r\n--edge--",
    b"\r\n--edge-",
    b"\r\n--edgex",
    b"\r\n",
    b"\r\n\r\n",
    b"\r",
    b"\n",
    b" ",
    b":",
    b"A: b",
    b'Content-Disposition: form-data; name="a"',
    b'content-disposition: form-data; name="b"; filename="c"\r\n\r\n',
]


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([b"", b"--edge\r\n", part("z", b"1")[:-2]]),
    st.lists(st.sampled_from(MARKS) | st.binary(max_size=4), max_size=20).map(b"".join),
    CUTS,
)
def test_no_bytes_crash_it_and_pieces_change_no_outcome(
    head: bytes, rest: bytes, places: list[int]
) -> None:
    body = head + rest
    whole = outcome([body])
    assert outcome(cut(body, places)) == whole
    assert outcome([bytes([each]) for each in body]) == whole


ENDLESS = "a" * 20_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"-",
        b"--edge",
        part("a", b"1"),
        part("a", b"1") + b"--edge-",
        b"preamble\r\n" + part("a") + CLOSE,
        b"\r\n" + part("a") + CLOSE,
        b"--other--\r\n",
        b"--edgeX\r\n",
        headed("Content-Disposition: attachment; name=a") + CLOSE,
        headed("Content-Disposition: form-data") + CLOSE,
        headed('Content-Disposition: form-data; name=""') + CLOSE,
        headed('Content-Disposition: form-data; name="a') + CLOSE,
        headed('Content-Disposition: form-data; name="a"; name="b"') + CLOSE,
        headed('Content-Disposition: form-data; name="a" b') + CLOSE,
        headed("Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=b")
        + CLOSE,
        headed("Content-Type: text/plain") + CLOSE,
        headed("Content-Disposition: form-data; name=a\r\n folded") + CLOSE,
        headed("Content-Disposition: form-data; name=a\r\nbad header: x") + CLOSE,
        headed("Content-Disposition: form-data; name=a\r\n: x") + CLOSE,
        headed("Content-Disposition: form-data; name=a\nX: y") + CLOSE,
        headed("Content-Disposition: form-data; name=a\r\nContent-Transfer-Encoding: base64")
        + CLOSE,
        part("a") + part("a") + CLOSE,
        part(unicodedata.normalize("NFC", "가")) + part(unicodedata.normalize("NFD", "가")) + CLOSE,
        b"".join(part(f"p{i}") for i in range(5)) + CLOSE,
        part("n" * 256) + CLOSE,
        part("a\x01") + CLOSE,
        part("a\u2028") + CLOSE,
        headed(f"Content-Disposition: form-data; name=a\r\nX: {ENDLESS}") + CLOSE,
        headed(f"{ENDLESS}: x") + CLOSE,
        headed("Content-Disposition: form-data; name=a" + "\r\nX: y" * 20) + CLOSE,
        headed("Content-Disposition: form-data; name=a" + f"\r\nX: {'y' * 2000}" * 10) + CLOSE,
        b'--edge\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n' + CLOSE,
    ],
)
def test_malformed_forms_are_refused(body: bytes) -> None:
    assert outcome([body]) is None
    assert outcome([bytes([each]) for each in body]) is None


def test_a_header_without_end_is_not_collected() -> None:
    reader = MultipartReader(TYPE, max_parts=1)
    reader.feed(b"--edge\r\nX: ")
    with pytest.raises(InvalidRequest):
        for _ in range(100):
            reader.feed(b"y" * 1000)


def test_data_is_handed_on_as_it_comes() -> None:
    reader = MultipartReader(TYPE, max_parts=1)
    reader.feed(part("a")[:-2])
    for _ in range(100):
        assert sum(len(each.data) for each in reader.feed(b"z" * 1000)) == 1000  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=edge", b"edge"),
        ('Multipart/Form-Data;charset=utf-8; BOUNDARY="e d\'g(e)+_,-./:=?"', b"e d'g(e)+_,-./:=?"),
        ("multipart/form-data; boundary=" + "x" * 70, b"x" * 70),
        ("multipart/form-data; boundary=edge;", b"edge"),
    ],
)
def test_boundaries(content_type: str, boundary: bytes) -> None:
    assert read([b"--" + boundary + b"--"], content_type=content_type) == [End()]


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="ends in space "',
        "multipart/form-data; boundary=" + "x" * 71,
        'multipart/form-data; boundary="a\r\nb"',
        'multipart/form-data; boundary="경계"',
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary=a{b",
        "multipart/form-data; boundary",
    ],
)
def test_bad_boundaries_are_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="boundary"):
        MultipartReader(content_type, max_parts=1)


def sent_as(parameters: str) -> str | None:
    body = headed(f"Content-Disposition: form-data; name=f; {parameters}") + CLOSE
    (begin, *_) = read([body])
    assert isinstance(begin, PartBegin)
    return begin.filename


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("way", ["raw", "extended", "both"])
def test_korean_file_names(form: str, way: str) -> None:
    name = unicodedata.normalize(form, KOREAN)  # type: ignore[arg-type]
    raw, extended = f'filename="{name}"', f"filename*=UTF-8''{quote(name)}"
    ways = {"raw": raw, "extended": extended, "both": f'filename="x.jpg"; {extended}'}
    assert sent_as(ways[way]) == name


@pytest.mark.parametrize(
    ("parameters", "filename"),
    [
        ("filename=plain.png", "plain.png"),
        ('filename="a;b=c.png"', "a;b=c.png"),
        ('filename="a\\"b\\\\c"', "c"),
        ('filename="q\\"q"', 'q"q'),
        ('filename="q%22q"', 'q"q'),
        ('filename="100%.png"', "100%.png"),
        ('filename="/etc/passwd"', "passwd"),
        ('filename="../../x"', "x"),
        ('filename="C:\\dir\\x.png"', "x.png"),
        ("filename*=utf-8'ko'..%2F..%2Fx", "x"),
        ("filename*=ISO-8859-1''caf%E9", "café"),
        ("filename=\"\"; filename*=UTF-8''x", "x"),
        (f'filename="{"가" * 255}"', "가" * 255),
        (
            f'filename="{unicodedata.normalize("NFD", "각" * 255)}"',
            unicodedata.normalize("NFD", "각" * 255),
        ),
    ],
)
def test_file_names(parameters: str, filename: str) -> None:
    assert sent_as(parameters) == filename


@pytest.mark.parametrize(
    "parameters",
    [
        'filename=""',
        'filename="."',
        'filename="a/.."',
        'filename="folder/"',
        'filename="a\x00b"',
        'filename="a\tb"',
        'filename="a\x7fb"',
        'filename="a\x85b"',
        f'filename="{"x" * 256}"',
        "filename*=UTF-8''%00",
        "filename*=UTF-8''a%0Ab",
        "filename*=UTF-8''%ff",
        "filename*=UTF-8''%zz",
        "filename*=UTF-8''%e",
        "filename*=UTF-16''x",
        "filename*=x",
        "filename*=UTF-8''",
    ],
)
def test_bad_file_names_are_refused(parameters: str) -> None:
    with pytest.raises(InvalidRequest):
        sent_as(parameters)


# Attachments --------------------------------------------------------------------------------------

LIMITS = AttachmentLimits(
    max_attachments=4,
    max_attachment_bytes=4 * WRITE_BYTES,
    max_total_bytes=6 * WRITE_BYTES,
    max_request_bytes=1000,
)
GONE: Message = {"type": "http.disconnect"}


class Client:
    """The sending side: pieces of a body, one at a time, then silence."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message | Exception] = asyncio.Queue()

    def send(self, data: bytes, *, ends: bool = False) -> None:
        self._messages.put_nowait({"type": "http.request", "body": data, "more_body": not ends})

    def leave(self) -> None:
        self._messages.put_nowait(GONE)

    def fail(self, error: Exception) -> None:
        self._messages.put_nowait(error)

    async def receive(self) -> Message:
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def attachments(client: Client, tmp_path: Path, threads: ThreadPoolExecutor) -> Attachments:
    return Attachments(client.receive, TYPE, spool_folder=tmp_path, limits=LIMITS, threads=threads)


def pump(attachments: Attachments) -> asyncio.Task[None]:
    """What whoever waits for the client's leaving does."""

    async def pumping() -> None:
        while (await attachments.receive())["type"] != "http.disconnect":
            pass

    return asyncio.create_task(pumping())


REQUEST = part("request", b'{"a": 1}')
# A part has ended when the next one's boundary has come.
OPENED = b"--edge\r\n"


def after_opened(body: bytes) -> bytes:
    assert body.startswith(OPENED)
    return body.removeprefix(OPENED)


async def test_each_attachment_can_be_used_while_the_next_arrive(
    client: Client, attachments: Attachments
) -> None:
    big = os.urandom(2 * WRITE_BYTES + 5)
    client.send(REQUEST[:20])
    client.send(REQUEST[20:] + part("one", b"first")[:-4])
    assert await attachments.read_request() == b'{"a": 1}'
    pumping = pump(attachments)
    one, two = (asyncio.create_task(attachments.get(name)) for name in ("one", "두"))
    await asyncio.sleep(0.05)
    assert not one.done()
    body = part(unicodedata.normalize("NFD", "두"), big, filename=KOREAN)
    client.send(b"st\r\n" + body[:100])
    assert (await one).read() == b"first"
    assert not two.done()
    for start in range(100, len(body), 60_000):
        client.send(body[start : start + 60_000])
    client.send(part("empty") + CLOSE, ends=True)
    file = await two
    assert file.read() == big and file.num_bytes == len(big)
    assert (await attachments.get("empty")).num_bytes == 0
    assert (await attachments.get("one")) is (await one)
    await attachments.finish()
    assert not pumping.done()  # it goes on waiting for the client to leave
    client.leave()
    await pumping


async def test_it_leaves_nothing_behind(
    client: Client, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    attachments = Attachments(
        client.receive, TYPE, spool_folder=tmp_path, limits=LIMITS, threads=threads
    )
    num_open = len(os.listdir("/proc/self/fd"))
    client.send(REQUEST + part("one", b"x" * WRITE_BYTES) + part("two", b"x" * WRITE_BYTES)[:-9])
    await attachments.read_request()
    assert (await attachments.get("one")).num_bytes == WRITE_BYTES
    assert len(os.listdir("/proc/self/fd")) == num_open + 1
    assert list(tmp_path.iterdir()) == []
    del attachments
    async with asyncio.timeout(5):  # the thread that wrote may still hold its last result
        while len(os.listdir("/proc/self/fd")) > num_open:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "body", [CLOSE, part("other", b"{}") + CLOSE, part("other", b"{}"), part("Request") + CLOSE]
)
async def test_the_first_part_is_the_request(
    client: Client, attachments: Attachments, body: bytes
) -> None:
    client.send(body, ends=True)
    with pytest.raises(InvalidRequest, match="'request'") as caught:
        await attachments.read_request()
    assert caught.value.param == "request"


async def test_the_request_has_a_limit_of_its_own(client: Client, attachments: Attachments) -> None:
    client.send(part("request", b"x" * 1001)[:-2])
    with pytest.raises(InvalidRequest, match="1000") as caught:
        await attachments.read_request()
    assert (caught.value.status, caught.value.param) == (400, "request")


async def test_the_request_may_be_as_long_as_its_limit(
    client: Client, attachments: Attachments
) -> None:
    client.send(part("request", b"x" * 1000) + CLOSE, ends=True)
    assert len(await attachments.read_request()) == 1000
    await attachments.finish()


async def test_a_client_that_leaves_before_its_request(
    client: Client, attachments: Attachments
) -> None:
    client.send(REQUEST[:-12])
    client.leave()
    with pytest.raises(ClientGone):
        await attachments.read_request()


MIB = WRITE_BYTES
PUMPED_ERRORS: list[tuple[bytes, type[Exception], str]] = [
    (part("a", b"1"), InvalidRequest, "closing boundary"),
    (b"--edge\r\n\r\n", InvalidRequest, "content-disposition"),
    (part("a", b"x" * (4 * MIB + 1)) + CLOSE, MediaFileTooLarge, "'a' is larger"),
    (part("a", b"x" * (4 * MIB)) + part("b", b"x" * (3 * MIB)), MediaFileTooLarge, "together"),
    (part("request", b"again") + CLOSE, InvalidRequest, "two parts"),
    (b"".join(part(f"p{i}") for i in range(5)) + CLOSE, InvalidRequest, "more than 5"),
]


@pytest.mark.parametrize(("rest", "kind", "words"), PUMPED_ERRORS)
async def test_what_goes_wrong_reaches_everybody(
    client: Client, attachments: Attachments, rest: bytes, kind: type[Exception], words: str
) -> None:
    client.send(REQUEST + OPENED)
    await attachments.read_request()
    waiting = asyncio.create_task(attachments.get("never"))
    ending = asyncio.create_task(attachments.finish())
    pumping = pump(attachments)
    client.send(after_opened(rest), ends=True)
    for work in (waiting, ending, pumping, attachments.get("a"), attachments.receive()):
        with pytest.raises(kind, match=words):
            await work


async def test_an_error_of_the_connection_reaches_everybody(
    client: Client, attachments: Attachments
) -> None:
    client.send(REQUEST + part("a", b"1")[:-2])
    await attachments.read_request()
    waiting = asyncio.create_task(attachments.get("a"))
    pumping = pump(attachments)
    client.fail(RequestReceiveTimeout())
    for work in (pumping, waiting, attachments.finish()):
        with pytest.raises(RequestReceiveTimeout):
            await work


async def test_a_client_that_leaves_ends_all_waiting(
    client: Client, attachments: Attachments
) -> None:
    client.send(REQUEST + OPENED)
    await attachments.read_request()
    waiting = asyncio.create_task(attachments.get("a"))
    pumping = pump(attachments)
    client.leave()
    await pumping
    with pytest.raises(ClientGone):
        await waiting


async def test_an_attachment_that_does_not_come_is_named(
    client: Client, attachments: Attachments
) -> None:
    client.send(REQUEST + OPENED)
    await attachments.read_request()
    pumping = pump(attachments)
    waiting = asyncio.create_task(attachments.get("고양이\n"))
    client.send(after_opened(part("dog", b"1")) + CLOSE, ends=True)
    with pytest.raises(InvalidRequest, match=r"'\\uace0\\uc591\\uc774\\n'"):
        await waiting
    with pytest.raises(InvalidRequest, match="refers to the part 'dog'"):
        await attachments.finish()
    assert (await attachments.get("dog")).read() == b"1"
    await attachments.finish()
    client.leave()
    await pumping


async def test_a_slow_disk_does_not_hold_up_the_loop(client: Client, tmp_path: Path) -> None:
    """The threads are held; the loop, which fed them, goes on."""
    with ThreadPoolExecutor(1) as busy:
        attachments = Attachments(
            client.receive, TYPE, spool_folder=tmp_path, limits=LIMITS, threads=busy
        )
        released = asyncio.Event()
        loop = asyncio.get_running_loop()
        busy.submit(lambda: asyncio.run_coroutine_threadsafe(released.wait(), loop).result(10))
        client.send(REQUEST + OPENED)
        client.send(after_opened(part("a", b"x" * WRITE_BYTES)) + CLOSE, ends=True)
        await attachments.read_request()
        pumping = pump(attachments)
        waiting = asyncio.create_task(attachments.get("a"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        released.set()
        assert (await waiting).num_bytes == WRITE_BYTES
        client.leave()
        await pumping


@pytest.fixture
def full_disk() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITE_BYTES, hard))
    try:
        yield WRITE_BYTES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_told(
    client: Client, attachments: Attachments, full_disk: int
) -> None:
    client.send(REQUEST + OPENED)
    await attachments.read_request()
    waiting = asyncio.create_task(attachments.get("a"))
    pumping = pump(attachments)
    client.send(after_opened(part("a", b"x" * (2 * full_disk))) + CLOSE, ends=True)
    for work in (waiting, pumping):
        with pytest.raises(StorageFull):
            await work
