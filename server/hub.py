"""From what the operator calls a model to a folder on this machine.

A folder is taken as it is; `owner/name` is fetched from the Hugging Face hub, which keeps its own
cache and reads its own token; nothing at all is the demo model that comes with the package. The
only file that knows the hub; it must not know what is inside a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from server.errors import CheckpointError

DEMO_NAME = "hcx-demo"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """Where a checkpoint lies, and what to call it where the operator chose no name."""

    folder: Path
    name: str


def is_hub_name(model: str) -> bool:
    """Whether the model has to be fetched: it has the form owner/name and is no folder here."""
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).exists()


def find_checkpoint(
    model: str | None, *, revision: str | None = None, show_progress: bool = False
) -> LocalCheckpoint:
    """The folder of a model, fetched first where needed; CheckpointError where there is none."""
    if model is not None and is_hub_name(model):
        folder = _fetch(model, revision=revision, show_progress=show_progress)
        return LocalCheckpoint(folder=folder, name=model)
    if revision is not None:
        raise CheckpointError(
            f"revision {revision} was asked for, but only a hub name has revisions"
        )
    if model is None:
        return LocalCheckpoint(folder=_demo_folder(), name=DEMO_NAME)
    folder = Path(model).expanduser().resolve()
    if not folder.exists():
        raise CheckpointError(f"{model}: no such folder, and not a hub name (owner/name)")
    if not folder.is_dir():
        raise CheckpointError(f"{model}: is a file; the checkpoint's folder is needed")
    return LocalCheckpoint(folder=folder, name=folder.name)


def _demo_folder() -> Path:
    folder = Path(str(files("server").joinpath("demo")))
    if not (folder / "config.json").is_file():
        raise CheckpointError("this installation has no demo model; name a model with --model")
    return folder


def _fetch(name: str, *, revision: str | None, show_progress: bool) -> Path:
    if not show_progress:
        disable_progress_bars()
    at_revision = f" at revision {revision}" if revision else ""
    try:
        # Weights for other programs lie in sub-folders, where there are any.
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"]
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owner asks for consent: accept the terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: not on the hub, or HF_TOKEN is missing or may not read it"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}{at_revision}: the hub cannot be reached, and no complete copy is cached"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise CheckpointError(f"{name}{at_revision}: the hub answered {status}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{name}{at_revision}: the download failed: {reason}") from error
    except Exception as error:  # names the hub never has, addresses that are none, and the like
        raise CheckpointError(
            f"{name}{at_revision}: cannot be fetched from the hub ({type(error).__name__})"
        ) from error
    return Path(folder)
