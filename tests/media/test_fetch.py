"""The whole way of a fetch against hosts that misbehave, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import MediaConfig
from server.errors import (
    ConfigError,
    DownloadFailed,
    InvalidMediaUrl,
    MediaError,
    MediaFileTooLarge,
    ShuttingDown,
    Unavailable,
)
from server.media.dial import Resolver, SystemResolver
from server.media.fetch import Fetched, Fetcher
from server.media.guard import Guard, IPAddress
from tests.media.hostile_host import (
    Behaviour,
    HostileHost,
    ScriptedResolver,
    answer,
    chunked,
    head,
    raw,
    redirect,
    stalls_after,
    trickles,
)

BODY = b"\x89PNG" + bytes(range(256)) * 4
LIMIT = 300_000
HERE: dict[str, Sequence[Sequence[str] | None]] = {"media.test": [["127.0.0.1"]]}
EVERYWHERE = ("0.0.0.0", "::")


def config_for(*hosts: HostileHost, **values: Any) -> MediaConfig:
    """Settings by which media.test may be fetched from, with deadlines a test can wait for."""
    return MediaConfig.model_validate(
        {
            "allowed_private_hosts": ("media.test",),
            "allowed_ports": tuple(host.port for host in hosts),
            "connect_timeout_s": 1.0,
            "first_byte_timeout_s": 1.0,
            "image_fetch_timeout_s": 5.0,
            "max_image_bytes": LIMIT,
            "max_video_bytes": 2 * LIMIT,
            **values,
        }
    )


@contextlib.asynccontextmanager
async def fetcher_for(
    config: MediaConfig, resolver: Resolver | None = None, **arguments: Any
) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(config, resolver=resolver or ScriptedResolver(HERE), **arguments)
    try:
        yield fetcher
    finally:
        await fetcher.close()
        if isinstance(resolver, SystemResolver):
            resolver.close()


async def fetch(fetcher: Fetcher, url: str, *, tenant: str = "a", cache_salt: str = "") -> Fetched:
    return await fetcher.fetch(url, kind="image", tenant=tenant, cache_salt=cache_salt)


async def error_of(fetcher: Fetcher, url: str) -> MediaError:
    with pytest.raises(MediaError) as caught:
        await fetch(fetcher, url)
    assert caught.value.kind == "image"
    assert "127.0.0.1" not in caught.value.message and "media.test" not in caught.value.message
    return caught.value


async def test_what_is_sent_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with HostileHost() as canary, HostileHost({"*": answer(BODY, "Set-Cookie: a=b")}) as host:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
        async with fetcher_for(config_for(host), user_agent="hcx-server/1") as fetcher:
            for _ in range(2):  # the second time with whatever the first one left behind
                fetched = await fetch(fetcher, f" {host.url('/고양이.png?b=c#d')}\n")
                assert fetched.cache == "miss"
                assert fetched.file.read() == BODY
                assert fetched.file.digest == hashlib.sha256(BODY).hexdigest()
        assert (
            host.heads
            == [
                "GET /%EA%B3%A0%EC%96%91%EC%9D%B4.png?b=c HTTP/1.1\r\n"
                f"Host: media.test:{host.port}\r\n"
                "User-Agent: hcx-server/1\r\n"
                "Accept: image/*, */*;q=0.5\r\n"
                "Accept-Encoding: identity\r\n"
                "Connection: close\r\n\r\n"
            ]
            * 2
        )
        assert canary.num_connections == 0


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(answer(BODY, "Content-Encoding: identity"), id="identity"),
        pytest.param(answer(BODY, "Content-Type: text/html"), id="wrong type"),
        pytest.param(chunked(BODY[:10], BODY[10:]), id="chunked"),
        pytest.param(raw(head(), BODY), id="until closed"),
        pytest.param(raw(b"HTTP/1.0 200 OK\r\n\r\n", BODY), id="HTTP/1.0"),
        pytest.param(
            raw(head(f"Content-Length: {len(BODY)}"), BODY + b"more"), id="more than said"
        ),
        pytest.param(raw(b"HTTP/1.1 103 Early\r\n\r\n", head(), BODY), id="informational"),
    ],
)
async def test_good_answers(behaviour: Behaviour) -> None:
    async with HostileHost({"*": behaviour}) as host, fetcher_for(config_for(host)) as fetcher:
        assert (await fetch(fetcher, host.url())).file.read() == BODY


NOT_HTTP = "broken off or not HTTP"


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        (answer(status="404 Not Found"), "answered 404"),
        (answer(BODY, status="206 Partial Content"), "answered 206"),
        (answer(BODY, status="500 Oh"), "answered 500"),
        (raw(head(status="204 No Content")), "answered 204"),
        (raw(head(status="304 Not Modified")), "answered 304"),
        (raw(head(status="300 Choices")), "answered 300"),
        (raw(head(status="302 Found")), "to nowhere"),
        (raw(head("Location: /a", "Location: /b", status="302 Found")), "to nowhere"),
        (answer(), "no bytes"),
        (chunked(), "no bytes"),
        (answer(BODY, "Content-Encoding: gzip"), "compressed"),
        (answer(BODY, "Content-Encoding: identity, gzip"), "compressed"),
        (raw(head("Transfer-Encoding: gzip, chunked"), BODY), NOT_HTTP),
        (raw(head("Content-Length: 5000"), BODY), NOT_HTTP),
        (raw(head("Content-Length: 5", "Content-Length: 6"), BODY), NOT_HTTP),
        (raw(head("Content-Length: -5"), BODY), NOT_HTTP),
        (raw(head("Content-Length: " + "9" * 5_000), BODY), NOT_HTTP),
        (raw(head("Transfer-Encoding: chunked"), b"zz\r\n", BODY), NOT_HTTP),
        (raw(head("Transfer-Encoding: chunked"), b"5\r\nabcdefgh\r\n"), NOT_HTTP),
        (chunked(BODY, end=b""), NOT_HTTP),
        (raw(b""), NOT_HTTP),
        (raw(b"HTTP/1.1 200 OK\r\nContent"), NOT_HTTP),
        (raw(b"\x00" * 1_000), NOT_HTTP),
        (raw(b"SSH-2.0-OpenSSH\r\n"), NOT_HTTP),
        (raw(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 200_000, b"\r\n\r\n"), NOT_HTTP),
        (raw(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 40_000, b"\r\n"), NOT_HTTP),
        (raw(head("X: a\x00b"), BODY), NOT_HTTP),
        (raw(head("Transfer-Encoding: chunked"), *[b"1\r\nx\r\n"] * 9_000), "too many pieces"),
    ],
)
async def test_bad_answers(behaviour: Behaviour, cause: str) -> None:
    async with HostileHost({"*": behaviour}) as host, fetcher_for(config_for(host)) as fetcher:
        error = await error_of(fetcher, host.url())
        assert isinstance(error, DownloadFailed), error
        assert cause in error.message
        await asyncio.wait_for(host.all_closed(), 5)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(stalls_after(head(f"Content-Length: {LIMIT + 1}")), id="declared"),
        pytest.param(stalls_after(head("Content-Length: " + "9" * 19)), id="declared enormous"),
        pytest.param(trickles(head(), bytes(65_536), pause_s=0), id="without length"),
        pytest.param(
            trickles(head("Transfer-Encoding: chunked"), b"8000\r\n" + bytes(0x8000) + b"\r\n"),
            id="chunked",
        ),
    ],
)
async def test_a_body_beyond_the_limit_is_not_read_on(behaviour: Behaviour) -> None:
    async with HostileHost({"*": behaviour}) as host, fetcher_for(config_for(host)) as fetcher:
        assert isinstance(await error_of(fetcher, host.url()), MediaFileTooLarge)
        await asyncio.wait_for(host.all_closed(), 5)


async def test_a_body_of_exactly_the_limit() -> None:
    async with (
        HostileHost({"*": answer(bytes(LIMIT))}) as host,
        fetcher_for(config_for(host)) as fetcher,
    ):
        assert (await fetch(fetcher, host.url())).file.num_bytes == LIMIT


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        pytest.param(stalls_after(), "too long to answer", id="no byte"),
        pytest.param(
            trickles(b"HTTP/1.1 200 OK\r\nX: ", b"x"), "too long to answer", id="slow head"
        ),
        pytest.param(
            trickles(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            "too long to answer",
            id="informational",
        ),
        pytest.param(stalls_after(head(), BODY), "too slowly", id="stalls"),
        pytest.param(trickles(head(), b"x"), "too slowly", id="one byte at a time"),
        pytest.param(trickles(head(), bytes(2_000)), "too long", id="fast enough for ever"),
    ],
)
async def test_slow_answers(behaviour: Behaviour, cause: str) -> None:
    async with HostileHost({"*": behaviour}) as host:
        config = config_for(
            host, first_byte_timeout_s=0.3, image_fetch_timeout_s=1.0, max_image_bytes=2**30
        )
        async with fetcher_for(config, speed_window_s=0.3) as fetcher:
            began = time.perf_counter()
            error = await error_of(fetcher, host.url())
            assert isinstance(error, DownloadFailed) and cause in error.message
            assert time.perf_counter() - began < 10
            await asyncio.wait_for(host.all_closed(), 5)


async def test_a_slow_but_steady_body_is_taken() -> None:
    pieces = [bytes(3_000)] * 12
    async with HostileHost({"*": raw(head(), *pieces, pause_s=0.05)}) as host:
        config = config_for(host, min_fetch_bytes_per_s=6_000)
        async with fetcher_for(config, speed_window_s=0.4) as fetcher:
            assert (await fetch(fetcher, host.url())).file.num_bytes == 36_000


async def test_one_deadline_over_all_redirects() -> None:
    slow = raw(
        b"", b"", head("Location: /on", "Content-Length: 0", status="302 Found"), pause_s=0.2
    )
    async with HostileHost({"*": slow}) as host:
        config = config_for(host, image_fetch_timeout_s=0.8, max_redirects=1_000)
        async with fetcher_for(config) as fetcher:
            error = await error_of(fetcher, host.url())
            assert "too long" in error.message
            assert 1 <= len(host.heads) < 5


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    [
        "/there/cat.png",
        "there/cat.png",
        "{url}",
        "//media.test:{port}/there/cat.png",
        "/there/cat.png#x",
    ],
)
async def test_redirects(status: int, location: str) -> None:
    async with HostileHost({"/there/cat.png": answer(BODY)}) as host:
        place = location.format(url=host.url("/there/cat.png"), port=host.port)
        host.behaviours["/cat.png"] = redirect(place, status=status, body=b"not read")
        async with fetcher_for(config_for(host)) as fetcher:
            assert (await fetch(fetcher, host.url())).file.read() == BODY
        assert host.paths == ["/cat.png", "/there/cat.png"]
        assert not any("Referer" in each or "Cookie" in each for each in host.heads)


async def test_the_body_of_a_redirect_is_never_read() -> None:
    endless = trickles(head("Location: /there", status="302 Found"), bytes(65_536), pause_s=0)
    async with (
        HostileHost({"/cat.png": endless, "/there": answer(BODY)}) as host,
        fetcher_for(config_for(host)) as fetcher,
    ):
        assert (await fetch(fetcher, host.url())).file.read() == BODY
        await asyncio.wait_for(host.all_closed(), 5)


async def test_redirects_end() -> None:
    behaviours = {f"/{number}": redirect(f"/{number + 1}") for number in range(10)}
    async with HostileHost({**behaviours, "/loop": redirect("/loop"), "/10": answer(BODY)}) as host:
        async with fetcher_for(config_for(host, max_redirects=3)) as fetcher:
            assert (await fetch(fetcher, host.url("/7"))).file.read() == BODY
            for path in ("/6", "/loop"):
                assert "redirected too often" in (await error_of(fetcher, host.url(path))).message
        assert host.paths.count("/loop") == 4


# Every spelling of an address that nobody may fetch from; {port} is a canary's that listens there.
SPELLINGS = [
    "http://127.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://１２７.0.0.1:{port}/",
    "http://127。0。0。1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://[::]:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[fec0::1]:{port}/",
    "http://[fd00:ec2::254]:{port}/",
    "http://169.254.169.254:{port}/",
    "http://100.100.100.200:{port}/",
    "http://168.63.129.16:{port}/",
    "http://100.64.0.1:{port}/",
    "http://10.0.0.1:{port}/",
    "http://user:password@127.0.0.1:{port}/",
    "http://media.test@127.0.0.1:{port}/",
    "http://media.test:{port}\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@media.test/",
    "http://2130706433.:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_x",
]


@pytest.fixture
async def canary() -> AsyncIterator[HostileHost]:
    """Listens on every address of this machine, and must never be connected to."""
    addresses = EVERYWHERE if socket.has_dualstack_ipv6() else EVERYWHERE[:1]
    async with HostileHost({"*": answer(b"secret")}, addresses=addresses) as host:
        yield host


async def test_the_canary_can_be_reached_at_all(canary: HostileHost) -> None:
    config = config_for(canary, allowed_private_hosts=("127.0.0.1",))
    async with fetcher_for(config) as fetcher:
        fetched = await fetch(fetcher, f"http://127.0.0.1:{canary.port}/")
    assert fetched.file.read() == b"secret" and canary.num_connections == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_forbidden_addresses_in_every_spelling(canary: HostileHost, spelling: str) -> None:
    """As a URL, as a redirect, and asked of the system's own resolver, which understands many."""
    url = spelling.format(port=canary.port)
    errors: list[MediaError] = []
    async with HostileHost({"/cat.png": redirect(url)}) as host:
        config = config_for(host, canary)
        async with fetcher_for(config, SystemResolver(timeout_s=5)) as fetcher:
            errors.append(await error_of(fetcher, url))
        async with fetcher_for(config) as fetcher:
            errors.append(await error_of(fetcher, host.url()))
        assert host.num_connections == 1
    assert canary.num_connections == 0
    for error in errors:
        # localhost is a name, which the scripted resolver of the second fetch does not know.
        if error is errors[0] or "localhost" not in url.lower():
            assert isinstance(error, InvalidMediaUrl), error.message
            assert error.message == "URL is not allowed."


