"""Keeping the batches themselves, and which samples they hold.

A batch is kept as ``training_step`` receives it: after the transfer hooks. Whatever was drawn on the
way, by the dataset, the collate function or the hooks (augmentation on the device), is in it, and a
replay runs none of that again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.trajectory.batch_forms import take_apart
from lightning_accie.trajectory.batches import SampleId
from lightning_accie.trajectory.records import Piece
from lightning_accie.trajectory.sizes import format_bytes
from lightning_accie.trajectory.writer import TrajectoryWriter

SampleIdOf = str | Callable[[Any], Sequence[Any]]
"""``sample_id=``: a key or field of the batch, or ``callable(batch) -> ids``."""


class BatchKeeper:
    """Keeps each batch as it goes into ``training_step``.

    Args:
        writer: the trajectory's writer.
        sample_id: what names the samples of a batch; None where their indices are known.
    """

    def __init__(self, writer: TrajectoryWriter, sample_id: SampleIdOf | None) -> None:
        self._writer = writer
        self._sample_id = sample_id
        self._numbers = _Numbers(*writer.known_ids())

    def keep(self, batch: Any, pieces: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], int]:
        """Keep the next batch.

        Args:
            batch: as ``training_step`` is about to receive it.
            pieces: its samples, where their indices are known.

        Returns:
            The batch's samples, and its number among the stored batches.

        Raises:
            UnsupportedError: if it cannot be stored, or its samples are not named as they should be.
            TrajectoryError: if it cannot be written.
        """
        names: list[SampleId] = []
        if self._sample_id is not None:
            numbers, names = self._numbers.of(ids_of(batch, self._sample_id))
            pieces = (Piece(0, numbers),)
        parts = take_apart(batch, [len(piece.indices) for piece in pieces])
        return pieces, self._writer.keep_batch(parts, names)


class _Numbers:
    """The samples' numbers: their ids where these count from 0, else by first appearance."""

    def __init__(self, names: list[SampleId], begun: bool) -> None:
        self._known = {name: number for number, name in enumerate(names)}
        self._counting = not names if begun else None

    def of(self, ids: list[SampleId]) -> tuple[np.ndarray, list[SampleId]]:
        """Give a batch's numbers ``[B]``, and the ids that were not known."""
        counting = all(isinstance(name, int) and name >= 0 for name in ids)
        if self._counting is None and ids:
            self._counting = counting
        if self._counting and not counting:
            odd = next(name for name in ids if not (isinstance(name, int) and name >= 0))
            raise UnsupportedError(
                f"`sample_id` gave {odd!r}, and numbers from 0 before. Let it give texts for every "
                "sample."
            )
        if self._counting:
            return np.array(ids, dtype=np.int64), []
        fresh = [name for name in dict.fromkeys(ids) if name not in self._known]
        for name in fresh:
            self._known[name] = len(self._known)
        return np.array([self._known[name] for name in ids], dtype=np.int64), fresh


def ids_of(batch: Any, sample_id: SampleIdOf) -> list[SampleId]:
    """Ask for the ids of a batch's samples.

    Args:
        batch: as ``training_step`` receives it.
        sample_id: a key or field of the batch, or ``callable(batch) -> ids``.

    Returns:
        One integer or text a sample.

    Raises:
        UnsupportedError: if it gives something else.
    """
    found = _entry(batch, sample_id) if isinstance(sample_id, str) else sample_id(batch)
    if isinstance(found, (Tensor, np.ndarray)):
        found = found.tolist()
    if isinstance(found, (str, bytes)) or not isinstance(found, Sequence):
        raise UnsupportedError(
            f"`sample_id` gave a {type(found).__name__}; it must give one integer or text for every "
            "sample of the batch."
        )
    ids: list[Any] = [
        name.item() if isinstance(name, (Tensor, np.generic)) else name for name in found
    ]
    for name in ids:
        if type(name) not in (int, str):
            raise UnsupportedError(
                f"`sample_id` gave {name!r} for a sample; ids must be integers or texts."
            )
    return ids


def _entry(batch: Any, key: str) -> Any:
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        names = ", ".join(map(repr, batch))
    else:
        own = is_dataclass(batch) or hasattr(batch, "_fields")
        if (own or not isinstance(batch, (list, tuple, Tensor))) and hasattr(batch, key):
            return getattr(batch, key)
        fields = getattr(batch, "__dataclass_fields__", getattr(batch, "_fields", ()))
        names = (
            ", ".join(map(repr, fields)) if own else f"no names (it is a {type(batch).__name__})"
        )
    raise UnsupportedError(
        f"`sample_id={key!r}` is not in the batch, which has {names}. Let the dataset yield the "
        "sample's id, or pass `callable(batch) -> ids`."
    )


def forecast(trainer: Any, written: int, room: int) -> tuple[str, bool]:
    """Say what keeping batches will cost, from the first one.

    Args:
        trainer: the Trainer.
        written: bytes of the first batch.
        room: bytes that the disk budget leaves for batches.

    Returns:
        The words, and whether the room may not do.
    """
    calls = _calls(trainer)
    words = f"about {format_bytes(written)} a batch"
    if calls is None:
        return f"{words}, and `disk_budget` has room for {format_bytes(room)}", False
    total = int(written * calls)
    words += (
        f", about {format_bytes(total)} in all; `disk_budget` has room for {format_bytes(room)}"
    )
    return words, total > room


def _calls(trainer: Any) -> float | None:
    """How many batches the run will train on, if that is known."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    by_epoch = batches * epochs if epochs is not None and epochs > 0 else float("inf")
    steps = trainer.max_steps
    by_step = steps * trainer.accumulate_grad_batches if steps > 0 else float("inf")
    found = min(by_epoch, by_step)
    return None if found == float("inf") else found
