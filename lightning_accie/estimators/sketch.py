"""V from mixed gradients: the directions in which a run moves its parameters when samples are left out.

Every Δ_j is made of the g_j of its visits, damped by the steps in between. A gradient with random
weights, Σ_i ω_i g_i, mixes those of a step's samples, and few such mixtures span what the leading right
singular vectors of all of them do (Halko, Martinsson, Tropp, arXiv 0909.4061).
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
_POINTS = tuple((place / 4) ** (1 / 3) for place in range(5))
"""Points on the line from θ_0 to θ_T: denser towards its end, where a run spends most of its steps."""


def sketched(replay: Replay, rank: int, seed: int, *, through: bool) -> Basis:
    """Find V.

    Args:
        replay: the run.
        rank: r.
        seed: of the random weights.
        through: whether to walk through the whole run. Otherwise the steps that it takes to see
            every sample are mixed at points on the line from θ_0 to θ_T, which is nearly as good.

    Returns:
        r directions, or fewer where the mixtures span no more; all directions where r is no smaller
        than the number of trained parameters.
    """
    start, end = replay.walker.start().state.params, replay.final.state.params
    names = replay.walker.program.trainable
    if rank >= sum(end[name].numel() for name in names):
        return complete(names, end)
    generator = torch.Generator().manual_seed(seed)
    last = len(replay.walker) - 1 if through else int(replay.first.max())
    steps = torch.linspace(0, last, _OVERSAMPLING * rank).round().long().tolist()
    points = _POINTS[:1] if through else _POINTS
    planned = Counter((step, points[k % len(points)]) for k, step in enumerate(steps))
    rows: list[Tensor] = []
    with replay.progress.task("low-rank: directions", last + 1) as advance:
        for visit in replay.walker.forwards():
            for point in points:
                count = planned[visit.step, point]
                if count and visit.map.losses:
                    line = {name: torch.lerp(v, end[name], point) for name, v in start.items()}
                    at = visit.state.params if through else line
                    rows.append(_mixed(visit, at, names, count, generator))
            advance(1)
            if visit.step == last:
                break
    return leading(torch.cat(rows), rank, names, end)


def _mixed(
    visit: Visit, params: Params, names: tuple[str, ...], count: int, generator: torch.Generator
) -> Tensor:
    """Mixtures of the gradients of a step's samples, ``[count, p]``."""
    ones = visit.map.ones()
    weights = torch.randn(count, len(ones), generator=generator, dtype=torch.float64).to(ones)
    found = visit.map.gradients(params, weights)
    parts = [
        found[name] if name in found else params[name].new_zeros(count, params[name].numel())
        for name in names
    ]
    return torch.cat([part.reshape(count, -1) for part in parts], 1)