@pytest.mark.parametrize("location", ["//127.0.0.1:{port}/", "http://evil.test:{port}/"])
async def test_a_redirect_to_a_forbidden_place(canary: HostileHost, location: str) -> None:
    resolver = ScriptedResolver({**HERE, "evil.test": [["127.0.0.1"]]})
    async with (
        HostileHost({"*": redirect(location.format(port=canary.port))}) as host,
        fetcher_for(config_for(host, canary), resolver) as fetcher,
    ):
        assert isinstance(await error_of(fetcher, host.url()), InvalidMediaUrl)
    assert canary.num_connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1", "8.8.8.8"],
        ["8.8.8.8", "::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["8.8.8.8", "0.0.0.0"],
    ],
)
async def test_a_name_with_one_forbidden_address(canary: HostileHost, addresses: list[str]) -> None:
    resolver = ScriptedResolver({"evil.test": [addresses]})
    async with fetcher_for(config_for(canary), resolver) as fetcher:
        error = await error_of(fetcher, canary.url(name="evil.test"))
    assert isinstance(error, InvalidMediaUrl) and error.message == "URL is not allowed."
    assert resolver.asked == ["evil.test"]
    assert canary.num_connections == 0


async def test_a_name_that_changes_its_address_is_judged_each_time(canary: HostileHost) -> None:
    config = config_for(canary, allowed_private_hosts=("127.0.0.1",))
    resolver = ScriptedResolver({"evil.test": [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]]})
    async with fetcher_for(config, resolver) as fetcher:
        url = canary.url(name="evil.test")
        assert (await fetch(fetcher, url)).file.read() == b"secret"
        assert isinstance(await error_of(fetcher, url), InvalidMediaUrl)
        assert canary.num_connections == 1
        assert (await fetch(fetcher, url)).file.read() == b"secret"
    assert resolver.asked == ["evil.test"] * 3  # once for each connection, and never in between


