"""What a step's own samples add to the recursion in V's coordinates, by Hessians or by Gauss-Newton.

For the samples j that step t draws, with g_j and H_j carrying their share 1/|m| of the step's loss,

    Vᵀg_j,   VᵀH_jVc_j,   ⟨μ_t, H_jVc_j⟩,   and for all of them together   VᵀH_tV.

μ_t (SGD-IE's, pulled back through U) is known on the backward walk, c_j on the forward one. So the
backward walk notes what H_jμ_t is in a few numbers a visit, and the forward walk takes it up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError, first_line
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis
from lightning_accie.estimators.chunks import activation_bytes, chunk_size
from lightning_accie.replay.outputs import Linearised, linearise
from lightning_accie.replay.state import Params, State, dot
from lightning_accie.replay.walker import Visit

_COPIES = 6
_CHECKED = 8
Note = list[Tensor]
"""What the backward walk keeps of H_jμ_t, for the visits of one step."""


class Own(NamedTuple):
    """A step's own samples; K visits, of which a sample may have several."""

    rows: Tensor
    """``[K]``: which of the n samples each is."""
    slope: Tensor
    """``[K, r]``: Vᵀg_j."""
    curved: Tensor
    """``[K, r]``: VᵀH_jVc_j."""
    gain: Tensor
    """``[K]``: ⟨μ_t, H_jVc_j⟩."""
    matrix: Tensor | None
    """``[r, r]``: VᵀH_tV, where asked for."""


class OwnCurvature(Protocol):
    """A way to H_j and H_t."""

    def note(self, visit: Visit, mu: Params, basis: Basis | None) -> Note:
        """Keep of H_jμ_t what the forward walk needs."""
        ...

    def own(self, visit: Visit, note: Note, c: Tensor, basis: Basis, *, matrix: bool) -> Own:
        """Compute a step's share of the recursion at c, ``[n, r]``."""
        ...


