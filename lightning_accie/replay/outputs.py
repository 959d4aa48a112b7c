"""The network's outputs inside the user's own training step, for Gauss-Newton products.

A step's loss is a function of what the network gives to ``F.cross_entropy(input, target)`` and the
like, its outputs f: L(θ) = Σ_i ℓ_i(f_i(θ)). With J_i = ∂f_i/∂θ, e_i = ∂ℓ_i/∂f_i and S_i = ∂²ℓ_i/∂f_i²,

    g_i = J_iᵀe_i       H_i ≈ J_iᵀS_iJ_i,

exact where f is linear in θ. J times a direction is one forward-mode derivative of the whole batch's
outputs, and all that depends on the sample comes after it, in the few dimensions of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.loss_form import ROWS, Layout, LossForm
from lightning_accie.replay.per_sample import CurvedLoss, Reduction, ReductionMode, wide
from lightning_accie.replay.state import Params

_MOST = 16
"""Losses that one step may have."""


@dataclass(frozen=True)
class OutputLoss:
    """One of the step's losses, ℓ_i as a function of the outputs alone.

    Attributes:
        loss: as the step called it.
        layout: which rows are whose.
        batch: B.
    """

    loss: CurvedLoss
    layout: Layout
    batch: int

    def derivatives(self, outputs: Tensor, along: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate the samples' terms by the outputs.

        Args:
            outputs: f.
            along: K directions in their space, stacked.
            share: the loss's factor in the step's loss.

        Returns:
            e, in the shape of f, and S times the directions.
        """
        with torch.enable_grad():
            leaf = wide(outputs.detach()).requires_grad_()
            total = self.loss.terms(leaf, self.layout, self.batch).sum() * share
            (first,) = torch.autograd.grad(total, leaf, create_graph=True)
            (second,) = torch.autograd.grad(first, leaf, along.to(leaf), is_grads_batched=True)
        return first.detach(), second

    def rows(self, values: Tensor) -> Tensor:
        """Gather what belongs to each sample.

        Args:
            values: ``[K, …]``, K of the outputs' shape.

        Returns:
            ``[B, K, D]``, the D numbers of each sample's outputs.
        """
        count = len(values)
        if self.layout.order == "interleaved":
            rows = values.reshape(count, -1, self.batch, *values.shape[2:]).transpose(1, 2)
        else:
            rows = values
        return rows.reshape(count, self.batch, -1).transpose(0, 1)


class Observed(NamedTuple):
    """What a run of the step showed."""

    outputs: list[Tensor]
    """f, one a loss."""
    shares: Tensor
    """The factor of each loss in the step's loss."""
    losses: list[OutputLoss]


class OutputsMode(ReductionMode):
    """Keeps the outputs that the step's losses are made of; a placeholder takes each loss's place.

    Args:
        form: how the step's loss splits into the samples' own terms.
        batch: B.
    """

    def __init__(self, form: LossForm, batch: int) -> None:
        super().__init__(form.hand_written)
        self.form, self.batch = form, batch
        self.outputs: list[Tensor] = []
        self.losses: list[OutputLoss] = []
        self.met = 0
        self._slots = torch.zeros(0)

    @staticmethod
    def slots(like: Tensor) -> Tensor:
        """The placeholders.

        Returns:
            Zeros in the dtype and on the device of ``like``.
        """
        return like.new_zeros(_MOST)

    def begin(self, slots: Tensor) -> None:
        """Start a run of the step with these placeholders."""
        self.outputs, self.losses, self.met, self._slots = [], [], 0, slots

    def meet(self, reduction: Reduction) -> Tensor:
        """Keep a loss's outputs.

        Returns:
            Its placeholder, or its own value where it carries no weights.

        Raises:
            UnsupportedError: if it is none that Gauss-Newton can be built on.
        """
        place, self.met = self.met, self.met + 1
        if place in self.form.excluded:
            return reduction.own()
        if not isinstance(reduction, CurvedLoss):
            raise UnsupportedError(
                f"`{reduction.name}` is not a loss that is convex and curved in the network's outputs"
            )
        layout = self.form.layouts.get(place, ROWS)
        rows, elements = reduction.outputs.shape[:1], reduction.elements.shape[:1]
        if layout.axis or layout.source is not None or rows != elements:
            raise UnsupportedError(
                f"the rows of what enters `{reduction.name}` are not the samples' own"
            )
        if len(self.losses) == _MOST:
            raise UnsupportedError(f"the step has more than {_MOST} losses")
        self.outputs.append(reduction.outputs)
        self.losses.append(OutputLoss(reduction, layout, self.batch))
        return self._slots[len(self.losses) - 1]


class OutputsOf(Protocol):
    """A `MicroLoss` whose outputs can be observed."""

    def outputs(self, params: Params) -> Observed:
        """The outputs from explicit parameters."""
        ...


class Linearised(NamedTuple):
    """A micro-batch's losses to first order in θ, along K directions; D outputs a sample in all."""

    along: Tensor
    """``[B, K, D]``: J_i times the directions."""
    curved: Tensor
    """``[B, K, D]``: S_iJ_i times the directions."""
    first: Tensor
    """``[B, D]``: e_i."""

    @property
    def slopes(self) -> Tensor:
        """``[B, K]``: the directions' inner products with g_i."""
        return torch.einsum("bkd,bd->bk", self.along, self.first)


def linearise(loss: OutputsOf, params: Params, directions: Params, *, rows: int) -> Linearised:
    """Differentiate a micro-batch's outputs in forward mode.

    Args:
        loss: c_m L_m.
        params: θ.
        directions: K of them stacked, for all parameters.
        rows: how many to push at once; 0 for one by one.

    Returns:
        J and SJ along the directions, and e; c_m and 1/|m| are in S and e.

    Raises:
        UnsupportedError: if the loss is no function of outputs in which it is convex.
    """
    losses: list[OutputLoss] = []

    def outputs(p: Params) -> tuple[list[Tensor], Tensor]:
        observed = loss.outputs(p)
        losses[:] = observed.losses
        return observed.outputs, observed.shares

    def push(direction: Params) -> Any:
        (at, shares), (along, _) = jvp(outputs, (params,), (direction,))
        return (at, shares), along

    count = len(next(iter(directions.values())))
    pushed: list[list[Tensor]] = []
    if rows:
        for start in range(0, count, rows):
            part = {name: value[start : start + rows] for name, value in directions.items()}
            many = vmap(push, out_dims=(None, 0), randomness="same")
            (at, shares), along = many(part)
            pushed.append(along)
    else:
        for k in range(count):
            (at, shares), along = push({name: value[k] for name, value in directions.items()})
            pushed.append([one[None] for one in along])
    return _by_sample(losses, at, shares, [torch.cat(parts) for parts in zip(*pushed, strict=True)])


def _by_sample(
    losses: Sequence[OutputLoss], at: Sequence[Tensor], shares: Tensor, along: Sequence[Tensor]
) -> Linearised:
    """Sort derivatives by sample, those of several losses beside each other."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for loss, outputs, moved, share in zip(losses, at, along, shares, strict=False):
        first, second = loss.derivatives(outputs, moved, share)
        parts.append((loss.rows(moved.to(second)), loss.rows(second), loss.rows(first[None])[:, 0]))
    return Linearised(*map(partial(torch.cat, dim=-1), zip(*parts, strict=True)))