async def test_names_that_cannot_be_resolved() -> None:
    resolver = ScriptedResolver({"hanging.test": [None]})
    async with (
        HostileHost() as host,
        fetcher_for(config_for(host, connect_timeout_s=0.2), resolver) as fetcher,
    ):
        error = await error_of(fetcher, host.url(name="unknown.test"))
        assert isinstance(error, DownloadFailed) and "name is not known" in error.message
        error = await error_of(fetcher, host.url(name="hanging.test"))
        assert isinstance(error, DownloadFailed) and "reached in time" in error.message


async def test_a_host_that_refuses_and_one_whose_first_address_does() -> None:
    resolver = ScriptedResolver({"media.test": [["127.0.0.2", "127.0.0.1"], ["127.0.0.2"]]})
    async with (
        HostileHost({"*": answer(BODY)}) as host,
        fetcher_for(config_for(host), resolver) as fetcher,
    ):
        assert (await fetch(fetcher, host.url())).file.read() == BODY
        assert "refused the connection" in (await error_of(fetcher, host.url())).message


def test_the_host_judged_is_the_host_that_is_resolved() -> None:
    resolver = ScriptedResolver({})
    guard = Guard(MediaConfig())
    with asyncio.Runner() as runner:
        fetcher = Fetcher(MediaConfig(connect_timeout_s=0.01), resolver=resolver)

        @given(
            url=st.text(max_size=40)
            | st.from_regex(r"https?://[a-z0-9.:@\\\[\]%#?/-]{1,30}(:80)?/?.{0,5}", fullmatch=True)
            | st.from_regex(
                r"http://[a-z]{1,5}\.[a-zé한]{2,5}\.?(:80)?[/?#][a-z@:/#]{0,9}", fullmatch=True
            )
        )
        @settings(max_examples=300, deadline=None)
        def check(url: str) -> None:
            resolver.asked.clear()
            try:
                judged = guard.target(url.strip(), kind="image")
            except InvalidMediaUrl:
                assert isinstance(runner.run(error_of(fetcher, url)), InvalidMediaUrl)
                assert resolver.asked == []
                return
            if judged.address is None:  # a public address would be dialled
                assert isinstance(runner.run(error_of(fetcher, url)), DownloadFailed)
                assert resolver.asked == [judged.host]

        check()
        runner.run(fetcher.close())


