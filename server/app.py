"""The composition root: given its parts, an ASGI application that serves them.

`build_app` decides nothing that its arguments could; it names the routes, the layers around them
and what becomes of an error. Endpoints find the parts in `request.app.state`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from server import __version__
from server.api import chat, completions, docs_page, health, limits, models, responses, tokenize
from server.api import files as files_api
from server.api.cross_origin import CrossOriginHeaders, Preflights
from server.api.health import Lifecycle
from server.api.json_body import error_response
from server.api.metrics import read_engine, read_media, read_requests
from server.api.middleware import (
    ALL_METHODS,
    NEVER_ROUTED,
    OPEN_PATHS,
    Authentication,
    BodyLimit,
    HeadAsGet,
    RequestRecord,
)
from server.api.models import ServedModel
from server.api.openapi import openapi_document
from server.api.rate_limits import RateLimits
from server.chat.media import MediaReader
from server.chat.prepare import Preparer
from server.config import EngineConfig, HttpConfig, MediaConfig
from server.engine.client import Engine
from server.errors import MethodNotAllowed, ServerError, UnknownUrl
from server.grammar.prover import Prover
from server.media.store import FileStore
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    tokenize.router,
    models.router,
    limits.router,
    health.router,
)
FILE_ROUTERS = (files_api.router,)
"""Only where there is a store for files: without one nobody can tell that there are such URLs."""

# Few, so that many uploads at once queue for the disk and not for everything else.
_NUM_DISK_THREADS = 4


def build_app(
    http: HttpConfig,
    engine: Engine,
    preparer: Preparer,
    model: ServedModel,
    *,
    metrics: Metrics,
    on_load_failure: Callable[[Exception], None],
    engine_limits: EngineConfig | None = None,
    media: MediaConfig | None = None,
    media_reader: MediaReader | None = None,
    files: FileStore | None = None,
    prover: Prover | None = None,
) -> FastAPI:
    """The application. It answers /health and /ready while the engine is still loading.

    The engine starts and stops with the application, and so do the decoders of the `media_reader`,
    which a model that takes pictures has. The `prover` stops with it. Where the engine cannot load
    its model, `on_load_failure` is called with the reason, and is to end the process.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load(engine, media_reader, on_load_failure))]
        if files is not None:
            sweeping = files_api.sweep_now_and_then(files, app.state.disk_threads)
            tasks.append(asyncio.create_task(sweeping))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await engine.stop()
            if media_reader is not None:
                await media_reader.stop()
            if prover is not None:
                await prover.stop()
            app.state.disk_threads.shutdown(wait=False)

    app = FastAPI(
        title="hcx-server",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.http = http
    app.state.engine = engine
    app.state.preparer = preparer
    app.state.model = model
    app.state.lifecycle = Lifecycle()
    app.state.metrics = metrics
    app.state.engine_limits = engine_limits or EngineConfig()
    app.state.media = media or MediaConfig()
    app.state.files = files
    app.state.disk_threads = ThreadPoolExecutor(_NUM_DISK_THREADS, thread_name_prefix="disk")
    metrics.add_reading(partial(read_requests, app.state.lifecycle))
    metrics.add_reading(partial(read_engine, engine))
    if media_reader is not None:
        metrics.add_reading(partial(read_media, media_reader))

    routers = ROUTERS if files is None else ROUTERS + FILE_ROUTERS
    open_paths = OPEN_PATHS
    if http.shows_docs:
        document = openapi_document(
            http, version=__version__, model_name=model.name, has_files=files is not None
        )
        app.state.description = docs_page.described(document)
        routers = (*routers, docs_page.router)
        open_paths |= docs_page.PATHS
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ServerError, _answer_server_error)
    routes = [route for router in routers for route in router.routes]
    app.add_exception_handler(HTTPException, partial(_answer_routing_error, routes))
    # The last one added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        BodyLimit,
        max_bytes=http.max_body_bytes,
        max_multipart_bytes=http.max_multipart_bytes,
        receive_timeout_s=http.receive_timeout_s,
    )
    app.add_middleware(RateLimits, api_keys=http.api_keys, metrics=metrics)
    app.add_middleware(Authentication, api_keys=http.api_keys, open_paths=open_paths)
    if http.cors_origins:
        app.add_middleware(Preflights, origins=http.cors_origins)
    app.add_middleware(
        RequestRecord,
        lifecycle=app.state.lifecycle,
        metrics=metrics,
        max_connections=http.max_connections,
        max_header_bytes=http.max_header_bytes,
    )
    if http.cors_origins:
        app.add_middleware(CrossOriginHeaders, origins=http.cors_origins)
    return app


async def drain(app: FastAPI) -> None:
    """Take no new requests, let running ones finish for the configured time, then end the rest.

    To be awaited before the server stops listening: until then /ready says no and new requests are
    told why. Those still running after the time end in an error or an error frame.
    """
    lifecycle: Lifecycle = app.state.lifecycle
    lifecycle.is_draining = True
    if not await lifecycle.wait_idle(timeout_s=app.state.http.drain_timeout_s):
        logger.warning("requests still running after the drain time are ended")
        await app.state.engine.stop()


async def _load(
    engine: Engine,
    media_reader: MediaReader | None,
    on_load_failure: Callable[[Exception], None],
) -> None:
    starting: list[Coroutine[Any, Any, None]] = [engine.start()]
    if media_reader is not None:
        # Side by side: the forker is a new program, whatever else has been started by then.
        starting.insert(0, media_reader.start())
    try:
        await asyncio.gather(*starting)
    except Exception as error:
        on_load_failure(error)


async def _answer_server_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _answer_routing_error(
    routes: Sequence[BaseRoute], request: Request, error: Exception
) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # A URL may have several routes; the error names the methods of the first alone.
        matching = [
            route
            for route in routes
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        ]
        methods = {method for route in matching for method in route.methods or ()}
        if "GET" in methods:
            methods.add("HEAD")
        return error_response(MethodNotAllowed(), headers={"allow": ", ".join(sorted(methods))})
    if request.method in NEVER_ROUTED:
        return error_response(MethodNotAllowed(), headers={"allow": ALL_METHODS})
    return error_response(UnknownUrl())
