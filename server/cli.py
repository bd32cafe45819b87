"""The command line: `serve`, `check` and `version`.

Turns settings into running parts and says what it found, in a few lines. Whatever keeps the server
from starting is one line on stderr and a non-zero exit. It must not know how any part works.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from server import __version__
from server.api.admin import AdminApp
from server.api.limits import effective_limits
from server.api.models import ServedModel
from server.api.protocol import protocol_with_deadline
from server.app import build_app, drain
from server.chat.media import MediaReader
from server.chat.prepare import ModelFacts, Preparer
from server.chat.template import ChatTemplate
from server.chat.tokenizer import Tokenizer
from server.config import Config, HttpConfig, MediaConfig, load_config
from server.core import VisionSpec
from server.decoding.pool import DecoderPool
from server.engine.client import Engine, EngineClient, EngineFacts
from server.errors import CheckpointError, ConfigError
from server.grammar.prover import Prover
from server.hub import find_checkpoint, is_hub_name
from server.media.fetch import Fetcher
from server.media.store import FileStore
from server.model.config import CheckpointInfo, read_checkpoint
from server.telemetry.metrics import Metrics
from server.vision.frames import video_token_range
from server.vision.tiles import image_token_range

_log = logging.getLogger(__name__)

# A group of processes is told to end more than once: by whoever ends it, and by make within it.
SAME_SIGNAL_S = 0.5

MAX_DESCRIPTORS = 65_536

UNIX_SOCKET_MODE = 0o660

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BUFFER_BYTES = 256 * 1024

cli = typer.Typer(
    name="hcx-server",
    help="An OpenAI-compatible server for HyperCLOVAX-SEED vision and text models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None,
    typer.Option(help="A checkpoint's folder or hub name (owner/name). Default: the demo model."),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub name. Default: its main branch.")
]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
ConfigOption = Annotated[
    Path | None, typer.Option(help="A settings file; config.yaml shows every setting.")
]


def main() -> None:
    """The console script."""
    cli()


@cli.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"hcx-server {__version__}")


@cli.command()
def check(
    model: ModelOption = None, revision: RevisionOption = None, config: ConfigOption = None
) -> None:
    """Read a checkpoint's metadata and print what was found, without loading its weights."""
    with _one_line_on_failure():
        settings = load_config(config, _flags(model={"path": model, "revision": revision}))
        # What would be logged is among the findings.
        logging.getLogger("server").addHandler(logging.NullHandler())
        info, _ = _read_model(settings)
        tokenizer, template = _read_chat(info)
        _check_tensors(info)
        for name, line in _findings(info, tokenizer, template):
            typer.echo(f"{name:<16} {line}")


@cli.command()
def serve(
    model: ModelOption = None,
    revision: RevisionOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    config: ConfigOption = None,
) -> None:
    """Load a model and answer requests until SIGTERM or Ctrl-C."""
    with _one_line_on_failure():
        settings = load_config(
            config,
            _flags(
                http={"host": host, "port": port},
                model={"path": model, "revision": revision, "device": device, "dtype": dtype},
            ),
        )
        tls = _tls_context(settings.http)
        with contextlib.ExitStack() as sockets:
            # Taken before anything slow, so that a port in use is known at once.
            listener = sockets.enter_context(_main_socket(settings.http))
            admin_listener = None
            if settings.http.admin_port is not None:
                admin_listener = sockets.enter_context(
                    _bound_socket(settings.http.admin_host, settings.http.admin_port)
                )
            _start_logging()
            _allow_many_descriptors()
            _give_large_buffers_back()
            _check_folders(settings.media)
            files = _open_file_store(settings.media)
            info, name = _read_model(settings)
            # Cancelled by a signal that came before there was anything to drain.
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(_serve(settings, info, name, files, listener, admin_listener, tls))


@contextlib.contextmanager
def _one_line_on_failure() -> Iterator[None]:
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        _fail(str(error))


def _fail(reason: str) -> NoReturn:
    typer.echo(f"hcx-server: {' '.join(reason.split())}", err=True)
    raise typer.Exit(1)


