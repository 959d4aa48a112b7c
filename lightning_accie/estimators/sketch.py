"""Which directions a run moves its parameters in, when samples are left out: V from mixed gradients.

Every Δ_j is made of the η g_j of its visits, damped by the steps in between. A gradient with random
weights, Σ_i ω_i η g_i, mixes those of a step's samples, and few such mixtures span what the leading
right singular vectors of all of them do (Halko, Martinsson, Tropp, arXiv 0909.4061).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis, complete, leading
from lightning_accie.replay.walker import Visit

_OVERSAMPLING = 4


class Sketch:
    """Collects mixed gradients at steps spread over a run.

    Args:
        replay: the run.
        rank: r.
        seed: of the random weights.
    """

    def __init__(self, replay: Replay, rank: int, seed: int) -> None:
        self._params = replay.final.state.params
        self._names = replay.walker.program.trainable
        self._rank = rank
        self._size = sum(self._params[name].numel() for name in self._names)
        self._generator = torch.Generator().manual_seed(seed)
        rows = torch.linspace(0, len(replay.walker) - 1, _OVERSAMPLING * rank).round().long()
        self._per_step = torch.bincount(rows, minlength=len(replay.walker)).tolist()
        self._rows: list[Tensor] = []

    @property
    def _complete(self) -> bool:
        return self._rank >= self._size

    def meet(self, visit: Visit) -> None:
        """Mix the gradients of a step's samples, if it is one of those chosen."""
        count = self._per_step[visit.step]
        if not count or self._complete or not visit.map.losses:
            return
        ones = visit.map.ones()
        weights = torch.randn(count, len(ones), generator=self._generator, dtype=torch.float64)
        mixed = visit.map.gradients(visit.state.params, weights.to(ones))
        parts = []
        for name in self._names:
            if name in mixed:
                rate = float(visit.map.update.settings[name]["lr"])
                parts.append(rate * mixed[name].reshape(count, -1))
            else:
                parts.append(ones.new_zeros(count, self._params[name].numel()))
        self._rows.append(torch.cat(parts, 1))

    def basis(self) -> Basis:
        """V.

        Returns:
            r directions, or fewer where the mixtures span no more; all of them where r is large enough.
        """
        if self._complete:
            return complete(self._names, self._params)
        return leading(torch.cat(self._rows), self._rank, self._names, self._params)
