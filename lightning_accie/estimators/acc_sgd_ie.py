"""ACC-SGD-IE (Shi, Yang, Su, Zhang, Xu, arXiv 2510.26185), for any optimiser.

    Δ_0 = 0;     Δ_{t+1} = [F_t(s_t, 1 - e_j) - F_t(s_t, 1)] + ∂_s F_t(s_t, 1 - e_j) Δ_t

For plain SGD this is the paper's recursion, Δ <- (I - ηH)Δ + 1[j ∈ S_t] (η/|m|)(g_j + H_j Δ): the
effect of leaving j out is carried along the whole run, and corrected by j's own Hessian each time it
comes round again. The paper's ways to make it cheaper are in `layers`, `part` and `thinning`.

| symbol | name |
|---|---|
| Δ_j | a row of ``tangents`` |
| q(θ_T + Δ_j) - q(θ_T) | ``query="evaluated"`` |
| ⟨∇q(θ_T), Δ_j⟩ | ``query="linear"``, the paper's figure |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.base import Advance, Candidates, Estimate, Replay
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.estimators.layers import (
    Layers,
    check_layers,
    followed,
    layers_to_json,
    with_names,
)
from lightning_accie.estimators.thinning import Span, Thinning
from lightning_accie.replay.part import part_of
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
        layers: whose change is followed: globs of module or parameter names, or a predicate on a
            parameter's name; the other parameters stay those of the recorded run. None for all.
        every_k_steps: the curvature H_t of one step stands for that of so many: the others cost a
            plain training step and the gradients of the samples that they drew. Stable while
            k η λ_max(H) < 2.
        correction_probability: ρ. At each visit H_jΔ_j is applied with this probability, divided by
            it: the same in the mean.
        correction_steps: a range of steps, or (first, one after the last), where H_jΔ_j is applied;
            elsewhere the step is that of SGD-IE.
        correction_epochs: the same in epochs.
        seed: of the choice at random.

    Raises:
        ValueError: if an argument is none of these.
    """

    name = "acc-sgd-ie"
    copies = 12
    graphs = 7
    title = "ACC-SGD-IE of {} samples"

    def __init__(
        self,
        candidates: Candidates = None,
        query: str = "evaluated",
        *,
        layers: Layers = None,
        every_k_steps: int = 1,
        correction_probability: float = 1.0,
        correction_steps: Span = None,
        correction_epochs: Span = None,
        seed: int = 0,
    ) -> None:
        if query not in ("evaluated", "linear"):
            raise ValueError(f'`query` must be "evaluated" or "linear", got {query!r}.')
        super().__init__(candidates)
        self.query = query
        self.layers = check_layers(layers)
        self.thinning = Thinning.of(
            every_k_steps, correction_probability, correction_steps, correction_epochs, seed
        )

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        found = {**super().settings(), "query": self.query, **self.thinning.to_json()}
        return {**found, **layers_to_json(self.layers)}

    def estimate(self, replay: Replay) -> Estimate:
        """Estimate the influence of the candidates.

        Args:
            replay: the run and the query.

        Returns:
            See `found`.
        """
        explicit = with_names(self, replay.trainable)
        return super().estimate(replay) if explicit is self else explicit.estimate(replay)

    def found(self, replay: Replay, samples: Tensor, figures: Mapping[str, Tensor]) -> Estimate:
        """Choose the form of the query.

        Args:
            replay: the run and the query.
            samples: ``[k]`` sample numbers.
            figures: what `measure` found.

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

    def carried(self, replay: Replay) -> State:
        """What is carried along the run for one sample.

        Args:
            replay: the run.

        Returns:
            The parameters that ``layers=`` names, with what the optimiser keeps for them.
        """
        return replay.final.state.only(followed(self.layers, replay.trainable))

    def probe(self, visit: Visit) -> None:
        """Carry one tangent along one step.

        Args:
            visit: the step.

        Raises:
            UnsupportedError: if ``layers=`` names no parameter, or ``every_k_steps=`` meets running
                statistics.
        """
        part = self._part(visit, followed(self.layers, visit.trainable))
        removed = visit.map.samples[:1]
        if not len(removed):
            return
        still = zeros_like(part.state, batch=1)
        try:
            replace(part.map, tangents="one-by-one").push(part.state, still, removed)
        except (RuntimeError, NotImplementedError):  # no forward mode
            replace(part.map, tangents="double-backward").push(part.state, still, removed)

    def _part(self, visit: Visit, names: Collection[str] | None) -> Visit:
        """The step of the parameters that are followed."""
        if self.thinning.every_k_steps > 1 and visit.state.statistics:
            raise UnsupportedError(
                "AccSgdIE with `every_k_steps` above 1 does not carry the running statistics of "
                f"normalisation layers ({next(iter(visit.state.statistics))}, …), which change at "
                "every step. Leave `every_k_steps` at 1."
            )
        return part_of(visit, names)

    def carry(self, replay: Replay, removed: Tensor, first: Tensor, advance: Advance) -> State:
        """Carry Δ_j along the run for every sample, or set of samples, of a chunk.

        Args:
            replay: the run.
            removed: ``[c]`` sample numbers, or ``[c, n]`` bool, by the step that first draws of it.
            first: ``[c]`` that step.
            advance: called with 1 at each step.

        Returns:
            Δ_j at the end of the run, ``[c, …]``.
        """
        names, total = followed(self.layers, replay.trainable), len(replay.walker)
        tangents: State | None = None
        for visit in replay.walker.forwards():
            begun = int((first <= visit.step).sum())  # Δ_j = 0 before j's first visit
            if begun:
                part, drawn = self._part(visit, names), removed[:begun]
                tangents = _grown(tangents, part.state, begun)
                tangents = part.map.push(
                    part.state,
                    tangents,
                    drawn,
                    curvature=self.thinning.curvature(visit.step, total),
                    own=self.thinning.own(visit, drawn),
                )
            advance(1)
        assert tangents is not None
        return tangents

    def measure(self, replay: Replay, carried: State) -> dict[str, Tensor]:
        """Measure q by its slope, and where it is to be evaluated at θ_T + Δ_j.

        Args:
            replay: the run and the query.
            carried: Δ_j.

        Returns:
            The influences and ``"relative_change"``.
        """
        params, at = replay.final.state.params, replay.final.state.visible
        gradient, along = replay.query.gradient(at), carried.visible
        scale = float(dot(params, params).sqrt())
        figures = {
            "linear": dot(along, {name: gradient[name] for name in along}).cpu(),
            "relative_change": (_norms(carried) / max(scale, 1e-30)).cpu(),
        }
        if self.query == "evaluated":
            moved = {name: at[name] + value for name, value in along.items()}
            rest = {name: value for name, value in at.items() if name not in moved}
            figures["evaluated"] = replay.query.values(moved, rest).cpu() - replay.query.value(at)
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