async def test_the_system_resolver_is_bounded_and_in_time() -> None:
    is_over = threading.Event()

    def dead(host: str, port: int) -> Sequence[IPAddress]:
        is_over.wait(30)
        return []

    resolver = SystemResolver(timeout_s=0.2, num_threads=1, max_lookups=2, lookup=dead)
    try:
        outcomes = await asyncio.gather(
            *(resolver.resolve(f"{number}.test", 80) for number in range(4)), return_exceptions=True
        )
        # One has the thread and is too slow, one never gets it, two find no place to wait.
        assert [type(outcome) for outcome in outcomes] == [TimeoutError] + [Unavailable] * 3
        assert await asyncio.to_thread(lambda: "others go on") == "others go on"
    finally:
        is_over.set()
        resolver.close()


async def test_the_system_resolver_knows_this_machine() -> None:
    resolver = SystemResolver(timeout_s=5)
    try:
        assert "127.0.0.1" in map(str, await resolver.resolve("localhost", 80))
    finally:
        resolver.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for media.test, with its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        " -subj /CN=media.test -addext subjectAltName=DNS:media.test"
        " -keyout key.pem -out certificate.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "certificate.pem").read_bytes())
    return both


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_tls_with_an_authority_of_our_own(tls: ssl.SSLContext, certificate: Path) -> None:
    names: list[str | None] = []
    tls.sni_callback = lambda _, name, __: names.append(name)
    resolver = ScriptedResolver({"media.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    async with HostileHost({"*": answer(BODY)}, trust=tls) as host:
        both = ("media.test", "other.test")
        config = config_for(host, ca_file=certificate, allowed_private_hosts=both)
        async with fetcher_for(config, resolver) as fetcher:
            assert (await fetch(fetcher, host.url(scheme="https"))).file.read() == BODY
            assert (await fetch(fetcher, host.url("/b", name="media.test.", scheme="https"))).file
            error = await error_of(fetcher, host.url(name="other.test", scheme="https"))
            assert isinstance(error, DownloadFailed) and "certificate" in error.message
    assert names == ["media.test", "media.test", "other.test"]


async def test_tls_without_trust_or_without_an_answer(tls: ssl.SSLContext) -> None:
    async with (
        HostileHost({"*": answer(BODY)}, trust=tls) as untrusted,
        HostileHost({"*": answer(BODY)}) as plain,
    ):
        async with fetcher_for(config_for(untrusted, plain, connect_timeout_s=0.4)) as fetcher:
            error = await error_of(fetcher, untrusted.url(scheme="https"))
            assert isinstance(error, DownloadFailed) and "certificate" in error.message
            # It waits for a request's end that a greeting of TLS never holds.
            error = await error_of(fetcher, plain.url(scheme="https"))
            assert isinstance(error, DownloadFailed) and "in time" in error.message
            await asyncio.wait_for(plain.all_closed(), 5)
            error = await error_of(fetcher, untrusted.url())
            assert isinstance(error, DownloadFailed)
        assert untrusted.heads == [] and plain.heads == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("proxy", "socks5://proxy.test:1080"),
        ("proxy", "http://user:secret@"),
        ("proxy", "http://user:secret@[::1"),
        ("proxy", "proxy.test:80"),
        ("proxy", "http://proxy.test/secret"),
        ("ca_file", Path("/nowhere/secret.pem")),
        ("ca_file", Path(__file__)),
        ("denied_hosts", ("http://x",)),
    ],
)
def test_settings_that_cannot_be_used(setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Fetcher(MediaConfig.model_validate({setting: value}))
    assert str(caught.value).startswith(f"media.{setting}:")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


async def test_a_proxy_gets_names_and_never_a_forbidden_address(canary: HostileHost) -> None:
    async with HostileHost({"*": answer(BODY)}) as proxy:
        config = MediaConfig(
            proxy=f"http://user:pass%20word@proxy.test:{proxy.port}",
            allowed_ports=(80, 443, canary.port),
            denied_hosts=("denied.test",),
        )
        resolver = ScriptedResolver({"proxy.test": [["127.0.0.1"]]})
        async with fetcher_for(config, resolver) as fetcher:
            assert (await fetch(fetcher, "http://pictures.test/cat.png")).file.read() == BODY
            assert resolver.asked == ["proxy.test"]
            for url in (f"http://127.0.0.1:{canary.port}/", "http://denied.test/", "http://[::1]/"):
                assert isinstance(await error_of(fetcher, url), InvalidMediaUrl)
            assert proxy.num_connections == 1
            sent = proxy.heads[0]
            assert sent.startswith("GET http://pictures.test/cat.png HTTP/1.1\r\n")
            assert "Proxy-Authorization: Basic dXNlcjpwYXNzIHdvcmQ=\r\n" in sent

            proxy.behaviours["pictures.test:443"] = answer(status="403 Forbidden")
            error = await error_of(fetcher, "https://pictures.test/cat.png")
            assert isinstance(error, DownloadFailed) and "proxy" in error.message
            assert proxy.heads[1].startswith("CONNECT pictures.test:443 HTTP/1.1\r\n")
    assert canary.num_connections == 0


async def test_so_many_at_once_and_from_one_host() -> None:
    slow = raw(b"", head(), BODY, pause_s=0.03)
    resolver = ScriptedResolver({f"{name}.test": [["127.0.0.1"]] for name in "abc"})
    async with HostileHost({"*": slow}) as host:
        config = config_for(
            host,
            allowed_private_hosts=("*.test",),
            max_fetches=3,
            max_fetches_per_host=2,
        )
        async with fetcher_for(config, resolver) as fetcher:
            urls = [host.url(f"/{number}", name="a.test") for number in range(6)]
            await asyncio.gather(*(fetch(fetcher, url) for url in urls))
            assert host.most_open == 2
            urls = [host.url(f"/{n}", name=f"{name}.test") for name in "abc" for n in range(4)]
            await asyncio.gather(*(fetch(fetcher, url) for url in urls))
            assert host.most_open == 3


async def test_a_busy_host_holds_up_only_itself() -> None:
    resolver = ScriptedResolver({"a.test": [["127.0.0.1"]], "b.test": [["127.0.0.1"]]})
    async with HostileHost({"/hang": stalls_after(), "*": answer(BODY)}) as host:
        config = config_for(
            host, allowed_private_hosts=("*.test",), max_fetches_per_host=1, first_byte_timeout_s=9
        )
        async with fetcher_for(config, resolver) as fetcher:
            hanging = asyncio.create_task(fetch(fetcher, host.url("/hang", name="a.test")))
            behind = asyncio.create_task(fetch(fetcher, host.url("/x", name="a.test")))
            other = await asyncio.wait_for(fetch(fetcher, host.url("/x", name="b.test")), 5)
            assert other.file.read() == BODY
            assert not behind.done()
            hanging.cancel()  # whose turn then is free
            assert (await asyncio.wait_for(behind, 5)).file.read() == BODY
            with pytest.raises(asyncio.CancelledError):
                await hanging


async def test_waiting_is_bounded_in_number_and_in_time() -> None:
    async with HostileHost({"*": stalls_after()}) as host:
        config = config_for(host, max_fetches=1, max_fetches_waiting=1, first_byte_timeout_s=9)
        async with fetcher_for(config, max_wait_s=0.2) as fetcher:
            running = asyncio.create_task(fetch(fetcher, host.url("/1")))
            waiting = asyncio.create_task(fetch(fetcher, host.url("/2")))
            await asyncio.sleep(0.02)
            with pytest.raises(Unavailable):
                await fetch(fetcher, host.url("/3"))
            assert not waiting.done()
            with pytest.raises(Unavailable):
                await waiting
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert host.paths == ["/1"]


async def test_waiting_does_not_count_as_fetching() -> None:
    slow = raw(b"", b"", head(), BODY, pause_s=0.1)
    async with HostileHost({"*": slow}) as host:
        config = config_for(host, max_fetches=1, image_fetch_timeout_s=0.9)
        async with fetcher_for(config) as fetcher:
            urls = [host.url(f"/{number}") for number in range(4)]
            fetched = await asyncio.gather(*(fetch(fetcher, url) for url in urls))
            assert [each.file.read() for each in fetched] == [BODY] * 4


async def test_one_fetch_for_all_of_one_tenant_who_ask_at_once() -> None:
    slow = raw(b"", head(), BODY, pause_s=0.1)
    async with HostileHost({"*": slow}) as host, fetcher_for(config_for(host)) as fetcher:
        fetched = await asyncio.gather(*(fetch(fetcher, host.url()) for _ in range(5)))
        assert [each.file.read() for each in fetched] == [BODY] * 5
        assert host.num_connections == 1
        await asyncio.gather(*(fetch(fetcher, host.url(), tenant=tenant) for tenant in "ab"))
        assert host.num_connections == 3
        await asyncio.gather(
            fetcher.fetch(host.url(), kind="image", tenant="a"),
            fetcher.fetch(host.url(), kind="video", tenant="a"),
        )
        assert host.num_connections == 5


async def test_each_waiter_gets_an_error_of_its_own() -> None:
    async with HostileHost() as host, fetcher_for(config_for(host)) as fetcher:
        first, second = await asyncio.gather(
            *(fetch(fetcher, host.url()) for _ in range(2)), return_exceptions=True
        )
        assert host.num_connections == 1
        assert isinstance(first, DownloadFailed) and isinstance(second, DownloadFailed)
        first.param = "messages[0]"
        assert second.param is None and second.message == first.message


async def test_a_fetch_ends_with_the_last_who_waits_for_it() -> None:
    for behaviour in (stalls_after(), stalls_after(head(), BODY)):
        async with HostileHost({"*": behaviour}) as host:
            config = config_for(host, first_byte_timeout_s=30, image_fetch_timeout_s=30)
            async with fetcher_for(config, speed_window_s=30) as fetcher:
                waiters = [asyncio.create_task(fetch(fetcher, host.url())) for _ in range(3)]
                while not host.heads:
                    await asyncio.sleep(0.005)
                for waiter in waiters[:2]:
                    waiter.cancel()
                await asyncio.gather(*waiters[:2], return_exceptions=True)
                await asyncio.sleep(0.05)
                assert host.num_open == 1 and not waiters[2].done()
                waiters[2].cancel()
                await asyncio.wait_for(host.all_closed(), 5)
                # Who comes now starts anew.
                host.behaviours["*"] = answer(BODY)
                assert (await fetch(fetcher, host.url())).file.read() == BODY


async def test_closing_ends_what_is_under_way() -> None:
    async with HostileHost({"*": stalls_after()}) as host:
        fetcher = Fetcher(
            config_for(host, first_byte_timeout_s=30), resolver=ScriptedResolver(HERE)
        )
        waiter = asyncio.create_task(fetch(fetcher, host.url()))
        while not host.heads:
            await asyncio.sleep(0.005)
        await fetcher.close()
        with pytest.raises(ShuttingDown):
            await waiter
        with pytest.raises(ShuttingDown):
            await fetch(fetcher, host.url())
        await asyncio.wait_for(host.all_closed(), 5)


def http_time(offset_s: float) -> str:
    return email.utils.formatdate(time.time() + offset_s, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ((), "miss"),
        (("Cache-Control: max-age=60",), "hit"),
        (("Cache-Control: public, MAX-AGE=60",), "hit"),
        (("Cache-Control: max-age=600", "Age: 59"), "hit"),
        (("Cache-Control: max-age=60", "Age: 60"), "miss"),
        (("Cache-Control: max-age=0",), "miss"),
        (("Cache-Control: max-age=x",), "miss"),
        (("Cache-Control: max-age=-60",), "miss"),
        (("Cache-Control: max-age=60, no-store",), "miss"),
        (("Cache-Control: max-age=60", "Cache-Control: private"), "miss"),
        (("Cache-Control: max-age=60, no-cache",), "miss"),
        (("Cache-Control: max-age=60", "Vary: *"), "miss"),
        (("Cache-Control: max-age=60", "Vary: Accept"), "hit"),
        ((f"Expires: {http_time(3600)}",), "hit"),
        ((f"Expires: {http_time(-3600)}",), "miss"),
        (("Expires: 0",), "miss"),
        ((f"Expires: {http_time(3600)}", "Cache-Control: max-age=0"), "miss"),
        ((f"Expires: {http_time(3600)}", f"Date: {http_time(3600)}"), "miss"),
        (('ETag: "a"',), "revalidated"),
        ((f"Last-Modified: {http_time(-3600)}",), "revalidated"),
        (('ETag: "a"', "Cache-Control: no-cache"), "revalidated"),
        (('ETag: "a"', "Cache-Control: max-age=60"), "hit"),
        (('ETag: "a"', "Cache-Control: no-store"), "miss"),
        (('ETag: "é"',), "miss"),
        (('ETag: "' + "a" * 600 + '"',), "miss"),
    ],
)
@pytest.mark.parametrize("is_on_disk", [False, True])
async def test_what_is_used_again(
    headers: tuple[str, ...], outcome: str, is_on_disk: bool, tmp_path: Path
) -> None:
    async with HostileHost({"*": answer(BODY, *headers)}) as host:
        config = config_for(host, cache_dir=tmp_path / "cache" if is_on_disk else None)
        async with fetcher_for(config) as fetcher:
            assert (await fetch(fetcher, host.url())).cache == "miss"
            if outcome == "revalidated":
                host.behaviours["*"] = raw(head(status="304 Not Modified"))
            second = await fetch(fetcher, host.url())
            assert (second.cache, second.file.read()) == (outcome, BODY)
            assert second.file.digest == hashlib.sha256(BODY).hexdigest()
            assert len(host.heads) == (1 if outcome == "hit" else 2)
            # Another tenant, salt or kind is never answered from it.
            host.behaviours["*"] = answer(b"other")
            assert (await fetch(fetcher, host.url(), tenant="b")).file.read() == b"other"
            salted = await fetch(fetcher, host.url(), cache_salt="s")
            assert salted.file.read() == b"other"
            other = await fetcher.fetch(host.url(), kind="video", tenant="a")
            assert other.file.read() == b"other"


