"""Batches that are built while a derivative is taken, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from lightning_accie import DataValueEmbedding, SgdIE
from lightning_accie.replay.batches import BatchCache
from lightning_accie.trajectory.records import MicroBatch, Piece
from tests.problems import Classifier, classification, record, sgd, smooth_net

MICRO = MicroBatch((Piece(0, np.arange(3)),), 0, 0, 0, 0.5, 1, draws=False)


def test_a_batch_that_is_built_inside_transforms_serves_outside_them() -> None:
    cache = BatchCache(10_000)

    def fetch() -> Tensor:
        return cache.get(MICRO, lambda _: torch.stack([torch.ones(2), 2 * torch.ones(2)]))

    x = torch.ones(2, 2)
    jvp(grad(lambda p: (p * fetch()).square().sum()), (x,), (x,))
    kept = fetch()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    assert torch.equal(grad(lambda p: (p * kept).sum())(x), kept)


@pytest.mark.parametrize("kept", [0, 300, 10**6], ids=["none", "two", "all"])
def test_estimators_in_turn_whatever_is_kept(tmp_path: Path, kept: int) -> None:
    engine = record(
        tmp_path, Classifier(smooth_net(), sgd()), classification(24), classification(11, seed=3)
    )
    replay = engine.replay("val_loss")
    batches = replay.walker.program.batches
    replay.walker.product = "reverse-over-forward"
    batches.keep(0)
    batches.keep(kept)
    SgdIE().estimate(replay)
    for step in engine.trajectory.steps():
        for one in step.micro_batches:
            tensors = [t for t in pytree.tree_leaves(batches.fetch(one)) if isinstance(t, Tensor)]
            assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    assert bool(DataValueEmbedding().estimate(replay).influence.isfinite().all())
