"""Where the recorder's records go while `fit` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.checkpoints import is_candidate
from lightning_accie.trajectory.records import Checkpoint, Step
from lightning_accie.trajectory.writer import TrajectoryWriter


class FirstStepWatch:
    """Keeps the first step that has a loss between its two states, until the self-check has seen it.

    Args:
        header: of the run's trajectory.
        before: the state before the first step.
    """

    def __init__(self, header: dict[str, Any], before: Checkpoint) -> None:
        self.header = header
        self.before = before
        self.step: Step | None = None
        self.late = False
        """Whether a step before had no loss, so that this one is not handed over by itself."""

    def wait(self, before: Checkpoint) -> None:
        """Wait for the next step: this one had no loss, and nothing to check.

        Args:
            before: the state now.
        """
        self.before, self.step, self.late = before, None, True


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
        """Pass the next steps on; those that wait for the self-check come alone."""
        if self._first is not None and self._first.step is None and steps:
            self._first.step = steps[0]
        try:
            self._writer.extend(steps)
        except TrajectoryError as error:
            self._stop(error)

    def checked(self) -> None:
        """The self-check has seen its step: keep no state for it."""
        self._first = None

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