async def test_revalidation() -> None:
    async with (
        HostileHost({"*": answer(BODY, 'ETag: "a"', "Last-Modified: then")}) as host,
        fetcher_for(config_for(host)) as fetcher,
    ):
        await fetch(fetcher, host.url())
        host.behaviours["*"] = answer(b"new", 'ETag: "b"')
        assert (await fetch(fetcher, host.url())).file.read() == b"new"
        assert 'If-None-Match: "a"\r\nIf-Modified-Since: then\r\n' in host.heads[1]
        host.behaviours["*"] = raw(head("Cache-Control: max-age=60", status="304 Not Modified"))
        assert (await fetch(fetcher, host.url())).cache == "revalidated"
        assert 'If-None-Match: "b"\r\n' in host.heads[2]
        assert (await fetch(fetcher, host.url())).cache == "hit"
        assert len(host.heads) == 3


async def test_nothing_stale_is_used_when_the_host_fails() -> None:
    async with (
        HostileHost({"*": answer(BODY, 'ETag: "a"')}) as host,
        fetcher_for(config_for(host)) as fetcher,
    ):
        await fetch(fetcher, host.url())
        host.behaviours["*"] = answer(status="500 Oh")
        assert "answered 500" in (await error_of(fetcher, host.url())).message
        host.behaviours["*"] = raw(head("Cache-Control: no-store", status="304 Not Modified"))
        assert (await fetch(fetcher, host.url())).cache == "revalidated"
        host.behaviours["*"] = answer(b"new")
        assert (await fetch(fetcher, host.url())).cache == "miss"
        assert "If-None-Match" not in host.heads[-1]


