"""U: gradient clipping, then the optimiser's rule, for all parameters of a step; and its derivative."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import jvp, vmap

from lightning_accie.replay.state import Params, Slots, State, unflatten_like
from lightning_accie.replay.update_rules import UpdateRule, shortcut


@dataclass(frozen=True)
class Clip:
    """Gradient clipping as `Trainer` does it: ``"norm"`` (global) or ``"value"``, at ``limit``.

    Attributes:
        rest: gradients of parameters that are not clipped here, but count in the norm.
    """

    algorithm: str
    limit: float
    rest: Params = field(default_factory=dict)

    def __call__(self, grads: Params) -> Params:
        """Clip; the operations are those of `torch.nn.utils.clip_grad_norm_` in its order.

        Returns:
            The clipped gradients.
        """
        if self.algorithm == "value":
            return {name: g.clamp(-self.limit, self.limit) for name, g in grads.items()}
        if not grads:
            return grads
        # The norm's derivative at 0 is defined as 0 by torch for both modes of differentiation.
        norms = torch.stack(
            [torch.linalg.vector_norm(g) for g in (*grads.values(), *self.rest.values())]
        )
        total = torch.linalg.vector_norm(norms)
        coefficient = torch.clamp(self.limit / (total + 1e-6), max=1.0)
        return {name: g * coefficient for name, g in grads.items()}


@dataclass(frozen=True)
class Update:
    """U: clipping, then the optimiser's rule with the step's settings.

    Attributes:
        rule: the optimiser's update rule.
        settings: per parameter name, the hyper-parameters of its group at this step.
        counts: per parameter name, the updates it has had before.
        clip: gradient clipping, or None.
    """

    rule: UpdateRule
    settings: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int]
    clip: Clip | None

    def __call__(self, state: State, grads: Params) -> State:
        """Apply one update. A parameter without a gradient stays as it is, as in torch.

        Running statistics are not the optimiser's: they pass through.

        Returns:
            The next state.
        """
        if self.clip is not None:
            grads = self.clip(grads)
        params: Params = {}
        slots: Slots = {}
        for name, param in state.params.items():
            old = state.slots.get(name, {})
            if name not in grads:
                params[name], slots[name] = param, dict(old)
            else:
                params[name], new = self.rule.update(
                    param, grads[name], old, self.counts[name], self.settings[name]
                )
                slots[name] = dict(sorted(new.items()))
        return State(params, slots, state.statistics)

    @property
    def linear(self) -> bool:
        """Whether the next state is affine in the gradient."""
        settings = list(self.settings.values())
        distinct = [s for i, s in enumerate(settings) if all(s is not t for t in settings[:i])]
        return self.clip is None and all(self.rule.linear_in_gradient(s) for s in distinct)

    def push(self, state: State, grads: Params, tangents: State, along: Params) -> State:
        """Push K tangents through, where the next state is affine in the gradient.

        Args:
            state: s.
            grads: the gradient.
            tangents: of the state, K of them stacked.
            along: the tangents of the gradient, K of them stacked.

        Returns:
            The tangents of the next state, K of them stacked.
        """
        if shortcut(self.rule, "homogeneous"):
            return self(tangents, along)
        return vmap(lambda *both: jvp(self.__call__, (state, grads), both)[1])(tangents, along)

    def vjp(self, state: State, grads: Params, cotangent: State) -> tuple[State, Params]:
        """Pull a cotangent of the next state back to (state, gradient).

        Returns:
            The cotangents of the state and of the gradient.
        """
        if self.linear and (vjp := shortcut(self.rule, "vjp")):
            return self._linear_vjp(state, cotangent, grads.keys(), vjp)
        leaves = [leaf.detach().requires_grad_() for leaf in state.leaves()]
        at = {name: g.detach().requires_grad_() for name, g in grads.items()}
        with torch.enable_grad():
            new = self(unflatten_like(state, leaves), at)
        outputs, cotangents = [], []
        for out, value in zip(new.leaves(), cotangent.leaves(), strict=True):
            if out.requires_grad:
                outputs.append(out)
                cotangents.append(value)
        inputs = [*leaves, *at.values()]
        pulled = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
        back = unflatten_like(state, list(pulled[: len(leaves)]))
        return back, dict(zip(at, pulled[len(leaves) :], strict=True))

    def _linear_vjp(
        self, state: State, cotangent: State, used: Collection[str], vjp: Callable[..., Any]
    ) -> tuple[State, Params]:
        """The same by the rule's own formula."""
        params: Params = {}
        slots: Slots = {}
        grads: Params = {}
        for name, value in cotangent.params.items():
            after = cotangent.slots.get(name, {})
            if name not in used:
                params[name], slots[name] = value, dict(after)
                continue
            before = state.slots.get(name, {})
            params[name], slots[name], grads[name] = vjp(value, after, before, self.settings[name])
        return State(params, slots, cotangent.statistics), grads
