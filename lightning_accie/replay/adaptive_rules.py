"""The update rules of torch's other adaptive optimisers; see `update_rules` for the conventions.

| symbol | name here |
|---|---|
| v, accumulated squares | ``slots["square_avg"]``, ``["sum"]``, ``["exp_avg_sq"]`` |
| mean gradient, mean squared update | ``slots["grad_avg"]``, ``["acc_delta"]`` |
| u, the weighted infinity norm | ``slots["exp_inf"]`` |
| μ₁·μ₂·…·μ_t, NAdam's momenta so far | ``slots["mu_product"]`` |

Roots are taken of max(v, tiny), for the reason that `update_rules.Adam` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class _Adaptive:
    """What these rules share: they are not linear, and count their steps."""

    keys: ClassVar[tuple[str, ...]]

    def linear_in_gradient(self, settings: Mapping[str, Any]) -> bool:
        """Each divides by something made of the gradients.

        Returns:
            False.
        """
        return False

    def slots_from(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Read the slots and the step count.

        Returns:
            The slots and the number of updates so far.
        """
        slots = {key: state[key] for key in self.keys if state.get(key) is not None}
        return slots, int(state.get("step", 0))


def _decayed(param: Tensor, grad: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The gradient with its sign and with coupled weight decay."""
    if settings.get("maximize", False):
        grad = -grad
    if settings["weight_decay"] != 0:
        grad = grad.add(param, alpha=settings["weight_decay"])
    return grad


def _root(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


class RMSprop(_Adaptive):
    """`torch.optim.RMSprop`: centred, momentum, weight decay, maximize."""

    keys = ("square_avg", "grad_avg", "momentum_buffer")

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
            The new parameter and ``square_avg`` (and ``grad_avg``, ``momentum_buffer``).
        """
        grad = _decayed(param, grad, settings)
        alpha = settings["alpha"]
        zero = torch.zeros_like(grad)
        squares = slots.get("square_avg", zero).mul(alpha).addcmul(grad, grad, value=1 - alpha)
        new = {"square_avg": squares}
        if settings["centered"]:
            mean = new["grad_avg"] = torch.lerp(slots.get("grad_avg", zero), grad, 1 - alpha)
            squares = squares.addcmul(mean, mean, value=-1)
        denominator = _root(squares).add(settings["eps"])
        if settings["momentum"] > 0:
            buffer = slots.get("momentum_buffer", zero).mul(settings["momentum"])
            buffer = new["momentum_buffer"] = buffer.addcdiv(grad, denominator)
            return param.add(buffer, alpha=-settings["lr"]), new
        return param.addcdiv(grad, denominator, value=-settings["lr"]), new


class Adagrad(_Adaptive):
    """`torch.optim.Adagrad`: learning-rate decay, an initial accumulator, weight decay, maximize."""

    keys = ("sum",)

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
            The new parameter and ``sum``.
        """
        grad = _decayed(param, grad, settings)
        total = slots["sum"].addcmul(grad, grad, value=1)
        rate = settings["lr"] / (1 + step * settings["lr_decay"])
        denominator = _root(total).add(settings["eps"])
        return param.addcdiv(grad, denominator, value=-rate), {"sum": total}


class Adadelta(_Adaptive):
    """`torch.optim.Adadelta`: weight decay, maximize."""

    keys = ("square_avg", "acc_delta")

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
            The new parameter, ``square_avg`` and ``acc_delta``.
        """
        grad = _decayed(param, grad, settings)
        rho, eps = settings["rho"], settings["eps"]
        zero = torch.zeros_like(grad)
        squares = slots.get("square_avg", zero).mul(rho).addcmul(grad, grad, value=1 - rho)
        before = slots.get("acc_delta", zero)
        delta = before.add(eps).sqrt().div(squares.add(eps).sqrt()).mul(grad)
        moved = before.mul(rho).addcmul(delta, delta, value=1 - rho)
        return param.add(delta, alpha=-settings["lr"]), {"square_avg": squares, "acc_delta": moved}


class Adamax(_Adaptive):
    """`torch.optim.Adamax`: weight decay, maximize."""

    keys = ("exp_avg", "exp_inf")

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
            The new parameter, ``exp_avg`` and ``exp_inf``.
        """
        grad = _decayed(param, grad, settings)
        beta1, beta2 = settings["betas"]
        zero = torch.zeros_like(grad)
        mean = torch.lerp(slots.get("exp_avg", zero), grad, 1 - beta1)
        decayed = slots.get("exp_inf", zero).mul(beta2)
        norm = torch.maximum(decayed, grad.abs().add(settings["eps"]))
        rate = settings["lr"] / (1 - beta1 ** (step + 1))
        return param.addcdiv(mean, norm, value=-rate), {"exp_avg": mean, "exp_inf": norm}


class RAdam(_Adaptive):
    """`torch.optim.RAdam`: coupled and decoupled weight decay, maximize."""

    keys = ("exp_avg", "exp_avg_sq")

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
            The new parameter, ``exp_avg`` and ``exp_avg_sq``.
        """
        lr, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
        decoupled = settings["decoupled_weight_decay"]
        grad = _decayed(param, grad, {**settings, "weight_decay": 0.0 if decoupled else decay})
        if decoupled and decay != 0:
            param = param.mul(1 - lr * decay)
        zero = torch.zeros_like(grad)
        mean = torch.lerp(slots.get("exp_avg", zero), grad, 1 - beta1)
        squares = slots.get("exp_avg_sq", zero).mul(beta2).addcmul(grad, grad, value=1 - beta2)
        count = step + 1
        correction = 1 - beta2**count
        move = mean / (1 - beta1**count) * lr
        # ρ_t, the length of the moving average that v stands for: v is used once it is long enough.
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * count * (beta2**count) / correction
        if length > 5.0:
            adaptive = (correction**0.5) / _root(squares).add(settings["eps"])
            ratio = (length - 4) * (length - 2) * longest
            move = move * adaptive * (ratio / ((longest - 4) * (longest - 2) * length)) ** 0.5
        return param.add(move, alpha=-1.0), {"exp_avg": mean, "exp_avg_sq": squares}


class NAdam(_Adaptive):
    """`torch.optim.NAdam`: coupled and decoupled weight decay, maximize."""

    keys = ("exp_avg", "exp_avg_sq", "mu_product")

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
            The new parameter, ``exp_avg``, ``exp_avg_sq`` and ``mu_product`` (a number).
        """
        lr, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
        decoupled = settings["decoupled_weight_decay"]
        grad = _decayed(param, grad, {**settings, "weight_decay": 0.0 if decoupled else decay})
        if decoupled and decay != 0:
            param = param.mul(1 - lr * decay)
        count = step + 1
        momentum = _nesterov_momentum(beta1, count, settings)
        following = _nesterov_momentum(beta1, count + 1, settings)
        one = torch.ones((), dtype=_scalar_dtype(), device=param.device)
        product = (slots["mu_product"] if slots else one).mul(momentum)
        zero = torch.zeros_like(grad)
        mean = torch.lerp(slots.get("exp_avg", zero), grad, 1 - beta1)
        squares = slots.get("exp_avg_sq", zero).mul(beta2).addcmul(grad, grad, value=1 - beta2)
        denominator = _root(squares.div(1 - beta2**count)).add(settings["eps"])
        # torch reads the product as a number and computes with it in double precision. A tensor is
        # the same under `torch.func`, which allows no reading. (A number divided by a tensor would be
        # multiplied by its reciprocal, which rounds otherwise.)
        passed = product.double()
        now = torch.full_like(passed, -lr * (1.0 - momentum)).div(1.0 - passed).to(param.dtype)
        ahead = torch.full_like(passed, -lr * following).div(1.0 - passed * following)
        ahead = ahead.to(param.dtype)
        param = param.add((grad * now) / denominator)
        param = param.add((mean * ahead) / denominator)
        return param, {"exp_avg": mean, "exp_avg_sq": squares, "mu_product": product}


def _nesterov_momentum(beta1: float, count: int, settings: Mapping[str, Any]) -> float:
    """μ_t of NAdam's schedule."""
    return beta1 * (1.0 - 0.5 * (0.96 ** (count * settings["momentum_decay"])))


def _scalar_dtype() -> torch.dtype:
    """Of the numbers that torch's optimisers keep in tensors."""
    double = torch.get_default_dtype() == torch.float64
    return torch.float64 if double else torch.float32
