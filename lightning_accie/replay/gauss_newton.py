"""Gauss-Newton products of a recorded step, from the graph of its gradient.

A `Tape` has the gradient g = Jᵀe with e = ∂L/∂f as a part of its graph. Being linear in e,

    Jv = ∂⟨v, g⟩/∂e        and        S Jv = (∂e/∂f) Jv,

each by one more backward pass, whatever the directions v, and for any operator that `StepMap.vjp` can
differentiate twice (no forward mode is needed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accie.replay.state import Params
from lightning_accie.replay.tape import Tape


class Linearised(NamedTuple):
    """A micro-batch's outputs to first order in θ, along K directions; D outputs a sample in all."""

    along: Tensor
    """``[B, K, D]``: J_i times the directions."""
    curved: Tensor
    """``[B, K, D]``: S_iJ_i times the directions."""
    errors: Tensor
    """``[B, D]``: e_i; c_m and 1/|m| are in S and e."""


def linearise(tape: Tape, directions: Params, *, rows: int) -> Linearised:
    """Differentiate a micro-batch's outputs along many directions; the graph stays.

    Args:
        tape: its gradient with the graph.
        directions: K of them stacked, for the parameters in use.
        rows: how many go through the graph at once; 1 for one by one.

    Returns:
        J and SJ along the directions, and e.
    """
    with tape.held():
        along = _along(tape, directions, rows)
        values = [one.value for one in tape.outputs]
        curved = _many(list(tape.errors), values, along, rows)
    errors = [error.detach()[None] for error in tape.errors]
    return Linearised(_sorted(tape, along), _sorted(tape, curved), _sorted(tape, errors)[:, 0])


def outputs_along(tape: Tape, direction: Params) -> Tensor:
    """J times one direction; the graph stays.

    Args:
        tape: a micro-batch's gradient with the graph.
        direction: by name, for the parameters in use.

    Returns:
        ``[B, D]``.
    """
    with tape.held():
        one = {name: value[None] for name, value in direction.items()}
        return _sorted(tape, _along(tape, one, 1))[:, 0]


def _along(tape: Tape, directions: Params, rows: int) -> list[Tensor]:
    """J times K directions, for each loss in the shape of its outputs."""
    pairs = [(g, directions[name]) for name, g in tape.grads.items() if g.requires_grad]
    gradients, vectors = zip(*pairs, strict=True)
    return _many(list(gradients), list(tape.errors), list(vectors), rows)


def _many(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], rows: int
) -> list[Tensor]:
    """∂outputs/∂inputs, transposed, times K vectors stacked."""
    parts = []
    for start in range(0, len(vectors[0]), rows):
        chunk = [vector[start : start + rows] for vector in vectors]
        many = len(chunk[0]) > 1
        found = torch.autograd.grad(
            outputs,
            inputs,
            chunk if many else [vector[0] for vector in chunk],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=many,
        )
        count = len(chunk[0])
        parts.append(
            [
                value.new_zeros(count, *value.shape)
                if one is None
                else one.reshape(count, *value.shape)
                for one, value in zip(found, inputs, strict=True)
            ]
        )
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _sorted(tape: Tape, values: Sequence[Tensor]) -> Tensor:
    """``[B, K, D]``: by sample, those of several losses beside each other."""
    rows = [one.rows(value) for one, value in zip(tape.outputs, values, strict=True)]
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    return torch.cat(rows, -1).to(dtype)
