"""Several processes in one plain torch loop, sharing no code with the package or with Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

RANKS = 2


def shares(samples: int, epoch: int, batch_size: int, ranks: int) -> list[list[list[int]]]:
    """Per rank the batches of one epoch, as torch's distributed sampler deals them out."""
    dealt = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(samples), ranks, rank, shuffle=True, seed=0)  # type: ignore[arg-type, var-annotated]
        sampler.set_epoch(epoch)
        indices = list(sampler)
        dealt.append([indices[i : i + batch_size] for i in range(0, len(indices), batch_size)])
    return dealt


def windows(
    samples: int, epochs: int, batch_size: int, accumulate: int, ranks: int = RANKS
) -> Iterator[list[list[list[int]]]]:
    """Per step: per rank its micro-batches."""
    for epoch in range(epochs):
        dealt = shares(samples, epoch, batch_size, ranks)
        for start in range(0, len(dealt[0]), accumulate):
            yield [batches[start : start + accumulate] for batches in dealt]


def retrain(
    net: nn.Module,
    data: tuple[Tensor, ...],
    weights: Tensor,
    configure: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    epochs: int = 3,
    batch_size: int = 5,
    accumulate: int = 1,
    clip: tuple[str, float] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    ranks: int = RANKS,
) -> nn.Module:
    """Train with a weight for every sample; the gradient is the mean over the ranks."""
    x, y = data
    nets = [deepcopy(net) for _ in range(ranks)]
    optimizer = configure(list(nets[0].parameters()))
    scheduler = None if schedule is None else schedule(optimizer)
    for step in windows(len(x), epochs, batch_size, accumulate, ranks):
        for rank, micros in enumerate(step):
            nets[rank].zero_grad()
            for indices in micros:
                at = torch.tensor(indices)
                losses = F.cross_entropy(nets[rank](x[at]), y[at], reduction="none")
                ((losses * weights[at]).sum() / len(at) / accumulate).backward()
        for one, *others in zip(*(net.parameters() for net in nets), strict=True):
            gradients = [p.grad for p in (one, *others) if p.grad is not None]
            assert len(gradients) == ranks
            one.grad = torch.stack(gradients).sum(0) / ranks
        if clip is not None and clip[0] == "norm":
            nn.utils.clip_grad_norm_(nets[0].parameters(), clip[1])
        elif clip is not None:
            nn.utils.clip_grad_value_(nets[0].parameters(), clip[1])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for other in nets[1:]:
            other.load_state_dict(nets[0].state_dict())  # the weights, and rank 0's buffers
    return nets[0]


def mean_loss(net: nn.Module, data: tuple[Tensor, ...]) -> float:
    """The validation loss."""
    x, y = data
    with torch.no_grad():
        return float(F.cross_entropy(deepcopy(net).eval()(x), y))
