"""The optimiser's state s_t as one explicit record, and the few tree operations it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]
Slots = dict[str, dict[str, Tensor]]


class State(NamedTuple):
    """s_t: what an optimiser step reads and writes (method: section 1).

    A pytree of tensors, so `torch.func` maps over it. Tangents and cotangents of a state are
    `State`s too; a batch of K states carries a leading dimension K on every tensor.
    """

    params: Params
    """θ_t, every parameter that the optimiser updates, by its name in the module."""
    slots: Slots
    """What the optimiser keeps per parameter: ``{}`` before its first step, then momentum buffers,
    moments, …"""
    statistics: Params = {}  # noqa: RUF012 - never written to
    """The running statistics of normalisation layers, by their names in the module."""

    @property
    def visible(self) -> Params:
        """What an evaluation of the module sees: its parameters and its running statistics."""
        return {**self.params, **self.statistics}

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Apply ``function`` to every tensor.

        Returns:
            The state of the results.
        """
        return State(
            {name: function(value) for name, value in self.params.items()},
            {
                name: {key: function(value) for key, value in slots.items()}
                for name, slots in self.slots.items()
            },
            {name: function(value) for name, value in self.statistics.items()},
        )

    def only(self, names: Collection[str] | None) -> State:
        """Leave out parameters, with what the optimiser keeps for them.

        Args:
            names: the parameters to keep; None for all.

        Returns:
            The state of those, with all running statistics.
        """
        if names is None:
            return self
        return State(
            {name: value for name, value in self.params.items() if name in names},
            {name: group for name, group in self.slots.items() if name in names},
            self.statistics,
        )

    def leaves(self) -> list[Tensor]:
        """List every tensor, parameters first.

        Returns:
            The tensors, in an order that depends on the structure alone.
        """
        slots = [value for group in self.slots.values() for value in group.values()]
        return [*self.params.values(), *slots, *self.statistics.values()]

    def nbytes(self) -> int:
        """Count the bytes of every tensor.

        Returns:
            The sum over the tensors.
        """
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves())


def unflatten_like(state: State, leaves: list[Tensor]) -> State:
    """Put ``leaves`` (in the order of `State.leaves`) into the structure of ``state``.

    Returns:
        A state of the same structure.
    """
    values = iter(leaves)
    params = {name: next(values) for name in state.params}
    slots = {name: {key: next(values) for key in group} for name, group in state.slots.items()}
    return State(params, slots, {name: next(values) for name in state.statistics})


def zeros_like(state: State, *, batch: int | None = None) -> State:
    """Make a zero tangent of ``state``, or ``batch`` of them stacked.

    Returns:
        A state of zeros.
    """
    lead = () if batch is None else (batch,)
    return state.map(lambda value: value.new_zeros((*lead, *value.shape)))


def pad_slots(tangent: State, like: State, *, batch: int | None = None) -> State:
    """Give ``tangent`` a zero slot for every slot that ``like`` has and it lacks.

    Returns:
        A tangent with the structure of ``like``.
    """
    lead = () if batch is None else (batch,)

    def slot(name: str, key: str, value: Tensor) -> Tensor:
        have = tangent.slots.get(name, {}).get(key)
        return value.new_zeros((*lead, *value.shape)) if have is None else have

    slots = {
        name: {key: slot(name, key, value) for key, value in group.items()}
        for name, group in like.slots.items()
    }
    return State(tangent.params, slots, tangent.statistics)


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """⟨left, right⟩ over all parameters, accumulated in float64.

    Where ``left`` carries a leading dimension K that ``right`` lacks, the result is ``[K]``.

    Returns:
        The inner product.
    """
    total: Tensor | None = None
    for name, value in right.items():
        rows = left[name].reshape(*left[name].shape[: left[name].dim() - value.dim()], -1)
        term = (rows.double() * value.reshape(-1).double()).sum(-1)
        total = term if total is None else total + term
    if total is None:
        return torch.zeros((), dtype=torch.float64)
    return total


def stack(state: State, batch: int) -> State:
    """Repeat ``state`` ``batch`` times along a new leading dimension, without copying.

    Returns:
        The batch of states.
    """
    return state.map(lambda value: value.expand(batch, *value.shape))


def tree_bytes(tree: object) -> int:
    """Count the bytes of every tensor in a nested batch.

    Returns:
        The sum over the tensors.
    """
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor)
    )