def _flags(**sections: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """The flags that were given; None is a flag that was not."""
    return {
        section: {key: value for key, value in entries.items() if value is not None}
        for section, entries in sections.items()
    }


def _read_model(config: Config) -> tuple[CheckpointInfo, str]:
    """The configured checkpoint, fetched if it has to be, and the name clients use for it."""
    model, revision = config.model.path, config.model.revision
    if model is not None and is_hub_name(model):
        typer.echo(f"fetching {model} from the hub", err=True)
    found = find_checkpoint(model, revision=revision, show_progress=sys.stderr.isatty())
    return read_checkpoint(found.folder), config.model.served_name or found.name


def _read_chat(info: CheckpointInfo) -> tuple[Tokenizer, ChatTemplate]:
    spec = info.vision
    media_ids = [] if spec is None else [spec.image_token_id, spec.video_token_id]
    tokenizer = Tokenizer.from_folder(
        info.path, reserved_ids=[each for each in media_ids if each is not None]
    )
    template = ChatTemplate.from_folder(
        info.path, tokenizer, revision_layout=info.revision_layout, vision=spec
    )
    return tokenizer, template


def _check_tensors(info: CheckpointInfo) -> None:
    # Here and not above: `serve` must never import torch, which the engine process is for.
    from server.attention.backend import choose_backend
    from server.model.checkpoint import check_tensors

    check_tensors(info, backend=choose_backend(device="cpu"))


# What `serve` does --------------------------------------------------------------------------------


def _allow_many_descriptors() -> None:
    """As many as the system lets an ordinary process have: connections and media are such."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _give_large_buffers_back() -> None:
    """Bodies and media go back to the system when they are freed, not into one of many heaps.

    Elsewhere than with glibc there is no such call, and nothing happens.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER_BYTES)


def _start_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("server").setLevel(logging.INFO)
    # It would write a line for each client whose form is malformed.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def _tls_context(http: HttpConfig) -> ssl.SSLContext | None:
    """What to speak TLS with, where the settings ask for that."""
    certificate_file, key_file = http.tls_certificate_file, http.tls_key_file
    if certificate_file is None and key_file is None:
        return None
    if certificate_file is None or key_file is None:
        raise ConfigError("http.tls_certificate_file and http.tls_key_file belong together")
    if http.unix_socket is not None:
        raise ConfigError("http.unix_socket takes no TLS: http.tls_certificate_file must be null")
    for name, path in (("certificate", certificate_file), ("key", key_file)):
        try:
            path.read_bytes()
        except OSError as error:
            reason = error.strerror or "unknown"
            raise ConfigError(f"http.tls_{name}_file: {path} cannot be read: {reason}") from None

    def refuse_password() -> str:
        raise ConfigError(f"http.tls_key_file: {key_file} is encrypted")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate_file, key_file, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key_file} is not the key of {certificate_file}") from None
        raise ConfigError(
            f"{certificate_file} and {key_file} must hold a certificate and its key as PEM"
        ) from None
    return context


@contextlib.contextmanager
def _main_socket(http: HttpConfig) -> Iterator[socket.socket]:
    """Where requests come in. A Unix socket's file is gone once the block has ended."""
    if http.unix_socket is None:
        with _bound_socket(http.host, http.port) as listener:
            yield listener
        return
    with _bound_unix_socket(http.unix_socket) as listener:
        inode = http.unix_socket.stat().st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if http.unix_socket.stat().st_ino == inode:  # else it is another server's by now
                    http.unix_socket.unlink()


