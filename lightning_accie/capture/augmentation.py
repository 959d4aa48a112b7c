"""Whether the training data are made anew at random each time: the first batch is made twice.

Two makings from different states of the generators must give the same batch. A generator that ends
where it depends on its beginning was drawn from, even if the batch came out the same (a flip with
probability ½ of a single sample may). One that ends in the same state from both was seeded on the way,
by the sample's index say, and is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.capture.generators import kept
from lightning_accie.data import training_loaders
from lightning_accie.replay import random_state
from lightning_accie.replay.batches import BatchSource
from lightning_accie.replay.module import overrides_transfer, transfer_hooks
from lightning_accie.replay.neutral import StandInTrainer, neutral_copy
from lightning_accie.trajectory.batch_forms import leaves_of
from lightning_accie.trajectory.records import Piece

_SEEDS = (1, 2)


def find_randomness(pieces: Sequence[Piece], combined: Any, module: Any, trainer: Any) -> str:
    """Look for randomness between the dataset and ``training_step``.

    Args:
        pieces: the samples of a batch.
        combined: the training data, as the Trainer combined it.
        module: the LightningModule.
        trainer: the Trainer.

    Returns:
        Where it was found, in words; empty where there is none.
    """
    device = trainer.strategy.root_device
    cuda = device if device.type == "cuda" else None
    loaders, assemble = training_loaders(combined)
    source = BatchSource(loaders, assemble, cache_bytes=0)
    roots = [part for loader in loaders for part in (loader.dataset, loader.collate_fn)]
    datamodule = trainer.datamodule
    with random_state.isolated(cuda), kept([*roots, datamodule]):
        if _varies(lambda: source.build(pieces), cuda):
            return "in the dataset or its `collate_fn`"
        if not overrides_transfer(module, datamodule):
            return ""
        twin = neutral_copy(module, StandInTrainer({}, trainer)).to(device)
        hooks = transfer_hooks(twin, datamodule, device)
        if hooks is not None and _varies(lambda: hooks(source.build(pieces), device), cuda):
            return "in the batch transfer hooks"
    return ""


def _varies(make: Callable[[], Any], cuda: torch.device | None) -> bool:
    """Make a batch twice, from different states of the generators, and compare."""
    made, started, ended = [], [], []
    for seed in _SEEDS:
        random_state.seed(seed, cuda=cuda)
        started.append(random_state.capture(cuda=cuda, host=True))
        made.append([_bytes(leaf) for leaf in leaves_of(make())])
        ended.append(random_state.capture(cuda=cuda, host=True))
    moved = (name for name in ended[0] if not torch.equal(started[0][name], ended[0][name]))
    drawn = any(not torch.equal(ended[0][name], ended[1][name]) for name in moved)
    return drawn or made[0] != made[1]


def _bytes(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        dense = leaf.detach().cpu()
        dense = dense.to_dense() if dense.layout != torch.strided else dense
        return dense.shape, dense.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.shape, leaf.tobytes()
    return repr(leaf)
