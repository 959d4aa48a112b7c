"""What a user's own package may hold, found by import path from a YAML file."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tests.problems import classification


def describe(sample: Any) -> dict[str, Any]:
    return {"label": int(sample[1])}


def loss_of_class_0(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return (F.cross_entropy(module.net(x), y, reduction="none") * (y == 0)).mean()


def make(library: ModuleType) -> tuple[type, type]:
    """A module and a datamodule of one of Lightning's two namespaces."""

    class Linear(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3).double()
            self.lr = lr

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)

    class Points(library.LightningDataModule):  # type: ignore[misc, name-defined]
        def __init__(self, batch_size: int = 6) -> None:
            super().__init__()
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            return DataLoader(classification(24), batch_size=self.batch_size, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(classification(11, seed=3), batch_size=7)

    return Linear, Points