def _bound_unix_socket(path: Path) -> socket.socket:
    """Listens from the start: whoever looks whether a server lives must never find it deaf."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone_in(path.parent):
            _remove_dead_socket(path)
            mask = os.umask(0o777 & ~UNIX_SOCKET_MODE)
            try:
                listener.bind(str(path))
            finally:
                os.umask(mask)
            listener.listen()
    except (OSError, ConfigError) as error:
        listener.close()
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror or error
        raise ConfigError(f"http.unix_socket: cannot listen on {path}: {reason}") from None
    return listener


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Of servers that start at the same time, one after another."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_socket(path: Path) -> None:
    """A socket that nobody listens on was left by a server that was killed."""
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise ConfigError(f"http.unix_socket: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a server whose queue is full lives
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise ConfigError(f"http.unix_socket: another server listens on {path}")


def _bound_socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"{host} is not an address to listen on") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _listen(listener: socket.socket) -> None:
    """Where two have bound the same port, the second one learns it here."""
    try:
        listener.listen()
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}")


async def _serve(
    config: Config,
    info: CheckpointInfo,
    name: str,
    files: FileStore | None,
    listener: socket.socket,
    admin_listener: socket.socket | None,
    tls: ssl.SSLContext | None,
) -> None:
    context_length = min(info.context_length, config.model.max_context or info.context_length)
    metrics = Metrics()
    failures: list[Exception] = []

    def on_load_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    async with contextlib.AsyncExitStack() as ends:
        progress = ends.enter_context(contextlib.closing(_LoadingProgress()))
        engine = EngineClient(
            info.path,
            vision=info.vision,
            engine=config.engine,
            model=config.model,
            metrics=metrics,
            # Without keys everyone is one tenant, under the server's own limits.
            max_requests_per_tenant=(
                config.engine.max_requests_per_key if config.http.api_keys else None
            ),
            on_loading=progress.update,
        )
        _be_cancelled_by_signals()
        # First of all, because it takes longest, and everything else beside it.
        ends.push_async_callback(engine.stop)
        await engine.launch()
        tokenizer, template = await asyncio.to_thread(_read_chat, info)
        facts = _model_facts(info, context_length)
        media_reader = _media_reader(config.media, info.vision, files)
        prover = Prover(info.path)
        preparer = Preparer(
            tokenizer,
            template,
            facts=facts,
            limits=config.media,
            media=media_reader,
            prover=prover,
        )
        app = build_app(
            config.http,
            engine,
            preparer,
            _served_model(name, config.model.aliases, info, context_length),
            metrics=metrics,
            on_load_failure=on_load_failure,
            engine_limits=config.engine,
            media=config.media,
            media_reader=media_reader,
            files=files,
            prover=prover,
        )
        server = uvicorn.Server(_uvicorn_config(app, config.http, has_lifespan=True, tls=tls))
        app.state.lifecycle.count_connections = lambda: len(server.server_state.connections)

        def on_ready(facts: EngineFacts) -> None:
            progress.close()
            limits = effective_limits(
                config.http,
                config.media,
                config.engine,
                context_length=context_length,
                facts=facts,
            )
            _log.info("limits: %s", json.dumps(limits))
            typer.echo(_banner(name, facts, _address(listener, has_tls=tls is not None)))

        _listen(listener)
        if admin_listener is not None:
            _listen(admin_listener)
            _log.info("metrics at %s/metrics", _address(admin_listener))
        ends.callback(preparer.close)
        await _let_signals_come()
        admin = _admin_server(metrics, config.http, admin_listener)
        await _run(server, listener, app, engine, on_ready, admin)
    for failure in failures:
        raise failure


def _be_cancelled_by_signals() -> None:
    """Until there is something to drain. SIGTERM alone would leave the engine's files behind."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


async def _let_signals_come() -> None:
    """A signal that came while the loop was kept busy cancels here, three of its turns later."""
    for _ in range(3):
        await asyncio.sleep(0)


def _check_folders(media: MediaConfig) -> None:
    """Those that requests would find missing."""
    for name, folder in (("local_root", media.local_root), ("spool_dir", media.spool_dir)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"media.{name}: {folder} is not a folder")
    if media.spool_dir is not None and not os.access(media.spool_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"media.spool_dir: {media.spool_dir} cannot be written to")


def _open_file_store(media: MediaConfig) -> FileStore | None:
    if media.files_dir is None:
        return None
    try:
        return FileStore(media.files_dir, media.files_ttl_s, media.max_files_bytes_per_key)
    except OSError as error:
        raise ConfigError(
            f"media.files_dir: {media.files_dir} cannot be used: {error.strerror}"
        ) from None


def _media_reader(
    config: MediaConfig, spec: VisionSpec | None, files: FileStore | None
) -> MediaReader | None:
    if spec is None:
        return None
    fetcher = Fetcher(config, user_agent=f"hcx-server/{__version__}")
    return MediaReader(
        config, spec, fetcher=fetcher, decoders=DecoderPool(config, spec), files=files
    )


def _served_model(
    name: str, aliases: Sequence[str], info: CheckpointInfo, context_length: int
) -> ServedModel:
    spec = info.vision
    return ServedModel(
        name=name,
        context_length=context_length,
        created_s=int(time.time()),
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != name),
        media_tokens={}
        if spec is None
        else {"image": image_token_range(spec), "video": video_token_range(spec)},
    )


