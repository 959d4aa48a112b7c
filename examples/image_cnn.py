"""Pictures and a convolutional network: which training pictures harm, and are they mislabelled?

    python examples/image_cnn.py

600 of scikit-learn's digits, 60 of them mislabelled on purpose. A small network with convolutions,
BatchNorm and Adam is trained; the report shows the pictures of the strongest examples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback

MISLABELLED, LOOKED_AT = 60, 40


class DigitCNN(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # BatchNorm cancels a bias, and Adam would scale up the rounding of its gradient.
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.GELU()),
            *(nn.Flatten(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        image, label, _ = batch
        return F.cross_entropy(self.net(image), label)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        image, label, _ = batch
        logits = self.net(image)
        self.log("val_loss", F.cross_entropy(logits, label))
        self.log("val_accuracy", (logits.argmax(1) == label).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def make_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Pictures, labels, and whether the label was changed: 600 to train with, 400 to validate."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)[:1000]
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    labels = torch.tensor(digits.target)[order]
    wrong = torch.zeros(len(order), dtype=torch.bool)
    wrong[torch.randperm(600, generator=generator)[:MISLABELLED]] = True
    shift = torch.randint(1, 10, (len(order),), generator=generator)
    data = TensorDataset(images, torch.where(wrong, (labels + shift) % 10, labels), wrong)
    return TensorDataset(*data[:600]), TensorDataset(*data[600:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank pictures by their influence.")
    parser.add_argument("--out", type=Path, default=Path("out/image_cnn"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val = make_data(arguments.seed)
    influence = InfluenceCallback(
        monitor="val_loss",
        dirpath=arguments.out,
        overwrite=True,
        top_k=5,
        verify=10,
        describe=lambda sample: {"label": int(sample[1]), "mislabelled": bool(sample[2])},
    )
    seed_everything(arguments.seed)
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        DigitCNN(),
        DataLoader(train, batch_size=50, shuffle=True),
        DataLoader(val, batch_size=200),
    )
    scores = influence.scores
    assert scores is not None
    assert scores.main_agreement is not None

    worst = scores.top_harmful(LOOKED_AT)
    found = sum(worst.columns["mislabelled"])
    print(f"\nval_accuracy {trainer.callback_metrics['val_accuracy']:.3f}")
    print(f"{found} of the {LOOKED_AT} most harmful pictures are mislabelled")
    print(f"Report: {arguments.out / 'report.html'}")
    assert found >= 0.6 * LOOKED_AT, "the mislabelled pictures do not lead the ranking"
    assert scores.main_agreement.kendall_tau > 0.6, "the estimates do not follow exact replay"


if __name__ == "__main__":
    main()
