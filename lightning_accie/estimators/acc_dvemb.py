"""Accumulative data value embeddings, ACC-DVEmb: arXiv 2510.26185 applied to arXiv 2412.09538.

What leaving sample i out has done to the parameters so far is carried forwards in R's coordinates, as
ACC-SGD-IE does, with H ≈ Σ g gᵀ (or Gauss-Newton) and the sample's own curvature as g_i g_iᵀ. That
makes the correction a scalar factor on each visit:

    Δ_i <- (I - η_t H_t) Δ_i + 1[i ∈ S_t] (η_t/|m|) (1 + ⟨∇ℓ_i, Δ_i⟩) ∇ℓ_i,      E_i = Δ_i at the end.

The first term concerns all n samples at every step. A step that does not draw i does to Δ_i what it
does to every other vector, so the walk goes in windows: the samples that a window draws are carried
step by step, beside the unit vectors, and where these arrive is the matrix that carries all others
over the window.

| symbol | name |
|---|---|
| Δ, with the optimiser's slots of it | ``moved``, ``[n, size of the parameter]`` each |
| the unit vectors | the last rows of ``carried`` |
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from lightning_accie.estimators.base import Advance, Replay
from lightning_accie.estimators.dvemb import EmbeddingEstimator, slots_of
from lightning_accie.estimators.embeddings import Embeddings
from lightning_accie.estimators.projected import ProjectedGradients
from lightning_accie.estimators.projection import Projection
from lightning_accie.replay.state import State, unflatten_like
from lightning_accie.replay.walker import Visit

_AT_ONCE = 4096
"""Samples that are carried over a window at a time."""


class AccDataValueEmbedding(EmbeddingEstimator):
    """DVEmb with ACC-SGD-IE's correction each time a sample comes round again.

    One walk forwards over the run; beside `DataValueEmbedding`'s price it takes products with the
    embeddings of all samples, once for every window of steps.

    Shi et al. 2025, arXiv 2510.26185, applied to Wang et al. 2024, arXiv 2412.09538. The sample's own
    curvature is the paper's ∇ℓ∇ℓᵀ with either ``curvature``.

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

    name = "acc-dvemb"

    def _walk(
        self, replay: Replay, projection: Projection, gradients: ProjectedGradients
    ) -> Embeddings:
        final = replay.final.state
        like = final.params[projection.names[0]]
        moved = _nothing(len(replay.samples), projection, like)
        walk = _Windows(replay, projection, gradients)
        with replay.progress.task("ACC-DVEmb: every sample", len(replay.walker)) as advance:
            for window in walk.windows():
                moved = walk.over(window, moved, advance)
        values = projection.joined(moved.params, like)
        return Embeddings(replay.samples, values, projection)

    def _numbers(self, samples: int, size: int, replay: Replay) -> int:
        width = size * (1 + slots_of(replay.final.state))
        return 3 * samples * width + 4 * width * width


class _Windows:
    """The walk, window by window."""

    def __init__(
        self, replay: Replay, projection: Projection, gradients: ProjectedGradients
    ) -> None:
        self._replay, self._projection, self._gradients = replay, projection, gradients
        self._visits = replay.walker.forwards()

    def windows(self) -> Iterator[tuple[range, Tensor | None]]:
        """Ranges of steps, with the positions of the samples that they draw; None for all samples."""
        replay = self._replay
        steps, count = len(replay.walker), len(replay.samples)
        width = self._projection.size * (1 + slots_of(replay.final.state))
        each = max(1, -(-int(replay.visits.sum()) // steps))
        length = max(1, isqrt(count * width) // each)
        if length * each + width >= count:  # all of them are no more than the rows of a window
            yield range(steps), None
            return
        for start in range(0, steps, length):
            window = range(start, min(start + length, steps))
            yield window, torch.unique(torch.cat([self._drawn(step) for step in window]))

    def _drawn(self, step: int) -> Tensor:
        walker = self._replay.walker
        numbers = walker.program.batches.sample_numbers
        micros = walker.trajectory.step(step).micro_batches
        found = [torch.from_numpy(numbers(micro)) for micro in micros]
        return (
            self._replay.positions(torch.cat(found)) if found else torch.zeros(0, dtype=torch.int64)
        )

    def over(self, window: tuple[range, Tensor | None], moved: State, advance: Advance) -> State:
        """Carry all samples over a window."""
        steps, drawn = window
        if drawn is None:
            return self._stepwise(steps, moved, None, advance)
        own = moved.map(lambda value: value[drawn.to(value.device)])
        units = _units(moved)
        both = [torch.cat(pair) for pair in zip(own.leaves(), units.leaves(), strict=True)]
        carried = self._stepwise(steps, unflatten_like(own, both), drawn, advance)
        matrix = carried.map(lambda value: value[len(drawn) :])
        after = _through(moved, matrix)
        for whole, part in zip(after.leaves(), carried.leaves(), strict=True):
            whole[drawn.to(whole.device)] = part[: len(drawn)]
        return after

    def _stepwise(self, steps: range, rows: State, drawn: Tensor | None, advance: Advance) -> State:
        for _ in steps:
            rows = self._step(next(self._visits), rows, drawn)
            advance(1)
        return rows

    def _step(self, visit: Visit, rows: State, drawn: Tensor | None) -> State:
        """Take one step with all rows; those of the samples that it draws are left out of it."""
        change: dict[str, Tensor] = {}
        if visit.map.losses and any(name in rows.params for name in visit.map.used):
            step = self._gradients(visit)
            spots = self._replay.positions(step.samples)
            spots = spots if drawn is None else torch.searchsorted(drawn, spots)
            spots = spots.to(step.slopes.device)
            along = self._projection.joined(rows.params, step.slopes)
            factor = 1.0 + (step.slopes * along[spots]).sum(1) / step.shares
            bent = step.curved(along).index_add_(0, spots, -factor[:, None] * step.slopes)
            change = {n: c for n, c in self._projection.split(bent).items() if n in visit.map.used}
        return visit.map.update(rows, change)


def _nothing(count: int, projection: Projection, like: Tensor) -> State:
    params = {name: like.new_zeros(count, size) for name, size in projection.sizes.items()}
    return State(params, {name: {} for name in params})


def _units(like: State) -> State:
    """A unit vector for each number that is carried for a sample."""
    sizes = [leaf.shape[1] for leaf in like.leaves()]
    first = like.leaves()[0]
    eye = torch.eye(sum(sizes), dtype=first.dtype, device=first.device)
    return unflatten_like(like, list(eye.split(sizes, 1)))


def _through(moved: State, matrix: State) -> State:
    """Every row of what is carried times the matrix."""
    leaves = moved.leaves()
    after = matrix.map(lambda value: value.new_empty(len(leaves[0]), value.shape[1]))
    for start in range(0, len(leaves[0]), _AT_ONCE):
        rows = torch.cat([leaf[start : start + _AT_ONCE] for leaf in leaves], 1)
        for whole, part in zip(after.leaves(), matrix.leaves(), strict=True):
            torch.matmul(rows, part, out=whole[start : start + _AT_ONCE])
    return after
