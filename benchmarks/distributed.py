"""Measures runs of several processes, as `configurations.py` does those of one.

    python benchmarks/distributed.py [--publish]

Lightning trains each with `DDPStrategy` under the callback, then again without a sample and with a
little more and a little less of it, in as many processes. One process replays the recorded run. Exits
with 1 where a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine, publish, quieten
from configuration_cases import SAMPLES, Case, adamw, mlp, sgd
from configurations import ALLOWED, Row, Runs, cells, difference, judged
from torch import nn

from lightning_accie import InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.trajectory import checkpoints

CHOSEN = (0, 13)
STEP = ALLOWED["double"].step


def cases() -> Iterator[tuple[int, Case]]:
    """How many processes, and what they train."""
    two = [
        Case("", "SGD, momentum", optimise=sgd(momentum=0.9)),
        Case(
            "",
            "AdamW, accumulation, clipping by norm",
            optimise=adamw(),
            trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
        ),
        Case(
            "",
            "BatchNorm and Dropout",
            net=lambda: mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)),
        ),
    ]
    yield from ((2, case) for case in two)
    yield 3, replace(two[0], rounds=True)
    yield 3, replace(two[2], rounds=True)


def train(root: Path) -> None:
    """Train every case of as many processes as there are, as one of them."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    for number, (wanted, case) in enumerate(cases()):
        if wanted != ranks:
            continue
        directory = root / str(number)
        several = {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": True}
        runs = Runs(replace(case, trainer={**case.trainer, **several}), directory)
        ones = torch.ones(SAMPLES, dtype=torch.float64)
        recorded = runs.fit(ones, twin=False, recorded=True)
        found: dict[str, Any] = {"base": runs.query(recorded)}

        def trained(
            sample: int, weight: float, runs: Runs = runs, recorded: Any = recorded
        ) -> float:
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[sample] = weight
            return runs.query(runs.fit(weights, twin=True), recorded)

        found["twin"] = trained(0, 1.0)
        found["removed"] = [trained(j, 0.0) - found["twin"] for j in CHOSEN]
        found["slopes"] = [
            -(trained(j, 1 + STEP) - trained(j, 1 - STEP)) / (2 * STEP) for j in CHOSEN
        ]
        if rank == 0:
            torch.save(recorded.state_dict(), directory / "weights.pt")
            (directory / "found.json").write_text(json.dumps(found))


def measure(directory: Path, case: Case) -> Row:
    """Replay a run in this process, and compare."""
    runs = Runs(case, directory)
    ones = torch.ones(SAMPLES, dtype=torch.float64)
    torch.manual_seed(1)
    module = case.model(case.net(), case.loss, case.optimise)
    engine = InfluenceEngine(
        directory / "run" / "trajectory",
        module,
        runs.loaders(ones),
        val_dataloaders=runs.validation(),
        progress=False,
    )
    replay = engine.replay("val_loss")
    first, exact = SgdIE().estimate(replay), LeaveOneOut(CHOSEN).estimate(replay)
    fidelity = replay.walker.fidelity
    found = json.loads((directory / "found.json").read_text())
    if not abs(found["twin"] - found["base"]) <= ALLOWED["double"].twin * abs(found["base"]):
        raise AssertionError(f"the twin trains otherwise: {found}")
    estimates = [float(first.influence[first.samples == j]) for j in CHOSEN]
    row = Row(
        case.group,
        case.name,
        steps=len(replay.walker),
        losses=fidelity.losses,
        checkpoints=fidelity.checkpoints,
        bit_exact=fidelity.bit_exact,
        apart=max(fidelity.largest_loss_difference, fidelity.largest_state_difference),
        exact=difference(exact.influence.tolist(), found["removed"]),
        slope=difference(estimates, found["slopes"]),
    )
    return judged(row, case)


def attempt(directory: Path, case: Case) -> Row:
    try:
        return measure(directory, case)
    except Exception as error:
        traceback.print_exc()
        return Row(case.group, case.name, failure=f"{type(error).__name__}: {error}")


def launch(root: Path) -> None:
    """Train everything, one group of processes after the other."""
    for ranks in sorted({ranks for ranks, _ in cases()}):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", __file__, "--train", str(root)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the table into the docs")
    parser.add_argument("--train", type=Path, help="train as one of several processes")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    checkpoints.SPACING = 2  # short runs are to have several
    if options.train is not None:
        train(options.train)
        return 0
    with tempfile.TemporaryDirectory() as name:
        launch(Path(name))
        rows = [
            (ranks, attempt(Path(name) / str(number), case))
            for number, (ranks, case) in enumerate(cases())
        ]
    failed = [row for _, row in rows if row.failure]
    lines = ["| configuration | processes | replay in one | exact replay | SGD-IE |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {row.name} | {ranks} | {' | '.join(cells(row))} |" for ranks, row in rows]
    text = "\n".join(lines) + f"\n\n{len(rows) - len(failed)} of {len(rows)} hold. {machine()}."
    print(text)
    if options.publish:
        publish("distributed", text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
