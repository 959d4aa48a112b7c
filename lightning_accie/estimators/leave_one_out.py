"""Exact leave-one-out replay: the truth that the estimators are measured against.

    s^{-j}_{t+1} = F_t(s^{-j}_t, 1 - e_j);     influence_j = q(θ^{-j}_T) - q(θ_T)

The denominators, the batches, the random states and the batch statistics stay those of the recorded
run (method: section 2). Many samples are replayed at once, vectorised; one row of each chunk leaves
out nothing, so that q(θ_T) is rounded in the same way, and shows how large the rounding is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.estimators.base import (
    Candidates,
    Estimate,
    Estimator,
    Interrupted,
    Replay,
    candidates_to_json,
    check_candidates,
    sorted_samples,
)
from lightning_accie.estimators.chunks import choose, chunks
from lightning_accie.replay.state import stack
from lightning_accie.replay.walker import Visit

_NOTHING = torch.tensor([-1])
_COPIES = 8


class LeaveOneOut(Estimator):
    """Exact influence by replaying the run without each sample.

    Args:
        candidates: None for every sample, a count (the strongest by SGD-IE), or sample numbers.

    Raises:
        ValueError: if ``candidates`` is none of these.
    """

    name = "leave-one-out"

    def __init__(self, candidates: Candidates = None) -> None:
        self.candidates = check_candidates(candidates)

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return {"candidates": candidates_to_json(self.candidates)}

    def estimate(self, replay: Replay) -> Estimate:
        """Replay the run once without each candidate.

        Args:
            replay: the run and the query.

        Returns:
            Exact influences; ``noise`` is their rounding error.

        Raises:
            Interrupted: at Ctrl-C, with the chunks that were finished.
        """
        samples = choose(replay, self.candidates)
        influence = torch.full((replay.span,), float("nan"), dtype=torch.float64)
        parts = list(chunks(replay, samples, copies=_COPIES))
        recorded = replay.query.value(replay.final.state.visible)
        kept: list[Tensor] = []
        total = len(parts) * len(replay.walker)
        done: list[Tensor] = []

        def found(samples: Tensor) -> Estimate:
            values = influence[samples]
            noise = _noise(replay, recorded, kept)
            return Estimate(self.name, samples, values, values.isfinite(), noise=noise)

        with replay.progress.task(f"exact replay of {len(samples)} samples", total) as advance:
            for part in parts:
                try:
                    values = self._replay(replay, part, advance)
                except KeyboardInterrupt:
                    raise Interrupted(found(sorted_samples(done))) from None
                influence[part] = values[:-1] - values[-1]
                kept.append(values[-1])
                done.append(part)
        return found(samples)

    def probe(self, visit: Visit) -> None:
        """Replay one step without a sample."""
        removed = visit.map.samples[:1]
        if len(removed):
            replace(visit.map, vectorize=False).advance_many(stack(visit.state, 1), removed)

    def _replay(self, replay: Replay, samples: Tensor, advance: Any) -> Tensor:
        """q(θ^{-j}_T) for one chunk, and q(θ_T) in its last row."""
        removed = torch.cat([samples, _NOTHING])
        begin = int(replay.first[replay.positions(samples)].min())
        states = None
        for visit in replay.walker.forwards():
            if visit.step >= begin:
                if states is None:
                    states = stack(visit.state, len(removed))
                states = visit.map.advance_many(states, removed)
            advance(1)
        assert states is not None
        return replay.query.values(states.visible)


def _noise(replay: Replay, recorded: float, kept: list[Tensor]) -> float:
    """The rounding error of an exact influence.

    Args:
        replay: the run.
        recorded: q(θ_T) of the recorded run.
        kept: q(θ_T) of the rows that left out nothing, one a chunk.

    Returns:
        How far those are off, and at least one rounding of q itself.
    """
    program = replay.walker.program
    parameter = next(iter(program.parameters.values()))
    least = torch.finfo(parameter.dtype).eps * abs(recorded)
    again = [float(value) for value in kept]
    # In another precision than training's the rows follow another run, equally far from it all.
    base = recorded if program.analysis == program.recorded else next(iter(again), recorded)
    off = max((abs(value - base) for value in again), default=0.0)
    if off == 0.0 and program.analysis.eps is not None:
        # Rows one by one repeat the record to the bit, and show nothing: a value is rounded to its
        # 16 bits by up to half a spacing, on average by 1/√12 of one.
        off = program.analysis.eps / 12**0.5 * abs(recorded)
    return max(least, off)
