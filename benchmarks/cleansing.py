"""Does the test error fall when the most harmful training samples are dropped?

    python benchmarks/cleansing.py --data DIR [--seeds 10] [--drop 1 10 100 300 1000]
                                   [--only mnist] [--results FILE] [--publish]

``DIR`` holds ``mnist.npz`` and ``cifar10_subset.npz``. In each repetition samples are drawn, a network
is trained, and its training samples are ranked by what they do to the loss on validation data. Then,
from another seed, networks are trained without the first m of each ranking, and the test error is
compared with that of a network trained from that seed on everything. So the intervals are those of a
user who has one run to rank by. What is finished is kept in ``--results`` and not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, Classifier, kept_rows, machine, mlp, publish, quieten, trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_accie import (
    AccSgdIE,
    DataValueEmbedding,
    InfluenceCallback,
    InfluenceEngine,
    LowRankAccSgdIE,
    SgdIE,
    TracIn,
)

RETRAIN = 1000
"""Added to a repetition's seed for the trainings that are compared."""


@dataclass(frozen=True)
class Problem:
    """What is trained on.

    Attributes:
        refined: how many samples ACC-SGD-IE gives a better figure: the most harmful by SGD-IE. 0 leaves
            out ACC-SGD-IE and its low-rank form, which are dear where layers are convolutions.
    """

    name: str
    file: str
    net: Callable[[], nn.Module]
    train: int
    val: int
    epochs: int
    rate: float
    refined: int
    flipped: float = 0.0


