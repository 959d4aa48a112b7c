"""Data value embeddings, DVEmb (Wang et al. 2024, arXiv 2412.09538), in a projection of the gradients.

For SGD whose steps average over |m| samples, the paper's embedding of a visit

    DVEmb_t(i) = (η_t/|m|) Π_{s>t} (I - η_s H_s) g_i,      H_s ≈ Σ g gᵀ over the step's samples,

is found for all visits by one backward pass: with P_t = Π_{s≥t} (I - η_s H_s), of which the paper keeps
M = I - P,

    P_T = I;   DVEmb_t(i) = (η_t/|m|) P_{t+1} g_i;   P_t = P_{t+1} (I - η_t H_t).

A sample's embedding E_i is the sum over its visits. Everything is in the coordinates of a projection
R, and SGD's momentum, weight decay and the like act on these as on parameters: the rows of P are
cotangents λ of k queries, one for each coordinate, which go back as in SGD-IE.

| symbol | name |
|---|---|
| R | ``projection`` |
| P, a row for each of k queries | ``cotangent``, ``[k, size of the parameter]`` each |
| -η_t P_{t+1}, for any SGD | ``mu``, ``[k, k]`` |
| E | ``Embeddings.values``, ``[n, k]`` |
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.base import Estimate, Estimator, Replay
from lightning_accie.estimators.embeddings import Embeddings
from lightning_accie.estimators.layers import (
    Layers,
    check_layers,
    followed,
    layers_to_json,
    with_names,
)
from lightning_accie.estimators.projected import CURVATURES, ProjectedGradients
from lightning_accie.estimators.projection import Projection
from lightning_accie.estimators.sgd_ie import no_larger_than_the_run
from lightning_accie.replay.state import State
from lightning_accie.replay.update import Update
from lightning_accie.replay.update_rules import SGD, optimizer_of, shortcut
from lightning_accie.replay.walker import Visit

_PROBE_BYTES = 2**30
_MATRICES = 8
"""How many matrices of k² numbers a step of the walk holds."""


class EmbeddingEstimator(Estimator):
    """Base of the estimators that embed every sample, whatever the query.

    For runs of SGD (momentum, Nesterov, dampening, weight decay, schedules, parameter groups,
    accumulation) without gradient clipping.

    Args:
        dimension: how many coordinates each parameter keeps of its gradients at most; those that
            have no more entries are kept whole. None keeps all of all.
        curvature: ``"fisher"``, Gauss-Newton in the outputs of the network, for losses such as
            ``F.cross_entropy`` of these; or the paper's ``"empirical"``, Σ g gᵀ of the samples'
            gradients, for any loss that is a mean of the samples' own. See `estimators.projected`.
        layers: whose change is followed: globs of module or parameter names, or a predicate on a
            parameter's name; None for all.
        seed: of the projection.

    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(
        self,
        dimension: int | None = 256,
        curvature: str = "fisher",
        layers: Layers = None,
        seed: int = 0,
    ) -> None:
        if dimension is not None and (type(dimension) is not int or dimension < 1):
            raise ValueError(f"`dimension` must be None or an integer from 1, got {dimension!r}.")
        if curvature not in CURVATURES:
            known = " or ".join(map(repr, CURVATURES))
            raise ValueError(f"`curvature` must be {known}, got {curvature!r}.")
        if type(seed) is not int:
            raise ValueError(f"`seed` must be an integer, got {seed!r}.")
        self.dimension = dimension
        self.curvature = curvature
        self.layers = check_layers(layers)
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return {
            "dimension": self.dimension,
            "curvature": self.curvature,
            "seed": self.seed,
            **layers_to_json(self.layers),
        }

    def estimate(self, replay: Replay) -> Estimate:
        """Embed every sample, and ask the query.

        Ctrl-C ends it without a result, as none is known before the end.

        Args:
            replay: the run and the query.

        Returns:
            The influence of every sample that the run drew. ``trusted`` is False where it is not
            finite or larger than what the whole run did to the query.
        """
        gradient = replay.query.gradient(replay.final.state.visible)
        influence = self.embed(replay).influence_on(gradient)
        trusted = influence.isfinite() & no_larger_than_the_run(replay, influence)
        return Estimate(self.name, replay.samples, influence, trusted)

    def embed(self, replay: Replay) -> Embeddings:
        """Embed every sample; the query does not matter.

        Args:
            replay: the run.

        Returns:
            The embeddings of the samples that the run drew.

        Raises:
            UnsupportedError: if the run is none that these embeddings are derived for, or they do
                not fit the memory budget, before any work is done.
        """
        explicit = with_names(self, replay.trainable)
        if explicit is not self:
            return explicit.embed(replay)
        first = replay.walker.first_loss()
        names = followed(self.layers, replay.trainable) or replay.trainable
        params = replay.final.state.params
        projection = Projection.drawn(names, params, self.dimension, self.seed)
        values = params[names[0]].new_zeros(0)
        need = self._numbers(len(replay.samples), projection.size, replay) * values.element_size()
        if need > replay.memory_budget:
            raise UnsupportedError(
                f"The embeddings of {len(replay.samples)} samples in {projection.size} coordinates, "
                f"and what their walk holds, take {need / 1e6:.0f} MB, and `memory_budget` leaves "
                f"{replay.memory_budget / 1e6:.0f} MB for them. Raise `memory_budget=`, or take a "
                "smaller `dimension=` or fewer `layers=`."
            )
        rest = max(1, (replay.memory_budget - need) // 2)  # half for a step, half for the walk
        replay = replace(replay, walker=replay.walker.within(rest))
        gradients = ProjectedGradients(projection, self.curvature, rest)
        _check(first)
        gradients(first)
        return self._walk(replay, projection, gradients)

    @abstractmethod
    def _walk(
        self, replay: Replay, projection: Projection, gradients: ProjectedGradients
    ) -> Embeddings:
        """Walk over the run."""

    @abstractmethod
    def _numbers(self, samples: int, size: int, replay: Replay) -> int:
        """How many numbers the walk holds, but for those of a step."""

    def probe(self, visit: Visit) -> None:
        """Compute one step's gradients and curvature."""
        _check(visit)
        names = followed(self.layers, visit.trainable) or visit.trainable
        projection = Projection.drawn(names, visit.state.params, self.dimension, self.seed)
        if visit.map.losses:
            ProjectedGradients(projection, self.curvature, _PROBE_BYTES)(visit)


class DataValueEmbedding(EmbeddingEstimator):
    """DVEmb of every sample, from one backward walk over the run.

    Its price does not depend on the number of samples, and later queries cost one product with the
    embeddings (`InfluenceEngine.embed` keeps them). Like SGD-IE it is blind to what a sample's own
    curvature does when it comes round again; `AccDataValueEmbedding` is not.

    Wang et al. 2024, arXiv 2412.09538, section 4; ``curvature="empirical"`` is the paper's.

    Args:
        dimension: how many coordinates each parameter keeps of its gradients at most; those that
            have no more entries are kept whole. None keeps all of all.
        curvature: ``"fisher"``, Gauss-Newton in the outputs of the network, for losses such as
            ``F.cross_entropy`` of these; or the paper's ``"empirical"``, Σ g gᵀ of the samples'
            gradients, for any loss that is a mean of the samples' own.
        layers: whose change is followed: globs of module or parameter names, or a predicate on a
            parameter's name; None for all.
        seed: of the projection.

    Raises:
        ValueError: if an argument is none of these.
    """

    name = "dvemb"

    def _walk(
        self, replay: Replay, projection: Projection, gradients: ProjectedGradients
    ) -> Embeddings:
        final = replay.final.state
        like = final.params[projection.names[0]]
        size = projection.size
        found = like.new_zeros(len(replay.samples), size)
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        cotangent = _still(projection.split(eye), final)
        walker = replay.walker.without_tapes()
        with replay.progress.task("DVEmb: every sample", len(walker)) as advance:
            for visit in walker.backwards():
                update, used = visit.map.update, visit.map.used
                mine = {n: p for n, p in cotangent.params.items() if n in used}
                cotangent, mu = update.vjp(visit.state, mine, cotangent)
                if visit.map.losses and mine:
                    step = gradients(visit)
                    rows = projection.joined(mu, eye)
                    places = replay.positions(step.samples).to(found.device)
                    found.index_add_(0, places, -(step.slopes @ rows.T))
                    bent = projection.split(step.curved(rows))
                    for name in mu:
                        cotangent.params[name] = cotangent.params[name] + bent[name]
                advance(1)
        return Embeddings(replay.samples, found, projection)

    def _numbers(self, samples: int, size: int, replay: Replay) -> int:
        slots = slots_of(replay.final.state)
        return samples * size + (_MATRICES + slots) * size * size


def _still(params: dict[str, Tensor], like: State) -> State:
    """A state of these parameters whose slots are 0, as ``like`` has them."""
    slots = {
        name: {slot: torch.zeros_like(value) for slot in like.slots.get(name, {})}
        for name, value in params.items()
    }
    return State(params, slots)


def slots_of(state: State) -> int:
    """Count the tensors that the optimiser keeps for a parameter.

    Args:
        state: a state of the run.

    Returns:
        The most of all parameters.
    """
    return max((len(slots) for slots in state.slots.values()), default=0)


def _check(visit: Visit) -> None:
    """Refuse a run that the embeddings are not derived for."""
    update: Update = visit.map.update
    instead = (
        'Use `estimator="sgd-ie"`, which goes with every optimiser, or `AccSgdIE(candidates=...)`.'
    )
    linear = isinstance(update.rule, SGD) and all(
        shortcut(update.rule, name) for name in ("vjp", "homogeneous")
    )
    if not linear:
        raise UnsupportedError(
            "Data value embeddings are derived for `SGD` (with momentum, Nesterov, dampening, weight "
            "decay), whose steps act on projected gradients as on parameters. This run's optimiser is "
            f"`{optimizer_of(update.rule)}`, whose steps do not. {instead}"
        )
    if update.clip is not None:
        raise UnsupportedError(
            "Data value embeddings are not derived for gradient clipping "
            f'(`gradient_clip_algorithm="{update.clip.algorithm}"`), which this run has: a clipped '
            f"step is not linear in the samples' gradients. {instead}"
        )
    if visit.state.statistics:
        raise UnsupportedError(
            "Data value embeddings do not follow the running statistics of normalisation layers, "
            f"which the query reads. {instead}"
        )
