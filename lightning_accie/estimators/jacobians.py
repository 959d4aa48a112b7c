"""J_jV: how the outputs of a batch's samples move along V's directions, whole or by factors.

With J_j the Jacobian of sample j's outputs in the parameters, a step needs J_jVc_j, and VᵀJ_jᵀx_j for
x in the space of the outputs. Where each parameter belongs to a linear or convolutional layer
(`replay.factors`), J_jV need not be made for that: with δ_jτ what the layers' outputs get back of x_j,

    Vᵀ J_jᵀ x_j = Σ_layers Σ_τ δ_jτᵀ V a_jτ

is one backward pass for all samples, and linear in x: its transpose, J_jVc_j, is another.

| symbol | name |
|---|---|
| J_jV | ``[r, B, D]``, what `whole` gives |
| a_jτ, with a 1 for the bias | ``inputs``, ``[B, τ, in]`` |
| V on a layer, its weight and bias beside each other | ``block``, ``[r, out, in]`` |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_accie.estimators.basis import Basis
from lightning_accie.replay.factors import Call, slopes_of, watched
from lightning_accie.replay.gauss_newton import by_sample, shaped
from lightning_accie.replay.step import MicroLoss
from lightning_accie.replay.tape import Tape

FEW = 4
"""Positions up to which Va is cheaper to have than the gradients of the single samples."""


class Jacobian(Protocol):
    """J_jV of the B samples of a micro-batch."""

    def along(self, c: Tensor) -> Tensor:
        """J_jVc_j ``[B, D]``, of c ``[B, r]``."""
        ...

    def back(self, rows: Tensor) -> Tensor:
        """VᵀJ_jᵀx_j ``[B, r]``, of x ``[B, D]``."""
        ...

    def whole(self) -> Tensor:
        """J_jV, ``[r, B, D]``."""
        ...


class WholeJacobian:
    """J_jV as a matrix.

    Args:
        values: ``[r, B, D]``.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._by_sample = values.transpose(0, 1).contiguous()

    def along(self, c: Tensor) -> Tensor:
        """See `Jacobian`.

        Returns:
            ``[B, D]``.
        """
        return torch.bmm(c[:, None], self._by_sample)[:, 0]

    def back(self, rows: Tensor) -> Tensor:
        """See `Jacobian`.

        Returns:
            ``[B, r]``.
        """
        return torch.bmm(self._by_sample, rows[..., None])[..., 0]

    def whole(self) -> Tensor:
        """See `Jacobian`.

        Returns:
            ``[r, B, D]``.
        """
        return self._values


