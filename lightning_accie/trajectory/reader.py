"""Reading a trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

import numpy as np

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.batches import Batches
from lightning_accie.trajectory.files import DAMAGED, FOLDER, MANIFEST, read
from lightning_accie.trajectory.manifest import StoredCheckpoint, read_manifest
from lightning_accie.trajectory.ranks import ending, merged_step, open_logs
from lightning_accie.trajectory.records import Checkpoint, Step
from lightning_accie.trajectory.tensors import load

_MERGE_AFTER = 2**20
"""How many samples may be counted apart before they are added up, in `Trajectory.visits`."""

Counts = tuple[np.ndarray, np.ndarray]
"""Sorted indices ``[n]`` and how often each was drawn ``[n]``, both int64."""


class Trajectory:
    """A training run on disk. It is only read: nothing is ever written.

    Files are read when they are needed, and each is compared with its recorded checksum before its
    content is used. A run that is still being written ends where it was last flushed; one of several
    processes, where the shortest of their logs ends.

    Args:
        directory: what a `TrajectoryWriter` wrote, or the callback's directory, which has it in its
            folder ``trajectory``.

    Attributes:
        directory: the trajectory's own, as an absolute path.
        header: what the writer's caller gave along, as JSON keeps it.
        status: ``"running"``, ``"finished"``, ``"interrupted"``, ``"failed"`` or ``"stopped"``.
            A writer that was killed leaves ``"running"``.
        reason: why, in words; may be empty.
        version: of the format.
        world_size: how many processes trained.
        batches: the stored batches, or None where the run kept their indices alone.
        writer: the version of the package that wrote it.

    Raises:
        TrajectoryError: where the trajectory is missing, damaged or too new. A checkpoint that is
            missing or damaged is only found when it is asked for.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).absolute()
        if (
            not (self.directory / MANIFEST).exists()
            and (self.directory / FOLDER / MANIFEST).exists()
        ):
            self.directory /= FOLDER
        manifest = read_manifest(self.directory)
        self.header = manifest.header
        self.writer = manifest.writer
        self.version = manifest.version
        self._logs = open_logs(self.directory, manifest)
        self.world_size = len(self._logs)
        self._length, self.status, self.reason = ending(self._logs)
        self._checkpoints = {
            stored.step: stored for stored in manifest.checkpoints if stored.step <= self._length
        }
        kept = manifest.batches
        self.batches = None if kept is None else Batches(self.directory, kept)

    @classmethod
    def open(cls, directory: Path | str) -> Trajectory:
        """Open a trajectory.

        Args:
            directory: see `Trajectory`.

        Returns:
            The trajectory.

        Raises:
            TrajectoryError: where it is missing, damaged or too new.
        """
        return cls(directory)

    def __len__(self) -> int:
        return self._length

    def step(self, t: int) -> Step:
        """Read one step.

        Args:
            t: its number, from 0 to ``len(self) - 1``.

        Returns:
            The step as it was recorded, with the micro-batches of all ranks.

        Raises:
            IndexError: where there is no such step.
            TrajectoryError: where its file is missing or damaged, or the ranks disagree on it.
        """
        if not 0 <= t < len(self):
            raise IndexError(f"there is no step {t} in a trajectory of {len(self)} steps")
        return merged_step([log.step(t) for log in self._logs])

    def steps(self, lo: int = 0, hi: int | None = None) -> Iterator[Step]:
        """Read consecutive steps, one at a time.

        Args:
            lo: the first.
            hi: the one behind the last; None for the trajectory's end.

        Returns:
            An iterator. It raises what `step` raises.
        """
        return map(self.step, range(lo, len(self) if hi is None else hi))

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps before which the full state was kept, in order."""
        return tuple(self._checkpoints)

    def checkpoint(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Args:
            step: one of ``checkpoint_steps``.

        Returns:
            The state before that step, on the CPU.

        Raises:
            TrajectoryError: where there is no such checkpoint, or its file is missing or damaged.
        """
        stored = self._checkpoints.get(step)
        if stored is None:
            raise TrajectoryError(
                f"{self.directory} has no checkpoint at step {step}. It has them at the steps "
                f"{', '.join(map(str, self.checkpoint_steps))}."
            )
        return self._decoded_checkpoint(stored)

    def until(self, steps: int) -> Trajectory:
        """Look at the beginning of the run as if it were all of it.

        Args:
            steps: how many steps, from 0 to ``len(self)``.

        Returns:
            The trajectory that ends there.

        Raises:
            ValueError: where there are not so many.
        """
        if not 0 <= steps <= len(self):
            raise ValueError(f"there are no {steps} steps in a trajectory of {len(self)} steps")
        view = copy(self)
        view._length = steps
        view._checkpoints = {t: kept for t, kept in self._checkpoints.items() if t <= steps}
        return view

    def visits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count how often each sample was drawn; a sample twice in a batch counts twice.

        Returns:
            ``(source, index, count)``, each ``[n]`` int64: one entry a sample that was ever drawn,
            sorted by source, then by index.

        Raises:
            TrajectoryError: where a file of the step log is missing or damaged.
        """
        parts: dict[int, list[Counts]] = {}
        for log in self._logs:
            for source, counts in log.visits(len(self)):
                known = parts.setdefault(source, [])
                known.append(counts)
                # Merging only once the new ones outweigh the old keeps the cost linear.
                if sum(len(part[0]) for part in known[1:]) > max(_MERGE_AFTER, len(known[0][0])):
                    known[:] = [_merged(known)]
        merged = [(source, *_merged(parts[source])) for source in sorted(parts)]
        sources = [np.full_like(indices, source) for source, indices, _ in merged]
        empty = np.empty(0, dtype=np.int64)
        return (
            np.concatenate([empty, *sources]),
            np.concatenate([empty, *[indices for _, indices, _ in merged]]),
            np.concatenate([empty, *[counts for _, _, counts in merged]]),
        )

    def verify(self, steps: int | None = None) -> None:
        """Read every file and compare it with its recorded checksum.

        Args:
            steps: look only at the files that the first so many steps need.

        Raises:
            TrajectoryError: for the first file that is missing or damaged.
        """
        steps = len(self) if steps is None else steps
        for log in self._logs:
            log.verify(steps)
        for stored in self._checkpoints.values():
            if stored.step <= steps:
                self._decoded_checkpoint(stored)
        if self.batches is not None:
            self.batches.verify()

    def _decoded_checkpoint(self, stored: StoredCheckpoint) -> Checkpoint:
        try:
            tensors, content = load(read(self.directory, stored))
        except ValueError as error:
            raise TrajectoryError(f"{self.directory / stored.file}: {error}. {DAMAGED}") from error
        return Checkpoint(stored.step, tensors, content)


def _merged(parts: list[Counts]) -> Counts:
    indices, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(indices), dtype=np.int64)
    np.add.at(counts, inverse, np.concatenate([part[1] for part in parts]))
    return indices, counts
