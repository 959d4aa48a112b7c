"""Slow references that share no code with the package: plain torch training with sample weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def retrain(
    net: nn.Module,
    data: Sequence[Tensor],
    batches: Sequence[Sequence[Sequence[int]]],
    configure: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    weights: Tensor,
    *,
    rates: Sequence[float] | None = None,
    clip: tuple[str, float] | None = None,
    accumulate: int | Sequence[int] = 1,
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> nn.Module:
    """Train ``net`` in place by torch's own optimiser and clipping.

    ``batches[t]`` lists step t's micro-batches; sample i's loss is multiplied by ``weights[i]``, and
    the denominator stays the number of samples, times
    ``accumulate`` (also in a partial last window, as Lightning has it), which may be one a step.
    """
    x, y = data
    optimizer = configure(list(net.parameters()))
    for t, step in enumerate(batches):
        optimizer.zero_grad()
        window = accumulate if isinstance(accumulate, int) else accumulate[t]
        for micro in step:
            index = torch.tensor(list(micro))
            losses = loss(net(x[index]), y[index], reduction="none")
            losses = losses.reshape(len(index), -1).mean(1)
            total = (losses * weights[index]).sum() / len(index) / window
            total.backward()
        if clip is not None:
            if clip[0] == "norm":
                nn.utils.clip_grad_norm_(net.parameters(), clip[1])
            else:
                nn.utils.clip_grad_value_(net.parameters(), clip[1])
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[t]
        optimizer.step()
    return net


def central_difference(query: Callable[[Tensor], float], count: int, j: int) -> float:
    """dq/dw_j at ones, through training."""
    h = 1e-5
    up, down = torch.ones(count).double(), torch.ones(count).double()
    up[j] += h
    down[j] -= h
    return (query(up) - query(down)) / (2 * h)


def mean_loss(
    net: nn.Module, data: Sequence[Tensor], loss: Callable[..., Tensor] = F.cross_entropy
) -> float:
    """The query: the mean loss over validation data."""
    x, y = data
    with torch.no_grad():
        return float(loss(net(x), y))


def recorded_batches(trajectory: Any) -> list[list[list[int]]]:
    """The micro-batches that a trajectory recorded."""
    return [
        [[int(i) for piece in micro.pieces for i in piece.indices] for micro in step.micro_batches]
        for step in trajectory.steps()
    ]


def recorded_rates(trajectory: Any) -> list[float]:
    return [float(step.settings[0]["lr"]) for step in trajectory.steps()]


def set_parameters(net: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(params[name])
    return net


__all__ = [
    "central_difference",
    "mean_loss",
    "recorded_batches",
    "recorded_rates",
    "retrain",
    "set_parameters",
]
