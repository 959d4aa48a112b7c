"""Every sample's own training loss, which finds flipped labels better than any influence."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accie.estimators.base import Replay


def training_losses(replay: Replay) -> Tensor:
    """Read each sample's loss at its last visit, before that step's update.

    Args:
        replay: the run.

    Returns:
        ``[n]`` float64, for ``replay.samples``: ℓ_i where the step's loss is their mean.
    """
    losses = torch.full((replay.span,), float("nan"), dtype=torch.float64)
    with replay.progress.task("training losses", len(replay.walker)) as advance:
        for visit in replay.walker.forwards():
            for loss in visit.map.losses:
                if bool((replay.last[replay.positions(loss.samples)] == visit.step).any()):
                    weights = loss.ones().requires_grad_()
                    with torch.enable_grad():
                        value = loss.bound(weights, {}).loss
                        (share,) = torch.autograd.grad(value, [weights])
                    scale = len(weights) * loss.micro.divisor  # type: ignore[attr-defined]
                    losses[loss.samples] = share.double().cpu() * scale
            advance(1)
    return losses[replay.samples]
