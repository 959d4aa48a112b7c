"""V from mixed gradients: the directions in which a run moves its parameters when samples are left out.

Every Δ_j is made of the g_j of its visits, damped by the steps in between. A gradient with random
weights, Σ_i ω_i g_i, mixes those of a step's samples, and few such mixtures span what the leading right
singular vectors of all of them do (Halko, Martinsson, Tropp, arXiv 0909.4061). The run's first steps, as
many as it takes to see every sample, are mixed at several points on the line from θ_0 to θ_T; to mix
them along the run itself takes a walk over all of it, and brings no more (see docs/estimators.md).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis, complete, leading
from lightning_accie.replay.state import Params
from lightning_accie.replay.walker import Visit

_OVERSAMPLING = 4
"""Mixtures for each direction."""
_POINTS = 5
"""Points on the line from θ_0 to θ_T."""


def sketched(replay: Replay, rank: int, seed: int) -> Basis:
    """Find V.

    Args:
        replay: the run.
        rank: r.
        seed: of the random weights.

    Returns:
        r directions, or fewer where the mixtures span no more; all directions where r is no smaller
        than the number of trained parameters.
    """
    start, end = replay.walker.start().state.params, replay.final.state.params
    names = replay.walker.program.trainable
    if rank >= sum(end[name].numel() for name in names):
        return complete(names, end)
    generator = torch.Generator().manual_seed(seed)
    count = _OVERSAMPLING * rank
    steps = torch.linspace(0, int(replay.first.max()), count).round().long().tolist()
    planned = Counter((step, place % _POINTS) for place, step in enumerate(steps))
    rows: list[Tensor] = []
    with replay.progress.task("low-rank: directions", steps[-1] + 1) as advance:
        for visit in replay.walker.forwards():
            for point in range(_POINTS):
                along = point / (_POINTS - 1)
                at = {n: torch.lerp(value, end[n], along) for n, value in start.items()}
                if planned[visit.step, point]:
                    rows.append(_mixed(visit, at, names, planned[visit.step, point], generator))
            advance(1)
            if visit.step == steps[-1]:
                break
    return leading(torch.cat(rows), rank, names, end)


def _mixed(
    visit: Visit, params: Params, names: tuple[str, ...], count: int, generator: torch.Generator
) -> Tensor:
    """Mixtures of the gradients of a step's samples, ``[count, p]``; none where it drew none."""
    ones = visit.map.ones()
    weights = torch.randn(count, len(ones), generator=generator, dtype=torch.float64).to(ones)
    found = visit.map.gradients(params, weights) if len(ones) else {}
    parts = [
        found[name] if name in found else params[name].new_zeros(count, params[name].numel())
        for name in names
    ]
    return torch.cat([part.reshape(count, -1) for part in parts], 1)
