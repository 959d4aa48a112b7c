"""A stretch of the step log as the bytes of one file: columns, not records.

Every number of the steps stands in a column with its like, in the smallest integer type that holds
them all; the counts (micro-batches a step, pieces a micro-batch, indices a piece) say where each
record begins. A step then costs its indices and a few tens of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.trajectory.records import MicroBatch, Piece, Step
from lightning_accie.trajectory.settings import SettingsTable, encode_settings
from lightning_accie.trajectory.tensors import dump, load, smallest

_COUNTERS = ("batch_idx", "epoch", "global_step", "accumulate")
"""The integer fields of a `MicroBatch`: one column each."""

_NO_BATCH = -1

_FIELDS = ("loss", "has_loss", "draws", "has_random", *_COUNTERS)
"""Every column that has one entry a micro-batch, but for the number of its pieces."""


def encode_chunk(steps: Sequence[Step]) -> bytes:
    """Write consecutive steps as the content of one file.

    Args:
        steps: at least one; numbered consecutively.

    Returns:
        The content of a safetensors file.

    Raises:
        TypeError: where a field holds what its record does not allow.
        OverflowError: where an integer does not fit int64.
    """
    micros = [micro for step in steps for micro in step.micro_batches]
    pieces = [piece for micro in micros for piece in micro.pieces]
    drawn = [np.asarray(piece.indices) for piece in pieces]
    columns = {
        "step/micro_batches": [len(step.micro_batches) for step in steps],
        "micro/pieces": [len(micro.pieces) for micro in micros],
        "piece/source": [piece.source for piece in pieces],
        "piece/size": [len(indices) for indices in drawn],
        "indices": np.concatenate(drawn) if drawn else [],
        **{f"micro/{name}": [getattr(micro, name) for micro in micros] for name in _COUNTERS},
    }
    if any(micro.batch is not None for micro in micros):
        numbers = [_NO_BATCH if micro.batch is None else micro.batch for micro in micros]
        columns["micro/batch"] = numbers
    prints = [micro.prints for micro in micros if micro.prints is not None]
    if prints:
        columns["micro/prints"] = [len(m.prints) if m.prints is not None else 0 for m in micros]
    settings, forms = encode_settings([step.settings for step in steps])
    scaled = any(step.loss_scale != 1.0 for step in steps)  # few runs are; no column without
    scales = {
        "step/loss_scale": torch.tensor([step.loss_scale for step in steps], dtype=torch.float64)
    }
    tensors = {
        **{name: smallest(values) for name, values in columns.items()},
        **_losses_and_flags(micros),
        **_states(micros),
        **({"prints": torch.from_numpy(np.concatenate(prints).view(np.int32))} if prints else {}),
        **(scales if scaled else {}),
        **settings,
    }
    return dump(tensors, {"first": steps[0].number, "settings": forms, "scaled": scaled})


class Chunk:
    """The steps of one file, put together one at a time.

    Args:
        data: what `encode_chunk` returned.

    Attributes:
        first: the number of the first step.

    Raises:
        ValueError: where ``data`` is something else.
    """

    def __init__(self, data: bytes) -> None:
        tensors, meta = load(data)
        try:
            self.first: int = meta["first"]
            self._micros = _starts(tensors["step/micro_batches"])
            self._pieces = _starts(tensors["micro/pieces"])
            self._drawn = _starts(tensors["piece/size"])
            self._sources = tensors["piece/source"].tolist()
            self._indices = tensors["indices"].numpy()
            self._fields = {name: tensors[f"micro/{name}"].tolist() for name in _FIELDS}
            if "micro/batch" in tensors:
                self._fields["batch"] = tensors["micro/batch"].tolist()
            self._settings = SettingsTable(tensors, meta["settings"])
            scaled = meta.get("scaled", False)  # not written by 0.1
            self._scales = tensors["step/loss_scale"].tolist() if scaled else [1.0] * len(self)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the step log lacks a part: {error!r}") from error
        self._random = _states_by_micro(tensors)
        self._prints: np.ndarray | None = None
        if "prints" in tensors:
            self._prints = tensors["prints"].numpy().view(np.uint32)
            self._print_starts = _starts(tensors["micro/prints"])
        lengths = {name: len(column) for name, column in self._fields.items()}
        lengths |= {"pieces": len(self._pieces) - 1}
        expected = dict.fromkeys(lengths, self._micros[-1])
        lengths |= {"settings": len(self._settings), "scales": len(self._scales)}
        expected |= {"settings": len(self), "scales": len(self)}
        sizes = (self._pieces[-1], self._drawn[-1])
        if self._prints is not None:
            lengths["prints"], expected["prints"] = len(self._print_starts) - 1, self._micros[-1]
            lengths["sums"], expected["sums"] = self._print_starts[-1], len(self._prints)
        if lengths != expected or sizes != (len(self._sources), len(self._indices)):
            raise ValueError("the columns of the step log do not fit each other")

    def __len__(self) -> int:
        return len(self._micros) - 1

    def step(self, number: int) -> Step:
        """Put one step together.

        Args:
            number: t, from ``first`` to ``first + len(self) - 1``.

        Returns:
            The step as it was recorded.
        """
        at = number - self.first
        micros = range(self._micros[at], self._micros[at + 1])
        batches = tuple(map(self._micro, micros))
        return Step(number, batches, self._settings[at], self._scales[at])

    def visits(self, stop: int | None = None) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Count how often each sample was drawn.

        Args:
            stop: count only the steps before this one; None for all.

        Returns:
            For each source its sorted indices ``[n]`` and their counts ``[n]``, both int64.
        """
        steps = len(self) if stop is None else max(0, min(stop - self.first, len(self)))
        pieces = self._pieces[self._micros[steps]]
        sources = np.repeat(self._sources[:pieces], np.diff(self._drawn[: pieces + 1]))
        drawn = self._indices[: self._drawn[pieces]]
        visits = {}
        for source in np.unique(sources).tolist():
            indices, counts = np.unique(drawn[sources == source], return_counts=True)
            visits[int(source)] = indices.astype(np.int64), counts.astype(np.int64)
        return visits

    def _micro(self, at: int) -> MicroBatch:
        fields: dict[str, Any] = {name: column[at] for name, column in self._fields.items()}
        if not fields.pop("has_loss"):
            fields["loss"] = None
        fields["random"] = self._random.get(at, {}) if fields.pop("has_random") else None
        if self._prints is not None:
            prints = self._prints[self._print_starts[at] : self._print_starts[at + 1]]
            fields["prints"] = prints if len(prints) else None
        if fields.get("batch") == _NO_BATCH:
            fields["batch"] = None
        pieces = range(self._pieces[at], self._pieces[at + 1])
        return MicroBatch(tuple(map(self._piece, pieces)), **fields)

    def _piece(self, at: int) -> Piece:
        indices = self._indices[self._drawn[at] : self._drawn[at + 1]]
        return Piece(self._sources[at], indices.astype(np.int64))


def _losses_and_flags(micros: Sequence[MicroBatch]) -> dict[str, Tensor]:
    losses = [float("nan") if micro.loss is None else micro.loss for micro in micros]
    return {
        "micro/loss": torch.tensor(losses, dtype=torch.float64),
        "micro/has_loss": torch.tensor([micro.loss is not None for micro in micros]).bool(),
        "micro/draws": torch.tensor([micro.draws for micro in micros]).bool(),
        "micro/has_random": torch.tensor([micro.random is not None for micro in micros]).bool(),
    }


def _states(micros: Sequence[MicroBatch]) -> dict[str, Tensor]:
    return {
        f"random/{at}/{name}": state
        for at, micro in enumerate(micros)
        for name, state in (micro.random or {}).items()
    }


def _states_by_micro(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    states: dict[int, dict[str, Tensor]] = {}
    for key, state in tensors.items():
        if key.startswith("random/"):
            _, at, name = key.split("/", 2)
            states.setdefault(int(at), {})[name] = state
    return states


def _starts(counts: Tensor) -> list[int]:
    # Where each record's part begins, and behind the last one the end of all.
    if counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError("a count in the step log is not one")
    return [0, *accumulate(counts.tolist())]
