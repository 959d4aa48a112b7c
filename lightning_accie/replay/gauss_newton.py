"""Gauss-Newton products of a recorded step, from the graph of its gradient.

A `Tape` has the gradient g = Jᵀe with e = ∂L/∂f as a part of its graph. Being linear in e,

    Jv = ∂⟨v, g⟩/∂e        and        S Jv = (∂e/∂f) Jv,

each by one more backward pass, whatever the directions v, and for any operator that `StepMap.vjp` can
differentiate twice (no forward mode is needed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accie.replay.state import Params
from lightning_accie.replay.tape import Pulled, Tape


def outputs_along(tape: Tape, directions: Params, *, rows: int) -> Tensor:
    """J times K directions; the graph stays.

    Args:
        tape: a micro-batch's gradient with the graph.
        directions: by name, K of them stacked, for the parameters in use.
        rows: how many go through the graph at once; 1 for one by one.

    Returns:
        ``[K, B, D]``, the D outputs of each sample, those of several losses beside each other.
    """
    pairs = [(g, directions[name]) for name, g in tape.grads.items() if g.requires_grad]
    gradients, vectors = zip(*pairs, strict=True)
    with tape.held():
        return by_sample(tape, _many(gradients, tape.errors, vectors, rows))


def pulled(tape: Tape, mu: Params, nu: Params) -> tuple[Pulled, Tensor]:
    """SGD-IE's product of a micro-batch, and J times μ by the same backward pass.

    Args:
        tape: a micro-batch's gradient with the graph, which is used up.
        mu: μ by parameter name.
        nu: ν by name, for the running statistics.

    Returns:
        What `Tape.product` gives, and Jμ, ``[B, D]``.
    """
    product, moved = tape.product_and_outputs(mu, nu)
    return product, by_sample(tape, [value[None] for value in moved])[0]


def curved(tape: Tape, along: Tensor, *, rows: int) -> Tensor:
    """S times K directions in the space of the outputs; the graph stays.

    Args:
        tape: a micro-batch's gradient with the graph.
        along: ``[K, B, D]``.
        rows: how many go through the graph at once; 1 for one by one.

    Returns:
        ``[K, B, D]``; c_m and 1/|m| are in S.
    """
    values = [one.value for one in tape.outputs]
    with tape.held():
        return by_sample(tape, _many(tape.errors, values, shaped(tape, along), rows))


def errors(tape: Tape) -> Tensor:
    """The loss's derivative in the outputs, e.

    Args:
        tape: a micro-batch's gradient with the graph.

    Returns:
        ``[B, D]``; c_m and 1/|m| are in it.
    """
    return by_sample(tape, [error.detach()[None] for error in tape.errors])[0]


def by_sample(tape: Tape, values: Sequence[Tensor]) -> Tensor:
    """Bring what has the shapes of the outputs into rows, one a sample.

    Args:
        tape: whose outputs.
        values: for each of the outputs, K of its shape stacked.

    Returns:
        ``[K, B, D]``, in 32 bits at least.
    """
    rows = [one.rows(value) for one, value in zip(tape.outputs, values, strict=True)]
    whole = rows[0] if len(rows) == 1 else torch.cat(rows, -1)
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def shaped(tape: Tape, rows: Tensor) -> list[Tensor]:
    """Undo `by_sample`.

    Args:
        tape: whose outputs.
        rows: ``[K, B, D]``.

    Returns:
        For each of the outputs, K of its shape and type stacked.
    """
    sizes = [one.value.numel() // one.batch for one in tape.outputs]
    parts = zip(tape.outputs, rows.split(sizes, -1), strict=True)
    return [one.from_rows(part).to(one.value) for one, part in parts]


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
    return parts[0] if len(parts) == 1 else [torch.cat(c) for c in zip(*parts, strict=True)]
