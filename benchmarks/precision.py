"""What the rounding of `precision="bf16-mixed"` does to exact replays and to estimates.

    python benchmarks/precision.py [--publish]

Every training sample of a run in mixed precision is replayed exactly, under the run's autocast and in
full precision, and the estimators are compared with the exact replays of their own kind.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Classifier, arguments, digits, loaders, machine, mlp, publish, quieten, trainer
from torch import Tensor, nn

from lightning_accie import AccSgdIE, InfluenceCallback, InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.agreement import kendall_tau, relative_rmse


@dataclass(frozen=True)
class Problem:
    name: str
    activation: type[nn.Module]
    epochs: int
    rate: float
    momentum: float


PROBLEMS = [
    Problem("tanh, 20 epochs", nn.Tanh, 20, 0.2, 0.0),
    Problem("tanh, 60 epochs", nn.Tanh, 60, 0.2, 0.0),
    Problem("ReLU, 20 epochs", nn.ReLU, 20, 0.2, 0.0),
    Problem("ReLU, momentum 0.9, 20 epochs", nn.ReLU, 20, 0.05, 0.9),
]
FIGURES = (
    "influence, rms",
    "noise floor",
    "exact: autocast against full",
    "SGD-IE, autocast",
    "SGD-IE, full",
    "ACC, autocast",
    "ACC, full",
)


def figures(problem: Problem, seed: int) -> list[list[float]]:
    """One list a column of `FIGURES`: a size, or relative RMSE and Kendall τ."""
    train, val = loaders(*digits(torch.float32, seed), 100, 300, 20)
    torch.manual_seed(seed)
    module = Classifier(
        mlp(64, 16, 10, activation=problem.activation), problem.rate, problem.momentum
    )
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root)
    settings = {"max_epochs": problem.epochs, "precision": "bf16-mixed"}
    trainer(root, callbacks=[influence], **settings).fit(module, train, val)
    found: dict[tuple[str, bool], Tensor] = {}
    noise = 0.0
    for full in (False, True):
        engine = InfluenceEngine(
            root / "trajectory",
            module,
            train,
            val_dataloaders=val,
            progress=False,
            full_precision=full,
        )
        replay = engine.replay("val_loss")
        exact = LeaveOneOut().estimate(replay)
        noise = noise or exact.noise
        found["exact", full] = exact.influence
        found["sgd", full] = SgdIE().estimate(replay).influence
        found["acc", full] = AccSgdIE().estimate(replay).influence

    def compare(left: Tensor, right: Tensor) -> list[float]:
        return [relative_rmse(left, right), kendall_tau(left, right)]

    estimates = [
        compare(found[name, full], found["exact", full])
        for name in ("sgd", "acc")
        for full in (False, True)
    ]
    size = float(found["exact", True].square().mean().sqrt())
    return [[size], [noise], compare(found["exact", False], found["exact", True]), *estimates]


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    rows = []
    for problem in PROBLEMS:
        runs = [figures(problem, seed) for seed in range(options.repeats)]
        cells = []
        for column in zip(*runs, strict=True):
            means = torch.tensor(column, dtype=torch.float64).mean(0).tolist()
            cells.append(f"{means[0]:.0e}" if len(means) == 1 else "{:.3f} / {:.3f}".format(*means))
        rows.append(f"| {problem.name} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    head = [
        "| 64-16-10, bf16-mixed | " + " | ".join(FIGURES) + " |",
        "|---|" + "---|" * len(FIGURES),
    ]
    text = "\n".join([*head, *rows])
    text += (
        f"\n\nDigits, n = 100, batch 20; relative RMSE / Kendall τ over all samples, means over "
        f"{options.repeats} seeds. {machine()}."
    )
    print(text)
    if options.publish:
        publish("precision", text)


if __name__ == "__main__":
    main()
