"""LightningCLI: the callback, its estimator and the columns of the tables come from a YAML file.

    python examples/lightning_cli/main.py fit --config examples/lightning_cli/config.yaml

600 of scikit-learn's digits, 60 of them mislabelled on purpose. Results go to
``out/lightning_cli``, or elsewhere with ``--trainer.callbacks.dirpath elsewhere`` behind the config.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback


class DigitClassifier(LightningModule):
    def __init__(self, hidden: int = 32, rate: float = 0.2) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        image, label, _ = batch
        return F.cross_entropy(self.net(image), label)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)


class Digits(LightningDataModule):
    """Pictures, labels, and whether the label was changed: 600 to train with, 400 to validate."""

    def __init__(self, batch_size: int = 50, mislabelled: int = 60, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits.target), generator=generator)[:1000]
        images = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
        labels = torch.tensor(digits.target)[order]
        wrong = torch.zeros(len(order), dtype=torch.bool)
        wrong[torch.randperm(600, generator=generator)[:mislabelled]] = True
        shift = torch.randint(1, 10, (len(order),), generator=generator)
        data = TensorDataset(images, torch.where(wrong, (labels + shift) % 10, labels), wrong)
        self.train, self.val = TensorDataset(*data[:600]), TensorDataset(*data[600:])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=200)


def describe(sample: tuple[Tensor, ...]) -> dict[str, Any]:
    """The columns of the tables; config.yaml names this function."""
    return {"label": int(sample[1]), "mislabelled": bool(sample[2])}


def main() -> None:
    cli = LightningCLI(DigitClassifier, Digits, save_config_callback=None)
    (influence,) = (c for c in cli.trainer.callbacks if isinstance(c, InfluenceCallback))
    assert influence.scores is not None

    worst = influence.scores.top_harmful(40)
    found = sum(worst.columns["mislabelled"])
    print(f"{found} of the {len(worst)} most harmful pictures are mislabelled")
    print(f"Report: {influence.directory / 'report.html'}")
    assert found >= 24, "the mislabelled pictures do not lead the ranking"


if __name__ == "__main__":
    main()
