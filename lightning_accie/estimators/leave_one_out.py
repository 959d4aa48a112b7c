"""Exact leave-one-out replay: the truth that the estimators are measured against.

    s^{-j}_{t+1} = F_t(s^{-j}_t, 1 - e_j);     influence_j = q(θ^{-j}_T) - q(θ_T)

The denominators, the batches, the random states and the batch statistics stay those of the recorded
run (method: section 2). Many samples are replayed at once, vectorised; one row of each chunk leaves
out nothing, so that q(θ_T) is rounded in the same way, and shows how large the rounding is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_accie.estimators.base import Advance, Estimate, Replay
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.replay.state import State, stack
from lightning_accie.replay.walker import Visit

_NOTHING = torch.tensor([-1])


class LeaveOneOut(ChunkedEstimator):
    """Exact influence by replaying the run without each sample.

    Args:
        candidates: None for every sample, a count (the strongest by SGD-IE), or sample numbers.

    Raises:
        ValueError: if ``candidates`` is none of these.
    """

    name = "leave-one-out"
    copies = 8
    graphs = 4
    beside = 1
    title = "exact replay of {} samples"

    def found(self, replay: Replay, samples: Tensor, figures: Mapping[str, Tensor]) -> Estimate:
        """Subtract q of the whole run.

        Args:
            replay: the run and the query.
            samples: ``[k]`` sample numbers.
            figures: what `measure` found.

        Returns:
            Exact influences; ``noise`` is their rounding error.
        """
        nothing = torch.zeros(0, dtype=torch.float64)
        everything = figures.get("everything", nothing)
        influence = figures.get("without", nothing) - everything
        noise = _noise(replay, everything)
        return Estimate(self.name, samples, influence, influence.isfinite(), noise=noise)

    def probe(self, visit: Visit) -> None:
        """Replay one step without a sample."""
        removed = visit.map.samples[:1]
        if len(removed):
            replace(visit.map, vectorize=False).advance_many(stack(visit.state, 1), removed)

    def carry(self, replay: Replay, removed: Tensor, first: Tensor, advance: Advance) -> State:
        """Replay the run once without each sample, or set of samples, of a chunk.

        Args:
            replay: the run.
            removed: ``[c]`` sample numbers, or ``[c, n]`` bool.
            first: ``[c]`` the step that first draws of it.
            advance: called with 1 at each step.

        Returns:
            The c states after the run, and one more of the run that leaves out nothing.
        """
        nothing = torch.zeros_like(removed[:1]) if removed.dim() > 1 else _NOTHING
        removed = torch.cat([removed, nothing])
        begin = int(first.min())
        states = None
        for visit in replay.walker.forwards():
            if visit.step >= begin:
                if states is None:
                    states = stack(visit.state, len(removed))
                states = visit.map.advance_many(states, removed)
            advance(1)
        assert states is not None
        return states

    def measure(self, replay: Replay, carried: State) -> dict[str, Tensor]:
        """Evaluate the query.

        Args:
            replay: the query.
            carried: what `carry` gave.

        Returns:
            ``"without"``, q(θ^{-j}_T), and ``"everything"``, q(θ_T) as the row that leaves out nothing
            has it.
        """
        values = replay.query.values(carried.visible)
        return {"without": values[:-1], "everything": values[-1].expand(len(values) - 1)}


def _noise(replay: Replay, everything: Tensor) -> float:
    """The rounding error of an exact influence.

    Args:
        replay: the run.
        everything: ``[k]`` q(θ_T) of the rows that left out nothing, for each sample its chunk's.

    Returns:
        How far those are off, and at least one rounding of q itself.
    """
    recorded = replay.query.value(replay.final.state.visible)
    program = replay.walker.program
    parameter = next(iter(program.parameters.values()))
    least = torch.finfo(parameter.dtype).eps * abs(recorded)
    again = everything.tolist()
    # In another precision than training's the rows follow another run, equally far from it all.
    base = recorded if program.analysis == program.recorded else next(iter(again), recorded)
    off = max((abs(value - base) for value in again), default=0.0)
    if off == 0.0 and program.analysis.eps is not None:
        # Rows one by one repeat the record to the bit, and show nothing: a value is rounded to its
        # 16 bits by up to half a spacing, on average by 1/√12 of one.
        off = program.analysis.eps / 12**0.5 * abs(recorded)
    return max(least, off)
