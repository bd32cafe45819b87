"""Import direction: a room imports only the rooms its row names. The only structural test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

EVERYTHING = {""}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "core": set(),
    "line": set(),
    "telemetry": set(),
    "config": {"errors"},
    "hub": {"errors"},
    "turns": {"errors", "line"},
    "media": {"config", "errors", "turns"},
    "vision": {"core", "errors"},
    "grammar": {"errors", "turns"},
    "kernels": set(),
    "attention": {"errors", "kernels"},
    "model": {"core", "attention", "kernels", "errors"},
    "engine": {"core", "config", "errors", "line", "attention", "grammar", "kernels", "model"},
    "decoding": {"core", "config", "errors", "line", "media", "vision"},
    "chat": {"core", "config", "errors", "line", "grammar", "media", "vision", "decoding"},
    "api": {
        "core",
        "config",
        "errors",
        "chat",
        "telemetry",
        "media.file",
        "media.store",
        "engine.client",
    },
    "app": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
}
ALSO_ALLOWED: dict[str, set[str]] = {"engine.client": {"telemetry"}}

# What runs in the engine process only; everything else also runs beside the HTTP server.
ENGINE_PROCESS_ONLY = {
    "attention",
    "kernels",
    "model.checkpoint",
    "model.compiled_decoder",
    "model.decoder",
    "model.layers",
    "model.packed",
    "model.pointwise",
    "model.projector",
    "model.vision_tower",
    "model.vlm",
    "engine.logprobs",
    "engine.runner",
    "engine.sampler",
    "engine.worker",
    "engine.worker_main",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted names without the leading `server.`; the package itself is ""."""
    for path in sorted((REPOSITORY / "server").rglob("*.py")):
        parts = path.relative_to(REPOSITORY / "server").with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """The modules of ours that a module names, at any depth of its code."""
    package = ["server", *[part for part in module.split(".") if part]]
    if not is_package:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "server":
                yield name.removeprefix("server").removeprefix(".")


def is_within(name: str, room: str) -> bool:
    return room == "" or name == room or name.startswith(f"{room}.")


def forbidden_imports(module: str, source: str, *, is_package: bool = False) -> list[str]:
    room = module.split(".")[0]
    allowed = ALLOWED[room] | ALSO_ALLOWED.get(module, set()) | {room}
    return [
        name
        for name in imports_of(module, source, is_package=is_package)
        if not any(is_within(name, each) for each in allowed)
    ]


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_rooms_import_downwards_only(module: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if module == "":
        assert list(imports_of(module, source, is_package=True)) == []
        return
    forbidden = forbidden_imports(module, source, is_package=path.name == "__init__.py")
    assert forbidden == [], f"server.{module} may not import {forbidden}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("chat.prepare", "from server.engine import client"),
        ("chat.prepare", "import server.engine.client"),
        ("chat.prepare", "from ..engine.client import Engine"),
        ("chat.prepare", "def late():\n    from server.model import config"),
        ("api.chat", "from server.engine.scheduler import Scheduler"),
        ("api.chat", "from server.engine import scheduler"),
        ("media.image", "from server.core import Tiles"),
        ("core", "from server.errors import ServerError"),
        ("engine.worker", "from server.telemetry import metrics"),
        ("vision.tiles", "from server import __version__"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, source: str) -> None:
    assert forbidden_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("chat.prepare", "from server.media import image\nfrom . import parts"),
        ("api.chat", "from server.engine.client import Engine"),
        ("engine.client", "from server.telemetry import metrics"),
        ("app", "from server import __version__\nfrom server.engine.process import EngineProcess"),
        ("vision.tiles", "import torch\nimport serverless"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(module: str, source: str) -> None:
    assert forbidden_imports(module, source) == []


def test_the_http_process_never_imports_torch() -> None:
    beside_http = [
        f"server.{module}"
        for module, _ in modules()
        if module not in ("", "__main__")
        and not any(is_within(module, each) for each in ENGINE_PROCESS_ONLY)
    ]
    assert "server.engine.client" in beside_http
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *beside_http],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
