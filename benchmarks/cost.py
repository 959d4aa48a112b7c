"""What capture and the estimators cost, as ratios to `Trainer.fit` in the same run, one thread.

    python benchmarks/cost.py [--publish]

Two networks: 64-32-10 on scikit-learn's digits (steps of about a millisecond), and 784-512-512-10
(670k parameters) on made-up images. Fits with and without the callback alternate, and the fastest of
each counts; the price of a step is the slope between a short and a long fit, so that what happens
once (opening the trajectory, the first-step self-check) is told apart from what happens at each step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

KINDS = ("nothing", "empty", "capture")


@dataclass(frozen=True)
class Problem:
    name: str
    net: Callable[[], nn.Module]
    data: tuple[Tensor, Tensor]
    train: int
    batch: int
    epochs: tuple[int, int]
    tracked: int


def problems() -> list[Problem]:
    return [
        Problem("64-32-10", lambda: mlp(64, 32, 10), digits(), 1000, 50, (20, 120), 300),
        Problem(
            "784-512-512-10",
            lambda: mlp(784, 512, 512, 10),
            mnist_like(2500),
            2000,
            100,
            (2, 8),
            16,
        ),
    ]


def fit(problem: Problem, epochs: int, *, kind: str) -> tuple[float, InfluenceCallback, Classifier]:
    torch.manual_seed(0)
    module = Classifier(problem.net(), rate=0.1)
    train, _ = data_of(problem)
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root / "influence")
    callbacks: list[Callback] = {"nothing": [], "empty": [Callback()], "capture": [influence]}[kind]
    runner = trainer(root, max_epochs=epochs, callbacks=callbacks, limit_val_batches=0)
    return seconds(lambda: runner.fit(module, train)), influence, module


def data_of(problem: Problem) -> tuple[DataLoader[object], DataLoader[object]]:
    return loaders(*problem.data, problem.train, 300, problem.batch)


def measure(problem: Problem, repeats: int) -> dict[str, float]:
    short, long = problem.epochs
    best: dict[tuple[str, int], float] = {}
    for _ in range(repeats):
        for epochs in problem.epochs:
            for kind in KINDS:
                spent, influence, module = fit(problem, epochs, kind=kind)
                best[kind, epochs] = min(spent, best.get((kind, epochs), float("inf")))
    steps = (long - short) * -(-problem.train // problem.batch)
    step = {kind: (best[kind, long] - best[kind, short]) / steps for kind in KINDS}
    whole = best["nothing", long]
    figures = {
        "step_ms": 1e3 * step["nothing"],
        "empty_step": step["empty"] / step["nothing"] - 1,
        "capture_step": step["capture"] / step["nothing"] - 1,
        "capture_fit": best["capture", long] / whole - 1,
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
        "capture_step": ("capture, per training step", "{:+.1%}"),
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
