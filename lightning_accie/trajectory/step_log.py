"""The step log of one process, read chunk by chunk."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.chunks import Chunk
from lightning_accie.trajectory.files import DAMAGED, check_size, read
from lightning_accie.trajectory.manifest import Manifest
from lightning_accie.trajectory.records import Step

_CHUNKS_IN_MEMORY = 4


class StepLog:
    """The steps that one process wrote.

    Args:
        directory: where its manifest is.
        manifest: what is there.

    Attributes:
        directory: the same.
        manifest: the same.

    Raises:
        TrajectoryError: where a file of the log is missing or of another size.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._stored = manifest.chunks
        self._firsts = [chunk.first for chunk in manifest.chunks]
        self._chunks: OrderedDict[int, Chunk] = OrderedDict()
        for chunk in manifest.chunks:
            check_size(directory, chunk)

    def __len__(self) -> int:
        return self.manifest.steps

    def step(self, t: int) -> Step:
        """Read one step.

        Args:
            t: its number, from 0 to ``len(self) - 1``.

        Returns:
            The step as it was recorded.

        Raises:
            TrajectoryError: where its file is missing or damaged.
        """
        return self._chunk(bisect_right(self._firsts, t) - 1).step(t)

    def visits(self, stop: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Count how often each sample was drawn, chunk by chunk.

        Args:
            stop: the step to count up to.

        Yields:
            A source with its sorted indices ``[n]`` and their counts ``[n]``; a source comes by
            once a chunk.

        Raises:
            TrajectoryError: where a file is missing or damaged.
        """
        for at, stored in enumerate(self._stored):
            if stored.first < stop:
                yield from self._chunk(at).visits(stop).items()

    def verify(self, steps: int) -> None:
        """Read files and compare them with their recorded checksums.

        Args:
            steps: look only at the files that the first so many steps need.

        Raises:
            TrajectoryError: for the first file that is missing or damaged.
        """
        for at, stored in enumerate(self._stored):
            if stored.first < steps:
                self._read_chunk(at)

    def _chunk(self, at: int) -> Chunk:
        if at in self._chunks:
            self._chunks.move_to_end(at)
        else:
            self._chunks[at] = self._read_chunk(at)
            if len(self._chunks) > _CHUNKS_IN_MEMORY:
                self._chunks.popitem(last=False)
        return self._chunks[at]

    def _read_chunk(self, at: int) -> Chunk:
        stored = self._stored[at]
        try:
            chunk = Chunk(read(self.directory, stored))
        except ValueError as error:
            raise TrajectoryError(f"{self.directory / stored.file}: {error}. {DAMAGED}") from error
        if (chunk.first, len(chunk)) != (stored.first, stored.count):
            raise TrajectoryError(
                f"{self.directory / stored.file} holds {len(chunk)} steps from {chunk.first}, not "
                f"{stored.count} steps from {stored.first} as the manifest says. {DAMAGED}"
            )
        return chunk