class FactoredJacobian:
    """J_jV by the layers' factors, for a batch in which no sample sees another.

    Args:
        loss: the micro-batch; the module must be bound to the state that it is of.
        basis: V.
        rows: how many backward passes run side by side.

    Attributes:
        tape: the outputs and their errors, without the gradient.
        outputs: D.
        names: the parameters whose part of J_jV is in it.
        positions: the largest number of positions at which one of their layers is applied.
        nbytes: what the factors take.
    """

    def __init__(self, loss: MicroLoss, basis: Basis, rows: int) -> None:
        self._rows, self._held = rows, loss.held
        program = loss.program  # type: ignore[attr-defined]
        chosen = {name: program.parameters[name] for name in basis.names}
        with watched(program.module, chosen, len(loss.samples)) as calls:
            self.tape = Tape.of(loss, ())
        self._values = [one.value for one in self.tape.outputs]
        self.outputs = sum(one.value.numel() // one.batch for one in self.tape.outputs)
        embeddings = [call.weight for call in calls.made if call.kind is nn.Embedding]
        self.names = calls.names() - {name for name in embeddings if name}
        self._calls = [call for call in calls.made if {call.weight, call.bias} & self.names]
        self.positions = max((call.inputs.shape[1] for call in self._calls), default=0)
        self._layers = [_layer(call, basis, self.names) for call in self._calls]
        self.nbytes = sum(layer.nbytes for layer in self._layers)
        self._seeds = [error.detach().requires_grad_() for error in self.tape.errors]
        self._slopes: Sequence[Tensor] = ()
        if self._calls:
            with loss.held(), torch.enable_grad():
                self._slopes = torch.autograd.grad(
                    self._values,
                    [call.output for call in self._calls],
                    self._seeds,
                    create_graph=True,
                    materialize_grads=True,
                )

    def along(self, c: Tensor) -> Tensor:
        """See `Jacobian`; the transpose of `back`, which is linear.

        Returns:
            ``[B, D]``.
        """
        slopes, moved = [], []
        for call, layer, slope in zip(self._calls, self._layers, self._slopes, strict=True):
            if slope.requires_grad:  # else the call's output goes nowhere
                with torch.enable_grad():
                    slopes.append(call.by_position(slope[None])[0])
                moved.append(layer.along(c))
        with self._held():
            found = torch.autograd.grad(
                slopes, self._seeds, moved, retain_graph=True, materialize_grads=True
            )
        return by_sample(self.tape, [value[None] for value in found])[0]

    def back(self, rows: Tensor) -> Tensor:
        """See `Jacobian`.

        Returns:
            ``[B, r]``.
        """
        return self._back(rows[None])[0]

    def whole(self) -> Tensor:
        """See `Jacobian`; one backward pass for each output.

        Returns:
            ``[r, B, D]``.
        """
        like = by_sample(self.tape, [value.detach()[None] for value in self._values])[0]
        units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        parts = units[:, None].expand(-1, *like.shape).split(self._rows)
        return torch.cat([self._back(part) for part in parts]).permute(2, 1, 0)

    def _back(self, rows: Tensor) -> Tensor:
        """``[K, B, r]`` of ``[K, B, D]``."""
        vectors = shaped(self.tape, rows)
        with self._held():
            slopes = slopes_of(self._values, self._calls, vectors, rows=self._rows)
        parts = [layer.back(part) for layer, part in zip(self._layers, slopes, strict=True)]
        return torch.stack(parts).sum(0)


class _Layer(Protocol):
    """VᵀGᵀ of a call, G being the samples' gradients δaᵀ, and its transpose."""

    nbytes: int

    def along(self, c: Tensor) -> Tensor:
        """``[B, τ, out]`` of c ``[B, r]``."""
        ...

    def back(self, slopes: Tensor) -> Tensor:
        """``[K, B, r]`` of δ ``[K, B, τ, out]``."""
        ...


class _AtFewPositions:
    """By Va."""

    def __init__(self, block: Tensor, inputs: Tensor) -> None:
        rank, out, size = block.shape
        batch, self._positions, _ = inputs.shape
        images = inputs.reshape(-1, size) @ block.reshape(-1, size).T
        images = images.view(batch, self._positions, rank, out).transpose(1, 2)
        self._images = images.reshape(batch, rank, -1)  # [B, r, τ out]
        self.nbytes = self._images.nbytes

    def along(self, c: Tensor) -> Tensor:
        return torch.bmm(c[:, None], self._images).view(len(c), self._positions, -1)

    def back(self, slopes: Tensor) -> Tensor:
        return torch.bmm(self._images, slopes.flatten(2).permute(1, 2, 0)).permute(2, 0, 1)


class _AtManyPositions:
    """By the samples' own gradients."""

    def __init__(self, block: Tensor, inputs: Tensor) -> None:
        self._shape, self._rows = block.shape[1:], block.flatten(1)
        self._inputs = inputs
        self.nbytes = 2 * inputs.nbytes + len(inputs) * self._rows[0].nbytes

    def along(self, c: Tensor) -> Tensor:
        weights = (c @ self._rows).view(len(c), *self._shape)
        return torch.bmm(self._inputs, weights.transpose(1, 2))

    def back(self, slopes: Tensor) -> Tensor:
        return torch.stack(
            [torch.bmm(s.transpose(1, 2), self._inputs).flatten(1) @ self._rows.T for s in slopes]
        )


def _layer(call: Call, basis: Basis, names: set[str]) -> _Layer:
    """The call's part of J_jV."""
    blocks, inputs = [], []
    if call.weight in names:
        blocks.append(basis.directions[call.weight].flatten(2))
        inputs.append(call.inputs.to(basis.rows))
    if call.bias in names:
        blocks.append(basis.directions[call.bias][..., None])
        inputs.append(basis.rows.new_ones(*call.inputs.shape[:2], 1))
    few = call.inputs.shape[1] <= FEW
    way: type[_AtFewPositions | _AtManyPositions] = _AtFewPositions if few else _AtManyPositions
    return way(torch.cat(blocks, -1), torch.cat(inputs, -1))
