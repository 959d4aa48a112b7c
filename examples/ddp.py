"""Two processes: a ranking of distributed training, and the same of one process.

    python examples/ddp.py

Distributed data-parallel training on two CPU processes, by the backend gloo. Each sees half of every
batch, records what it draws, and takes a share of the exact replays. Then one process trains on the
same batches, and its ranking must be the same up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceScores


class DigitClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        image, label = batch
        return F.cross_entropy(self.net(image), label)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


def make_data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    data = TensorDataset(images, torch.tensor(digits.target))
    return TensorDataset(*data[:600]), TensorDataset(*data[600:])


def train_and_rank(
    loader: DataLoader[Any], val: DataLoader[Any], out: Path, seed: int, **trainer_settings: Any
) -> tuple[Trainer, InfluenceScores]:
    influence = InfluenceCallback(dirpath=out, overwrite=True, top_k=5, verify=10)
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **trainer_settings,
    )
    trainer.fit(DigitClassifier(), loader, val)
    assert influence.scores is not None
    return trainer, influence.scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank on two processes, and on one.")
    parser.add_argument("--out", type=Path, default=Path("out/ddp"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val = make_data()
    val_loader = DataLoader(val, batch_size=400)

    # Lightning starts this script a second time, as the other process, and deals the data out.
    loader = DataLoader(train, batch_size=25, shuffle=True)
    trainer, two = train_and_rank(
        loader, val_loader, arguments.out / "two", arguments.seed, devices=2, strategy="ddp"
    )
    if not trainer.is_global_zero:
        return  # the other process has done its part, and has the same scores

    # Batches of 50 in the order of Lightning's own sampler: both halves of what the two drew.
    sampler = DistributedSampler(train, num_replicas=1, rank=0, seed=arguments.seed)
    loader = DataLoader(train, batch_size=50, sampler=sampler)
    _, one = train_and_rank(loader, val_loader, arguments.out / "one", arguments.seed, devices=1)

    largest = float(one.influence.abs().max())
    apart = float((two.influence - one.influence).abs().max())
    print(f"\nLargest influence {largest:.1e}; two processes and one differ by at most {apart:.1e}")
    print(f"Report: {arguments.out / 'two' / 'report.html'}")
    assert two.index.tolist() == one.index.tolist()
    assert apart < 1e-3 * largest, "the rankings of two processes and of one differ"


if __name__ == "__main__":
    main()
