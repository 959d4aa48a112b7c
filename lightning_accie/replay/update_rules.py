"""The update rules of `torch.optim` as pure functions of (parameter, gradient, slots, settings).

| symbol | name here |
|---|---|
| θ | ``param`` |
| g | ``grad`` |
| momentum buffer | ``slots["momentum_buffer"]`` |
| m, v, max v | ``slots["exp_avg"]``, ``["exp_avg_sq"]``, ``["max_exp_avg_sq"]`` |
| η, μ, τ, λ, β₁, β₂, ε | ``lr, momentum, dampening, weight_decay, betas, eps`` in ``settings`` |

Each rule performs the operations of torch's own single-tensor implementation in the same order, so
that a replay on the CPU gives the recorded parameters bit for bit. Each also runs under
`torch.func`'s transforms: no in-place operation, no branch on a tensor's value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.adaptive_rules import (
    Adadelta,
    Adagrad,
    Adamax,
    NAdam,
    RAdam,
    RMSprop,
)


class UpdateRule(Protocol):
    """One optimiser's update, for one parameter tensor.

    Register an instance with `register_update_rule` to make another optimiser replayable.
    """

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        step: int,
        settings: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step.

        Args:
            param: the parameter before the step, any shape.
            grad: its gradient, same shape, after clipping.
            slots: the parameter's slots before the step; empty at its first.
            step: how many updates this parameter has had before, from 0.
            settings: the hyper-parameters of its group, as in ``optimizer.param_groups``.

        Returns:
            The new parameter and the new slots.
        """
        ...

    def linear_in_gradient(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether the new state is affine in ``grad``, as for SGD.

        Returns:
            Whether one derivative describes the effect of any change of the gradient.
        """
        ...

    # A rule may also have `vjp` and `homogeneous`, for speed alone; see `SGD`.

    def slots_from(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Read a torch optimiser's state of one parameter.

        Returns:
            The slots, and the number of updates so far.
        """
        ...


class SGD:
    """`torch.optim.SGD`: momentum, dampening, Nesterov, weight decay, maximize.

    >>> rule = SGD()
    >>> settings = dict(lr=0.5, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False,
    ...                 maximize=False)
    >>> param, slots = rule.update(torch.ones(1), torch.ones(1), {}, 0, settings)
    >>> param, slots
    (tensor([0.5000]), {'momentum_buffer': tensor([1.])})
    """

    homogeneous = True
    """The step is linear in parameter, gradient and slots together: it is its own derivative."""

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        step: int,
        settings: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step; see `UpdateRule.update`.

        Returns:
            The new parameter and its ``momentum_buffer`` where there is momentum.
        """
        if settings["maximize"]:
            grad = -grad
        if settings["weight_decay"] != 0:
            grad = torch.add(grad, param, alpha=settings["weight_decay"])
        new_slots: dict[str, Tensor] = {}
        momentum = settings["momentum"]
        if momentum != 0:
            previous = slots.get("momentum_buffer")
            if previous is None:  # torch starts the buffer at g, without dampening
                buffer = grad
            else:
                buffer = previous.mul(momentum).add(grad, alpha=1 - settings["dampening"])
            new_slots["momentum_buffer"] = buffer
            grad = torch.add(grad, buffer, alpha=momentum) if settings["nesterov"] else buffer
        return torch.add(param, grad, alpha=-settings["lr"]), new_slots

    def vjp(
        self,
        param: Tensor,
        slots: Mapping[str, Tensor],
        slots_before: Collection[str],
        settings: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Pull a cotangent back through `update`, which is linear, without building a graph.

        Args:
            param: the cotangent of the new parameter.
            slots: the cotangents of the new slots.
            slots_before: the names of the slots before the step.
            settings: the hyper-parameters.

        Returns:
            The cotangents of the parameter, of the slots before the step, and of the gradient.
        """
        direction = param.mul(-settings["lr"])
        before: dict[str, Tensor] = {}
        momentum = settings["momentum"]
        if momentum != 0:
            nesterov = settings["nesterov"]
            buffer = slots["momentum_buffer"] + (direction.mul(momentum) if nesterov else direction)
            first = "momentum_buffer" not in slots_before
            grad = buffer if first else buffer.mul(1 - settings["dampening"])
            if nesterov:
                grad = grad + direction
            if not first:
                before["momentum_buffer"] = buffer.mul(momentum)
        else:
            grad = direction
        if settings["weight_decay"] != 0:
            param = torch.add(param, grad, alpha=settings["weight_decay"])
        return param, before, -grad if settings["maximize"] else grad

    def linear_in_gradient(self, settings: Mapping[str, Any]) -> bool:
        """SGD is affine in the gradient.

        Returns:
            True.
        """
        return True

    def slots_from(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Read the momentum buffer; SGD counts no steps.

        Returns:
            The slots and 0.
        """
        buffer = state.get("momentum_buffer")
        return ({} if buffer is None else {"momentum_buffer": buffer}), 0


class Adam:
    """`torch.optim.Adam` and `AdamW`: amsgrad, coupled or decoupled weight decay, maximize.

    √v is taken of max(v, tiny), with tiny the smallest normal number: beside ε this changes no bit
    of the result, and it makes the derivative at v = 0 zero instead of infinite (a weight that never
    got a gradient meets a zero tangent there, and ∞ · 0 would be NaN).

    Args:
        decoupled: whether weight decay is decoupled where the settings do not say so themselves
            (``AdamW`` of older torch releases).
    """

    def __init__(self, *, decoupled: bool = False) -> None:
        self.decoupled = decoupled

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        slots: Mapping[str, Tensor],
        step: int,
        settings: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step; see `UpdateRule.update`.

        Returns:
            The new parameter and ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``).
        """
        lr, (beta1, beta2) = settings["lr"], settings["betas"]
        if settings["maximize"]:
            grad = -grad
        if settings["weight_decay"] != 0:
            if settings.get("decoupled_weight_decay", self.decoupled):
                param = param.mul(1 - lr * settings["weight_decay"])
            else:
                grad = torch.add(grad, param, alpha=settings["weight_decay"])
        count = step + 1
        exp_avg = slots["exp_avg"] if slots else torch.zeros_like(grad)
        exp_avg_sq = slots["exp_avg_sq"] if slots else torch.zeros_like(grad)
        exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
        exp_avg_sq = exp_avg_sq.mul(beta2).addcmul(grad, grad, value=1 - beta2)
        new_slots = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        second = exp_avg_sq
        if settings["amsgrad"]:
            largest = slots["max_exp_avg_sq"] if slots else torch.zeros_like(grad)
            second = new_slots["max_exp_avg_sq"] = torch.maximum(largest, exp_avg_sq)
        root = second.clamp_min(torch.finfo(second.dtype).tiny).sqrt()
        denominator = (root / (1 - beta2**count) ** 0.5).add(settings["eps"])
        step_size = lr / (1 - beta1**count)
        return torch.addcdiv(param, exp_avg, denominator, value=-step_size), new_slots

    def linear_in_gradient(self, settings: Mapping[str, Any]) -> bool:
        """Adam divides by the root of the squared gradients.

        Returns:
            False.
        """
        return False

    def slots_from(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Read the moments and the step count.

        Returns:
            The slots and the number of updates so far.
        """
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return {key: state[key] for key in keys if key in state}, int(state.get("step", 0))


_RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(),
    torch.optim.AdamW: Adam(decoupled=True),
    torch.optim.RMSprop: RMSprop(),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adadelta: Adadelta(),
    torch.optim.Adamax: Adamax(),
    torch.optim.RAdam: RAdam(),
    torch.optim.NAdam: NAdam(),
}
_WITHOUT = {
    "ASGD": "the size of its step comes from the learning rate of the step before",
    "Adafactor": "it scales a whole parameter by what all of its entries have in common",
    "LBFGS": "it computes the loss several times in a step, and decides by its value",
    "Muon": "it takes its matrices apart in 16 bits, which round the effect of one sample away",
    "Rprop": "it follows the signs of the gradient alone, which have no derivative",
    "SparseAdam": "its gradients are sparse",
}
"""Optimisers of torch that have no rule here, and why."""


def shortcut(rule: UpdateRule, name: str) -> Any:
    """Find what a rule has for speed, if it is about the `update` that the rule has.

    Args:
        rule: the rule.
        name: ``"vjp"`` or ``"homogeneous"``.

    Returns:
        It; None without it, and where a subclass has another `update` than the class that has it.
    """
    for kind in type(rule).__mro__:
        if name in vars(kind):
            return getattr(rule, name)
        if "update" in vars(kind):
            return None
    return None


def register_update_rule(optimizer: type[torch.optim.Optimizer], rule: UpdateRule) -> None:
    """Make runs with another optimiser class replayable.

    The first-step self-check of every `fit` compares the rule with the optimiser's own step.

    Args:
        optimizer: the optimiser's class; subclasses need a registration of their own.
        rule: an object with the methods of `UpdateRule`.
    """
    _RULES[optimizer] = rule


def rule_for(optimizer: type[torch.optim.Optimizer]) -> UpdateRule:
    """Find the rule of an optimiser class.

    Returns:
        The rule.

    Raises:
        UnsupportedError: if none is registered for exactly this class.
    """
    rule = _RULES.get(optimizer)
    if rule is None:
        known = ", ".join(sorted(f"`{known.__name__}`" for known in _RULES))
        is_torchs = getattr(torch.optim, optimizer.__name__, None) is optimizer
        reason = _WITHOUT.get(optimizer.__name__) if is_torchs else None
        raise UnsupportedError(
            f"The optimiser `{optimizer.__name__}` has no update rule"
            + (f" ({reason})" if reason else "")
            + f", so its steps cannot be replayed. Use one of {known}, or register its rule with "
            "`lightning_accie.register_update_rule(YourOptimizer, rule)`."
        )
    return rule


def rule_named(name: str) -> UpdateRule:
    """Find the rule of an optimiser class by the qualified name that a trajectory recorded.

    Returns:
        The rule.

    Raises:
        UnsupportedError: if no registered class has this name.
    """
    for optimizer, rule in _RULES.items():
        if qualified_name(optimizer) == name:
            return rule
    raise UnsupportedError(
        f"The trajectory was recorded with the optimiser `{name}`, which has no update rule here. "
        "Register it with `lightning_accie.register_update_rule` before opening the trajectory."
    )


def optimizer_of(rule: UpdateRule) -> str:
    """Name the optimiser that a rule is registered for.

    Returns:
        The name of its class.
    """
    classes = (optimizer.__name__ for optimizer, known in _RULES.items() if known is rule)
    return next(classes, type(rule).__name__)


def qualified_name(optimizer: type) -> str:
    """Name a class as trajectories record it.

    Returns:
        Module and qualified name, joined by a dot.
    """
    return f"{optimizer.__module__}.{optimizer.__qualname__}"
