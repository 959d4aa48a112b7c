"""Data value embeddings: agreement with exact replay, cost, and how fast stored ones answer.

    python benchmarks/dvemb.py [--publish]

Digits, n = 1000, batch 50, 20 epochs, a tenth of the labels flipped; every training sample is replayed
exactly. Then 60,000 images, whose embeddings are stored and asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import (
    AccDataValueEmbedding,
    DataValueEmbedding,
    Estimator,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    SgdIE,
)
from lightning_accie.agreement import kendall_tau

N, EPOCHS, IMAGES, QUERIES = 1000, 20, 60_000, 1000


@dataclass(frozen=True)
class Problem:
    name: str
    net: Callable[[], nn.Module]
    rate: float


PROBLEMS = [
    Problem("softmax", lambda: mlp(64, 10), 0.5),
    Problem("64-32-10 ReLU", lambda: mlp(64, 32, 10), 0.1),
    Problem("64-32-10 tanh", lambda: mlp(64, 32, 10, activation=nn.Tanh), 0.1),
]
WAYS: dict[str, Callable[[], Estimator]] = {
    "SGD-IE": SgdIE,
    "DVEmb, empirical (the paper's)": lambda: DataValueEmbedding(curvature="empirical"),
    "ACC-DVEmb, empirical": lambda: AccDataValueEmbedding(curvature="empirical"),
    "DVEmb, fisher (the default)": DataValueEmbedding,
    "ACC-DVEmb, fisher": AccDataValueEmbedding,
    "DVEmb, fisher, dimension 512": lambda: DataValueEmbedding(512),
}


def flipped(y: Tensor, seed: int) -> Tensor:
    """A tenth of the first N labels, replaced by others."""
    generator = torch.Generator().manual_seed(100 + seed)
    y, which = y.clone(), torch.randperm(N, generator=generator)[: N // 10]
    y[which] = (y[which] + torch.randint(1, 10, (len(which),), generator=generator)) % 10
    return y


def fit(
    make: Callable[[], Classifier], epochs: int, train: Any, callbacks: list[Any]
) -> Classifier:
    module = make()
    runner = trainer(
        Path(tempfile.mkdtemp()), max_epochs=epochs, callbacks=callbacks, limit_val_batches=0
    )
    runner.fit(module, train)
    return module


def recorded(
    make: Callable[[], Classifier], epochs: int, train: Any, val: Any
) -> tuple[InfluenceEngine, float]:
    """A run, and the seconds that it takes without a callback."""
    plain = min(seconds(lambda: fit(make, epochs, train, [])) for _ in range(3))
    root = Path(tempfile.mkdtemp())
    influence = InfluenceCallback(monitor="val_loss", run="manual", dirpath=root)
    module = fit(make, epochs, train, [influence])
    engine = InfluenceEngine(
        root / "trajectory", module, train, val_dataloaders=val, progress=False
    )
    return engine, plain


def measure(problem: Problem, seed: int, figures: dict[str, list[tuple[float, float]]]) -> None:
    x, y = digits(seed=seed)
    train, val = loaders(x, flipped(y, seed), N, 500, 50)

    def make() -> Classifier:
        torch.manual_seed(seed)
        return Classifier(problem.net(), problem.rate)

    engine, plain = recorded(make, EPOCHS, train, val)
    replay = engine.replay("val_loss")
    exact = LeaveOneOut().estimate(replay).influence
    for name, way in WAYS.items():
        found: list[Tensor] = []
        cost = seconds(lambda w=way, f=found: f.append(w().estimate(replay).influence)) / plain
        figures.setdefault(name, []).append((cost, kendall_tau(found[0], exact)))


def table(all_figures: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    rows = ["| digits, n = 1000 | " + " | ".join(all_figures) + " |"]
    rows.append("|---|" + "---|" * len(all_figures))
    for name in WAYS:
        cells = []
        for figures in all_figures.values():
            cost, tau = torch.tensor(figures[name], dtype=torch.float64).mean(0).tolist()
            cells.append(f"{tau:.4f} / {cost:.1f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def stored() -> str:
    """How fast the stored embeddings of many samples answer."""
    x, y = mnist_like(IMAGES + QUERIES)
    train = DataLoader(TensorDataset(x[:IMAGES], y[:IMAGES]), 100, shuffle=True)
    val = DataLoader(TensorDataset(x[IMAGES:], y[IMAGES:]), 250)
    few = DataLoader(TensorDataset(x[-100:], y[-100:]), 1)

    def make() -> Classifier:
        torch.manual_seed(0)
        return Classifier(mlp(784, 32, 10), 0.1)

    engine, plain = recorded(make, 1, train, val)
    rows = ["| 60,000 images, 784-32-10 | DVEmb | ACC-DVEmb |", "|---|---|---|"]
    cells: dict[str, list[str]] = {}
    for name in ("dvemb", "acc-dvemb"):
        directory = Path(tempfile.mkdtemp()) / "embeddings"
        took = seconds(lambda n=name, d=directory: engine.embed(d, n)) / plain
        opened: list[Any] = []
        opening = seconds(lambda d=directory, o=opened: o.append(engine.embeddings(d)))
        store = opened[0]
        size = sum(path.stat().st_size for path in directory.iterdir())
        store.scores()
        query = min(seconds(store.scores) for _ in range(3))
        product = torch.randn(1, store.embeddings.projection.size)
        alone = min(seconds(lambda s=store, p=product: s.embeddings.products(p)) for _ in range(3))
        each = seconds(lambda s=store: s.explain(few))
        values = {
            "embedding every sample": f"{took:.1f} fits",
            f"on disk, {store.embeddings.projection.size} coordinates": f"{size / 1e6:.0f} MB",
            "opening, with the checksums": f"{opening:.2f} s",
            f"a new query over {QUERIES} samples": f"{query:.3f} s",
            "of that, the product": f"{alone:.3f} s",
            "100 samples, each a query of its own": f"{each:.2f} s",
        }
        for key, value in values.items():
            cells.setdefault(key, []).append(value)
    return "\n".join(rows + [f"| {key} | " + " | ".join(v) + " |" for key, v in cells.items()])


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    all_figures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for problem in PROBLEMS:
        figures = all_figures.setdefault(problem.name, {})
        for seed in range(options.repeats):
            measure(problem, seed, figures)
        print(table(all_figures), flush=True)
    text = table(all_figures) + (
        f"\n\nKendall τ against exact replay of all {N} samples / cost in units of `Trainer.fit`; "
        f"batch 50, {EPOCHS} epochs, 10 % of the labels flipped; means over {options.repeats} seeds. "
        f"{machine()}."
    )
    print(text)
    second = stored() + f"\n\nOne epoch, batch 100. {machine()}."
    print(second)
    if options.publish:
        publish("dvemb", text)
        publish("dvemb-store", second)


if __name__ == "__main__":
    main()
