"""Where the recorder's records go while `fit` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.checkpoints import is_candidate
from lightning_accie.trajectory.records import Checkpoint, Step
from lightning_accie.trajectory.writer import TrajectoryWriter


class FirstStepWatch:
    """Keeps the first step between its two states, until the self-check has seen it."""

    def __init__(self, header: dict[str, Any], before: Checkpoint) -> None:
        self.header = header
        self.before = before
        self.step: Step | None = None


class GuardedSink:
    """Passes records on to the writer; a disk that fails stops the recording, not the training.

    Args:
        writer: the trajectory's writer.
        first: gets the first step too.
        stop: what to call with the writer's error.
    """

    def __init__(
        self,
        writer: TrajectoryWriter,
        first: FirstStepWatch,
        stop: Callable[[TrajectoryError], None],
    ) -> None:
        self._writer = writer
        self._first: FirstStepWatch | None = first
        self._stop = stop

    def extend(self, steps: Sequence[Step]) -> None:
        """Pass the next steps on; the first one comes alone."""
        if self._first is not None:
            self._first.step, self._first = steps[0], None
        try:
            self._writer.extend(steps)
        except TrajectoryError as error:
            self._stop(error)

    def wants_checkpoint(self, step: int) -> bool:
        """Tell whether the schedule keeps the state before ``step``."""
        return self._writer.wants_checkpoint(step)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Pass a state on."""
        try:
            self._writer.checkpoint(checkpoint)
        except TrajectoryError as error:
            self._stop(error)


class FurtherRankSink(GuardedSink):
    """The same on a rank that keeps no checkpoints: those of rank 0 are its own as well.

    All but the generators' states, which each rank has for itself. Where rank 0 may keep a
    checkpoint the recorder is made to forget the states that it knows to be recorded, so that a
    replay from there finds the next one in the log.

    Args:
        writer: the rank's writer.
        first: gets the first step too.
        stop: what to call with the writer's error.
        forget: what to call where a checkpoint may be.
    """

    def __init__(
        self,
        writer: TrajectoryWriter,
        first: FirstStepWatch,
        stop: Callable[[TrajectoryError], None],
        forget: Callable[[], None],
    ) -> None:
        super().__init__(writer, first, stop)
        self._forget = forget

    def wants_checkpoint(self, step: int) -> bool:
        """Tell whether rank 0 may keep the state before ``step``."""
        return is_candidate(step)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Forget the generators' states instead."""
        self._forget()
