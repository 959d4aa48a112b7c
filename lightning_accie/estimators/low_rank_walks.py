"""How far the walks of low-rank ACC-SGD-IE have come, for an analysis that is killed.

| kept as | what |
|---|---|
| ``directions`` | V, once |
| ``notes`` | what the steps of the walk forwards have noted, part by part |
| ``forwards`` | the rest of its state: c, the optimiser's slots in V's coordinates, VᵀH_tV |
| ``backwards`` | the state of the walk back: SGD-IE's, and the corrections |

A state is only gone on from where the notes of all steps that it needs are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis
from lightning_accie.estimators.own_curvature import Note
from lightning_accie.estimators.sgd_ie import WalkBack

_SLOT = "slots/"
Notes = list["Note | None"]
"""What each step has noted; None of a step without a loss."""


@dataclass
class Forwards:
    """How far the walk forwards has come.

    Attributes:
        c: ``[n, r]``.
        slots: the coordinates of what the optimiser keeps, ``[n, r]`` each.
        matrix: ``[r, r]``, VᵀH_tV as it was last computed.
        notes: of all steps so far.
    """

    c: Tensor
    slots: dict[str, Tensor] = field(default_factory=dict)
    matrix: Tensor | None = None
    notes: Notes = field(default_factory=list)


@dataclass
class Backwards:
    """How far the walk back has come.

    Attributes:
        walk: SGD-IE's.
        correction: ``[n]`` float64, what the samples' own curvature has added so far.
    """

    walk: WalkBack
    correction: Tensor


class Walks:
    """Where the walks are kept.

    Args:
        replay: the run.
        key: the estimator's `Estimator.key`.
        samples: ``[n]`` sample numbers, those that are estimated.
    """

    def __init__(self, replay: Replay, key: str, samples: Tensor) -> None:
        self._replay, self._device = replay, replay.walker.program.device
        self._key = f"{key} {_checksum(samples)}"
        self._kept_notes = 0

    def basis(self, find: Callable[[], Basis]) -> Basis:
        """Give V; the coordinates of other directions, if only to rounding, are none of its own.

        Args:
            find: finds it, where an earlier analysis has not left it.

        Returns:
            The directions; what the other methods keep and find belongs to these.
        """
        key = f"{self._key} directions"
        kept = self._parts("directions")
        if kept:
            basis = Basis(kept[0]["rows"], self._replay.trainable, self._replay.final.state.params)
        else:
            basis = find()
            self._replay.kept.add(key, {"rows": basis.rows})
        self._key += f" {_checksum(basis.rows)}"
        return basis

    def forwards(self) -> Forwards | None:
        """Find the walk forwards.

        Returns:
            The furthest state that there are notes for.
        """
        notes: dict[int, Note | None] = {}
        for part in self._parts("notes"):
            notes |= _noted(part)
        for state in sorted(self._parts("forwards"), key=lambda s: -int(s["step"])):
            known = [notes[t] for t in range(int(state["step"])) if t in notes]
            if len(known) == int(state["step"]):
                self._kept_notes = len(known)
                slots = {n[len(_SLOT) :]: v for n, v in state.items() if n.startswith(_SLOT)}
                return Forwards(state["c"], slots, state.get("matrix"), known)
        return None

    def keep_forwards(self, walk: Forwards) -> None:
        """Keep how far the walk forwards is: the notes since the last time, and the state.

        Args:
            walk: the walk.
        """
        first, step = self._kept_notes, len(walk.notes)
        if step > first:
            self._replay.kept.add(f"{self._key} notes", _part(walk.notes[first:], first))
        self._kept_notes = step
        state = {"step": torch.tensor(step), "c": walk.c}
        state |= {f"{_SLOT}{name}": value for name, value in walk.slots.items()}
        if walk.matrix is not None:
            state["matrix"] = walk.matrix
        self._replay.kept.replace(f"{self._key} forwards", state)

    def backwards(self) -> Backwards | None:
        """Find the walk back.

        Returns:
            The state that has come furthest.
        """
        like = self._replay.final.state
        found = [
            Backwards(WalkBack.of(state, like), state["correction"].to(self._device))
            for state in self._replay.kept.parts(f"{self._key} backwards")
        ]
        return min(found, key=lambda back: back.walk.step, default=None)

    def keep_backwards(self, back: Backwards) -> None:
        """Keep how far the walk back is.

        Args:
            back: the walk.
        """
        state = {**back.walk.tensors(), "correction": back.correction.clone()}
        self._replay.kept.replace(f"{self._key} backwards", state)

    def _parts(self, which: str) -> list[dict[str, Tensor]]:
        """What an earlier analysis has left, where the run is replayed."""
        parts = self._replay.kept.parts(f"{self._key} {which}")
        return [{name: value.to(self._device) for name, value in part.items()} for part in parts]


def _checksum(values: Tensor) -> str:
    return sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _part(notes: Notes, first: int) -> dict[str, Tensor]:
    """The notes of some steps as tensors; one of a step without a loss has no columns."""
    there = [note for note in notes if note is not None]
    shapes = [(0, 0) if note is None else tuple(note.values.shape) for note in notes]
    part = {"first": torch.tensor(first), "shapes": torch.tensor(shapes)}
    if there:
        part["spots"] = torch.cat([note.spots for note in there])
        part["values"] = torch.cat([note.values.flatten() for note in there])
    return part


def _noted(part: Mapping[str, Tensor]) -> dict[int, Note | None]:
    """The same by step."""
    found: dict[int, Note | None] = {}
    place = number = 0
    for step, (rows, columns) in enumerate(part["shapes"].tolist(), int(part["first"])):
        found[step] = None
        if columns:
            values = part["values"][number : number + rows * columns].view(rows, columns)
            found[step] = Note(part["spots"][place : place + rows], values)
            place, number = place + rows, number + rows * columns
    return found
