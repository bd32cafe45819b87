from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Server, assert_error


def test_a_ready_server(shared_server: Server) -> None:
    assert shared_server.http.get("/health").json() == {"status": "ok"}
    assert shared_server.http.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("loading", "model_loading"),
        ("restarting", "worker_restarting"),
        ("crashed", "worker_restarting"),
        ("silent", "worker_restarting"),
        ("stopping", "shutting_down"),
    ],
)
def test_a_server_that_is_alive_but_not_ready(server: Server, status: Any, code: str) -> None:
    server.engine.status = status
    assert_error(server.http.get("/ready"), 503, code)
    assert server.http.get("/health").status_code == 200


def test_a_draining_server_is_not_ready(server: Server) -> None:
    server.app.state.lifecycle.is_draining = True
    assert_error(server.http.get("/ready"), 503, "shutting_down")
    assert server.http.get("/health").status_code == 200
