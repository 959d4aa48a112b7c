"""Consecutive steps of a run that is still going on, in memory between their two states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_accie.trajectory.records import Checkpoint, Step


class Stretch:
    """A `RecordedSteps` in memory.

    Args:
        header: as of the run's trajectory.
        steps: the steps, numbered here from 0.
        before: the state before the first one.
        after: the state after the last one.
        name: what messages call it.
    """

    def __init__(
        self,
        header: Mapping[str, Any],
        steps: Sequence[Step],
        before: Checkpoint,
        after: Checkpoint,
        name: str,
    ) -> None:
        self.status = "running"
        self.directory = Path(f"({name})")
        self.header = {**header, "resumed": []}  # of this stretch nothing was resumed
        self._steps = [replace(step, number=number) for number, step in enumerate(steps)]
        self._checkpoints = {0: before, len(steps): after}
        self.checkpoint_steps = tuple(self._checkpoints)

    def __len__(self) -> int:
        return len(self._steps)

    def step(self, number: int) -> Step:
        """Give a step.

        Returns:
            The step.
        """
        return self._steps[number]

    def steps(self) -> Iterator[Step]:
        """Give all steps in order.

        Returns:
            An iterator.
        """
        return iter(self._steps)

    def checkpoint(self, step: int) -> Checkpoint:
        """Give the state before the first step, or after the last one.

        Returns:
            The checkpoint.
        """
        return self._checkpoints[step]


class Window:
    """Gathers the steps since it was last cut; passes them on to where the recorder's records go.

    Args:
        header: as of the run's trajectory.
        before: the state before the first step.
        sink: where records go besides.
    """

    def __init__(self, header: Mapping[str, Any], before: Checkpoint, sink: Any) -> None:
        self._header = header
        self._before = before
        self._sink = sink
        self._steps: list[Step] = []
        self._stopped = False

    def __len__(self) -> int:
        return len(self._steps)

    def stop(self) -> None:
        """Gather no more; records are still passed on."""
        self._steps, self._stopped = [], True

    def extend(self, steps: Sequence[Step]) -> None:
        """Take the next steps."""
        if not self._stopped:
            self._steps += steps
        self._sink.extend(steps)

    def wants_checkpoint(self, step: int) -> bool:
        """Ask where records go."""
        return bool(self._sink.wants_checkpoint(step))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Pass a state on."""
        self._sink.checkpoint(checkpoint)

    def cut(self, after: Checkpoint) -> Stretch:
        """Give the steps gathered so far, and begin anew behind them.

        Args:
            after: a copy of the state now.

        Returns:
            The steps, between the states that they start from and lead to.
        """
        steps, before = self._steps, self._before
        self._steps, self._before = [], after
        name = f"steps {steps[0].number + 1} to {steps[-1].number + 1}"
        return Stretch(self._header, steps, before, after, name)
