"""The command line of the demo model's making: `python -m tools.demo_model --help`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from tools.demo_model import evaluate, export, joint_phase, labels, tokenizer, tower_phase
from tools.demo_model.network import DemoModel, Dimensions
from tools.demo_model.optimizer import Optimizer

SEED = 20261121
# The whole run stays under six hours on two slow cores; on faster ones it simply sees more.
MINUTES = {"tower": 65.0, "decoder": 65.0, "joint": 35.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument(
        "step",
        choices=("all", "tokenizer", "tower", "decoder", "joint", "export", "evaluate"),
        nargs="?",
        default="all",
    )
    parser.add_argument("--folder", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--output", type=Path, default=None, help="default: FOLDER/export")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None, help="of one phase")
    parser.add_argument("--samples", type=int, default=200, help="per task, for evaluate")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.output or options.folder / "export"
    if options.step == "all":
        run_all(options.folder, output)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    run_step(
        options.step,
        options.folder,
        output,
        minutes=options.minutes or MINUTES.get(options.step, 0.0),
        samples=options.samples,
    )


def run_all(folder: Path, output: Path) -> None:
    """Everything in order. Tower and decoder learn at the same time, one core each."""
    here = [sys.executable, "-m", "tools.demo_model"]
    where = ["--folder", str(folder), "--output", str(output)]
    subprocess.run([*here, "tokenizer", *where], check=True)
    beside = [subprocess.Popen([*here, step, *where]) for step in ("tower", "decoder")]
    if any([process.wait() for process in beside]):  # a list: both, whatever the first says
        raise SystemExit("a phase failed; run the same command to go on from its checkpoint")
    for step in ("joint", "export", "evaluate"):
        subprocess.run([*here, step, *where, "--threads", "2"], check=True)


def run_step(step: str, folder: Path, output: Path, *, minutes: float, samples: int) -> None:
    if step == "tokenizer":
        tokenizer.write(folder)
    elif step == "tower":
        model = DemoModel(Dimensions(vocab_size=8), labels.CLASSES)
        tower_phase.run(model, Optimizer(model), folder, seed=SEED, budget_s=60 * minutes)
    elif step == "export":
        export.write(output, folder / "tokenizer.json", export.trained_weights(folder))
    elif step == "evaluate":
        print(evaluate.table(evaluate.report(output, samples)))
    else:
        codec = tokenizer.TextCodec(folder / "tokenizer.json")
        model = DemoModel(Dimensions(vocab_size=codec.size), labels.CLASSES)
        joint = step == "joint"
        if joint and not (folder / "joint.pt").exists():
            with torch.no_grad():
                for name, value in export.merged_weights(folder, codec.size).items():
                    model.get_parameter(name).copy_(value)
        joint_phase.run(
            model,
            Optimizer(model),
            codec,
            folder,
            seed=SEED,
            phase=step,
            budget_s=60 * minutes,
            peak_rate=0.35 if joint else 0.5,
            end_rate=0.0 if joint else 0.5,
            small=0.3 if joint else 0.5,
        )


if __name__ == "__main__":
    main()
