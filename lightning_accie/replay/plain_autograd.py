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

from lightning_accie.replay.state import Params, State

Value = Callable[[Params, Params], tuple[Tensor, Params]]
"""(θ, b) -> (L, b'): a loss as a function of all parameters, and the running statistics after it."""
Held = Callable[[Params], AbstractContextManager[None]]
"""Keeps the module on given parameters while a backward pass may run parts of it again."""


def gradient(
    value: Value, params: Params, statistics: Params, names: Sequence[str], held: Held
) -> tuple[Params, Params]:
    """∇_θL, and the running statistics after it.

    Args:
        value: L.
        params: θ.
        statistics: b.
        names: the parameters to differentiate for.
        held: see `Held`.

    Returns:
        The gradient and b' by name, without a graph.
    """
    leaves = _leaves(params, names)
    with held(leaves):
        grads, after = _gradient(value, leaves, statistics, names, create_graph=False)
    after = {name: one.detach() for name, one in after.items()}
    return dict(zip(names, grads, strict=True)), after


def gradient_and_products(
    value: Value, state: State, names: Sequence[str], tangents: State, held: Held
) -> tuple[Params, Params, Params]:
    """∇_θL, HΔ_k for K tangents, and the tangents of the running statistics after it.

    Args:
        value: L.
        state: θ and b.
        names: the parameters to differentiate for; Δ is zero elsewhere.
        tangents: Δ, K of them stacked.
        held: see `Held`.

    Returns:
        The gradient by name; the products and the tangents of b', K of them stacked.
    """
    leaves = _leaves(state.params, names)
    before = _leaves(state.statistics, tuple(state.statistics))
    inputs = [leaves[name] for name in names]
    count = len(next(iter(tangents.params.values())))
    with held(leaves):
        grads, after = _gradient(value, leaves, before, names, create_graph=True)
        curved = [(name, g) for name, g in zip(names, grads, strict=True) if g.requires_grad]

        def product(k: int) -> tuple[Tensor, ...]:
            if not curved:
                return tuple(torch.zeros_like(leaf) for leaf in inputs)
            outputs, along = zip(
                *[(g, tangents.params[name][k]) for name, g in curved], strict=True
            )
            return torch.autograd.grad(
                outputs, inputs, along, retain_graph=True, materialize_grads=True
            )

        rows = [product(k) for k in range(count)]
        moved = _pushed(after, {**{n: leaves[n] for n in names}, **before}, tangents.visible, count)
    products = [torch.stack(column) for column in zip(*rows, strict=True)]
    plain = {name: g.detach() for name, g in zip(names, grads, strict=True)}
    return plain, dict(zip(names, products, strict=True)), moved


def _pushed(outputs: Params, inputs: Params, tangents: Params, count: int) -> Params:
    """JΔ_k by reverse mode alone: uᵀJ is linear in u, and its derivative along Δ is JΔ."""
    if not outputs:
        return {}
    dual = [torch.zeros_like(value, requires_grad=True) for value in outputs.values()]
    back = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        dual,
        create_graph=True,
        materialize_grads=True,
    )
    linear = [(name, b) for name, b in zip(inputs, back, strict=True) if b.requires_grad]
    values = [value for _, value in linear]
    rows = [
        torch.autograd.grad(
            values,
            dual,
            [tangents[name][k] for name, _ in linear],
            retain_graph=True,
            materialize_grads=True,
        )
        for k in range(count)
    ]
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip(outputs, columns, strict=True))


def _leaves(params: Params, names: Sequence[str]) -> Params:
    """Leaves of their own that stand for θ."""
    leaves = {name: value.detach() for name, value in params.items()}
    for name in names:
        leaves[name].requires_grad_()
    return leaves


def _gradient(
    value: Value, leaves: Params, statistics: Params, names: Sequence[str], *, create_graph: bool
) -> tuple[tuple[Tensor, ...], Params]:
    inputs = [leaves[name] for name in names]
    with torch.enable_grad():
        loss, after = value(leaves, statistics)
        if not loss.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in inputs), after
        grads = torch.autograd.grad(loss, inputs, create_graph=create_graph, materialize_grads=True)
    return grads, after
