"""Which samples a run drew, how often, and when."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_accie.replay.batches import Batches
from lightning_accie.trajectory.records import RecordedSteps


def drawn(trajectory: RecordedSteps, batches: Batches) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every drawn sample's number, visits, and first and last step.

    Args:
        trajectory: the recorded run.
        batches: where its batches come from.

    Returns:
        ``[n]`` int64 each; the numbers ascend.
    """
    per_step = [
        np.concatenate(
            [batches.sample_numbers(micro) for micro in step.micro_batches] or [np.zeros(0, int)]
        )
        for step in trajectory.steps()
    ]
    everything = np.concatenate(per_step)
    steps = np.repeat(np.arange(len(per_step)), [len(part) for part in per_step])
    samples, first, counts = np.unique(everything, return_index=True, return_counts=True)
    _, backwards = np.unique(everything[::-1], return_index=True)
    last = len(everything) - 1 - backwards
    found = (samples, counts, steps[first], steps[last])
    parts = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in found]
    return parts[0], parts[1], parts[2], parts[3]
