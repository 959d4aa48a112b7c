"""Measures every configuration that the package supports, against Lightning's own training.

    python benchmarks/configurations.py [--publish] [--jobs 2] [--only TEXT]

Each is trained under the callback, replayed, and then trained again by Lightning alone: without a
sample (its weight is 0), and with a little more and a little less of it (a central difference). The
loss of those runs is a weighted sum over samples in plain torch, see `configuration_cases.py`. Exits
with 1 where a configuration fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, publish, quieten, trainer
from configuration_cases import CASES, SAMPLES, Case, Model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.trajectory import checkpoints

STEP = 1e-5
"""h of the central difference in a sample's weight."""
TWIN_TOLERANCE = 1e-9
EXACT_TOLERANCE = 1e-6
SLOPE_TOLERANCE = 1e-3
"""Relative to the largest influence of the samples compared. What was measured stands in the table."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        steps, losses, checkpoints: how many were replayed and compared.
        bit_exact: whether all of them were equal to the bit.
        exact: largest difference between exact replay and training without the sample, or None.
        slope: the same between SGD-IE and the central difference, or None.
        failure: what went wrong; empty where nothing did.
    """

    group: str
    name: str
    steps: int = 0
    losses: int = 0
    checkpoints: int = 0
    bit_exact: bool = False
    exact: float | None = None
    slope: float | None = None
    failure: str = ""


class Runs:
    """Trains a case again and again from the same start."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self.root = case, root
        self.data = case.data(SAMPLES, 0)
        self.valid = TensorDataset(*case.data(12, 1), torch.ones(12, dtype=torch.float64))

    def loaders(self, weights: Tensor) -> Any:
        return self.case.loaders(TensorDataset(*self.data, weights))

    def validation(self) -> DataLoader[Any]:
        return DataLoader(self.valid, batch_size=12)

    def fit(self, weights: Tensor, *callbacks: Any, twin: bool) -> Model:
        torch.manual_seed(1)
        model = self.case.model(self.case.net(), self.case.loss, self.case.optimise)
        model.twin = twin
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        random.seed(5)
        settings = {"max_epochs": 3, "num_sanity_val_steps": 0, **self.case.trainer}
        callbacks = (*callbacks, *self.case.callbacks())
        lightning = trainer(self.root, callbacks=list(callbacks), **settings)
        lightning.fit(model, self.loaders(weights), self.validation())
        return model

    def query(self, model: Model, like: Model | None = None) -> float:
        """The validation loss, with the buffers of ``like`` but for the running statistics."""
        if like is not None:
            kept = dict(like.named_buffers())
            for name, buffer in model.named_buffers():
                if "running_" not in name:
                    buffer.copy_(kept[name])
        model.eval()
        with torch.no_grad():
            return float(model.query(self.valid.tensors))


def measure(case: Case) -> Row:
    """Train, replay, train again, compare."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        runs = Runs(case, root)
        ones = torch.ones(SAMPLES, dtype=torch.float64)
        influence = InfluenceCallback(
            estimator="auto" if case.derivatives else "leave-one-out",
            run="manual",
            dirpath=root / "run",
            console=False,
        )
        recorded = runs.fit(ones, influence, twin=False)
        engine = InfluenceEngine(
            root / "run" / "trajectory",
            recorded,
            runs.loaders(ones),
            val_dataloaders=runs.validation(),
            progress=False,
        )
        replay = engine.replay("val_loss")
        if case.derivatives:
            first = SgdIE().estimate(replay)
            order = first.influence.abs().argsort()
            chosen = first.samples[order[[-1, len(order) // 2]]].unique()
        else:
            chosen = replay.samples[[0, -1]]
        found = LeaveOneOut(chosen).estimate(replay)
        fidelity = replay.walker.fidelity
        row = Row(
            case.group,
            case.name,
            steps=len(engine.trajectory),
            losses=fidelity.losses,
            checkpoints=fidelity.checkpoints,
            bit_exact=fidelity.bit_exact,
        )
        if not case.twins:
            return judged(row)
        base = runs.query(recorded)
        twin = runs.query(runs.fit(ones, twin=True), recorded)
        if not abs(twin - base) <= TWIN_TOLERANCE * abs(base):
            raise AssertionError(f"the twin trains otherwise: {twin!r} instead of {base!r}")

        def trained(sample: int, weight: float) -> float:
            weights = ones.clone()
            weights[sample] = weight
            return runs.query(runs.fit(weights, twin=True), recorded)

        removed = [trained(j, 0.0) - twin for j in chosen.tolist()]
        row = replace(row, exact=difference(found.influence.tolist(), removed))
        if case.derivatives:
            slopes = [
                -(trained(j, 1 + STEP) - trained(j, 1 - STEP)) / (2 * STEP) for j in chosen.tolist()
            ]
            at = [int((first.samples == j).nonzero()) for j in chosen.tolist()]
            row = replace(row, slope=difference(first.influence[at].tolist(), slopes))
    return judged(row)


def difference(found: list[float], true: list[float]) -> float:
    """The largest difference, relative to the largest true figure."""
    scale = max(abs(value) for value in true)
    return max(abs(a - b) for a, b in zip(found, true, strict=True)) / scale


def judged(row: Row) -> Row:
    reasons = []
    if not row.bit_exact or not row.losses:
        reasons.append("the replay is not bit-exact")
    if row.exact is not None and not row.exact <= EXACT_TOLERANCE:
        reasons.append(f"exact replay is off by {row.exact:.1e}")
    if row.slope is not None and not row.slope <= SLOPE_TOLERANCE:
        reasons.append(f"SGD-IE is off by {row.slope:.1e}")
    return replace(row, failure="; ".join(reasons))


def attempt(number: int) -> Row:
    """Measure a case; any error is its failure, so that one row does not cost the others."""
    quieten()
    torch.set_num_threads(1)
    checkpoints.SPACING = 2  # short runs are to have several
    case = CASES[number]
    try:
        return measure(case)
    except Exception as error:
        traceback.print_exc()
        return Row(case.group, case.name, failure=f"{type(error).__name__}: {error}")


def lines(rows: list[Row]) -> Iterator[str]:
    yield "| configuration | replay | exact replay | SGD-IE |"
    yield "|---|---|---|---|"
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            yield f"| **{group}** | | | |"
        if row.failure:
            yield f"| {row.name} | **failed: {row.failure.splitlines()[0]}** | | |"
            continue
        how = f"bit-exact: {row.steps} steps, {row.checkpoints} checkpoints"
        exact = "" if row.exact is None else f"{row.exact:.0e}"
        refused = "refused by name" if exact else ""
        slope = refused if row.slope is None else f"{row.slope:.0e}"
        yield f"| {row.name} | {how} | {exact} | {slope} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the table into the docs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a group's or a configuration's name")
    options = parser.parse_args()
    quieten()
    chosen = [
        n
        for n, case in enumerate(CASES)
        if options.only.lower() in f"{case.group} {case.name}".lower()
    ]
    began = time.perf_counter()
    # Processes of their own, since a case with workers forks: spawned, so that they start clean.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        rows = list(pool.map(attempt, chosen))
    failed = [row for row in rows if row.failure]
    text = "\n".join(lines(rows))
    text += f"\n\n{len(rows) - len(failed)} of {len(rows)} hold. {machine()}."
    print(text)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.publish:
        publish("configurations", text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
