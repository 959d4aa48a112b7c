"""SGD-IE (Hara, Nitanda, Maehara 2019, arXiv 1906.08473), for any optimiser.

    λ_T = ∇q(θ_T);   (λ_t, γ_t) = vjp of F_t at (s_t, 1) applied to λ_{t+1};   influence_i = -Σ_t γ_t[i]

One backward walk ranks every sample: the result is -dq/dw_i, with w_i shared by all visits of i.

| symbol | name |
|---|---|
| λ_t | ``cotangent`` |
| γ_t | ``by_weight``, ``[N]`` over the places of the step's batch |
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.estimators.base import Estimate, Estimator, Replay
from lightning_accie.estimators.kept import Regularly
from lightning_accie.estimators.layers import (
    Layers,
    check_layers,
    followed,
    layers_to_json,
    with_names,
)
from lightning_accie.replay.part import part_of
from lightning_accie.replay.state import State, zeros_like
from lightning_accie.replay.step import StepMap
from lightning_accie.replay.walker import Visit, Walker

KEEP_EVERY = 60.0
"""Seconds after which the state of a walk is kept."""


@dataclass
class WalkBack:
    """How far a backward walk has come.

    Attributes:
        step: t.
        cotangent: λ_t.
        influence: ``[span]`` float64, -Σ γ over the steps from t on.
    """

    step: int
    cotangent: State
    influence: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Describe it, to be kept.

        Returns:
            Tensors by name.
        """
        return {
            "step": torch.tensor(self.step),
            "influence": self.influence.clone(),  # the walk goes on adding to it
            **{f"params/{name}": value for name, value in self.cotangent.params.items()},
            **{
                f"slots/{name}/{slot}": value
                for name, slots in self.cotangent.slots.items()
                for slot, value in slots.items()
            },
            **{f"statistics/{name}": value for name, value in self.cotangent.statistics.items()},
        }

    @classmethod
    def begun(cls, replay: Replay, names: Collection[str] | None = None) -> WalkBack:
        """Begin at the end of the run.

        Args:
            replay: the run and the query.
            names: the parameters to follow; None for all.

        Returns:
            The walk.
        """
        influence = torch.zeros(replay.span, dtype=torch.float64)
        return cls(len(replay.walker), at_the_end(replay, names), influence)

    @staticmethod
    def of(kept: Mapping[str, Tensor], like: State) -> WalkBack:
        """Read `tensors`.

        Args:
            kept: what it gave.
            like: a state of the run, whose order the cotangent is to have.

        Returns:
            The walk.
        """
        leaf = next(iter(like.params.values()))

        def read(name: str) -> Tensor:
            return kept[name].to(leaf.device)

        cotangent = State(
            {name: read(f"params/{name}") for name in like.params},
            {
                name: {s: read(f"slots/{name}/{s}") for s in slots if f"slots/{name}/{s}" in kept}
                for name, slots in like.slots.items()
            },
            {name: read(f"statistics/{name}") for name in like.statistics},
        )
        return WalkBack(int(kept["step"]), cotangent, kept["influence"].clone())


def at_the_end(replay: Replay, names: Collection[str] | None = None) -> State:
    """λ_T.

    Args:
        replay: the run and the query.
        names: the parameters to follow; None for all.

    Returns:
        ∇q by those parameters and running statistics, and 0 for what the optimiser keeps.
    """
    final = replay.final.state
    zero = zeros_like(final.only(names))
    found = replay.query.gradient(final.visible)
    gradient = {name: found.get(name, still) for name, still in zero.visible.items()}
    statistics = {name: gradient.pop(name) for name in final.statistics}
    return State(gradient, zero.slots, statistics)


def walker_of(replay: Replay) -> Walker:
    """The walker with the room that pulling λ back leaves.

    Args:
        replay: the run.

    Returns:
        The walker.
    """
    return replay.walker.within(replay.memory_budget - pull_bytes(replay))


def pull_bytes(replay: Replay) -> int:
    """What pulling λ back through a step takes: λ, μ, Hμ, their sum, and the graph of the gradient.

    Args:
        replay: the run.

    Returns:
        The bytes.
    """
    return 6 * replay.final.state.nbytes() + 2 * replay.walker.graph_bytes()