async def test_freshness_ends_with_the_settings_and_with_the_answer() -> None:
    now = time.time()
    async with HostileHost({"*": answer(BODY, "Cache-Control: max-age=100")}) as host:
        for ttl_s, seconds, outcome in [(1000, 99, "hit"), (1000, 101, "miss"), (50, 51, "miss")]:
            times = [now]
            async with fetcher_for(
                config_for(host, cache_ttl_s=ttl_s), clock=lambda times=times: times[0]
            ) as fetcher:
                await fetch(fetcher, host.url())
                times[0] = now + seconds
                assert (await fetch(fetcher, host.url())).cache == outcome
                times[0] = now - 86_400  # the clock was set back
                assert (await fetch(fetcher, host.url())).cache == "miss"


async def test_a_redirect_is_asked_again_and_its_goal_is_not() -> None:
    goal = answer(BODY, "Cache-Control: max-age=60")
    async with (
        HostileHost({"/old": redirect("/new", status=301), "/new": goal}) as host,
        fetcher_for(config_for(host)) as fetcher,
    ):
        await fetch(fetcher, host.url("/old"))
        assert (await fetch(fetcher, host.url("/old"))).cache == "hit"
        assert (await fetch(fetcher, host.url("/new"))).cache == "hit"
        assert host.paths == ["/old", "/new", "/old"]


