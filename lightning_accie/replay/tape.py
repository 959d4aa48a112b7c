"""A gradient with its graph, to be differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_accie.replay.outputs import Outputs
from lightning_accie.replay.state import Params


class Bound(NamedTuple):
    """A loss of the module's bound parameters."""

    loss: Tensor
    params: Params
    """Those parameters."""
    statistics: Params
    """The running statistics after it, those that are followed."""
    outputs: Sequence[Outputs]
    """What entered its losses; see `WeightedReduction.outputs`."""


class Tapeable(Protocol):
    """What a tape is made of: a `MicroLoss` on bound parameters."""

    def bound(self, weights: Tensor, statistics: Params) -> Bound:
        """The loss and what belongs to it."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Where a backward pass over it belongs."""
        ...

    def ones(self) -> Tensor:
        """The weights of the real run."""
        ...


Pulled = tuple[Params, Tensor, Params]
"""Of a micro-batch: Hμ + (∂b'/∂θ)ᵀν, γ, and (∂b'/∂b)ᵀν."""


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
        statistics: the running statistics before the micro-batch, those that are followed.
        followed: the same after it, with their graph.
        held: where the next backward pass belongs.
        outputs: f, the network's outputs that enter the losses.
        errors: ∂L/∂f, with their graph.
    """

    value: Tensor
    inputs: Params
    weights: Tensor
    grads: Params
    statistics: Params
    followed: Params
    held: Callable[[], AbstractContextManager[None]]
    outputs: Sequence[Outputs] = ()
    errors: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls,
        loss: Tapeable,
        names: tuple[str, ...],
        statistics: Params | None = None,
        *,
        create_graph: bool = True,
    ) -> Tape:
        """Run a loss and take its gradient.

        Args:
            loss: the micro-batch.
            names: the parameters to differentiate for; none for the outputs' errors alone.
            statistics: the running statistics before it; none where they do not matter.
            create_graph: whether the gradient is to be differentiated again.

        Returns:
            The tape.
        """
        weights = loss.ones().requires_grad_(create_graph)
        before = {n: value.detach().requires_grad_() for n, value in (statistics or {}).items()}
        with loss.held(), torch.enable_grad():
            value, parameters, followed, outputs = loss.bound(weights, before)
            distinct = {id(one.value): one for one in outputs if one.value.requires_grad}
            outputs = list(distinct.values())
            inputs = [*(parameters[name] for name in names), *(one.value for one in outputs)]
            grads: Sequence[Tensor] = ()
            if inputs:
                grads = torch.autograd.grad(
                    value, inputs, create_graph=create_graph, allow_unused=True
                )
        used = {name: g for name, g in zip(names, grads, strict=False) if g is not None}
        of = {name: parameters[name] for name in used}
        pairs = zip(outputs, grads[len(names) :], strict=True)
        kept = [(one, error) for one, error in pairs if error is not None]
        return cls(
            value.detach(),
            of,
            weights,
            used,
            before,
            followed,
            loss.held,
            [one for one, _ in kept],
            [error for _, error in kept],
        )

    def without(self, names: Collection[str]) -> Tape:
        """Leave out parameters: nothing is then differentiated for them.

        Args:
            names: those to leave out.

        Returns:
            A tape on the same graph.
        """
        inputs = {name: value for name, value in self.inputs.items() if name not in names}
        return replace(self, inputs=inputs, grads={name: self.grads[name] for name in inputs})

    def detached(self) -> Params:
        """The gradient alone.

        Returns:
            ∇_θ L by parameter name.
        """
        return {name: value.detach() for name, value in self.grads.items()}

    def product(self, mu: Params, nu: Params | None = None) -> Pulled:
        """Differentiate ⟨μ, ∇_θ L(θ, w)⟩ + ⟨ν, b'(θ, b)⟩ once more; the graph is used up.

        Args:
            mu: μ by parameter name.
            nu: ν by name, for the running statistics b' after the micro-batch.

        Returns:
            Hμ + (∂b'/∂θ)ᵀν by parameter name; γ ``[B]`` with γ_i = ⟨μ, ∂∇_θL/∂w_i⟩; and
            (∂b'/∂b)ᵀν by name.
        """
        return self._named(self._pull(*self._along(mu, nu or {})))

    def product_and_outputs(self, mu: Params, nu: Params) -> tuple[Pulled, Sequence[Tensor]]:
        """The same, and by the same backward pass Jμ, how the outputs move along μ.

        ⟨μ, ∇_θ L⟩ = ⟨Jμ, e⟩ is linear in the errors e, and what is differentiated goes through them.

        Args:
            mu: μ by parameter name.
            nu: ν by name.

        Returns:
            What `product` gives; and Jμ, of each of ``outputs`` in its own shape.
        """
        found = self._pull(*self._along(mu, nu), also=self.errors)
        rest = len(found) - len(self.errors)
        return self._named(found[:rest]), found[rest:]

    def products(self, along: Sequence[tuple[Params, Params]], *, batched: bool) -> list[Pulled]:
        """The same for several (μ, ν); the graph is used up.

        Args:
            along: μ and ν, one pair a query.
            batched: whether these backward passes run side by side, under `torch.func.vmap`.

        Returns:
            What `product` gives, for each.
        """
        pairs = [self._along(*one) for one in along]
        if not batched:
            last = len(pairs) - 1
            return [
                self._named(self._pull(*pair, retain_graph=place < last))
                for place, pair in enumerate(pairs)
            ]
        stacked = [torch.stack(values) for values in zip(*(pair[1] for pair in pairs), strict=True)]
        found = self._pull(pairs[0][0], stacked, is_grads_batched=True)
        return [self._named([value[place] for value in found]) for place in range(len(pairs))]

    def _along(self, mu: Params, nu: Params) -> tuple[list[Tensor], list[Tensor]]:
        """What is differentiated, and in which proportions."""
        outputs = [(g, mu[name]) for name, g in self.grads.items() if g.requires_grad]
        outputs += [(self.followed[name], value) for name, value in nu.items()]
        return [value for value, _ in outputs], [weight for _, weight in outputs]

    def _pull(
        self,
        values: Sequence[Tensor],
        along: Sequence[Tensor],
        also: Sequence[Tensor] = (),
        **options: bool,
    ) -> Sequence[Tensor]:
        inputs = [self.weights, *self.inputs.values(), *self.statistics.values(), *also]
        with self.held():
            return torch.autograd.grad(values, inputs, along, materialize_grads=True, **options)

    def _named(self, found: Sequence[Tensor]) -> Pulled:
        by_weights, *rest = found
        by_name = dict(zip([*self.inputs, *self.statistics], rest, strict=True))
        before = {name: by_name.pop(name) for name in self.statistics}
        return by_name, by_weights, before
