"""What the engine process decides before it loads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.engine import worker_main
from server.engine.worker_main import choose_dtype
from server.model.config import CheckpointInfo


@pytest.mark.parametrize(
    ("asked", "stored", "device", "has_units", "num_parameters", "chosen"),
    [
        ("auto", "bfloat16", "cpu", True, 1000, "bfloat16"),
        ("auto", "bfloat16", "cpu", False, 1000, "float32"),
        ("auto", "float16", "cpu", False, 1000, "float32"),
        ("auto", "bfloat16", "cpu", False, 10**15, "bfloat16"),  # would not fit
        ("auto", "bfloat16", "cuda", False, 1000, "bfloat16"),
        ("auto", "float32", "cpu", True, 1000, "float32"),
        ("float16", "bfloat16", "cpu", False, 1000, "float16"),
    ],
)
def test_auto_dtype_suits_the_processor(
    monkeypatch: pytest.MonkeyPatch,
    tiny_info: CheckpointInfo,
    asked: str,
    stored: str,
    device: str,
    has_units: bool,
    num_parameters: int,
    chosen: str,
) -> None:
    monkeypatch.setattr(worker_main, "has_half_units", lambda dtype: has_units)
    info = replace(tiny_info, dtype=stored, num_parameters=num_parameters)
    assert choose_dtype(asked, info, device=device) == chosen