class Spots:
    """Where the samples of a step are among those that are estimated.

    Args:
        replay: the run.
        samples: ``[n]`` sample numbers.
    """

    def __init__(self, replay: Replay, samples: Tensor) -> None:
        self._spots = torch.full((replay.span,), -1)
        self._spots[samples] = torch.arange(len(samples))

    def of(self, samples: Tensor) -> Tensor:
        """Look samples up.

        Args:
            samples: ``[K]`` sample numbers.

        Returns:
            ``[K]`` positions, -1 for those that are not estimated.
        """
        return self._spots[samples]

    def drawn(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """The estimated samples of a step, each once.

        Returns:
            Their numbers and their positions.
        """
        samples = torch.unique(visit.map.samples)
        spots = self.of(samples)
        return samples[spots >= 0], spots[spots >= 0]


class FullHessian:
    """The samples' own Hessians and the step's, by the products that `AccSgdIE` uses.

    A step takes r Hessian products for VᵀH_tV, and two for each sample that it draws.

    Args:
        replay: the run.
        spots: the samples that are estimated.
    """

    def __init__(self, replay: Replay, spots: Spots) -> None:
        self._spots = spots
        self._rows = chunk_size(replay, _COPIES)

    def note(self, visit: Visit, mu: Params, basis: Basis | None) -> Note:
        """VᵀH_jμ_t.

        Returns:
            One tensor ``[K, r]``, a row for each sample of the step.
        """
        assert basis is not None
        samples, _ = self._spots.drawn(visit)
        along = _filled(mu, visit.state.params)
        found = [torch.zeros(0, basis.rank).to(basis.rows)]
        for chunk in samples.split(self._rows):
            same = {name: value.expand(len(chunk), *value.shape[1:]) for name, value in along.items()}
            found.append(-basis.project(visit.map.leaving_out(visit.state.params, same, chunk)[1]))
        return [torch.cat(found)]

    def own(self, visit: Visit, note: Note, c: Tensor, basis: Basis, *, matrix: bool) -> Own:
        """See `OwnCurvature.own`.

        Returns:
            The step's share, one row for each of its samples.
        """
        samples, spots = self._spots.drawn(visit)
        slopes, curved = [c[:0]], [c[:0]]
        for chunk, rows in zip(samples.split(self._rows), spots.split(self._rows), strict=True):
            if len(chunk):
                along = basis.combine(c[rows])
                first, second = visit.map.leaving_out(visit.state.params, along, chunk)
                slopes.append(-basis.project(first))
                curved.append(-basis.project(second))
        gain = (note[0] * c[spots]).sum(1)
        step = self._matrix(visit, basis) if matrix else None
        return Own(spots, torch.cat(slopes), torch.cat(curved), gain, step)

    def _matrix(self, visit: Visit, basis: Basis) -> Tensor:
        """VᵀH_tV."""
        found = []
        for start in range(0, basis.rank, self._rows):
            part = {n: v[start : start + self._rows] for n, v in basis.directions.items()}
            count = len(next(iter(part.values())))
            still = {n: v.new_zeros(count, *v.shape) for n, v in visit.state.statistics.items()}
            _, products, _ = visit.map.products(visit.state, State(part, {}, still))
            found.append(basis.project(products))
        return torch.cat(found)


class GaussNewton:
    """Everything from forward-mode derivatives of the network's outputs; see `replay.outputs`.

    A step takes one of them on the backward walk and r on the forward walk, however many samples it
    draws.

    Args:
        replay: the run.
        spots: the samples that are estimated.
    """

    def __init__(self, replay: Replay, spots: Spots) -> None:
        self._spots = spots
        room = replay.memory_budget // max(1, _COPIES * activation_bytes(replay))
        self._rows = max(1, room) if replay.walker.vectorize else 0

    def note(self, visit: Visit, mu: Params, basis: Basis | None) -> Note:
        """S_iJ_iμ_t.

        Returns:
            For each micro-batch ``[B, D]``.
        """
        along = _filled(mu, visit.state.params)
        return [lin.curved[:, 0] for lin in linearised(visit, along, 1 if self._rows else 0)]

    def own(self, visit: Visit, note: Note, c: Tensor, basis: Basis, *, matrix: bool) -> Own:
        """See `OwnCurvature.own`.

        Returns:
            The step's share, one row for each place of its batches.
        """
        found = []
        total = torch.zeros(basis.rank, basis.rank).to(c) if matrix else None
        losses = linearised(visit, basis.directions, self._rows)
        for loss, lin, noted in zip(visit.map.losses, losses, note, strict=True):
            if total is not None:
                total += torch.einsum("bkd,bld->kl", lin.along, lin.curved)
            spots = self._spots.of(loss.samples)
            kept = spots >= 0
            along, spots = lin.along[kept], spots[kept]
            own = c[spots].unsqueeze(1)
            curved = (along @ (own @ lin.curved[kept]).transpose(1, 2)).squeeze(2)
            gain = ((own @ along).squeeze(1) * noted[kept]).sum(1)
            found.append((spots, lin.slopes[kept], curved, gain))
        spots, slope, curved, gain = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Own(spots, slope, curved, gain, total)


def linearised(visit: Visit, directions: Params, rows: int) -> list[Linearised]:
    """A step's micro-batches along K directions.

    Args:
        visit: the step.
        directions: K of them stacked, for all parameters.
        rows: how many to push at once; 0 for one by one.

    Returns:
        One for each micro-batch.
    """
    params = visit.state.params
    return [linearise(loss, params, directions, rows=rows) for loss in visit.map.losses]


def _filled(some: Params, params: Params) -> Params:
    """One direction, ``[1, …]`` each, with zeros for the parameters that it lacks."""
    return {n: (some[n] if n in some else torch.zeros_like(p))[None] for n, p in params.items()}


def check_gauss_newton(visit: Visit) -> None:
    """Refuse a step whose loss is no function of outputs in which it is convex.

    The slopes of some samples along a direction, by the outputs' derivatives, must be those that
    differentiating the loss itself gives.

    Args:
        visit: the step.

    Raises:
        UnsupportedError: with the reason, and what to use instead.
    """
    reason = _why_not(visit)
    if reason is not None:
        raise UnsupportedError(
            f'`curvature="gauss-newton"` does not go with this training_step: {reason}. Use '
            '`LowRankAccSgdIE(curvature="hessian")`.'
        )


def _why_not(visit: Visit) -> str | None:
    params, step = visit.state.params, replace(visit.map, tangents="one-by-one")
    samples = torch.unique(step.samples)[:_CHECKED]
    generator = torch.Generator().manual_seed(0)
    along = {n: torch.randn((1, *p.shape), generator=generator).to(p) for n, p in params.items()}
    along = _filled({name: along[name][0] for name in step.used}, params)
    try:
        slopes = torch.cat([lin.slopes[:, 0] for lin in linearised(visit, along, 0)])
        still = {n: p.new_zeros(len(samples), *p.shape) for n, p in params.items()}
        first, _ = step.leaving_out(params, still, samples)
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error).rstrip(".")
    found = (slopes * (step.samples == samples[:, None])).sum(1)
    expected = -dot(first, {name: along[name][0] for name in first}).to(found)
    tolerance = step.losses[0].program.analysis.tolerances.gradient  # type: ignore[attr-defined]
    if float((found - expected).norm()) > tolerance * float(expected.norm()):
        return "its loss depends on the weights in other ways than through what enters its losses"
    return None
