"""How close each estimator comes to exact leave-one-out replay, in float64.

    python benchmarks/fidelity.py [--publish]

Every training sample is replayed exactly, and every estimator is compared over all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Classifier, arguments, digits, loaders, machine, mlp, publish, quieten, trainer
from torch import Tensor, nn

from lightning_accie import (
    AccSgdIE,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
    TracIn,
)
from lightning_accie.agreement import kendall_tau, relative_rmse


@dataclass(frozen=True)
class Problem:
    name: str
    net: Callable[[], nn.Module]
    epochs: int
    rate: float
    shuffled: bool


PROBLEMS = [
    Problem("softmax, file order", lambda: mlp(64, 10), 40, 0.5, shuffled=False),
    Problem("softmax, shuffled", lambda: mlp(64, 10), 40, 0.5, shuffled=True),
    Problem("64-32-10 tanh", lambda: mlp(64, 32, 10, activation=nn.Tanh), 100, 0.1, shuffled=True),
    Problem("64-32-10 ReLU", lambda: mlp(64, 32, 10), 40, 0.1, shuffled=True),
]


def estimates(problem: Problem, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    x, y = digits(torch.float64, seed if problem.shuffled else None)
    train, val = loaders(x, y, 200, 500, 50)
    torch.manual_seed(seed)
    module = Classifier(problem.net().double(), problem.rate)
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root)
    trainer(root, max_epochs=problem.epochs, callbacks=[influence]).fit(module, train, val)
    engine = InfluenceEngine(
        root / "trajectory", module, train, val_dataloaders=val, progress=False
    )
    replay = engine.replay("val_loss")
    acc = AccSgdIE().estimate(replay)
    found = {
        "TracIn": TracIn().estimate(replay).influence,
        "SGD-IE": SgdIE().estimate(replay).influence,
        "low-rank, r = 16": LowRankAccSgdIE().estimate(replay).influence,
        "low-rank, r = 64, hessian": LowRankAccSgdIE(64, "hessian").estimate(replay).influence,
        "ACC, linear": acc.extras["linear"],
        "ACC, evaluated": acc.influence,
    }
    return found, LeaveOneOut().estimate(replay).influence


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    rows = []
    names: list[str] = []
    for problem in PROBLEMS:
        figures: dict[str, list[tuple[float, float]]] = {}
        for seed in range(options.repeats):
            found, exact = estimates(problem, seed)
            for name, estimate in found.items():
                pair = (relative_rmse(estimate, exact), kendall_tau(estimate, exact))
                figures.setdefault(name, []).append(pair)
        names = list(figures)
        cells = []
        for name in names:
            error, tau = torch.tensor(figures[name], dtype=torch.float64).mean(0).tolist()
            cells.append(f"{error:.3f} / {tau:.3f}")
        rows.append(f"| {problem.name} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    head = [
        "| digits, n = 200, batch 50 | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    text = "\n".join([*head, *rows])
    text += (
        f"\n\nRelative RMSE / Kendall τ against exact replay of all 200 samples, means over "
        f"{options.repeats} seeds. {machine()}."
    )
    print(text)
    if options.publish:
        publish("fidelity", text)


if __name__ == "__main__":
    main()