async def test_the_disk_outlives_the_process_and_its_failure_fails_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = answer(BODY, "Cache-Control: max-age=60")
    async with HostileHost({"*": fresh}) as host:
        config = config_for(host, cache_dir=tmp_path / "cache", cache_bytes=0)

        async def outcome() -> str:
            async with fetcher_for(config) as fetcher:
                fetched = await fetch(fetcher, host.url())
                assert fetched.file.read() == BODY
                return fetched.cache

        async with fetcher_for(config) as fetcher:
            assert (await fetch(fetcher, host.url())).cache == "miss"
            async with asyncio.timeout(5):  # it is written in the background
                while not list((tmp_path / "cache").glob("*.media")):
                    await asyncio.sleep(0.005)
        assert await outcome() == "hit"
        assert len(host.heads) == 1
        [file] = (tmp_path / "cache").glob("*.media")
        file.write_bytes(file.read_bytes()[:-1])
        assert await outcome() == "miss"

        (tmp_path / "file").touch()
        config = config_for(host, cache_dir=tmp_path / "file" / "folder", cache_bytes=0)
        assert await outcome() == "miss"
        assert "media cache on disk is off" in caplog.text
        assert str(tmp_path) not in caplog.text


async def test_nothing_is_kept_where_there_is_no_memory_for_it() -> None:
    async with (
        HostileHost({"*": answer(BODY, "Cache-Control: max-age=60")}) as host,
        fetcher_for(config_for(host, cache_bytes=0)) as fetcher,
    ):
        assert (await fetch(fetcher, host.url())).cache == "miss"
        assert (await fetch(fetcher, host.url())).cache == "miss"


