"""What a step's own samples add to the recursion in V's coordinates, by Hessians or by Gauss-Newton.

For the samples j that step t draws, with g_j and H_j carrying their share 1/|m| of the step's loss,

    Vᵀg_j,   VᵀH_jVc_j,   ⟨μ_t, H_jVc_j⟩,   and for all of them together   VᵀH_tV.

c_j is known on the forward walk, μ_t (SGD-IE's λ_{t+1}, pulled back through U) on the backward one. So
the forward walk notes a few numbers for every visit, and the backward walk takes them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError, first_line
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis
from lightning_accie.estimators.chunks import chunk_size
from lightning_accie.estimators.jacobians import (
    FEW,
    FactoredJacobian,
    Jacobian,
    WholeJacobian,
)
from lightning_accie.replay.gauss_newton import curved, errors, outputs_along, pulled
from lightning_accie.replay.state import Params, State, dot
from lightning_accie.replay.step import MicroLoss
from lightning_accie.replay.tape import Tape
from lightning_accie.replay.walker import Visit

_COPIES = 6


class Note(NamedTuple):
    """What is kept of a step's K visits."""

    spots: Tensor
    """``[K]``: which of the n samples each visit is of; a sample may have several."""
    values: Tensor
    """``[K, …]``: what ⟨μ_t, H_jVc_j⟩ will need."""


class Own(NamedTuple):
    """A step's own samples, K visits."""

    note: Note
    slope: Tensor
    """``[K, r]``: Vᵀg_j."""
    bend: Tensor
    """``[K, r]``: VᵀH_jVc_j."""
    matrix: Tensor | None
    """``[r, r]``: VᵀH_tV, where asked for."""


class Back(NamedTuple):
    """What a step pulls back."""

    cotangent: State
    """λ_t of SGD-IE."""
    by_weight: Tensor
    """``[N]``: γ_t of SGD-IE."""
    gain: Tensor
    """``[K]``: ⟨μ_t, H_jVc_j⟩."""


class OwnCurvature(Protocol):
    """A way to H_j and H_t."""

    def forwards(self, visit: Visit, c: Tensor, *, matrix: bool) -> Own:
        """Compute a step's share of the recursion at c, ``[n, r]``."""
        ...

    def backwards(self, visit: Visit, cotangent: State, note: Note) -> Back:
        """Pull λ_{t+1} back, as SGD-IE does, and take up what the forward walk has noted."""
        ...


class Spots:
    """Where the samples of a step are among those that are estimated.

    Args:
        replay: the run.
        samples: ``[n]`` sample numbers.
    """

    def __init__(self, replay: Replay, samples: Tensor) -> None:
        device = replay.walker.program.device
        self._spots = torch.full((replay.span,), -1, device=device)
        self._spots[samples] = torch.arange(len(samples), device=device)

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
        return samples[(spots >= 0).to(samples.device)], spots[spots >= 0]


