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
import os
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
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.trajectory import checkpoints


@dataclass(frozen=True)
class Allowed:
    """How far figures may be apart, relative to the larger one; what was measured is in the table.

    Attributes:
        twin: between the run and its twin, of the validation loss.
        exact, slope: of the influences compared.
        step: h of the central difference in a sample's weight.
    """

    twin: float
    exact: float
    slope: float
    step: float


ALLOWED = {"double": Allowed(1e-9, 1e-6, 1e-3, 1e-5), "single": Allowed(1e-5, 1e-2, 5e-2, 1e-2)}
ROUNDINGS = 1e-11
"""Of a loss, or of a tensor's largest entry (which may be rounding itself, as the gradient of a bias
before BatchNorm), where a replay is not promised to be bit-exact."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        steps, losses, checkpoints: how many were replayed and compared.
        bit_exact: whether all of them were equal to the bit.
        apart: by how much they differed.
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
    apart: float = 0.0
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

    def influence(self) -> InfluenceCallback:
        return InfluenceCallback(
            estimator="auto" if self.case.derivatives else "leave-one-out",
            run="manual",
            dirpath=self.root / "run",
            console=False,
            **self.case.influence,
        )

    def fit(
        self, weights: Tensor, *, twin: bool, recorded: bool = False, steps: int | None = None
    ) -> Model:
        """Train; a case that is resumed stops on the way, and goes on from a checkpoint."""
        settings = {"max_epochs": 3, "num_sanity_val_steps": 0, **self.case.trainer}
        if steps is not None:
            settings |= {"max_steps": steps}
        checkpoint = None
        if self.case.resumed:
            checkpoint = self.root / "stopped.ckpt"
            stopped = {**settings, "max_steps": self.case.resumed}
            self._fit(weights, twin, recorded, stopped)[0].save_checkpoint(checkpoint)
        return self._fit(weights, twin, recorded, settings, checkpoint)[1]

    def _fit(
        self,
        weights: Tensor,
        twin: bool,
        recorded: bool,
        settings: dict[str, Any],
        checkpoint: Path | None = None,
    ) -> tuple[Any, Model]:
        torch.manual_seed(1)
        model = self.case.model(self.case.net(), self.case.loss, self.case.optimise)
        model.twin = twin
        seed = 5 + int(os.environ.get("LOCAL_RANK", "0"))  # each process draws numbers of its own
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        callbacks = [*([self.influence()] if recorded else []), *self.case.callbacks(self.root)]
        if not recorded:  # another run might stop elsewhere
            callbacks = [c for c in callbacks if not isinstance(c, EarlyStopping)]
        if any(isinstance(c, ModelCheckpoint) for c in callbacks):
            settings = {**settings, "enable_checkpointing": True}
        lightning = trainer(self.root, callbacks=callbacks, **settings)
        lightning.fit(model, self.loaders(weights), self.validation(), ckpt_path=checkpoint)
        return lightning, model

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
        runs = Runs(case, Path(name))
        ones = torch.ones(SAMPLES, dtype=torch.float64)
        recorded = runs.fit(ones, twin=False, recorded=True)
        stored = case.influence.get("capture") == "batches" or "sample_id" in case.influence
        engine = InfluenceEngine(
            runs.root / "run" / "trajectory",
            recorded,
            None if stored else runs.loaders(ones),
            val_dataloaders=runs.validation(),
            progress=False,
        )
        check_kind(case, engine)
        replay = engine.replay("val_loss", at=case.at)
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
            steps=len(replay.walker),
            losses=fidelity.losses,
            checkpoints=fidelity.checkpoints,
            bit_exact=fidelity.bit_exact,
            apart=max(fidelity.largest_loss_difference, fidelity.largest_state_difference),
        )
        if case.precision == "half":
            return judged(row, case)
        allowed = ALLOWED[case.precision]
        fewer = len(replay.walker) < 12 and (case.at == "best" or "EarlyStopping" in case.name)
        steps = len(replay.walker) if fewer else None
        if case.at == "best":  # the weights that Lightning saved
            recorded.load_state_dict(saved_weights(runs.root))
        base = runs.query(recorded)
        twin = runs.query(runs.fit(ones, twin=True, steps=steps), recorded)
        if not abs(twin - base) <= allowed.twin * abs(base):
            raise AssertionError(f"the twin trains otherwise: {twin!r} instead of {base!r}")
        ids = engine.trajectory.batches.ids() if engine.trajectory.batches is not None else []

        def trained(sample: int, weight: float) -> float:
            weights = ones.clone()
            weights[ids[sample] if ids else sample] = weight
            return runs.query(runs.fit(weights, twin=True, steps=steps), recorded)

        removed = [trained(j, 0.0) - twin for j in chosen.tolist()]
        row = replace(row, exact=difference(found.influence.tolist(), removed))
        if case.derivatives:
            h = allowed.step
            slopes = [-(trained(j, 1 + h) - trained(j, 1 - h)) / (2 * h) for j in chosen.tolist()]
            at = [int((first.samples == j).nonzero()) for j in chosen.tolist()]
            row = replace(row, slope=difference(first.influence[at].tolist(), slopes))
    return judged(row, case)


def check_kind(case: Case, engine: InfluenceEngine) -> None:
    """The run must have been what the row says."""
    trajectory = engine.trajectory
    if case.resumed:
        assert [entry["step"] for entry in trajectory.header["resumed"]] == [case.resumed]
    if case.at == "best":
        assert 1 < trajectory.header["best"]["step"] < len(trajectory)
    if case.name.startswith("`EarlyStopping`"):
        assert len(trajectory) < 12
    if "skipped" in case.name:
        assert len(trajectory) < 12
        assert len({step.loss_scale for step in trajectory.steps()}) > 1


def saved_weights(root: Path) -> dict[str, Tensor]:
    (path,) = (root / "best").glob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def difference(found: list[float], true: list[float]) -> float:
    """The largest difference, relative to the largest true figure."""
    scale = max(abs(value) for value in true)
    return max(abs(a - b) for a, b in zip(found, true, strict=True)) / scale


def judged(row: Row, case: Case) -> Row:
    reasons = []
    if not row.losses or not (row.bit_exact or (case.rounds and row.apart <= ROUNDINGS)):
        reasons.append(f"the replay is not bit-exact ({row.apart:.0e})")
    allowed = ALLOWED.get(case.precision)
    if row.exact is not None and allowed and not row.exact <= allowed.exact:
        reasons.append(f"exact replay is off by {row.exact:.1e}")
    if row.slope is not None and allowed and not row.slope <= allowed.slope:
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
        yield f"| {row.name} | {' | '.join(cells(row))} |"


def cells(row: Row) -> list[str]:
    """What a row says of the replay, of exact replay and of SGD-IE."""
    if row.failure:
        return [f"**failed: {row.failure.splitlines()[0]}**", "", ""]
    how = "bit-exact" if row.bit_exact else f"within {row.apart:.0e}"
    how += f": {row.steps} steps, {row.checkpoints} checkpoints"
    if row.exact is None:
        return [how, "16 bits", "16 bits"]
    slope = "refused by name" if row.slope is None else f"{row.slope:.0e}"
    return [how, f"{row.exact:.0e}", slope]


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
