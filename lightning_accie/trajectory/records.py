"""The records of a training run: what one optimiser step drew, and under which settings.

Everything here is frozen. The recorder makes these records, the store keeps them, the replay reads
them; none of the three needs another's types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

RandomState = Mapping[str, Tensor]
"""Generator states by name (``"torch"``, ``"cuda"``, ``"numpy"``, ``"python"``), as CPU tensors."""

GroupSettings = Mapping[str, Any]
"""One parameter group's hyper-parameters as JSON values: ``lr``, ``momentum``, ``betas``, …"""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The samples that one training dataloader contributed to a micro-batch.

    Attributes:
        source: which training dataloader, counted over the flattened loaders (0 where there is one).
        indices: ``[b]`` int64, the dataset indices in batch order. A sample may stand there twice.
    """

    source: int
    indices: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One call of ``training_step``.

    Attributes:
        pieces: the drawn samples, one piece a contributing dataloader.
        batch_idx: the ``batch_idx`` argument that ``training_step`` received.
        epoch: ``trainer.current_epoch`` during the call.
        global_step: ``trainer.global_step`` during the call.
        loss: the loss that ``training_step`` returned, before the division by ``accumulate``;
            ``None`` where it returned ``None`` (no backward pass then).
        accumulate: ``accumulate_grad_batches`` in force: the loss is divided by it.
        draws: whether the call drew random numbers.
        random: the generator states before the call; kept only where the call draws and its state
            is not simply what the previous drawing call of the same rank left behind.
        rank: the process that ran the call; 0 where there is one.
        world_size: over how many processes the step's gradient is averaged.
        batch: the number of the stored batch, in a trajectory that keeps batches.
        prints: checksums of the samples (`fingerprints`), where they were taken.
    """

    pieces: tuple[Piece, ...]
    batch_idx: int
    epoch: int
    global_step: int
    loss: float | None
    accumulate: int = 1
    draws: bool = False
    random: RandomState | None = None
    rank: int = 0
    world_size: int = 1
    batch: int | None = None
    prints: np.ndarray | None = None

    @property
    def divisor(self) -> int:
        """1 / c_m: what the returned loss is divided by in the step's loss (method: section 1)."""
        return self.accumulate * self.world_size


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One optimiser step: the micro-batches whose gradients it summed, and its settings.

    Attributes:
        number: t, counted from 0 at the start of the trajectory.
        micro_batches: those of rank 0 in the order in which they ran, then those of rank 1, ….
        settings: the hyper-parameters in force at the step, one mapping per parameter group, in
            the optimiser's group order (without ``params``).
        loss_scale: what the loss was multiplied by for the backward pass, and the gradient divided
            by before the step (`torch.amp.GradScaler`); 1 without.
    """

    number: int
    micro_batches: tuple[MicroBatch, ...]
    settings: tuple[GroupSettings, ...]
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The full state before step ``step``.

    Attributes:
        step: t; the state is s_t, so 0 is the initial state and T the final one.
        tensors: every tensor of the state by a slash-separated name. The store gives them back as
            it got them and knows nothing of their meaning.
        meta: JSON values that belong to them.
    """

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)


class RecordedSteps(Protocol):
    """Consecutive steps of a run and some of its states: what an analysis reads.

    A `Trajectory` is one, and so is a part of a run that is still going on.
    """

    @property
    def directory(self) -> Path:
        """Where they are, for messages."""
        ...

    @property
    def header(self) -> Mapping[str, Any]:
        """Facts of the run, as in a trajectory's manifest."""
        ...

    @property
    def status(self) -> str:
        """How the recording ended, as in a trajectory's manifest."""
        ...

    def __len__(self) -> int: ...

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps before which the full state is known, in order."""
        ...

    def step(self, t: int, /) -> Step:
        """Give step ``t``, counted from 0."""
        ...

    def steps(self) -> Iterator[Step]:
        """Give all steps in order."""
        ...

    def checkpoint(self, step: int, /) -> Checkpoint:
        """Give the state before a step that is among ``checkpoint_steps``."""
        ...
