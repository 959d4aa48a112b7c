"""The recorded batches again, from a trajectory that keeps them: no training data are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from lightning_accie.errors import TrajectoryError, UnsupportedError
from lightning_accie.replay.batches import BatchCache, numbered, spans_of
from lightning_accie.trajectory.batches import Batches
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import MicroBatch

_VISITS = 4
"""How many visits of a sample are looked at for one whose batch can be taken apart."""


class StoredSource:
    """Reads stored batches.

    Args:
        trajectory: one that keeps batches.
        device: where tensors go that were not on the CPU in training.
        cache_bytes: batches are kept in memory up to this many bytes.
    """

    ready = True

    def __init__(self, trajectory: Trajectory, *, device: torch.device, cache_bytes: int) -> None:
        assert trajectory.batches is not None
        self._batches: Batches = trajectory.batches
        self._trajectory = trajectory
        self._device = device
        self._cache = BatchCache(cache_bytes)
        sizes = [loader["samples"] for loader in trajectory.header["loaders"]]
        self._offsets = [0, *accumulate(sizes)]
        self._places: dict[int, list[tuple[int, int]]] | None = None

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of batches for when they come again."""
        self._cache.resize(nbytes)

    def sample_numbers(self, micro: MicroBatch) -> np.ndarray:
        """Number the batch's samples, as `BatchSource` does.

        Returns:
            ``[B]`` int64, one number a place of the batch.
        """
        return numbered(micro.pieces, self._offsets)

    def spans(self, micro: MicroBatch) -> dict[int, slice]:
        """Where each loader's samples lie among the batch's.

        Returns:
            By loader, a slice of ``[B]``.
        """
        return spans_of(micro.pieces)

    def fetch(self, micro: MicroBatch) -> Any:
        """Read the batch, or take it from the cache.

        Returns:
            The batch as ``training_step`` received it, on the device.
        """
        return self._cache.get(micro, self._read)

    def _read(self, micro: MicroBatch) -> Any:
        return self._batches.batch(_number(micro), self._device)

    def others(self, micro: MicroBatch) -> Iterator[Any]:
        """Batches of the same sizes made of other samples.

        Yields:
            The batch with its first sample in every place.
        """
        yield from self._changed(micro, None, lambda refs: np.full_like(refs, refs[0]))

    def with_another(self, micro: MicroBatch, source: int, place: int) -> Iterator[Any]:
        """The batch with one sample replaced.

        Args:
            micro: the batch at hand.
            source: the loader whose sample to replace.
            place: its place among that loader's samples.

        Yields:
            The batch with others of its own samples in that place. Nothing where the loaders gave
            equally many: it is not known then whose rows are whose.
        """
        spans = [span.stop - span.start for span in self.spans(micro).values()]
        span = self.spans(micro)[source]
        size = span.stop - span.start
        if spans.count(size) > 1:
            return
        for step in range(1, min(size, _VISITS)):

            def replaced(refs: np.ndarray, other: int = (place + step) % size) -> np.ndarray:
                changed = refs.copy()
                changed[place] = refs[other]
                return changed

            yield from self._changed(micro, size, replaced)

    def _changed(
        self, micro: MicroBatch, size: int | None, change: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[Any]:
        batch = self._batches.changed(_number(micro), size, change, self._device)
        if batch is not None:
            yield batch

    def sample(self, number: int) -> Any:
        """Read one sample, as it stood in a batch.

        Args:
            number: its sample number.

        Returns:
            The batch's structure with the sample's parts alone.

        Raises:
            UnsupportedError: if the batches cannot be taken apart by sample.
        """
        if self._places is None:
            self._places = self._found()
        for batch, place in self._places.get(number, ()):
            found = self._batches.sample(batch, place)
            if found is not None:
                return found[0]
        raise UnsupportedError(
            "The stored batches cannot be taken apart by sample: no tensor has the batch as its "
            "leading dimension, or they come from several dataloaders. Leave `describe=` out, and "
            "add your columns by `scores.with_columns(...)`."
        )

    def _found(self) -> dict[int, list[tuple[int, int]]]:
        """Where each sample stands, at its first few visits."""
        places: dict[int, list[tuple[int, int]]] = {}
        for step in self._trajectory.steps():
            for micro in step.micro_batches:
                for place, number in enumerate(self.sample_numbers(micro).tolist()):
                    known = places.setdefault(number, [])
                    if len(known) < _VISITS:
                        known.append((_number(micro), place))
        return places


def _number(micro: MicroBatch) -> int:
    if micro.batch is None:
        raise TrajectoryError(
            f"The trajectory keeps no batch for batch {micro.batch_idx} of epoch {micro.epoch}. "
            "Record the run again."
        )
    return micro.batch