def no_larger_than_the_run(replay: Replay, influence: Tensor) -> Tensor:
    """Tell where one sample moves q no further than the whole run did, or than q is from 0.

    Args:
        replay: the run and the query.
        influence: ``[n]``.

    Returns:
        ``[n]`` bool.
    """
    end = replay.query.value(replay.final.state.visible)
    run = abs(replay.query.value(replay.walker.start().state.visible) - end)
    return influence.abs() <= max(abs(end), run if math.isfinite(run) else 0.0)


class SgdIE(Estimator):
    """First-order influence of every sample, from one backward walk over the run.

    Its price does not depend on the number of samples. It is blind to what the sample's own
    curvature does when it comes round again (`AccSgdIE` is not).

    Args:
        layers: whose change is followed: globs of module or parameter names, or a predicate on a
            parameter's name; the other parameters stay those of the recorded run. None for all.

    Raises:
        ValueError: if it is none of these.
    """

    name = "sgd-ie"
    curvature = True

    def __init__(self, layers: Layers = None) -> None:
        self.layers = check_layers(layers)

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return layers_to_json(self.layers)

    def estimate(self, replay: Replay) -> Estimate:
        """Estimate every drawn sample's influence.

        Args:
            replay: the run and the query.

        Returns:
            The influence of every sample that the run drew. ``trusted`` is False where it is not
            finite or larger than what the whole run did to the query, which is no small change any
            more.
        """
        explicit = with_names(self, replay.trainable)
        if explicit is not self:
            return explicit.estimate(replay)
        names = followed(self.layers, replay.trainable)
        walk = self._resumed(replay, names) or WalkBack.begun(replay, names)
        keep = Regularly(KEEP_EVERY)
        with replay.progress.task(self._description(), walk.step) as advance:
            for visit in walker_of(replay).backwards(before=walk.step):
                part = part_of(visit, names)
                walk.cotangent, by_weight = self.pull(part, walk.cotangent)
                walk.influence.index_add_(0, part.map.samples, -by_weight.double().cpu())
                walk.step = visit.step
                keep(lambda: replay.kept.replace(self.key, walk.tensors()))
                advance(1)
        replay.kept.replace(self.key, walk.tensors())
        values = walk.influence[replay.samples]
        trusted = values.isfinite()
        if self.curvature:  # without it sizes mean little
            trusted &= no_larger_than_the_run(replay, values)
        return Estimate(self.name, replay.samples, values, trusted)

    def least_bytes(self, replay: Replay) -> int:
        """What the walk back holds at the least.

        Args:
            replay: the run.

        Returns:
            The bytes, with what pulling λ back through a step takes.
        """
        return replay.walker.least_bytes() + pull_bytes(replay)

    def pull(self, visit: Visit, cotangent: State) -> tuple[State, Tensor]:
        """Pull λ_{t+1} back through one step.

        Args:
            visit: the step.
            cotangent: λ_{t+1}.

        Returns:
            λ_t and γ_t.
        """
        step = visit.map
        return (step.vjp if self.curvature else step.vjp_without_curvature)(visit.state, cotangent)

    def _resumed(self, replay: Replay, names: Collection[str] | None) -> WalkBack | None:
        """Where an earlier analysis was when it was killed."""
        like = replay.final.state.only(names)
        walks = [WalkBack.of(kept, like) for kept in replay.kept.parts(self.key)]
        return min(walks, key=lambda walk: walk.step, default=None)

    def probe(self, visit: Visit) -> None:
        """Pull a cotangent back through one step."""
        visit = part_of(visit, followed(self.layers, visit.trainable))
        still = {name: torch.zeros_like(visit.state.params[name]) for name in visit.map.used}
        cotangent = visit.map.update(visit.state, still).map(torch.ones_like)
        if self.curvature:
            pull, other = StepMap.vjp, replace(visit.map, product="reverse-over-forward")
        else:
            pull, other = (
                StepMap.vjp_without_curvature,
                replace(visit.map, tangents="double-backward"),
            )
        try:
            pull(visit.map, visit.state, cotangent)
        except (RuntimeError, NotImplementedError):  # an operator may lack one of the derivatives
            pull(other, visit.state, cotangent)

    def _description(self) -> str:
        return "SGD-IE: every sample"
