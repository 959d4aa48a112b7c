"""Sixty thousand images: every one ranked, what that costs and what memory it takes.

    python benchmarks/large.py --data DIR [--publish] [--samples 1000 10000 60000] [--threads 2]

``DIR`` holds ``mnist.npz`` (``x_train``, ``y_train``, ``x_test``, ``y_test``). A small convolutional
network is trained for two epochs. The training run and each analysis have a process of their own. Its
peak of resident memory is read from the system; costs are in units of `Trainer.fit` without the
callback.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Classifier, machine, publish, quieten, seconds, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, LowRankAccSgdIE, SgdIE
from lightning_accie.estimators import Estimator

EPOCHS = 2
BATCH = 100
ESTIMATORS: dict[str, Estimator] = {
    "sgd-ie": SgdIE(),
    "low-rank-acc-sgd-ie": LowRankAccSgdIE(),
}


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )


def data(folder: Path, samples: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    with np.load(folder / "mnist.npz") as found:
        parts = [
            TensorDataset(
                torch.from_numpy(found[f"x_{part}"][:count]).unsqueeze(1).float() / 255,
                torch.from_numpy(found[f"y_{part}"][:count]).long(),
            )
            for part, count in (("train", samples), ("test", 2000))
        ]
    return DataLoader(parts[0], BATCH, shuffle=True), DataLoader(parts[1], 500)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------- what runs in its own process


def fit(options: argparse.Namespace, *, capture: bool) -> dict[str, float]:
    train, _ = data(options.data, options.samples[0])
    influence = InfluenceCallback(run="manual", dirpath=options.run)
    runner = trainer(
        options.run,
        max_epochs=EPOCHS,
        callbacks=[influence] if capture else [],
        limit_val_batches=0,
    )
    module = Classifier(cnn(), 0.05)
    return {"seconds": seconds(lambda: runner.fit(module, train)), "peak": peak_gib()}


def analyse(options: argparse.Namespace, estimator: str) -> dict[str, float]:
    train, val = data(options.data, options.samples[0])
    engine = InfluenceEngine(
        options.run / "trajectory",
        Classifier(cnn(), 0.05),
        train,
        val_dataloaders=val,
        memory_budget=options.memory_budget,
        progress=False,
    )
    before = peak_gib()
    spent = seconds(
        lambda: engine.estimate("val_loss", ESTIMATORS[estimator], verify=0, resume=False)
    )
    return {"seconds": spent, "peak": peak_gib(), "added": peak_gib() - before}


def task(options: argparse.Namespace) -> dict[str, float]:
    quieten()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    if options.task in ("fit", "capture"):
        return fit(options, capture=options.task == "capture")
    return analyse(options, options.task)


# ---------------------------------------------------------------------- the whole


def spawned(name: str, run: Path, samples: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", name, "--run", str(run), "--data"]
    command += [str(options.data), "--samples", str(samples), "--threads", str(options.threads)]
    command += ["--memory-budget", options.memory_budget]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def row(samples: int, options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        plain = min(
            spawned("fit", run, samples, options)["seconds"] for _ in range(options.repeats)
        )
        captured = spawned("capture", run, samples, options)
        steps = samples * EPOCHS // BATCH
        cells = [
            f"{samples:,}",
            f"{steps:,}",
            f"{captured['seconds'] / plain - 1:+.0%} / {captured['peak']:.1f} GiB",
        ]
        for name in ESTIMATORS:
            found = spawned(name, run, samples, options)
            cells.append(f"{found['seconds'] / plain:.2f} fits / {found['peak']:.1f} GiB")
            print(name, found, f"{1e3 * found['seconds'] / steps:.2f} ms a step", flush=True)
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    options = parsed()
    if options.task:
        print(json.dumps(task(options)))
        return
    parameters = sum(p.numel() for p in cnn().parameters())
    names = " | ".join(f"{name}, every sample" for name in ESTIMATORS)
    lines = [f"| samples | steps | capture | {names} |", "|---|---|---|" + "---|" * len(ESTIMATORS)]
    for samples in options.samples:
        lines.append(row(samples, options))
        print(lines[-1], flush=True)
    torch.set_num_threads(options.threads)
    text = "\n".join(lines) + (
        f"\n\nMNIST, a convolutional network of {parameters:,} parameters, {EPOCHS} epochs, batch "
        f"{BATCH}; cost in units of `Trainer.fit` / peak resident memory of the process, PyTorch, "
        f'Lightning and the data included; `memory_budget="{options.memory_budget}"`. {machine()}.'
    )
    print(text)
    if options.publish:
        publish("large", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--publish", action="store_true", help="write the figures into the docs")
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10000, 60000])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-budget", default="1GB")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
