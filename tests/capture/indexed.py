"""Datasets whose samples are their own index, and a fit that notes what was drawn and claimed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_accie.capture.indices import IndexRecorder, pieces_of

LIGHTNING, PYTORCH_LIGHTNING = lightning.pytorch, pytorch_lightning
Batches = list[list[tuple[int, list[int]]]]
"""Per batch: (position of the loader, indices) of each loader that contributed."""

IGNORED = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*LeafSpec.* is deprecated:FutureWarning",  # Lightning's CombinedLoader, on torch 2.13
        ".*does not have many workers",
        ".*train_dataloader yielded None",
        ".*resuming from a checkpoint that ended before the epoch ended",
        "You requested to overfit but enabled train",
        "Be aware that when using `ckpt_path`",
        ".set_vital. is deprecated",  # torchdata 0.11, on torch 2.13
    )
]


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.as_tensor(index)


class NoLength:
    """A sampler without ``__len__``: Lightning then fetches one batch ahead."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        return iter(torch.randperm(self.size).tolist())


def loader(workers: int, size: int = 10, batch_size: int | None = 3, **options: Any) -> DataLoader:
    if "sampler" not in options:
        options.setdefault("shuffle", True)
    return DataLoader(Numbers(size), batch_size, num_workers=workers, **options)


def make_module(pl: ModuleType, loaders: Callable[[Any], Any]) -> Any:
    """A model of one weight that notes the samples it is given while a ``Probe`` is active."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.lr, self.batch_size = 0.01, 2
            self.seen: Batches = []
            self.losses: list[float] = []

        def train_dataloader(self) -> Any:
            return loaders(self)

        def val_dataloader(self) -> DataLoader:
            return loader(0, size=6, shuffle=False)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            leaves = [(source, leaf) for source, leaf in enumerate(tree_leaves(batch))]
            leaves = [(source, leaf.reshape(-1)) for source, leaf in leaves if leaf is not None]
            if any(isinstance(callback, Probe) for callback in self.trainer.callbacks):
                self.seen.append([(source, leaf.tolist()) for source, leaf in leaves])
            values = torch.cat([leaf for _, leaf in leaves]) / 10
            loss = ((self.weight * (values + 0.1 * torch.rand(1)) - 0.5) ** 2).mean()
            self.losses.append(loss.item())
            self.log("loss", loss, batch_size=1)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Module()


class Probe:
    """The hooks of a callback that records; mixed with either namespace's ``Callback``."""

    def __init__(self) -> None:
        self.recorder = IndexRecorder()
        self.claimed: Batches = []

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        if stage == "fit":
            self.recorder.attach(trainer)
            self.recorder.attach(trainer)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.recorder.on_train_start(trainer)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        pieces = pieces_of(self.recorder.claim(trainer)[0])
        assert all(piece.indices.dtype == np.int64 for piece in pieces)
        self.claimed.append([(piece.source, piece.indices.tolist()) for piece in pieces])

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.recorder.detach()

    def on_exception(self, *_: Any) -> None:
        self.recorder.detach()
        self.recorder.detach()


def make_callback(pl: ModuleType, hooks: type = Probe) -> Any:
    return type(hooks.__name__, (hooks, pl.Callback), {})()


def make_trainer(pl: ModuleType, callbacks: list[Any], **options: Any) -> Any:
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False}
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(callbacks=callbacks, **(defaults | dict.fromkeys(quiet, False) | options))


def fit(
    pl: ModuleType,
    loaders: Callable[[Any], Any],
    *others: Any,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Fit with the callbacks ``others`` and a recording one; give the latter and the module."""
    module, callback = make_module(pl, loaders), make_callback(pl)
    trainer = make_trainer(pl, [*others, callback], **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return callback, module
