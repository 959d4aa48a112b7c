"""Which first ranking "auto" is better off with: SGD-IE, as it has, or low-rank ACC-SGD-IE.

    python benchmarks/automatic.py [--publish] [--repeats 3]

Every training sample is replayed exactly, in float64, and compared with either ranking by itself and
with what "auto" makes of it. Costs are processor times, in units of a fit in the same process, in which
what else the machine does meanwhile counts less.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import Classifier, arguments, digits, loaders, machine, publish, quieten, trainer
from fidelity import PROBLEMS, Problem
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
)
from lightning_accie.agreement import kendall_tau
from lightning_accie.estimators import Estimator
from lightning_accie.estimators.base import Replay
from lightning_accie.ranking import Ranking

TOP = 10
CHOICES = ((25, 20), (10, 20))
"""``top_k`` and ``verify``: those of `InfluenceCallback`, and fewer."""


class LowRankFirst(Ranking):
    """The automatic ranking, whose first one is by low-rank ACC-SGD-IE."""

    def _begin(self, estimator: Estimator) -> None:
        super()._begin(LowRankAccSgdIE())


FIRST: dict[str, tuple[Estimator, type[Ranking]]] = {
    "SGD-IE": (SgdIE(), Ranking),
    "low-rank, r = 16": (LowRankAccSgdIE(), LowRankFirst),
}
Rows = dict[tuple[str, str], list[tuple[float, ...]]]
"""By what was refined and by the first ranking, for every seed: cost, Kendall τ, Jaccard index."""


def fit(
    problem: Problem, seed: int, root: Path, callbacks: list[Any]
) -> tuple[Classifier, DataLoader[Any], DataLoader[Any]]:
    x, y = digits(torch.float64, seed)
    train, val = loaders(x, y, 200, 500, 50)
    torch.manual_seed(seed)
    module = Classifier(problem.net().double(), problem.rate)
    settings = {"max_epochs": problem.epochs, "callbacks": callbacks, "limit_val_batches": 0}
    trainer(root, **settings).fit(module, train)
    return module, train, val


def recorded(problem: Problem, seed: int) -> Replay:
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root)
    module, train, val = fit(problem, seed, root, [influence])
    engine = InfluenceEngine(
        root / "trajectory", module, train, val_dataloaders=val, progress=False
    )
    return engine.replay("val_loss")


def seconds(action: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = process_time()
    action()
    return process_time() - start


def overlap(found: Tensor, exact: Tensor) -> float:
    """The Jaccard index of the most harmful samples."""
    one, other = (set(values.argsort()[:TOP].tolist()) for values in (found, exact))
    return len(one & other) / len(one | other)


def measure(problem: Problem, seed: int, rows: Rows) -> None:
    root = Path(tempfile.mkdtemp())
    replay = recorded(problem, seed)
    one_fit = min(seconds(lambda: fit(problem, seed, root, [])) for _ in range(2))
    exact = LeaveOneOut().estimate(replay).influence

    def note(refined: str, first: str, spent: float, found: Tensor) -> None:
        figures = spent / one_fit, kendall_tau(found, exact), overlap(found, exact)
        rows.setdefault((refined, first), []).append(figures)

    for first, (estimator, kind) in FIRST.items():
        found: list[Tensor] = []
        spent = seconds(
            lambda e=estimator, f=found: f.append(e.estimate(replay).influence)  # type: ignore[misc]
        )
        note("none", first, spent, found[0])
        for top_k, verify in CHOICES:
            ranking = kind(replay, seed=0)
            spent = seconds(lambda r=ranking, k=top_k, v=verify: r.run(None, top_k=k, verify=v))  # type: ignore[misc]
            note(f"`top_k={top_k}`, `verify={verify}`", first, spent, ranking.influence)


def table(columns: dict[str, Rows]) -> str:
    """One row for what was refined and the first ranking, one column a problem."""
    lines = [
        "| refined | first ranking | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for key in next(iter(columns.values())):
        means = [torch.tensor(rows[key], dtype=torch.float64).mean(0) for rows in columns.values()]
        cells = ["{:.2f}: {:.3f} / {:.2f}".format(*mean.tolist()) for mean in means]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    columns: dict[str, Rows] = {}
    for seed in range(options.repeats):
        for problem in (problem for problem in PROBLEMS if problem.shuffled):
            rows = columns.setdefault(problem.name.removesuffix(", shuffled"), {})
            measure(problem, seed, rows)
            print(problem.name, seed, {key: found[-1] for key, found in rows.items()}, flush=True)
        text = table(columns) + (
            f"\n\nCost in fits: Kendall τ over all 200 samples / Jaccard index of the {TOP} most "
            f"harmful, against exact replay; means over {seed + 1} seeds. {machine()}."
        )
        print(text, flush=True)
        if options.publish:
            publish("automatic", text)


if __name__ == "__main__":
    main()