class FullHessian:
    """The samples' own Hessians and the step's, by the products that `AccSgdIE` uses.

    A step takes r Hessian products for VᵀH_tV, and two for each sample that it draws.

    Args:
        replay: the run.
        spots: the samples that are estimated.
        basis: V.
    """

    def __init__(self, replay: Replay, spots: Spots, basis: Basis) -> None:
        self._spots, self._basis = spots, basis
        self._rows = chunk_size(replay, _COPIES)

    def forwards(self, visit: Visit, c: Tensor, *, matrix: bool) -> Own:
        """See `OwnCurvature`; the note is c_j itself.

        Returns:
            The step's share, one row for each of its samples.
        """
        samples, spots = self._spots.drawn(visit)
        own = c[spots]
        slopes, bends = [own[:0]], [own[:0]]
        for first, second in self._left_out(visit, samples, own):
            slopes.append(-self._basis.project(first))
            bends.append(-self._basis.project(second))
        step = self._matrix(visit) if matrix else None
        return Own(Note(spots, own), torch.cat(slopes), torch.cat(bends), step)

    def backwards(self, visit: Visit, cotangent: State, note: Note) -> Back:
        """See `OwnCurvature`.

        Returns:
            The gains in float64.
        """
        samples, _ = self._spots.drawn(visit)
        step, state = visit.map, visit.state
        mu = step.update.vjp(state, step.gradient_for_vjp(state), cotangent)[1]
        gains = [torch.zeros(0, dtype=torch.float64, device=note.values.device)]
        gains += [-dot(second, mu) for _, second in self._left_out(visit, samples, note.values)]
        return Back(*step.vjp(state, cotangent), torch.cat(gains))

    def _left_out(
        self, visit: Visit, samples: Tensor, c: Tensor
    ) -> Iterator[tuple[Params, Params]]:
        """-g_j and -H_jVc_j, chunk by chunk."""
        if not len(samples):
            return
        for chunk, at in zip(samples.split(self._rows), c.split(self._rows), strict=True):
            yield visit.map.leaving_out(visit.state.params, self._basis.combine(at), chunk)

    def _matrix(self, visit: Visit) -> Tensor:
        """VᵀH_tV."""
        found = []
        for start in range(0, self._basis.rank, self._rows):
            part = {n: v[start : start + self._rows] for n, v in self._basis.directions.items()}
            count = len(next(iter(part.values())))
            still = {n: v.new_zeros(count, *v.shape) for n, v in visit.state.statistics.items()}
            _, products, _ = visit.map.products(visit.state, State(part, {}, still))
            found.append(self._basis.project(products))
        return torch.cat(found)


class GaussNewton:
    """Everything from derivatives of the network's outputs; see `replay.gauss_newton`.

    Their Jacobian times V takes r backward passes a step on the forward walk, however many samples it
    draws. Where a layer is applied at many positions (a convolution), what is needed of it is found by
    the layers' factors instead, and the whole of it only for VᵀH_tV. On the backward walk a step's one
    derivative comes with SGD-IE's own pass.

    Args:
        replay: the run.
        spots: the samples that are estimated.
        basis: V.
    """

    def __init__(self, replay: Replay, spots: Spots, basis: Basis) -> None:
        self._spots, self._basis = spots, basis
        self._budget = replay.memory_budget
        room = replay.memory_budget // max(1, _COPIES * replay.walker.graph_bytes())
        self._rows = max(1, room) if replay.walker.vectorize else 1
        self._factored: dict[tuple[str, ...], bool] = {}

    def forwards(self, visit: Visit, c: Tensor, *, matrix: bool) -> Own:
        """See `OwnCurvature`; the note is S_jJ_jVc_j.

        Returns:
            The step's share, one row for each place of its batches.
        """
        found = []
        total = c.new_zeros(self._basis.rank, self._basis.rank) if matrix else None
        for loss in visit.map.losses:
            spots = self._spots.of(loss.samples)
            tape, jacobian = self._jacobian(visit, loss, whole=matrix)
            own = torch.where(spots[:, None] >= 0, c[spots], 0.0)
            if total is None:
                pushed = curved(tape, jacobian.along(own)[None], rows=1)[0]
            else:
                along = jacobian.whole()
                bent = curved(tape, along, rows=self._rows)
                total += along.flatten(1) @ bent.flatten(1).T
                pushed = WholeJacobian(bent).along(own)
            slope, bend = jacobian.back(errors(tape)), jacobian.back(pushed)
            found.append((spots, pushed, slope, bend))
        spots, pushed, slope, bend = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = spots >= 0
        if not bool(kept.all()):
            spots, pushed, slope, bend = (v[kept] for v in (spots, pushed, slope, bend))
        return Own(Note(spots, pushed), slope, bend, total)

    def _jacobian(self, visit: Visit, loss: MicroLoss, *, whole: bool) -> tuple[Tape, Jacobian]:
        """J_jV in the cheaper way, which is the same to rounding, and a tape of the outputs."""
        used = visit.map.used
        if used not in self._factored:
            self._factored[used] = all(self._has_factors(visit, one) for one in visit.map.losses)
        if self._factored[used]:
            factored = FactoredJacobian(loss, self._basis, self._rows)
            if not whole:
                return factored.tape, factored
            if factored.outputs <= self._basis.rank:  # as many passes as outputs, or as directions
                return factored.tape, WholeJacobian(factored.whole())
        tape = taped(loss, visit)
        along = outputs_along(tape, self._basis.directions, rows=self._rows)
        return tape, WholeJacobian(along)

    def _has_factors(self, visit: Visit, loss: MicroLoss) -> bool:
        """Whether J_jV by factors is cheaper, fits, and gives the samples' gradients."""
        found = FactoredJacobian(loss, self._basis, self._rows)
        cheaper = found.positions > FEW and found.names >= set(visit.map.used)
        if not cheaper or found.nbytes > self._budget:
            return False
        ones = loss.ones()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(len(ones), generator=generator, dtype=torch.float64).to(ones)
        one = replace(visit.map, losses=[loss])
        exact = self._basis.project(one.gradients(visit.state.params, weights[None]))[0]
        mixed = weights.to(exact) @ found.back(errors(taped(loss, visit)))
        tolerance = loss.program.analysis.tolerances.gradient  # type: ignore[attr-defined]
        return float((mixed - exact).norm()) <= tolerance * float(exact.norm())

    def backwards(self, visit: Visit, cotangent: State, note: Note) -> Back:
        """See `OwnCurvature`; one backward pass gives SGD-IE's product and J_jμ_t.

        Returns:
            The gains.
        """
        step, state = visit.map, visit.state
        back, mu = step.update.vjp(state, step.gradient_for_vjp(state), cotangent)
        params, nu = dict(back.params), back.statistics
        by_weight, along = [], []
        for loss in reversed(step.losses):
            (product, gamma, nu), moved = pulled(taped(loss, visit), mu, nu)
            for name, value in product.items():
                params[name] = params[name] + value
            by_weight.append(gamma)
            along.append(moved[self._spots.of(loss.samples) >= 0])
        gain = (torch.cat(along[::-1]) * note.values).sum(1)
        return Back(State(params, back.slots, nu), torch.cat(by_weight[::-1]), gain)


