"""The setting of the ACC-SGD-IE paper (arXiv 2510.26185, section 6), estimator by estimator.

    python benchmarks/paper_tables.py --data DIR [--seeds 20] [--epochs 2 10 20 38] [--only adult]
                                      [--results FILE] [--publish]

``DIR`` holds ``adult.npz``, ``mnist.npz`` and ``newsgroups_hardware.jsonl.gz``. 400 samples train a
logistic regression or an 8-8 ReLU network, in batches of 100 at a learning rate of 0.1; the query is
the mean loss of 400 others. Every sample is replayed exactly, and every estimator is compared over all
of them, after 2 to 38 epochs. What is finished is kept in ``--results`` and not done again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, Classifier, kept_rows, loaders, machine, mlp, publish, quieten, trainer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lightning_accie import (
    AccDataValueEmbedding,
    AccSgdIE,
    DataValueEmbedding,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
    TracIn,
)
from lightning_accie.agreement import jaccard_at_k, kendall_tau

SAMPLES, BATCH, RATE = 400, 100, 0.1
STEPS = SAMPLES // BATCH
NOISY = 0.2
"""The share of the training samples with another label, or with noise of one standard deviation."""
DATA = ("adult", "newsgroups", "mnist 1-7")
MODELS = ("logistic", "8-8 ReLU")
NOISE = ("clean", "feature noise", "label noise")
SHARES = (0.1, 0.3, 0.5, 0.7)


class Binary(Classifier):
    """A classifier of two classes, trained as the paper trains it."""

    def __init__(self, net: nn.Module, penalty: float, *, decays: bool) -> None:
        super().__init__(net, RATE)
        self.penalty, self.decays = penalty, decays

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x)[:, 0], y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, weight_decay=self.penalty)
        if not self.decays:
            return optimizer
        # After step c the rate is multiplied by √(c/(c + 1)).
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda c: 1 / math.sqrt(c + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ---------------------------------------------------------------------------- data


def read(folder: Path, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """800 samples at random, the first half to train on, standardised by it."""
    random = np.random.default_rng(seed)
    if name == "newsgroups":
        with gzip.open(folder / "newsgroups_hardware.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        chosen = [rows[i] for i in random.permutation(len(rows))[: 2 * SAMPLES]]
        words = TfidfVectorizer(stop_words="english", min_df=0.001, max_df=0.2)
        words.fit([row["text"] for row in chosen[:SAMPLES]])
        x = words.transform([row["text"] for row in chosen]).toarray()
        y = np.array([row["label"] for row in chosen])
    else:
        with np.load(folder / ("adult.npz" if name == "adult" else "mnist.npz")) as found:
            x, y = found["x_train"], found["y_train"]
        if name == "mnist 1-7":
            kept = np.isin(y, (1, 7))
            x, y = x[kept].reshape(kept.sum(), -1) / 255.0, y[kept] == 7
        order = random.permutation(len(y))[: 2 * SAMPLES]
        x, y = x[order].astype(np.float64), y[order]
    scaler = StandardScaler().fit(x[:SAMPLES])
    return scaler.transform(x), y.astype(np.float64)


def spoilt(x: np.ndarray, y: np.ndarray, noise: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Spoil a share of the training samples."""
    random = np.random.default_rng(seed + 1000)
    rows = random.permutation(SAMPLES)[: int(NOISY * SAMPLES)]
    x, y = x.copy(), y.copy()
    if noise == "feature noise":
        x[rows] += random.normal(size=(len(rows), x.shape[1]))
    elif noise == "label noise":
        y[rows] = 1 - y[rows]
    return x, y