async def test_large_media_come_back_from_the_cache_whole() -> None:
    body = random.Random(0).randbytes(1_000_000)
    async with (
        HostileHost({"*": answer(body, "Cache-Control: max-age=60")}) as host,
        fetcher_for(config_for(host, max_image_bytes=2_000_000)) as fetcher,
    ):
        for outcome in ("miss", "hit"):
            fetched = await fetch(fetcher, host.url())
            assert (fetched.cache, fetched.file.read()) == (outcome, body)


async def test_mutated_answers_give_only_the_listed_errors() -> None:
    random_ = random.Random(4)
    whole = [
        head(f"Content-Length: {len(BODY)}", "ETag: x", "Cache-Control: max-age=9", "Age: 1")
        + BODY,
        head("Transfer-Encoding: chunked", "Expires: 0") + b"5\r\nabcde\r\n0\r\nA: b\r\n\r\n",
        head("Location: http://media.test/x", status="302 Found"),
        head("Connection: close", "Vary: a, b") + BODY,
    ]
    async with HostileHost() as host:
        config = config_for(host, first_byte_timeout_s=0.5, image_fetch_timeout_s=0.5)
        async with fetcher_for(config) as fetcher:
            for number in range(300):
                data = bytearray(random_.choice(whole))
                for _ in range(random_.randrange(1, 6)):
                    place = random_.randrange(min(len(data), 160))
                    data[place : place + random_.randrange(3)] = random_.randbytes(
                        random_.randrange(3)
                    )
                host.behaviours[f"/{number}"] = raw(bytes(data))
                with contextlib.suppress(DownloadFailed, InvalidMediaUrl, MediaFileTooLarge):
                    await fetch(fetcher, host.url(f"/{number}"))
            await asyncio.wait_for(host.all_closed(), 5)
