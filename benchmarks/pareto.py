"""Fidelity against cost: the estimators, and the paper's ways to make ACC-SGD-IE cheaper, in float64.

    python benchmarks/pareto.py [--publish] [--repeats 3]

Every one of 200 training samples is estimated by each, and compared with its exact replay; costs are in
units of the run's own `Trainer.fit`, one thread. Writes the table and the plot of the benchmark page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    Classifier,
    arguments,
    digits,
    loaders,
    machine,
    mlp,
    publish,
    quieten,
    seconds,
    trainer,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

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
from lightning_accie.estimators import Estimator


@dataclass(frozen=True)
class Problem:
    name: str
    net: Callable[[], nn.Module]
    epochs: int
    rate: float
    layers: tuple[str, ...] = ()


PROBLEMS = [
    Problem("softmax", lambda: mlp(64, 10), 40, 0.5),
    Problem(
        "64-32-10 tanh",
        lambda: mlp(64, 32, 10, activation=nn.Tanh),
        100,
        0.1,
        layers=("net.0", "net.2"),
    ),
]


@dataclass(frozen=True)
class Way:
    """An estimator, the family it belongs to, and what marks its point."""

    family: str
    mark: str
    estimator: Estimator

    @property
    def name(self) -> str:
        return f"{self.family}, {self.mark}" if self.mark else self.family


def ways(problem: Problem) -> list[Way]:
    some = [
        ("every k-th step's curvature", f"k = {k}", {"every_k_steps": k}) for k in (2, 4, 8, 16)
    ]
    some += [
        ("corrected at random", f"ρ = {p}", {"correction_probability": p}) for p in (0.5, 0.25)
    ]
    for part in (0.25, 0.5):
        epochs = (0, int(part * problem.epochs))
        some.append(("corrected in the first epochs", f"{part:.0%}", {"correction_epochs": epochs}))
    some += [("some layers", layer, {"layers": layer}) for layer in problem.layers]
    found = [
        Way("TracIn", "", TracIn()),
        Way("SGD-IE", "", SgdIE()),
        Way("ACC-SGD-IE", "", AccSgdIE()),
        Way("ACC-SGD-IE, linear query", "", AccSgdIE(query="linear")),
    ]
    found += [Way(f"ACC, {family}", mark, AccSgdIE(**given)) for family, mark, given in some]
    for rank in (4, 16, 64):
        found.append(Way("low-rank ACC, Gauss-Newton", f"r = {rank}", LowRankAccSgdIE(rank)))
    for rank in (4, 16, 64):
        found.append(Way("low-rank ACC, Hessian", f"r = {rank}", LowRankAccSgdIE(rank, "hessian")))
    return found


Figures = dict[str, list[tuple[float, float, float]]]
"""Per way, for every seed: cost in fits, relative RMSE, Kendall τ."""


def measure(problem: Problem, seed: int, figures: Figures) -> None:
    x, y = digits(torch.float64, seed)
    train, val = loaders(x, y, 200, 500, 50)
    plain = seconds(lambda: fit(problem, seed, train, val, []))
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(run="manual", dirpath=root)
    module = fit(problem, seed, train, val, [influence])
    plain = min(plain, seconds(lambda: fit(problem, seed, train, val, [])))
    engine = InfluenceEngine(
        root / "trajectory", module, train, val_dataloaders=val, progress=False
    )
    replay = engine.replay("val_loss")
    truth: list[Any] = []
    cost = seconds(lambda: truth.append(LeaveOneOut().estimate(replay).influence)) / plain
    figures.setdefault("exact replay", []).append((cost, 0.0, 1.0))
    for way in ways(problem):
        found: list[Any] = []
        cost = seconds(lambda w=way, f=found: f.append(w.estimator.estimate(replay))) / plain
        influence_ = found[0].influence
        pair = relative_rmse(influence_, truth[0]), kendall_tau(influence_, truth[0])
        figures.setdefault(way.name, []).append((cost, *pair))


def fit(problem: Problem, seed: int, train: Any, val: Any, callbacks: list[Any]) -> Classifier:
    torch.manual_seed(seed)
    module = Classifier(problem.net().double(), problem.rate)
    root = Path(tempfile.mkdtemp())
    runner = trainer(root, max_epochs=problem.epochs, callbacks=callbacks, limit_val_batches=0)
    runner.fit(module, train, val)
    return module


def mean(rows: list[tuple[float, float, float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


# ---------------------------------------------------------------------- table and plot


def table(all_figures: dict[str, Figures]) -> str:
    names = dict.fromkeys(name for figures in all_figures.values() for name in figures)
    head = ["| | " + " | ".join(all_figures) + " |", "|---|" + "---|" * len(all_figures)]
    rows = []
    for name in names:
        cells = []
        for figures in all_figures.values():
            if name not in figures:
                cells.append("")
                continue
            cost, error, tau = mean(figures[name])
            cells.append(f"{cost:.2f}: {error:.3f} / {tau:.3f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*head, *rows])


def plot(all_figures: dict[str, Figures], path: Path) -> None:
    figure = Figure(figsize=(7, 3.6 * len(all_figures)), layout="constrained")
    axes = figure.subplots(len(all_figures), 1, squeeze=False)[:, 0]
    for problem, axis in zip(PROBLEMS, axes, strict=True):
        draw(problem, all_figures[problem.name], axis)
    handles, labels = axes[-1].get_legend_handles_labels()  # the last problem has all families
    axes[0].legend(handles, labels, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set_xlabel("cost of all 200 samples, in units of Trainer.fit")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw(problem: Problem, figures: Figures, axis: Axes) -> None:
    families: dict[str, list[Way]] = {}
    for way in ways(problem):
        if way.family not in ("TracIn", "ACC-SGD-IE, linear query"):  # far off the scale; dearer
            families.setdefault(way.family, []).append(way)
    shown = dict.fromkeys(way.family for way in ways(PROBLEMS[-1]))
    styles = {family: (f"C{n % 10}", "osD^v<>P*X"[n % 10]) for n, family in enumerate(shown)}
    for family, members in families.items():
        color, marker = styles[family]
        points = [mean(figures[way.name]) for way in members]
        costs, errors = [p[0] for p in points], [p[1] for p in points]
        axis.plot(costs, errors, marker=marker, color=color, linewidth=0.8, label=family)
        for way, cost, error in zip(members, costs, errors, strict=True):
            where = {"xytext": (3, 3), "textcoords": "offset points"}
            axis.annotate(way.mark, (cost, error), fontsize=6, **where)
    axis.axvline(
        mean(figures["exact replay"])[0], color="grey", linestyle=":", label="exact replay"
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(0.02, 2.0)  # what blew up is in the table
    axis.set_ylabel("relative RMSE")
    axis.set_title(f"digits, {problem.name}, n = 200", fontsize=9)


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    all_figures: dict[str, Figures] = {problem.name: {} for problem in PROBLEMS}
    for problem in PROBLEMS:
        for seed in range(options.repeats):
            measure(problem, seed, all_figures[problem.name])
            print(table(all_figures), flush=True)
    text = table(all_figures) + (
        "\n\nCost in units of `Trainer.fit`: relative RMSE / Kendall τ against exact replay of all 200 "
        f"samples, batch 50, shuffled, means over {options.repeats} seeds. {machine()}."
    )
    print(text)
    if options.publish:
        publish("pareto", text)
        plot(all_figures, ROOT / "docs" / "figures" / "pareto.svg")


if __name__ == "__main__":
    main()
