"""A checkpoint with random weights, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.model.config import CheckpointInfo, read_checkpoint
from tools.random_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="session")
def tiny_info(tiny_checkpoint: Path) -> CheckpointInfo:
    return read_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
