"""Where the server is, for the tests of every group. Needs pytest alone: each group has its own."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Server:
    """A running server, told by the environment that `run.py` made."""

    url: str
    api_key: str
    model: str
    picture_url: str
    repository: Path

    @property
    def base_url(self) -> str:
        """What clients of OpenAI's API take."""
        return f"{self.url}/v1"

    @property
    def picture(self) -> bytes:
        """A PNG of a red circle and a blue square."""
        return (self.repository / "docs" / "example.png").read_bytes()

    @property
    def picture_data_url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"


@pytest.fixture(scope="session")
def server() -> Server:
    return Server(
        url=os.environ["CLIENTS_URL"],
        api_key=os.environ["CLIENTS_API_KEY"],
        model=os.environ["CLIENTS_MODEL"],
        picture_url=os.environ["CLIENTS_PICTURE_URL"],
        repository=Path(os.environ["CLIENTS_REPOSITORY"]),
    )
