"""Exact leave-one-out replay: the truth that the estimators are measured against.

    s^{-j}_{t+1} = F_t(s^{-j}_t, 1 - e_j);     influence_j = q(θ^{-j}_T) - q(θ_T)

The denominators, the batches, the random states and the batch statistics stay those of the recorded
run (method: section 2). Many samples are replayed at once, vectorised; one row of each chunk leaves
out nothing, so that q(θ_T) is rounded in the same way, and shows how large the rounding is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_accie.estimators.base import (
    Advance,
    Candidates,
    Estimate,
    Estimator,
    Replay,
    candidates_to_json,
    check_candidates,
)
from lightning_accie.estimators.chunks import choose, in_chunks
from lightning_accie.replay.state import stack
from lightning_accie.replay.walker import Visit

_NOTHING = torch.tensor([-1])
_NONE = torch.zeros(0, dtype=torch.float64)
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
        recorded = replay.query.value(replay.final.state.visible)

        def found(samples: Tensor, figures: dict[str, Tensor]) -> Estimate:
            without, everything = figures.get("without", _NONE), figures.get("everything", _NONE)
            influence = without - everything
            noise = _noise(replay, recorded, everything)
            return Estimate(self.name, samples, influence, influence.isfinite(), noise=noise)

        samples = choose(replay, self.candidates)
        return in_chunks(
            replay,
            samples,
            partial(self._replay, replay),
            found,
            key=self.key,
            copies=_COPIES,
            title=f"exact replay of {len(samples)} samples",
        )

    def probe(self, visit: Visit) -> None:
        """Replay one step without a sample."""
        removed = visit.map.samples[:1]
        if len(removed):
            replace(visit.map, vectorize=False).advance_many(stack(visit.state, 1), removed)

    def _replay(self, replay: Replay, samples: Tensor, advance: Advance) -> dict[str, Tensor]:
        """q(θ^{-j}_T) of one chunk, and q(θ_T) as that chunk's last row has it."""
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
        values = replay.query.values(states.visible)
        return {"without": values[:-1], "everything": values[-1].expand(len(samples))}


def _noise(replay: Replay, recorded: float, everything: Tensor) -> float:
    """The rounding error of an exact influence.

    Args:
        replay: the run.
        recorded: q(θ_T) of the recorded run.
        everything: ``[k]`` q(θ_T) of the rows that left out nothing, for each sample its chunk's.

    Returns:
        How far those are off, and at least one rounding of q itself.
    """
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
