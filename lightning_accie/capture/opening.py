"""Opening a recording on every process of the run."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.processes import Processes
from lightning_accie.trajectory.files import MANIFEST, rank_name
from lightning_accie.trajectory.manifest import Rank, read_manifest
from lightning_accie.trajectory.records import Checkpoint
from lightning_accie.trajectory.splice import After, same_place
from lightning_accie.trajectory.writer import TrajectoryWriter

_SHARED_WITHIN = 30.0
"""Seconds that a network file system may take to show rank 0 what another rank has written."""


def open_recording(
    directory: Path,
    header: Mapping[str, Any],
    state: Checkpoint,
    processes: Processes,
    *,
    disk_budget: int,
    keeps_batches: bool = False,
    overwrite: bool,
    after: After | None = None,
) -> TrajectoryWriter:
    """Open the trajectory with the state that it begins or goes on with; collective.

    Args:
        directory: of the trajectory.
        header: of the trajectory.
        state: s_0, or the one to go on with.
        processes: of the run.
        disk_budget: bytes for checkpoints and batches.
        keeps_batches: whether batches are kept; in a run of one process only.
        overwrite: whether a trajectory that is there is replaced.
        after: go on with an earlier trajectory.

    Returns:
        This process's writer. Rank 0 writes the trajectory, the others their step logs beside it.

    Raises:
        TrajectoryError: on every process, where one of them cannot write, or rank 0 does not find
            what another one has written.
    """
    several = processes.count > 1
    run = processes.on_first(lambda: _name_of_run(directory, after)) if several else ""
    rank = Rank(processes.rank, processes.count, run) if several else None

    def writer() -> TrajectoryWriter:
        return TrajectoryWriter(
            directory,
            header if processes.first else {},
            disk_budget=disk_budget,
            keeps_batches=keeps_batches,
            overwrite=overwrite,
            after=_own_part(after, processes.rank),
            rank=rank,
        )

    opened: list[TrajectoryWriter] = []

    def begin() -> None:
        opened.append(writer())
        opened[0].checkpoint(state)

    processes.on_first(begin)  # it clears the directory: the others come afterwards
    if several:
        processes.together(lambda: None if processes.first else opened.append(writer()))
        processes.on_first(lambda: _find_other_logs(directory, processes.count))
    return opened[0]


def _name_of_run(directory: Path, after: After | None) -> str:
    # In place it stays what it is: until every rank has taken up its log, the old ones fit.
    if after is not None and same_place(after.directory, directory):
        rank = read_manifest(directory).rank
        assert rank is not None  # it had as many processes
        return rank.run
    return secrets.token_hex(8)


def _own_part(after: After | None, rank: int) -> After | None:
    """What a rank takes up of an earlier trajectory: rank 0 alone has checkpoints."""
    if after is None or rank == 0:
        return after
    log = after.directory / rank_name(rank)
    return replace(after, directory=log, last_checkpoint=-1, pinned=frozenset())


def _find_other_logs(directory: Path, count: int) -> None:
    expected = [directory / rank_name(number) / MANIFEST for number in range(1, count)]
    patience = time.monotonic() + _SHARED_WITHIN
    while missing := [path for path in expected if not path.is_file()]:
        if time.monotonic() > patience:
            raise TrajectoryError(
                f"Rank 0 does not find {missing[0]}, which another process has written: the "
                "processes do not share this file system. Choose a directory that they share with "
                "`dirpath=`."
            )
        time.sleep(0.1)