def penalty_of(x: np.ndarray, y: np.ndarray) -> float:
    """α = 1/(C n), with C by cross-validation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegressionCV(fit_intercept=False, cv=5).fit(x, y)
    return float(1 / (model.C_[0] * len(y)))


# ---------------------------------------------------------------------------- one run


def measured(
    folder: Path, name: str, model: str, noise: str, seed: int, epochs: list[int]
) -> Iterator[dict[str, Any]]:
    """Train once, and compare every estimator after so many epochs."""
    x, y = spoilt(*read(folder, name, seed), noise, seed)
    torch.manual_seed(seed)
    convex = model == "logistic"
    width = x.shape[1]
    net = nn.Sequential(nn.Linear(width, 1, bias=False)) if convex else mlp(width, 8, 8, 1)
    penalty = penalty_of(x[:SAMPLES], y[:SAMPLES]) if convex else 0.0
    module = Binary(net.double(), penalty, decays=not convex)
    data = torch.from_numpy(x), torch.from_numpy(y)
    train, val = loaders(*data, SAMPLES, SAMPLES, BATCH)
    with tempfile.TemporaryDirectory() as root:
        influence = InfluenceCallback(run="manual", dirpath=root)
        trainer(Path(root), max_epochs=max(epochs), callbacks=[influence]).fit(module, train, val)
        engine = InfluenceEngine(root, module, train, val_dataloaders=val, progress=False)
        for count in epochs:
            replay = engine.replay("val_loss", at=STEPS * count)
            exact = LeaveOneOut().estimate(replay).influence
            for estimator, estimate in estimates(replay).items():
                yield {
                    "data": name,
                    "model": model,
                    "noise": noise,
                    "seed": seed,
                    "epochs": count,
                    "estimator": estimator,
                    "rmse": float((estimate - exact).square().mean().sqrt()),
                    "relative_rmse": float((estimate - exact).norm() / exact.norm()),
                    "tau": kendall_tau(estimate, exact),
                    **{
                        f"jaccard_{share:.0%}": jaccard_at_k(
                            estimate, exact, round(share * SAMPLES / 2)
                        )
                        for share in SHARES
                    },
                }


def estimates(replay: Any) -> dict[str, Tensor]:
    acc = AccSgdIE().estimate(replay)
    return {
        "SGD-IE": SgdIE().estimate(replay).influence,
        "ACC, linear": acc.extras["linear"],
        "ACC, evaluated": acc.influence,
        "low-rank ACC": LowRankAccSgdIE().estimate(replay).influence,
        "DVEmb": DataValueEmbedding().estimate(replay).influence,
        "ACC-DVEmb": AccDataValueEmbedding().estimate(replay).influence,
        "TracIn": TracIn().estimate(replay).influence,
    }


# ---------------------------------------------------------------------------- tables


def table(rows: list[dict[str, Any]]) -> str:
    """Relative RMSE / τ of every estimator, by setting, at the last epoch; means over seeds."""
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    last = max(row["epochs"] for row in rows)
    lines = [
        f"| after {last} epochs | seeds | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for name, model, noise in product(DATA, MODELS, NOISE):
        found = [
            row
            for row in rows
            if (row["data"], row["model"], row["noise"], row["epochs"])
            == (name, model, noise, last)
        ]
        if not found:
            continue
        cells = []
        for estimator in names:
            own = [row for row in found if row["estimator"] == estimator]
            error, tau = (np.mean([row[key] for row in own]) for key in ("relative_rmse", "tau"))
            cells.append(f"{error:.3f} / {tau:.3f}")
        seeds = len({row["seed"] for row in found})
        lines.append(f"| {name}, {model}, {noise} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def improvements(rows: list[dict[str, Any]]) -> str:
    """How much better than SGD-IE the paper's figure is, and the evaluated one, over all epochs."""
    by_run: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("data", "model", "noise", "seed", "epochs"))
        by_run.setdefault(key, {})[row["estimator"]] = row
    lines = [
        "| setting | RMSE, linear | RMSE, evaluated | τ, linear | Jaccard@10, linear |",
        "|---|---|---|---|---|",
    ]
    for name, model, noise in product(DATA, MODELS, NOISE):
        runs: dict[int, list[dict[str, dict[str, Any]]]] = {}
        for key, found in by_run.items():
            if key[:3] == (name, model, noise):
                runs.setdefault(key[3], []).append(found)
        if not runs:
            continue
        cells = []
        for estimator, measure in (
            ("ACC, linear", "rmse"),
            ("ACC, evaluated", "rmse"),
            ("ACC, linear", "tau"),
            ("ACC, linear", "jaccard_10%"),
        ):
            ratios = [
                sum(run[estimator][measure] for run in seed)
                / sum(run["SGD-IE"][measure] for run in seed)
                - 1
                for seed in runs.values()
            ]
            cells.append(_interval(ratios))
        lines.append(f"| {name}, {model}, {noise} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(values: list[float]) -> str:
    """A mean and its 95 % interval over seeds, by the normal approximation."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.1%}"
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:+.1%} ± {half:.1%}"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Relative RMSE across epochs, one panel a model and data set, on clean data."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "paper"
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    there = [d for d in DATA if any(row["data"] == d for row in rows)]
    fig, axes = plt.subplots(2, len(there), figsize=(3.6 * len(there), 6), squeeze=False)
    for (line, model), (column, name) in product(enumerate(MODELS), enumerate(there)):
        axis = axes[line][column]
        for estimator in names:
            found: dict[int, list[float]] = {}
            for row in rows:
                if (row["data"], row["model"], row["noise"]) != (name, model, "clean"):
                    continue
                if row["estimator"] == estimator:
                    found.setdefault(row["epochs"], []).append(row["relative_rmse"])
            epochs = sorted(found)
            axis.plot(
                epochs, [np.mean(found[e]) for e in epochs], marker="o", ms=3, label=estimator
            )
        axis.set(title=f"{name}, {model}", xlabel="epochs", ylabel="relative RMSE", yscale="log")
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 10, 20, 38])
    parser.add_argument("--only", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--results", type=Path, default=Path("paper_tables.jsonl"))
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    rows = kept_rows(options.results)
    done = {(r["data"], r["model"], r["noise"], r["seed"], r["epochs"]) for r in rows}
    runs = [
        (*setting, seed)
        for seed in range(options.seeds)
        for setting in product(options.only, MODELS, NOISE)
    ]
    for place, run in enumerate(runs, 1):
        if all((*run, count) in done for count in options.epochs):
            continue
        print(f"{place} of {len(runs)}: {', '.join(map(str, run))}", file=sys.stderr, flush=True)
        found = list(measured(options.data, *run, sorted(options.epochs)))
        with options.results.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in found))
        rows += found
    text = (
        f"{table(rows)}\n\nRelative RMSE / Kendall τ over all {SAMPLES} samples, means over seeds.\n\n"
        f"{improvements(rows)}\n\nChange against SGD-IE over all epochs measured, mean over seeds and "
        f"its 95 % interval; for the RMSE less is better, for the others more. {machine()}."
    )
    print(text)
    if options.publish:
        publish("paper", text)
        figure(rows, ROOT / "docs" / "figures" / "paper.svg")


if __name__ == "__main__":
    main()
