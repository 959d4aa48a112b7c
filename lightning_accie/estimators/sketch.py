"""V from mixed gradients: the directions in which a run moves its parameters when samples are left out.

Every Δ_j is made of the g_j of its visits, damped by the steps in between. A gradient with random
weights, Σ_i ω_i g_i, mixes those of a step's samples, and few such mixtures span what the leading right
singular vectors of all of them do (Halko, Martinsson, Tropp, arXiv 0909.4061).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis, complete, leading
from lightning_accie.estimators.chunks import chunk_size
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

    Raises:
        UnsupportedError: if the mixtures do not fit the memory budget, before any is computed.
    """
    start, end = replay.walker.start().state.params, replay.final.state.params
    names = replay.walker.program.trainable
    size = sum(end[name].numel() for name in names)
    count = _OVERSAMPLING * rank if rank < size else 0
    _check_memory(min(rank, size), count, sum(end[name].nbytes for name in names), replay)
    if not count:
        return complete(names, end)
    generator = torch.Generator().manual_seed(seed)
    last = len(replay.walker) - 1 if through else int(replay.first.max())
    steps = torch.linspace(0, last, count).round().long().tolist()
    points = _POINTS[:1] if through else _POINTS
    planned = Counter((step, points[k % len(points)]) for k, step in enumerate(steps))
    found, rows = end[names[0]].new_zeros(count, size), 0
    at_once = chunk_size(replay, 4)
    with replay.progress.task("low-rank: directions", last + 1) as advance:
        for visit in replay.walker.forwards():
            for point in points:
                mixtures = planned[visit.step, point]
                if mixtures and visit.map.losses:
                    line = {name: torch.lerp(v, end[name], point) for name, v in start.items()}
                    at = visit.state.params if through else line
                    for some in found[rows : rows + mixtures].split(at_once):
                        _mix(some, visit, at, names, generator)
                    rows += mixtures
            advance(1)
            if visit.step == last:
                break
    return leading(found[:rows], rank, names, end)


def _check_memory(rank: int, mixtures: int, each: int, replay: Replay) -> None:
    need, have = (rank + mixtures) * each / 1e6, replay.memory_budget / 1e6
    if need > have:
        raise UnsupportedError(
            f"{rank} directions of this model, and the gradients that they are found from, take "
            f"{need:.0f} MB, and `memory_budget` leaves {have:.0f} MB for them. Raise "
            "`memory_budget=`, or take a smaller `rank=`."
        )


def _mix(
    rows: Tensor, visit: Visit, params: Params, names: tuple[str, ...], generator: torch.Generator
) -> None:
    """Fill ``[K, p]`` with mixtures of the gradients of a step's samples."""
    ones = visit.map.ones()
    weights = torch.randn(len(rows), len(ones), generator=generator, dtype=torch.float64)
    mixed = visit.map.gradients(params, weights.to(ones))
    parts = rows.split([params[name].numel() for name in names], 1)
    for name, part in zip(names, parts, strict=True):
        if name in mixed:
            part.copy_(mixed[name].reshape(len(rows), -1))
