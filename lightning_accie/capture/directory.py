"""Where a `fit` is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.processes import Processes
from lightning_accie.trajectory.files import FOLDER, MANIFEST


def choose(trainer: Any, dirpath: Path | None, processes: Processes, *, beside: bool) -> Path:
    """Choose where a `fit` is recorded; collective.

    Args:
        trainer: the Trainer.
        dirpath: the user's choice, if there is one.
        processes: of the run.
        beside: whether to go beside a trajectory that is there already.

    Returns:
        ``dirpath``, or a new directory; the same on every process.

    Raises:
        TrajectoryError: where no directory can be made.
    """
    if dirpath is None:
        root = Path(trainer.log_dir or trainer.default_root_dir)  # on every rank: it broadcasts
        return processes.on_first(lambda: make_numbered(root, "influence"))
    return processes.on_first(lambda: _beside(dirpath) if beside else dirpath)


def _beside(dirpath: Path) -> Path:
    taken = (dirpath / FOLDER / MANIFEST).exists()
    return make_numbered(dirpath.parent, dirpath.name) if taken else dirpath


def make_numbered(root: Path, name: str) -> Path:
    """Make a directory that was not there, numbered where its name is taken.

    Args:
        root: where to.
        name: its name; with ``-1``, ``-2``, … where that is taken.

    Returns:
        The directory.

    Raises:
        TrajectoryError: where it cannot be made.
    """
    number = 0
    while True:
        directory = root / (f"{name}-{number}" if number else name)
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise TrajectoryError(
                f"The directory {directory} for the recording cannot be made: {error}. Choose "
                "another one with `dirpath=`."
            ) from error
        else:
            return directory
