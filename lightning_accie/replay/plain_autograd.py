"""The step's derivatives by plain autograd, where an operator has no forward mode or no transform.

Forward mode and `torch.func` do not take every operator: `huber_loss`, `weight_norm`, packed sequences
and `grid_sample` have no forward mode, activation checkpointing and a classic `autograd.Function` no
transform. Nearly all of them can be differentiated backwards twice. H is symmetric, so

    Hv = ∇_θ⟨∇_θL, v⟩,

from one graph of the gradient for any number of v. The results are those of forward mode, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_accie.replay.state import Params

Value = Callable[[Params], Tensor]
"""A loss as a function of all parameters."""
Held = Callable[[Params], AbstractContextManager[None]]
"""Keeps the module on given parameters while a backward pass may run parts of it again."""


def gradient(value: Value, params: Params, names: Sequence[str], held: Held) -> Params:
    """∇_θL.

    Args:
        value: L.
        params: θ.
        names: the parameters to differentiate for.
        held: see `Held`.

    Returns:
        The gradient by name, without a graph.
    """
    leaves = _leaves(params, names)
    with held(leaves):
        grads = _gradient(value, leaves, names, create_graph=False)
    return dict(zip(names, grads, strict=True))


def gradient_and_products(
    value: Value, params: Params, names: Sequence[str], tangents: Params, held: Held
) -> tuple[Params, Params]:
    """∇_θL, and HΔ_k for K tangents.

    Args:
        value: L.
        params: θ.
        names: the parameters to differentiate for; Δ is zero elsewhere.
        tangents: Δ, K of them stacked.
        held: see `Held`.

    Returns:
        The gradient by name, and the products, K of them stacked.
    """
    leaves = _leaves(params, names)
    inputs = [leaves[name] for name in names]
    with held(leaves):
        grads = _gradient(value, leaves, names, create_graph=True)
        curved = [(name, g) for name, g in zip(names, grads, strict=True) if g.requires_grad]

        def product(k: int) -> tuple[Tensor, ...]:
            if not curved:
                return tuple(torch.zeros_like(leaf) for leaf in inputs)
            outputs, along = zip(*[(g, tangents[name][k]) for name, g in curved], strict=True)
            return torch.autograd.grad(
                outputs, inputs, along, retain_graph=True, materialize_grads=True
            )

        rows = [product(k) for k in range(len(next(iter(tangents.values()))))]
    products = [torch.stack(column) for column in zip(*rows, strict=True)]
    plain = {name: g.detach() for name, g in zip(names, grads, strict=True)}
    return plain, dict(zip(names, products, strict=True))


def _leaves(params: Params, names: Sequence[str]) -> Params:
    """Leaves of their own that stand for θ."""
    leaves = {name: value.detach() for name, value in params.items()}
    for name in names:
        leaves[name].requires_grad_()
    return leaves


def _gradient(
    value: Value, leaves: Params, names: Sequence[str], *, create_graph: bool
) -> tuple[Tensor, ...]:
    inputs = [leaves[name] for name in names]
    with torch.enable_grad():
        loss = value(leaves)
        if not loss.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in inputs)
        return torch.autograd.grad(loss, inputs, create_graph=create_graph, materialize_grads=True)
