"""What grows with what: cost over parameters and over steps, and memory against `memory_budget`.

    python benchmarks/scaling.py [--publish]

Multi-layer perceptrons of about 10k, 100k and 1M parameters on made-up images, batch 100. Each problem
has a process of its own; where `memory_budget` is in question each analysis has. Before an analysis is
measured, a run of 23 parameters is analysed in the same way, so that what PyTorch loads once is not
counted, and what was freed is given back to the system; the peak of resident memory, which Linux lets
be reset, is then taken against what was resident before. Times are those of the processor, on one
thread, and costs in units of `Trainer.fit` without the callback.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Classifier,
    forget_peak,
    machine,
    mlp,
    mnist_like,
    peak_bytes,
    publish,
    quieten,
    resident_bytes,
    trainer,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import (
    AccSgdIE,
    DataValueEmbedding,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
    TracIn,
    UnsupportedError,
)
from lightning_accie.estimators import Estimator

BATCH = 100
NETWORKS = ((784, 12, 10), (784, 120, 120, 10), (784, 784, 512, 10))
LENGTHS = (40, 80, 160, 320)
BUDGETS = ("200MB", "800MB")
EACH = ("acc-sgd-ie", "leave-one-out")
"""Those that work sample by sample."""
ESTIMATORS: dict[str, Callable[[int], Estimator]] = {
    "sgd-ie": lambda tracked: SgdIE(),
    "low-rank-acc-sgd-ie": lambda tracked: LowRankAccSgdIE(rank=16),
    "dvemb": lambda tracked: DataValueEmbedding(),
    "acc-sgd-ie": lambda tracked: AccSgdIE(range(tracked)),
    "leave-one-out": lambda tracked: LeaveOneOut(range(tracked)),
    "tracin": lambda tracked: TracIn(),
}
COMPARED = tuple(name for name in ESTIMATORS if name != "tracin")


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
        work: ``"record"``, an estimator's name, or ``"all"``: to record and to run those compared.
        sizes: of the network's layers.
        steps: of the run.
        run: where the recorded run is, or goes.
        tracked: samples, for those that work sample by sample.
        budget: `memory_budget`.
    """

    work: str
    sizes: tuple[int, ...]
    steps: int
    run: str
    tracked: int = 8
    budget: str = "1GB"

    @property
    def parameters(self) -> int:
        return sum((i + 1) * o for i, o in zip(self.sizes, self.sizes[1:], strict=False))


# ---------------------------------------------------------------------- what runs in its own process


def train_and_val(task: Task) -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = mnist_like(2500)
    x = x[:, : task.sizes[0]]
    train = TensorDataset(x[:2000], y[:2000])
    return DataLoader(train, BATCH, shuffle=True), DataLoader(
        TensorDataset(x[2000:], y[2000:]), 250
    )


def fitted(task: Task, *, capture: bool) -> float:
    """Train, and give the seconds of the processor that it took."""
    torch.manual_seed(0)
    callbacks = [InfluenceCallback(run="manual", dirpath=task.run)] if capture else []
    runner = trainer(Path(task.run), max_steps=task.steps, callbacks=callbacks, limit_val_batches=0)
    module, (train, _) = Classifier(mlp(*task.sizes), 0.05), train_and_val(task)
    start = time.process_time()
    runner.fit(module, train)
    return time.process_time() - start


def analysed(task: Task) -> dict[str, float]:
    """Analyse a recorded run: the seconds, and the bytes that came at the peak."""
    module, (train, val) = Classifier(mlp(*task.sizes), 0.05), train_and_val(task)
    forget_peak()
    before, start = resident_bytes(), time.process_time()
    engine = InfluenceEngine(
        Path(task.run) / "trajectory",
        module,
        train,
        val_dataloaders=val,
        memory_budget=task.budget,
        progress=False,
    )
    estimator = ESTIMATORS[task.work](task.tracked)
    try:
        engine.estimate("val_loss", estimator, verify=0, resume=False)
    except UnsupportedError as refused:
        print(refused)
        return {"refused": 1.0}
    return {"seconds": time.process_time() - start, "peak": peak_bytes() - before}


