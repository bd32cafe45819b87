"""schemathesis: what /openapi.json says, held against what the server does.

All of its checks but one, in all of its phases: examples, each bound and each value of the
document, random requests, and chains of requests along the document's links.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import Server

HERE = Path(__file__).parent


def test_the_server_is_as_its_document_says(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color"]
    command += ["--config-file", str(HERE / "schemathesis.toml")]
    command += ["run", f"{server.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {server.api_key}"]
    environment = os.environ | {
        "PYTHONPATH": str(HERE),
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
    }
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in run.stdout
    num_cases = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert num_cases is not None and num_cases[1] == num_cases[2] and int(num_cases[1]) > 5_000
