"""The influence of leaving out whole sets of samples at once: w = 1 − Σ_{j ∈ S} e_j.

Exact replay and ACC-SGD-IE take a set as they take a sample; first-order estimates of a set are
the sums of its members'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accie.estimators.base import Estimate, Replay
from lightning_accie.estimators.chunks import ChunkedEstimator


def leave_out(estimator: ChunkedEstimator, replay: Replay, sets: Tensor) -> Estimate:
    """Estimate the influence of sets.

    Args:
        estimator: `LeaveOneOut`, or `AccSgdIE` whose correction is not drawn at random.
        replay: the run and the query.
        sets: ``[K, span]`` bool, which sample numbers belong to each.

    Returns:
        The K influences; ``samples`` are the sets' places. A set of which the run drew nothing has
        influence 0.
    """
    drawn = sets[:, replay.samples]
    never = len(replay.walker)
    first = torch.where(drawn, replay.first, never).amin(1)
    order = torch.argsort(first, stable=True)
    order = order[first[order] < never]
    count = len(sets)
    influence = torch.zeros(count, dtype=torch.float64)
    trusted = torch.ones(count, dtype=torch.bool)
    noise = float("nan")
    parts = order.split(estimator.at_once(replay)) if len(order) else ()
    title = f"{estimator.name} of {count} sets"
    with replay.progress.task(title, len(parts) * len(replay.walker)) as advance:
        for part in parts:
            carried = estimator.carry(replay, sets[part], first[part], advance)
            found = estimator.found(replay, part, estimator.measure(replay, carried))
            influence[part], trusted[part] = found.influence, found.trusted
            noise = found.noise if noise != noise else max(noise, found.noise)
    return Estimate(estimator.name, torch.arange(count), influence, trusted, noise=noise)