def done(task: Task) -> dict[str, float]:
    quieten()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = replace(task, sizes=(2, 1, 10), steps=20, run=folder, tracked=2, budget="1GB")
        fitted(small, capture=True)
        if task.work == "record":
            return {"record": fitted(task, capture=True)}
        if task.work == "all":
            found = {"fit": min(fitted(task, capture=False) for _ in range(2))}
            fitted(task, capture=True)
            for name in COMPARED:
                analysed(replace(small, work=name))
                measured = analysed(replace(task, work=name))
                found |= {f"{key} {name}": value for key, value in measured.items()}
            return found
        loaded = analysed(small)["peak"]
    return {**analysed(task), "loaded": loaded}


# ---------------------------------------------------------------------- the whole


def spawned(task: Task) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", json.dumps(asdict(task))]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    print(task, found, flush=True)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def each(name: str) -> str:
    return f"{name}, each sample" if name in EACH else name


def over_parameters(steps: int) -> str:
    rows = []
    for sizes in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            run = Task("all", sizes, steps, folder)
            found = spawned(run)
        cells = [f"{run.parameters:,}", f"{1e3 * found['fit'] / steps:.1f} ms"]
        for name in COMPARED:
            share = run.tracked if name in EACH else 1
            cost, peak = found[f"seconds {name}"] / found["fit"] / share, found[f"peak {name}"]
            cells.append(f"{cost:.2f} fits / {peak / 1e6:.0f} MB")
        rows.append(cells)
    return table(["parameters", "a training step", *map(each, COMPARED)], rows) + (
        f"\n\n{steps} steps; cost in units of `Trainer.fit` / peak of resident memory above what was "
        f"there before the analysis; 8 samples side by side where they are worked on one by one; "
        f'`memory_budget="1GB"`. {machine()}.'
    )


def over_steps() -> str:
    sizes = NETWORKS[1]
    spent: dict[str, list[float]] = {name: [] for name in COMPARED}
    for steps in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            found = spawned(Task("all", sizes, steps, folder))
            for name, values in spent.items():
                values.append(found[f"seconds {name}"])
    rows = []
    for name, times in spent.items():
        slope, once = np.polyfit(LENGTHS, times, 1)
        off = max(abs(once + slope * n - t) / t for n, t in zip(LENGTHS, times, strict=True))
        seen = [f"{value:.2f} s" for value in times]
        rows.append([name, *seen, f"{1e3 * slope:.1f} ms", f"{once:.1f} s", f"{off:.0%}"])
    head = ["", *(f"{steps} steps" for steps in LENGTHS), "each step", "once", "off the line by"]
    return table(head, rows) + (
        f"\n\n{Task('', sizes, 0, '').parameters:,} parameters; 8 samples together where they are "
        f"worked on one by one. The straight line through the four times is what a step costs and "
        f"what is done once; the last column is the largest distance from it. {machine()}."
    )


def over_budgets(steps: int, tracked: int) -> str:
    sizes = NETWORKS[-1]
    found: dict[str, list[str]] = {name: [] for name in ESTIMATORS}
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        run = Task("record", sizes, steps, folder, tracked)
        spawned(run)
        for name, cells in found.items():
            for budget in BUDGETS:
                measured = spawned(replace(run, work=name, budget=budget))
                loaded.append(measured["loaded"])
                refused = "refused" in measured
                cells.append("refused" if refused else f"{measured['peak'] / 1e6:.0f} MB")
    rows = [[name, *cells] for name, cells in found.items()]
    return table(["", *(f'`memory_budget="{budget}"`' for budget in BUDGETS)], rows) + (
        f"\n\n{run.parameters:,} parameters, {steps} steps, {tracked} samples where they are worked "
        f"on one by one: peak of resident memory above what was there before the analysis. What "
        f"PyTorch loads at the first analysis of a process comes besides, "
        f"{min(loaded) / 1e6:.0f} to {max(loaded) / 1e6:.0f} MB. {machine()}."
    )


def main() -> None:
    options = parsed()
    if options.task:
        given: dict[str, Any] = json.loads(options.task)
        print(json.dumps(done(Task(**{**given, "sizes": tuple(given["sizes"])}))))
        return
    torch.set_num_threads(1)
    tables = {
        "memory": lambda: over_budgets(options.steps, tracked=16),
        "parameters": lambda: over_parameters(options.steps),
        "steps": over_steps,
    }
    for name in options.only:
        text = tables[name]()
        print(text, flush=True)
        if options.publish:
            publish(f"scaling-{name}", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the figures into the docs")
    parser.add_argument("--steps", type=int, default=40, help="of the first two tables")
    parser.add_argument("--only", nargs="+", default=["memory", "steps", "parameters"])
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