def _model_facts(info: CheckpointInfo, context_length: int) -> ModelFacts:
    return ModelFacts(
        context_length=context_length,
        stop_token_ids=info.stop_token_ids,
        im_end_id=info.turn_end_token_id,
        vision=info.vision,
        defaults=info.sampling,
    )


def _uvicorn_config(
    app: FastAPI | AdminApp,
    http: HttpConfig,
    *,
    has_lifespan: bool,
    tls: ssl.SSLContext | None = None,
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol_with_deadline(http.headers_timeout_s),
        ws="none",
        lifespan="on" if has_lifespan else "off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Beyond what `RequestRecord` allows, or headers that come in pieces would get h11's 400.
        h11_max_incomplete_event_size=4 * http.max_header_bytes,
        timeout_keep_alive=http.keep_alive_timeout_s,
        ssl_context_factory=None if tls is None else lambda config, default: tls,
        # Requests have been drained before; what is left is a client that does not read.
        timeout_graceful_shutdown=5,
    )


@contextlib.asynccontextmanager
async def _admin_server(
    metrics: Metrics, http: HttpConfig, listener: socket.socket | None
) -> AsyncIterator[None]:
    """Answers on the admin port, where there is one, until the block ends."""
    if listener is None:
        yield
        return
    server = uvicorn.Server(_uvicorn_config(AdminApp(metrics), http, has_lifespan=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _run(
    server: uvicorn.Server,
    listener: socket.socket,
    app: FastAPI,
    engine: Engine,
    on_ready: Callable[[EngineFacts], None],
    admin: contextlib.AbstractAsyncContextManager[None],
) -> None:
    """Serve until the first signal, then drain; a second one ends what still runs at once.

    `admin` is entered before the first request and left after the last.
    """
    loop = asyncio.get_running_loop()
    hurry = asyncio.Event()
    signalled_s: float | None = None

    async def drain_and_exit() -> None:
        drained = asyncio.create_task(drain(app))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({drained, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            drained.cancel()
            await engine.stop()
        hurried.cancel()
        server.should_exit = True

    def on_signal() -> None:
        nonlocal signalled_s
        if signalled_s is None:
            signalled_s = loop.time()
            endings.append(asyncio.create_task(drain_and_exit()))
        elif loop.time() - signalled_s > SAME_SIGNAL_S:
            hurry.set()

    def take_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)

    # A task that nobody holds may be collected before it is done.
    endings: list[asyncio.Task[None]] = []
    async with admin:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.sleep(0)
        # After uvicorn has set its own handlers, which would stop listening before the drain.
        take_signals()
        while engine.status == "loading" and not serving.done():
            await asyncio.wait({serving}, timeout=0.05)
        if engine.status == "ready" and engine.facts is not None:
            on_ready(engine.facts)
        await serving
        take_signals()  # uvicorn has put back those that were there before


def _banner(name: str, facts: EngineFacts, address: str) -> str:
    return (
        f"hcx-server {__version__}: {name} on {facts.device} in {facts.dtype}, "
        f"context {facts.max_request_tokens} tokens, at {address}"
    )


def _address(listener: socket.socket, *, has_tls: bool = False) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if has_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _LoadingProgress:
    """A bar on a terminal; elsewhere a line for each quarter."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("loading weights"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._num_quarters = 0
        self._is_closed = False

    def update(self, done: int, total: int) -> None:
        """So many of so many bytes of weights are loaded. Silent once closed, as at a restart."""
        if self._is_closed:
            return
        if sys.stderr.isatty():
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
            return
        num_quarters = 4 * done // max(total, 1)
        if num_quarters > self._num_quarters:
            self._num_quarters = num_quarters
            typer.echo(f"loading weights: {25 * num_quarters} % of {_size(total)}", err=True)

    def close(self) -> None:
        """Take the bar away. May be called any number of times."""
        self._is_closed = True
        if self._bar.live.is_started:
            self._bar.stop()


# What `check` prints ------------------------------------------------------------------------------


def _findings(
    info: CheckpointInfo, tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[str, str]]:
    """The lines of `check`, as (what, found)."""
    text = info.text
    yield "checkpoint", str(info.path)
    yield "revision layout", info.revision_layout
    yield "parameters", f"{info.num_parameters:,}, stored as {info.dtype}"
    yield "context", f"{info.context_length:,} tokens"
    yield (
        "decoder",
        f"{text.num_layers} layers of {text.hidden_size}, {text.num_heads} heads of "
        f"{text.head_dim} over {text.num_kv_heads} key/value heads, feed-forward "
        f"{text.intermediate_size}, rotary base {text.rope_theta:g}",
    )
    yield (
        "vocabulary",
        f"{info.tokenizer_size:,} ids, {text.logits_rows:,} logits"
        f"{', head tied to the embedding' if text.is_tied else ''}",
    )
    yield from _vision_findings(info, tokenizer)
    yield "stop token ids", _named_ids(info.stop_token_ids, tokenizer)
    if info.turn_end_token_id is not None:
        yield "turn end id", _named_ids((info.turn_end_token_id,), tokenizer)
    yield "chat template", "; ".join(template.notes) or "the checkpoint's own"
    yield "sampling", _sampling(info)
    for dtype in ("float32", "bfloat16", "float16"):
        weights = info.parameter_bytes(dtype)
        cache = info.kv_bytes_per_token(dtype) * info.context_length
        yield (
            "memory",
            f"{dtype}: weights {_size(weights)}, cache of one full context {_size(cache)}",
        )
    for assumption in info.assumptions:
        yield "assumed", assumption
    if not info.assumptions:
        yield "assumed", "nothing"


def _vision_findings(info: CheckpointInfo, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    tower, projector, spec = info.tower, info.projector, info.vision
    if tower is None or projector is None or spec is None:
        yield "vision", "none: a text model, pictures and videos are refused"
        return
    yield (
        "vision tower",
        f"{tower.num_layers} layers of {tower.hidden_size}, {tower.num_heads} heads, pictures of "
        f"{tower.image_size} in patches of {tower.patch_size}",
    )
    yield "vision layer", f"the output of layer {tower.num_layers_used} of {tower.num_layers}"
    extras = [
        name
        for name, has in (("position embedding", projector.pos_emb), ("norm", projector.prenorm))
        if has
    ]
    yield (
        "projector",
        f"{projector.kind}, {projector.channels} to {projector.hidden_size}"
        f"{', with ' + ' and '.join(extras) if extras else ''}",
    )
    yield "picture grids", _grids(spec)
    least_tokens, most_tokens = image_token_range(spec)
    yield "picture tokens", f"{least_tokens} at detail low, at most {most_tokens}"
    yield (
        "video frames",
        f"at most {spec.max_frames}, on {spec.max_canvases} canvases of {spec.frames_per_canvas}",
    )
    yield (
        "video tokens",
        f"{spec.video_slow_queries} for a canvas's first frame and {spec.video_fast_queries} for "
        f"each other, at most {video_token_range(spec)[1]}",
    )
    yield "picture id", _named_ids((spec.image_token_id,), tokenizer)
    if spec.video_token_id is None:
        yield "video id", "the picture's"
    else:
        yield "video id", _named_ids((spec.video_token_id,), tokenizer)


def _grids(spec: VisionSpec) -> str:
    if not spec.candidate_resolutions:
        return f"none: one tile of {spec.tile_size} pixels"
    tiles = [
        (height // spec.tile_size) * (width // spec.tile_size)
        for height, width in spec.candidate_resolutions
    ]
    return f"{len(tiles)}, of at most {max(tiles)} tiles of {spec.tile_size} pixels and a thumbnail"


def _named_ids(ids: tuple[int, ...], tokenizer: Tokenizer) -> str:
    return ", ".join(f"{each} {tokenizer.token_of(each) or ''}".strip() for each in ids) or "none"


def _sampling(info: CheckpointInfo) -> str:
    defaults = info.sampling
    stated = [
        f"{name} {value:g}"
        for name, value in (
            ("temperature", defaults.temperature),
            ("top_p", defaults.top_p),
            ("top_k", defaults.top_k),
            ("repetition_penalty", defaults.repetition_penalty),
        )
        if value is not None
    ]
    return ", ".join(stated) or "no defaults stated: temperature 1"


def _size(num_bytes: int) -> str:
    if num_bytes < 1_000_000_000:
        return f"{num_bytes / 1_000_000:.1f} MB"
    return f"{num_bytes / 1_000_000_000:.1f} GB"
