"""What capture and the estimators cost, as ratios to `Trainer.fit` in the same run, one thread.

    python benchmarks/cost.py [--publish]

Two networks: 64-32-10 on scikit-learn's digits (steps of about a millisecond), and 784-512-512-10
(670k parameters) on made-up images. Fits with and without the callback alternate. A step is timed
from one `training_step` to the next, once the fit is warm, so that what happens once (opening the
trajectory, the first-step self-check) is told apart from what happens at each step. Where things lie
in memory moves a step by some percent, for as long as they lie there: every fit begins with another
layout, and the median of the fits counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import (
    Classifier,
    arguments,
    digits,
    loaders,
    machine,
    mlp,
    mnist_like,
    publish,
    quieten,
    seconds,
    trainer,
)
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import (
    AccSgdIE,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
)

WARM = 60
"""Steps at the beginning of a fit that are not timed."""
KINDS = ("nothing", "empty", "capture")


@dataclass(frozen=True)
class Problem:
    name: str
    net: Callable[[], nn.Module]
    data: tuple[Tensor, Tensor]
    train: int
    batch: int
    epochs: int
    timed_epochs: int
    tracked: int


def problems() -> list[Problem]:
    return [
        Problem("64-32-10", lambda: mlp(64, 32, 10), digits(), 1000, 50, 120, 120, 300),
        Problem(
            "784-512-512-10",
            lambda: mlp(784, 512, 512, 10),
            mnist_like(2500),
            2000,
            100,
            8,
            30,
            16,
        ),
    ]


class Timed(Classifier):
    """Notes when its training steps begin."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, rate=0.1)
        self.begun: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.begun.append(perf_counter())
        return super().training_step(batch, batch_idx)


@dataclass(frozen=True)
class Fit:
    """How long a fit took in all, and its steps in the mean and in the median."""

    whole: float
    mean: float
    median: float


def fit(problem: Problem, epochs: int, kind: str) -> tuple[Fit, InfluenceCallback, Timed]:
    layout = scattered()
    torch.manual_seed(0)
    module = Timed(problem.net())
    train, _ = data_of(problem)
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root / "influence")
    callbacks: list[Callback] = {"nothing": [], "empty": [Callback()], "capture": [influence]}[kind]
    runner = trainer(root, max_epochs=epochs, callbacks=callbacks, limit_val_batches=0)
    whole = seconds(lambda: runner.fit(module, train))
    steps = np.diff(module.begun)[WARM:]
    del layout
    return Fit(whole, float(steps.mean()), float(np.median(steps))), influence, module


def scattered() -> list[Tensor]:
    """Memory with holes in it, at random."""
    sizes = 10 ** np.random.default_rng().uniform(3, 5.8, 40)
    blocks = [torch.zeros(int(size)) for size in sizes]
    return blocks[::2]


def data_of(problem: Problem) -> tuple[DataLoader[object], DataLoader[object]]:
    return loaders(*problem.data, problem.train, 300, problem.batch)


def measure(problem: Problem, repeats: int) -> dict[str, float]:
    fits: dict[str, list[Fit]] = {kind: [] for kind in KINDS}
    for _ in range(2 * repeats):
        for kind in KINDS:
            fits[kind].append(fit(problem, problem.timed_epochs, kind)[0])
    mean = {kind: median(found.mean for found in fits[kind]) for kind in KINDS}
    typical = {kind: median(found.median for found in fits[kind]) for kind in KINDS}
    wholes = [fit(problem, problem.epochs, "nothing")[0].whole for _ in range(repeats)]
    whole = median(wholes)
    recorded, influence, module = fit(problem, problem.epochs, "capture")
    figures = {
        "step_ms": 1e3 * mean["nothing"],
        "spread": (max(f.mean for f in fits["nothing"]) / min(f.mean for f in fits["nothing"])) - 1,
        "empty_step": mean["empty"] / mean["nothing"] - 1,
        "capture_step": mean["capture"] / mean["nothing"] - 1,
        "capture_typical": typical["capture"] / typical["nothing"] - 1,
        "capture_us": 1e6 * (mean["capture"] - mean["nothing"]),
        "capture_fit": recorded.whole / whole - 1,
    }
    assert influence.directory is not None
    train, val = data_of(problem)
    engine = InfluenceEngine(
        influence.directory / "trajectory", module, train, val_dataloaders=val, progress=False
    )
    replay = engine.replay("val_loss")
    tracked = list(range(problem.tracked))
    for name, estimator, share in (
        ("sgd_ie", SgdIE(), 1),
        ("low_rank", LowRankAccSgdIE(), 1),
        ("acc", AccSgdIE(tracked), problem.tracked),
        ("exact", LeaveOneOut(tracked), problem.tracked),
    ):
        times = [seconds(lambda e=estimator: e.estimate(replay)) for _ in range(min(repeats, 3))]
        figures[name] = min(times) / whole / share
    return figures


def table(rows: dict[str, dict[str, float]]) -> str:
    names = list(rows)
    lines = [
        "| ratio to `Trainer.fit` | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    labels = {
        "empty_step": ("an empty callback, per training step", "{:+.1%}"),
        "capture_step": ("capture, per training step (mean)", "{:+.1%}"),
        "capture_us": ("capture, µs per training step (mean)", "{:+.0f}"),
        "capture_typical": ("capture, per training step (median of the steps)", "{:+.1%}"),
        "spread": ("fits without a callback differ by", "{:.1%}"),
        "capture_fit": ("capture, whole fit (with self-check and files)", "{:+.1%}"),
        "sgd_ie": ("SGD-IE, every sample", "{:.2f} fits"),
        "low_rank": ("low-rank ACC-SGD-IE, r = 16, every sample", "{:.2f} fits"),
        "acc": ("ACC-SGD-IE, per tracked sample", "{:.3f} fits"),
        "exact": ("exact replay, per sample", "{:.3f} fits"),
    }
    for key, (label, form) in labels.items():
        lines.append(f"| {label} | " + " | ".join(form.format(rows[n][key]) for n in names) + " |")
    steps = ", ".join(f"{rows[n]['step_ms']:.2f} ms ({n})" for n in names)
    return "\n".join(lines) + f"\n\nOne training step: {steps}. {machine()}."


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    text = table({problem.name: measure(problem, options.repeats) for problem in problems()})
    print(text)
    if options.publish:
        publish("cost", text)


if __name__ == "__main__":
    main()