def small_cnn() -> nn.Module:
    """Two convolutions with stride, 35,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    )


def flat_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), mlp(784, 64, 10))


PROBLEMS = (
    Problem("mnist", "mnist.npz", flat_mlp, 3000, 3000, 8, 0.1, 60),
    Problem("mnist, 10 % flipped", "mnist.npz", flat_mlp, 3000, 3000, 8, 0.1, 60, flipped=0.1),
    Problem("cifar-10", "cifar10_subset.npz", small_cnn, 3000, 1000, 8, 0.05, 0),
)
BATCH = 50


class Decaying(Classifier):
    """Its learning rate falls to zero in equal steps, so that where it ends is no matter of chance."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def read(folder: Path, problem: Problem, seed: int) -> tuple[Dataset[Any], ...]:
    """Training and validation samples at random, and all test samples, standardised."""
    with np.load(folder / problem.file) as found:
        arrays = [found[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x, y, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=random)[: problem.train + problem.val]
    x, y = x[order].float(), y[order].long()
    mean, spread = x[: problem.train].mean(), x[: problem.train].std()
    x, x_test = (_images((part.float() - mean) / spread) for part in (x, x_test))
    flips = torch.randperm(problem.train, generator=random)[: int(problem.flipped * problem.train)]
    y[flips] = (y[flips] + torch.randint(1, 10, (len(flips),), generator=random)) % 10
    first, rest = slice(problem.train), slice(problem.train, None)
    parts = ((x[first], y[first]), (x[rest], y[rest]), (x_test, y_test.long()))
    return tuple(TensorDataset(*part) for part in parts)


def _images(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()


def train(
    problem: Problem, dataset: Dataset[Any], val: Dataset[Any], seed: int, callbacks: list[Any]
) -> Classifier:
    seed_everything(seed, verbose=False)
    module = Decaying(problem.net(), problem.rate)
    batches = DataLoader(dataset, BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as root:
        settings = {"max_epochs": problem.epochs, "limit_val_batches": 0, "callbacks": callbacks}
        trainer(Path(root), **settings).fit(module, batches, DataLoader(val, 500))
    return module


def error(module: Classifier, test: TensorDataset) -> float:
    """The share of the test samples that are put into a wrong class."""
    x, y = test.tensors
    with torch.no_grad():
        return float((module.net(x).argmax(1) != y).double().mean())


def orders(
    problem: Problem, data: TensorDataset, val: Dataset[Any], seed: int
) -> dict[str, Tensor]:
    """The training samples by each method, most harmful first, from one recorded run."""
    with tempfile.TemporaryDirectory() as root:
        influence = InfluenceCallback(run="manual", dirpath=root)
        module = train(problem, data, val, seed, [influence])
        loaders = DataLoader(data, BATCH), DataLoader(val, 500)
        engine = InfluenceEngine(
            root, module, loaders[0], val_dataloaders=loaders[1], progress=False
        )
        replay = engine.replay("val_loss")
        found = {
            name: estimator.estimate(replay).influence.argsort()
            for name, estimator in (
                ("SGD-IE", SgdIE()),
                *([("low-rank ACC", LowRankAccSgdIE())] if problem.refined else []),
                ("DVEmb", DataValueEmbedding()),
                ("TracIn", TracIn()),
            )
        }
        if problem.refined:
            first, rest = found["SGD-IE"].split([problem.refined, problem.train - problem.refined])
            refined = AccSgdIE(first.tolist()).estimate(replay)
            again = refined.samples[refined.influence.argsort()]
            found[f"ACC of the first {problem.refined}"] = torch.cat([again, rest])
    x, y = data.tensors
    with torch.no_grad():
        loss = F.cross_entropy(module.net(x), y, reduction="none")
    random = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return {
        **found,
        "training loss": loss.argsort(descending=True),
        "random": random,
    }


def measured(
    folder: Path, problem: Problem, seed: int, drops: list[int]
) -> Iterator[dict[str, Any]]:
    """One repetition: the test error without the first m of each ranking, and with everything."""
    data, val, test = read(folder, problem, seed)
    key = {"data": problem.name, "seed": seed}
    whole = error(train(problem, data, val, seed + RETRAIN, []), test)
    yield {**key, "method": "nothing", "dropped": 0, "error": whole}
    for method, order in orders(problem, data, val, seed).items():
        for drop in drops:
            left = Subset(data, order[drop:].sort().values.tolist())
            module = train(problem, left, val, seed + RETRAIN, [])
            yield {**key, "method": method, "dropped": drop, "error": error(module, test)}


# ---------------------------------------------------------------------------- tables


def changes(rows: list[dict[str, Any]], data: str) -> dict[tuple[str, int], np.ndarray]:
    """Test error less that with everything, of each repetition, in percentage points."""
    own = [row for row in rows if row["data"] == data]
    whole = {row["seed"]: row["error"] for row in own if row["method"] == "nothing"}
    found: dict[tuple[str, int], list[float]] = {}
    for row in own:
        if row["method"] != "nothing":
            change = 100 * (row["error"] - whole[row["seed"]])
            found.setdefault((row["method"], row["dropped"]), []).append(change)
    return {key: np.array(values) for key, values in found.items()}


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """A mean and half its 95 % interval, by Student's t."""
    from scipy import stats

    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def table(rows: list[dict[str, Any]], problem: Problem) -> str:
    found = changes(rows, problem.name)
    drops = sorted({drop for _, drop in found})
    whole = [
        100 * row["error"]
        for row in rows
        if row["data"] == problem.name and row["method"] == "nothing"
    ]
    mean, half = mean_and_half(np.array(whole))
    lines = [
        f"| {problem.name}, {len(whole)} repetitions: {mean:.2f} ± {half:.2f} % | "
        + " | ".join(f"{drop:,} dropped" for drop in drops)
        + " |",
        "|---|" + "---|" * len(drops),
    ]
    for method in dict.fromkeys(method for method, _ in found):
        cells = []
        for drop in drops:
            mean, half = mean_and_half(found[method, drop])
            cells.append(f"{mean:+.2f} ± {half:.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Change of the test error by samples dropped, one panel a problem."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "cleansing"
    there = [p for p in PROBLEMS if any(row["data"] == p.name for row in rows)]
    fig, axes = plt.subplots(1, len(there), figsize=(4.2 * len(there), 3.6), squeeze=False)
    for axis, problem in zip(axes[0], there, strict=True):
        found = changes(rows, problem.name)
        for method in dict.fromkeys(method for method, _ in found):
            drops = sorted(drop for name, drop in found if name == method)
            pairs = [mean_and_half(found[method, drop]) for drop in drops]
            means, halves = zip(*pairs, strict=True)
            axis.errorbar(drops, means, halves, marker="o", ms=3, lw=1, capsize=2, label=method)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(title=problem.name, xscale="log", xlabel="samples dropped")
        axis.set_yscale("symlog", linthresh=1.0, linscale=2.0)
    axes[0][0].set_ylabel("change of the test error, points")
    axes[0][-1].legend(fontsize=7, loc="upper left")
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    names = [problem.name for problem in PROBLEMS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--drop", type=int, nargs="+", default=[1, 10, 100, 300, 1000])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--results", type=Path, default=Path("cleansing.jsonl"))
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    rows = kept_rows(options.results)
    done = {(row["data"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for problem in PROBLEMS:
            if problem.name not in options.only or (problem.name, seed) in done:
                continue
            print(f"{problem.name}, repetition {seed + 1}", file=sys.stderr, flush=True)
            found = list(measured(options.data, problem, seed, sorted(options.drop)))
            with options.results.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
            rows += found
    there = [p for p in PROBLEMS if any(row["data"] == p.name for row in rows)]
    text = "\n\n".join(
        [
            *(table(rows, problem) for problem in there),
            "Change of the test error in percentage points, against training on everything from the "
            "same seed; the first cell has that error. Means over the repetitions and their 95 % "
            f"intervals (Student's t). {machine()}.",
        ]
    )
    print(text)
    if options.publish:
        publish("cleansing", text)
        figure(rows, ROOT / "docs" / "figures" / "cleansing.svg")


if __name__ == "__main__":
    main()
