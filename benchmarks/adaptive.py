"""Momentum, Adam and AdamW: how close influence by the optimiser's own update comes to exact replay.

    python benchmarks/adaptive.py [--data DIR] [--repeats 3] [--publish]

With Adam's F_t, SGD-IE is Adam-IE and ACC-SGD-IE is ACC-Adam-IE: the moments are a part of the state.
Digits come with scikit-learn; with ``--data`` (a folder with ``adult.npz``) Adult is measured too. 200
samples, batches of 50, float64, every sample replayed exactly.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Classifier, digits, loaders, machine, mlp, publish, quieten, trainer
from torch import Tensor, nn

from lightning_accie import AccSgdIE, InfluenceCallback, InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.agreement import kendall_tau, relative_rmse
from lightning_accie.estimators.base import Replay

SAMPLES, BATCH, EPOCHS = 200, 50, 40
Configure = Callable[[Any], torch.optim.Optimizer]
OPTIMISERS: dict[str, Configure] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.05),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "ReLU": nn.ReLU}


class Adaptive(Classifier):
    def __init__(self, net: nn.Module, configure: Configure) -> None:
        super().__init__(net, 0.0)
        self.configure = configure

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.configure(self.parameters())


def adult(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Adult, standardised, in a random order."""
    with np.load(folder / "adult.npz") as found:
        x, y = found["x_train"].astype(np.float64), found["y_train"]
    order = np.random.default_rng(seed).permutation(len(y))[:1000]
    x = x[order]
    x = (x - x[:SAMPLES].mean(0)) / np.maximum(x[:SAMPLES].std(0), 1e-6)
    return torch.from_numpy(x), torch.from_numpy(y[order]).long()


def estimates(replay: Replay) -> dict[str, Tensor]:
    acc = AccSgdIE().estimate(replay)
    order = torch.argsort(replay.first, stable=True)
    samples, first = replay.samples[order], replay.first[order]
    change = AccSgdIE().carry(replay, samples, first, lambda done: None).visible
    curved = replay.query.hessian_products(replay.final.state.visible, change)
    bend = sum((change[name] * curved[name]).flatten(1).sum(1) for name in change)
    assert isinstance(bend, Tensor)
    second = acc.extras["linear"].clone()
    second[order] += bend.double() / 2
    return {
        "first order": SgdIE().estimate(replay).influence,
        "ACC, linear": acc.extras["linear"],
        "ACC, second order": second,
        "ACC, evaluated": acc.influence,
        "trusted": acc.trusted,
    }


def measure(
    data: tuple[Tensor, Tensor], activation: type[nn.Module], configure: Configure, seed: int
) -> dict[str, tuple[float, float]]:
    classes = int(data[1].max()) + 1
    train, val = loaders(*data, SAMPLES, 500, BATCH)
    torch.manual_seed(seed)
    net = mlp(data[0].shape[1], 32, classes, activation=activation).double()
    module = Adaptive(net, configure)
    with tempfile.TemporaryDirectory() as root:
        influence = InfluenceCallback(run="manual", dirpath=root)
        trainer(Path(root), max_epochs=EPOCHS, callbacks=[influence]).fit(module, train, val)
        engine = InfluenceEngine(root, module, train, val_dataloaders=val, progress=False)
        replay = engine.replay("val_loss")
        found, exact = estimates(replay), LeaveOneOut().estimate(replay).influence
    trusted = found.pop("trusted")
    figures = {
        name: (
            relative_rmse(one[trusted], exact[trusted]),
            kendall_tau(one[trusted], exact[trusted]),
        )
        for name, one in found.items()
    }
    return figures | {"marked": (float((~trusted).sum()), float("nan"))}


def table(rows: dict[str, list[dict[str, tuple[float, float]]]], repeats: int) -> str:
    names = list(next(iter(rows.values()))[0])
    lines = [
        f"| n = {SAMPLES}, {EPOCHS} epochs | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for title, runs in rows.items():
        cells = []
        for name in names:
            error, tau = np.mean([run[name] for run in runs], 0)
            cells.append(f"{error:.1f}" if np.isnan(tau) else f"{error:.3f} / {tau:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        f"\n\nRelative RMSE / Kendall τ against exact replay of all samples but those that ACC-SGD-IE "
        f"marks as not to be relied on, whose number is in the last column; means over {repeats} "
        f"seeds. {machine()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    sources = {"digits": lambda seed: digits(torch.float64, seed)}
    if options.data is not None:
        sources["Adult"] = lambda seed: adult(options.data, seed)
    rows: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for (name, read), activation, optimiser in product(sources.items(), ACTIVATIONS, OPTIMISERS):
        title = f"{name}, {activation}, {optimiser}"
        rows[title] = [
            measure(read(seed), ACTIVATIONS[activation], OPTIMISERS[optimiser], seed)
            for seed in range(options.repeats)
        ]
        print(table({title: rows[title]}, options.repeats).splitlines()[2], flush=True)
    text = table(rows, options.repeats)
    print(text)
    if options.publish:
        publish("adaptive", text)


if __name__ == "__main__":
    main()
