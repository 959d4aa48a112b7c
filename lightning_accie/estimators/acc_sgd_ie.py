"""ACC-SGD-IE (Shi, Yang, Su, Zhang, Xu, arXiv 2510.26185), for any optimiser.

    Δ_0 = 0;     Δ_{t+1} = [F_t(s_t, 1 - e_j) - F_t(s_t, 1)] + ∂_s F_t(s_t, 1 - e_j) Δ_t

For plain SGD this is the paper's recursion, Δ <- (I - ηH)Δ + 1[j ∈ S_t] (η/|m|)(g_j + H_j Δ): the
effect of leaving j out is carried along the whole run, and corrected by j's own Hessian each time it
comes round again.

| symbol | name |
|---|---|
| Δ_j | a row of ``tangents`` |
| q(θ_T + Δ_j) - q(θ_T) | ``query="evaluated"`` |
| ⟨∇q(θ_T), Δ_j⟩ | ``query="linear"``, the paper's figure |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.estimators.base import Advance, Candidates, Estimate, Replay
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.replay.state import State, dot, pad_slots, zeros_like
from lightning_accie.replay.walker import Visit

BLOW_UP = 0.5
"""‖Δ_j‖ beyond this share of ‖θ_T‖ is no small change any more: the estimate is not trusted."""


class AccSgdIE(ChunkedEstimator):
    """Accumulative SGD influence of chosen samples.

    Args:
        candidates: None for every sample, a count (the strongest by SGD-IE), or sample numbers.
        query: ``"evaluated"`` evaluates q at θ_T + Δ_j, which costs one forward pass a sample and
            removes most of the error in convex problems; ``"linear"`` is the paper's ⟨∇q, Δ_j⟩.

    Raises:
        ValueError: if an argument is neither.
    """

    name = "acc-sgd-ie"
    copies = 10
    title = "ACC-SGD-IE of {} samples"

    def __init__(self, candidates: Candidates = None, query: str = "evaluated") -> None:
        if query not in ("evaluated", "linear"):
            raise ValueError(f'`query` must be "evaluated" or "linear", got {query!r}.')
        super().__init__(candidates)
        self.query = query

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return {**super().settings(), "query": self.query}

    def found(self, replay: Replay, samples: Tensor, figures: Mapping[str, Tensor]) -> Estimate:
        """Choose the form of the query.

        Args:
            replay: the run and the query.
            samples: ``[k]`` sample numbers.
            figures: what `work` found.

        Returns:
            The influences; ``extras`` holds both forms of the query (``"evaluated"`` only where asked
            for) and ``"relative_change"`` = ‖Δ_j‖/‖θ_T‖. ``trusted`` is False where the latter exceeds
            `BLOW_UP` or a figure is not finite.
        """
        if not figures:
            nothing = torch.zeros(0, dtype=torch.float64)
            return Estimate(self.name, samples, nothing, nothing.bool())
        influence = figures[self.query]
        trusted = influence.isfinite() & (figures["relative_change"] <= BLOW_UP)
        return Estimate(self.name, samples, influence, trusted, extras=figures)

    def work(self, replay: Replay, samples: Tensor, advance: Advance) -> dict[str, Tensor]:
        """Carry Δ_j along the run for every sample of a chunk.

        Args:
            replay: the run and the query.
            samples: ``[c]`` sample numbers, by the step that first drew them.
            advance: called with 1 at each step.

        Returns:
            The influences and ``"relative_change"``.
        """
        return self._measure(replay, self._carry(replay, samples, advance))

    def probe(self, visit: Visit) -> None:
        """Carry one tangent along one step."""
        removed = visit.map.samples[:1]
        if not len(removed):
            return
        still = zeros_like(visit.state, batch=1)
        try:
            replace(visit.map, tangents="one-by-one").push(visit.state, still, removed)
        except (RuntimeError, NotImplementedError):  # no forward mode
            replace(visit.map, tangents="double-backward").push(visit.state, still, removed)

    def _carry(self, replay: Replay, samples: Tensor, advance: Advance) -> State:
        """Δ_j at the end of the run, ``[c, …]``, for one chunk (ordered by first visit)."""
        first = replay.first[replay.positions(samples)]
        tangents: State | None = None
        for visit in replay.walker.forwards():
            begun = int((first <= visit.step).sum())  # Δ_j = 0 before j's first visit
            if begun:
                tangents = _grown(tangents, visit.state, begun)
                tangents = visit.map.push(visit.state, tangents, samples[:begun])
            advance(1)
        assert tangents is not None
        return tangents

    def _measure(self, replay: Replay, tangents: State) -> dict[str, Tensor]:
        """The influences and the relative size of the change, ``[c]`` each."""
        params, at = replay.final.state.params, replay.final.state.visible
        gradient, along = replay.query.gradient(at), tangents.visible
        scale = float(dot(params, params).sqrt())
        figures = {
            "linear": dot(along, gradient).cpu(),
            "relative_change": (_norms(tangents) / max(scale, 1e-30)).cpu(),
        }
        if self.query == "evaluated":
            moved = {name: at[name] + value for name, value in along.items()}
            figures["evaluated"] = replay.query.values(moved).cpu() - replay.query.value(at)
        return figures


def _norms(tangents: State) -> Tensor:
    """‖Δ_j‖ over the parameters, ``[c]``."""
    values = tangents.params.values()
    rows = [value.reshape(len(value), -1).double().square().sum(1) for value in values]
    return torch.stack(rows).sum(0).sqrt()


def _grown(tangents: State | None, state: State, rows: int) -> State:
    """Add zero rows for samples drawn for the first time, and zero slots where the state has more."""
    have = 0 if tangents is None else len(next(iter(tangents.params.values())))
    if tangents is None:
        return zeros_like(state, batch=rows)
    tangents = pad_slots(tangents, state, batch=have)
    if have == rows:
        return tangents
    extra = zeros_like(state, batch=rows - have)
    params = {n: torch.cat([v, extra.params[n]]) for n, v in tangents.params.items()}
    slots = {
        n: {k: torch.cat([v, extra.slots[n][k]]) for k, v in group.items()}
        for n, group in tangents.slots.items()
    }
    statistics = {n: torch.cat([v, extra.statistics[n]]) for n, v in tangents.statistics.items()}
    return State(params, slots, statistics)
