"""A gradient with its graph, to be differentiated once more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_accie.replay.state import Params


class Tapeable(Protocol):
    """What a tape is made of: a `MicroLoss` on bound parameters."""

    def bound(self, weights: Tensor) -> tuple[Tensor, Params]:
        """The loss and the parameters it depends on."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Where a backward pass over it belongs."""
        ...

    def ones(self) -> Tensor:
        """The weights of the real run."""
        ...


def saved_bytes(action: Callable[[], object]) -> int:
    """Measure what autograd keeps for the backward pass of a computation.

    Args:
        action: the computation.

    Returns:
        The bytes of all saved tensors; one that is saved twice counts twice.
    """
    held = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        action()
    return held


@dataclass(frozen=True)
class Tape:
    """∇_θ L(θ, w) at w = 1 of one micro-batch.

    Attributes:
        value: L, without its graph.
        inputs: θ, by name.
        weights: ``[B]``, w.
        grads: ∇_θ L with its graph; parameters that the loss does not use have none.
        held: where the next backward pass belongs.
    """

    value: Tensor
    inputs: Params
    weights: Tensor
    grads: Params
    held: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(cls, loss: Tapeable, names: tuple[str, ...], *, create_graph: bool = True) -> Tape:
        """Run a loss and take its gradient.

        Args:
            loss: the micro-batch.
            names: the parameters to differentiate for.
            create_graph: whether the gradient is to be differentiated again.

        Returns:
            The tape.
        """
        weights = loss.ones().requires_grad_(create_graph)
        with loss.held(), torch.enable_grad():
            value, parameters = loss.bound(weights)
            inputs = [parameters[name] for name in names]
            grads = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)
        used = {name: g for name, g in zip(names, grads, strict=True) if g is not None}
        of = {name: parameters[name] for name in used}
        return cls(value.detach(), of, weights, used, loss.held)

    def detached(self) -> Params:
        """The gradient alone.

        Returns:
            ∇_θ L by parameter name.
        """
        return {name: value.detach() for name, value in self.grads.items()}

    def product(self, mu: Params) -> tuple[Params, Tensor]:
        """Differentiate ⟨μ, ∇_θ L(θ, w)⟩ once more; the graph is used up.

        Args:
            mu: μ by parameter name.

        Returns:
            Hμ by parameter name, and γ ``[B]`` with γ_i = ⟨μ, ∂∇_θL/∂w_i⟩.
        """
        curved = {name: g for name, g in self.grads.items() if g.requires_grad}
        with self.held():
            *by_params, by_weights = torch.autograd.grad(
                list(curved.values()),
                [*self.inputs.values(), self.weights],
                [mu[name] for name in curved],
                materialize_grads=True,
            )
        return dict(zip(self.inputs, by_params, strict=True)), by_weights
