"""What goes wrong in a run of two processes, one after the other; the last one kills a process."""

from __future__ import annotations

import errno
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_accie import InfluenceCallback
from lightning_accie.capture import recorder
from lightning_accie.trajectory import writer
from tests.ddp.cases import (
    CASES,
    PLAIN,
    Case,
    Synchronised,
    layered,
    train,
    warnings_are_errors,
)
from tests.problems import smooth_net

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class HalvesItsGradients(Synchronised):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5


class LooksAtTheOthers(Synchronised):
    """Its loss depends on the other process's batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        centre = self.all_gather(x.mean(0)).mean(0) if self.trainer.training else 0.0
        return self.loss(self.net(x - centre), y)


class DriftsApart(Synchronised):
    """Each process schedules by a value of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 4:
            self.optimizers().param_groups[0]["lr"] = 0.05 + 0.01 * self.global_rank  # type: ignore[union-attr]


class AfterTheTrial:
    """A `describe=` that takes the sample it is tried on when `fit` starts, and no other."""

    def __init__(self, fault: Callable[[], Any]) -> None:
        self.fault, self.calls = fault, 0

    def __call__(self, sample: Any) -> dict[str, Any]:
        self.calls += 1
        if self.calls > 1:
            self.fault()
        return {}


def breaks(sample: Any = None) -> Any:
    raise ValueError("no such label")


def interrupts() -> None:
    raise KeyboardInterrupt


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def case(make: Callable[[], Any], **trainer: Any) -> Case:
    return Case(make, PLAIN, trainer)


def attempt(root: Path, case: Case, *callbacks: Callback, **influence: Any) -> dict[str, Any]:
    """Train under the callback and tell how it went."""
    options = {"verify": 2, "top_k": 1, "console": False, **influence}
    callback = InfluenceCallback(dirpath=root, **options)
    outcome: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = train(root, case, [callback, *callbacks])
        except RuntimeError as error:
            outcome |= {"error": type(error).__name__, "message": str(error)}
        except ValueError as error:
            outcome |= {"error": "ValueError", "message": str(error)}
        else:
            outcome["weights"] = [v.tolist() for v in result["state"].values()]
    outcome["warnings"] = [str(w.message) for w in caught if "Influence" in str(w.message)]
    outcome["scores"] = callback.scores is not None
    return outcome


def full_disk(root: Path, case: Case) -> dict[str, Any]:
    """The second process finds its disk full in the middle of the run."""
    write, calls = writer.write, [0]

    def fails(*args: Any) -> Any:
        calls[0] += 1
        if RANK == 1 and calls[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    writer.write = fails
    try:
        return attempt(root, case)
    finally:
        writer.write = write


class Killed(Callback):
    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 7 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def strategy(**options: Any) -> dict[str, Any]:
    return {"strategy": DDPStrategy(**options)}


def hook(*args: Any) -> None: ...


FAULTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda root: attempt(root, CASES["plain"]),
    "hidden-hand": lambda root: attempt(
        root, case(lambda: HalvesItsGradients(smooth_net(), PLAIN))
    ),
    "all-gather": lambda root: attempt(root, case(lambda: LooksAtTheOthers(smooth_net(), PLAIN))),
    "monitor": lambda root: attempt(root, CASES["plain"], monitor="val_accuracy"),
    "sync-batchnorm": lambda root: attempt(
        root, case(lambda: Synchronised(layered(nn.SyncBatchNorm(6)), PLAIN))
    ),
    "buffers": lambda root: attempt(
        root, case(CASES["plain"].make, **strategy(broadcast_buffers=False))
    ),
    "hook": lambda root: attempt(root, case(CASES["plain"].make, **strategy(ddp_comm_hook=hook))),
    "drift": lambda root: attempt(root, case(lambda: DriftsApart(smooth_net(), PLAIN))),
    "describe": lambda root: attempt(root, CASES["plain"], describe=breaks),
    "describes-later": lambda root: attempt(root, CASES["plain"], describe=AfterTheTrial(breaks)),
    "interrupt": lambda root: attempt(root, CASES["plain"], describe=AfterTheTrial(interrupts)),
    "full-disk": lambda root: full_disk(root, CASES["plain"]),
    "small-budget": lambda root: attempt(root, CASES["plain"], disk_budget=10),
}


def main(root: Path) -> None:
    warnings_are_errors()
    writer.TrajectoryWriter.__init__.__kwdefaults__["flush_steps"] = 2  # type: ignore[index]
    recorder._MOST_WAITING = 1
    outcomes = {name: fault(root / name) for name, fault in FAULTS.items()}
    (root / f"{RANK}.json").write_text(json.dumps(outcomes))
    found = attempt(root / "killed-in-training", CASES["plain"], Killed())
    (root / f"killed-in-training-{RANK}.json").write_text(json.dumps(found))


def killed_in_analysis(root: Path) -> None:
    found = attempt(root / "killed-in-analysis", CASES["plain"], describe=AfterTheTrial(dies))
    (root / f"killed-in-analysis-{RANK}.json").write_text(json.dumps(found))
