"""What capture and the estimators cost, as ratios to `Trainer.fit` in the same run, one thread.

    python benchmarks/cost.py [--publish] [--device cuda]

Two networks: 64-32-10 on scikit-learn's digits (steps of about a millisecond), and 784-512-512-10
(670k parameters) on made-up images. What capture costs at each step is a percent or two of what one
fit differs from the next, so both are measured within one: before each epoch a draw decides whether
the recorder is attached, taken off, or taken off with an empty callback in its place. A step is timed
from one `training_step` to the next, once the fit is warm, so that what happens once (opening the
trajectory, the first-step self-check) is told apart from what happens at each step. Where things lie
in memory moves a step, too: every fit begins with another layout, and the median of the fits counts.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
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
    now,
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
        Problem("64-32-10", lambda: mlp(64, 32, 10), digits(), 1000, 50, 120, 300, 300),
        Problem(
            "784-512-512-10",
            lambda: mlp(784, 512, 512, 10),
            mnist_like(2500),
            2000,
            100,
            8,
            90,
            16,
        ),
    ]


class Timed(Classifier):
    """Notices when its training steps begin."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, rate=0.1)
        self.begun: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.begun.append(now())
        return super().training_step(batch, batch_idx)


class Switch(Callback):
    """Attaches the recorder before some epochs, and takes it off before others.

    Args:
        influence: whose recorder. Its trajectory has gaps: it cannot be replayed.

    Attributes:
        epochs: the number of the first step of each epoch, and what watched it.
    """

    def __init__(self, influence: InfluenceCallback) -> None:
        self._influence = influence
        self._empty = Callback()
        self._random = random.Random()
        self._recording: list[tuple[Any, type, type]] = []
        self.epochs: list[tuple[int, str]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        combined = trainer.fit_loop._combined_loader
        if not self._recording:
            self._recording = [
                (watched, type(watched), type(watched)._untapped)
                for watched in (combined, *combined.flattened)
            ]
        kind = self._random.choice(KINDS) if len(pl_module.begun) >= WARM else KINDS[-1]
        self._switch(trainer, kind)
        self.epochs.append((len(pl_module.begun), kind))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._switch(trainer, KINDS[-1])

    def _switch(self, trainer: Any, kind: str) -> None:
        recorder = self._influence._recording._recorder
        recorder.detach()
        for watched, recording, own in self._recording:
            object.__setattr__(watched, "__class__", recording if kind == "capture" else own)
        others = [c for c in trainer.callbacks if c not in (self._influence, self._empty)]
        there: dict[str, list[Callback]] = {"empty": [self._empty], "capture": [self._influence]}
        trainer.callbacks = there.get(kind, []) + others
        if kind == "capture":
            recorder.attach()


def steps_of(problem: Problem, device: str) -> dict[str, np.ndarray]:
    """Time the steps of one fit.

    Returns:
        Seconds of the steps by what watched them (`KINDS`); those that end with an epoch are left out.
    """
    layout = scattered()
    influence = InfluenceCallback(run="manual", dirpath=Path(tempfile.mkdtemp()) / "influence")
    switch = Switch(influence)
    callbacks: list[Callback] = [influence, switch]
    begun = np.array(fit(problem, problem.timed_epochs, callbacks, device)[1].begun)
    del layout
    spans = zip(switch.epochs, [*switch.epochs[1:], (len(begun), "")], strict=True)
    steps: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for (first, kind), (end, _) in spans:
        if first >= WARM:
            steps[kind].append(np.diff(begun[first:end]))
    return {kind: np.concatenate(found) for kind, found in steps.items()}


def fit(
    problem: Problem, epochs: int, callbacks: list[Callback], device: str = "cpu"
) -> tuple[float, Timed]:
    """Train once.

    Returns:
        How many seconds it took, and the module.
    """
    torch.manual_seed(0)
    module = Timed(problem.net())
    train, _ = data_of(problem)
    root = Path(tempfile.mkdtemp())
    settings: dict[str, Any] = {"max_epochs": epochs, "limit_val_batches": 0}
    runner = trainer(root, callbacks=callbacks, accelerator=device, **settings)
    return seconds(lambda: runner.fit(module, train)), module


def scattered() -> list[Tensor]:
    """Memory with holes in it, at random."""
    sizes = 10 ** np.random.default_rng().uniform(3, 5.8, 40)
    blocks = [torch.zeros(int(size)) for size in sizes]
    return blocks[::2]


def data_of(problem: Problem) -> tuple[DataLoader[object], DataLoader[object]]:
    return loaders(*problem.data, problem.train, 300, problem.batch)


def capture(problem: Problem, repeats: int, device: str) -> dict[str, float]:
    """What watching costs at each step."""
    fits = [steps_of(problem, device) for _ in range(2 * repeats)]
    mean = {kind: np.array([steps[kind].mean() for steps in fits]) for kind in KINDS}
    middle = {kind: np.array([np.median(steps[kind]) for steps in fits]) for kind in KINDS}
    typical = middle["capture"] / middle["nothing"] - 1
    return {
        "step_ms": 1e3 * float(np.median(mean["nothing"])),
        "empty_step": float(np.median(middle["empty"] / middle["nothing"])) - 1,
        "capture_step": float(np.median(mean["capture"] / mean["nothing"])) - 1,
        "capture_us": 1e6 * float(np.median(middle["capture"] - middle["nothing"])),
        "capture_typical": float(np.median(typical)),
        "spread": float(typical.std() / len(typical) ** 0.5),
    }


def measure(problem: Problem, repeats: int, device: str) -> dict[str, float]:
    figures = capture(problem, repeats, device)
    whole = median(fit(problem, problem.epochs, [], device)[0] for _ in range(repeats))
    influence = InfluenceCallback(run="manual", dirpath=Path(tempfile.mkdtemp()) / "influence")
    recorded, module = fit(problem, problem.epochs, [influence], device)
    figures["capture_fit"] = recorded / whole - 1
    assert influence.directory is not None
    train, val = data_of(problem)
    engine = InfluenceEngine(
        influence.directory / "trajectory",
        module,
        train,
        val_dataloaders=val,
        progress=False,
        device=device,
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
        "capture_typical": ("capture, per training step (median of the steps)", "{:+.1%}"),
        "spread": ("standard error of that, over the fits", "{:.1%}"),
        "capture_us": ("capture, µs per training step (median)", "{:+.0f}"),
        "capture_step": (
            "capture, per training step (mean: with what is written to disk)",
            "{:+.1%}",
        ),
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
    options = arguments(__doc__, device=True)
    quieten()
    torch.set_num_threads(1)
    rows = {p.name: measure(p, options.repeats, options.device) for p in problems()}
    text = table(rows)
    print(text)
    if options.publish:  # a GPU's figures beside those of the CPU, not in their place
        publish("cost" if options.device == "cpu" else "cost-gpu", text)


if __name__ == "__main__":
    main()
