"""Start the processes of an analysis that shares its work."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lightning_accie.processes import ProcessEndedError, Processes
from lightning_accie.scores import InfluenceScores

STRATEGIES = ("auto", "ddp_fork", "ddp_spawn", "ddp_notebook")
_ERROR = "error.pickle"


def launch(engine: Any, given: Mapping[str, Any], asked: Mapping[str, Any]) -> InfluenceScores:
    """Let an analysis run in several processes of this machine.

    Args:
        engine: the class `InfluenceEngine`.
        given: its arguments; ``devices``, ``accelerator`` and ``strategy`` say what to start.
        asked: the arguments of its `estimate`.

    Returns:
        The scores.

    Raises:
        RuntimeError: if a process ended before its work was done.
        failure: what the analysis raised on rank 0.
    """
    accelerator, strategy = given["accelerator"], given["strategy"]
    if accelerator == "auto":
        accelerator = torch.device(given["device"]).type
    if strategy == "auto":
        strategy = "ddp_fork" if accelerator == "cpu" else "ddp_spawn"
    fabric = Fabric(accelerator=accelerator, devices=given["devices"], strategy=strategy)
    with TemporaryDirectory() as exchange:
        run = partial(
            _run,
            engine=engine,
            given={**given, "devices": 1},
            asked=asked,
            exchange=Path(exchange),
            forked=strategy != "ddp_spawn",
        )
        try:
            fabric.launch(run)
        except (ProcessRaisedException, ProcessExitedException) as error:
            failure = _failure(Path(exchange))
            if failure is not None:
                raise failure from error
            raise RuntimeError(
                "A process of the analysis has ended before its work was done. What was finished is "
                f"kept: call `estimate` again with the same arguments to go on from there. ({error})"
            ) from error
        # Not the return value: a long one would not fit the pipe that Fabric returns it by.
        return InfluenceScores.load(exchange)


def _failure(exchange: Path) -> BaseException | None:
    path = exchange / _ERROR
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _run(
    fabric: Any,
    engine: Any,
    given: Mapping[str, Any],
    asked: Mapping[str, Any],
    exchange: Path,
    forked: bool,
) -> None:
    """What every process does."""
    if forked:  # the threads of OpenMP do not survive a fork
        torch.set_num_threads(1)
    processes = Processes(fabric.global_rank, fabric.world_size)
    given = {**given, "device": fabric.device, "processes": processes}

    def helper() -> Any:  # rank 0 checks the data and shows the bars
        one = engine(**{**given, "check_data": False, "progress": False})
        return one.helper(asked["query"], asked["query_dataloader"], asked["at"])

    try:
        scores = processes.lead(lambda: engine(**given).estimate(**asked), helper)
        if processes.first:
            scores.save(exchange)
    except BaseException as error:
        # That another one has ended, the launching process says itself, and how to go on.
        if processes.first and not isinstance(error, ProcessEndedError):
            (exchange / _ERROR).write_bytes(pickle.dumps(error))
        raise
    processes.close()