def taped(loss: MicroLoss, visit: Visit) -> Tape:
    """A micro-batch's gradient with its graph, for Gauss-Newton.

    Args:
        loss: one of the step's.
        visit: the step.

    Returns:
        The one that the walk kept, or another.

    Raises:
        UnsupportedError: if no outputs enter its losses.
    """
    tape = loss.tape or Tape.of(loss, visit.map.used, visit.state.statistics)
    if not tape.outputs:
        raise UnsupportedError(
            _refusing(
                "its loss is none that is convex in the rows of what enters it, such as "
                "`F.cross_entropy` or `F.mse_loss`"
            )
        )
    return tape


def check_gauss_newton(visit: Visit) -> None:
    """Refuse a step whose loss is no function of outputs in which it is convex.

    The samples' slopes along a direction, by the outputs' derivatives, must be those that
    differentiating the loss itself gives.

    Args:
        visit: the step.

    Raises:
        UnsupportedError: with the reason, and what to use instead.
    """
    if visit.map.penalty:
        raise UnsupportedError(_refusing("a part of its loss belongs to no sample"))
    generator = torch.Generator().manual_seed(0)
    params = visit.state.params
    mu = {
        name: torch.randn(params[name].shape, generator=generator).to(params[name])
        for name in visit.map.used
    }
    one = {name: value[None] for name, value in mu.items()}
    for loss in visit.map.losses:
        tape = taped(loss, visit)
        try:
            along = outputs_along(tape, one, rows=1)[0]
            curved(tape, along[None], rows=1)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(_refusing(first_line(error).rstrip("."))) from error
        found = (along * errors(tape)).sum(1)
        expected = Tape.of(loss, visit.map.used).product(mu)[1]
        tolerance = loss.program.analysis.tolerances.gradient  # type: ignore[attr-defined]
        if float((found - expected).norm()) > tolerance * float(expected.norm()):
            raise UnsupportedError(
                _refusing(
                    "its loss depends on the weights in other ways than by what enters its losses"
                )
            )


def _refusing(reason: str) -> str:
    return (
        f'`curvature="gauss-newton"` does not go with this training_step: {reason}. Use '
        '`LowRankAccSgdIE(curvature="hessian")`.'
    )
