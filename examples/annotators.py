"""Groups: which of five annotators hurts the model?

    python examples/annotators.py

Five annotators label 120 of scikit-learn's digits each. Four take every fiftieth for another digit,
one is careless and takes every fourth. The single influences of an annotator's pictures are added
up, and the run is replayed exactly without each annotator's pictures.
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

from lightning_accie import InfluenceCallback, InfluenceEngine

ANNOTATORS = ["Ada", "Ben", "Cleo", "Dan", "Eve"]
CARELESS = "Cleo"


class DigitClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss(self, batch: list[Tensor]) -> Tensor:
        image, label, _ = batch
        return F.cross_entropy(self.net(image), label)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


def make_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Pictures, labels and the annotator's number: 600 to train with, 1197 to validate."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    labels = torch.tensor(digits.target)[order]
    annotator = torch.randint(0, len(ANNOTATORS), (len(order),), generator=generator)
    rate = torch.where(annotator == ANNOTATORS.index(CARELESS), 0.25, 0.02)
    wrong = torch.rand(len(order), generator=generator) < rate
    wrong[600:] = False
    shift = torch.randint(1, 10, (len(order),), generator=generator)
    data = TensorDataset(images, torch.where(wrong, (labels + shift) % 10, labels), annotator)
    return TensorDataset(*data[:600]), TensorDataset(*data[600:])


def annotator_of(sample: tuple[Tensor, ...]) -> str:
    return ANNOTATORS[int(sample[2])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the annotator who hurts the model.")
    parser.add_argument("--out", type=Path, default=Path("out/annotators"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val = make_data(arguments.seed)
    loaders = DataLoader(train, batch_size=50, shuffle=True), DataLoader(val, batch_size=400)
    influence = InfluenceCallback(
        monitor="val_loss",
        dirpath=arguments.out,
        overwrite=True,
        top_k=5,
        verify=10,
        console=False,
        describe=lambda sample: {"label": int(sample[1]), "annotator": annotator_of(sample)},
    )
    seed_everything(arguments.seed, verbose=False)
    model = DigitClassifier()
    Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(model, *loaders)
    scores = influence.scores
    assert scores is not None

    engine = InfluenceEngine(
        arguments.out, model, loaders[0], val_dataloaders=loaders[1], progress=False
    )
    together = engine.groups(annotator_of, acc=False)
    summed = scores.by("annotator")
    exact = dict(zip(together.name, together.exact.tolist(), strict=True))
    before = scores.info["query_value"]
    print(f"{together}\n")
    print(f"val_loss {before:.4f}; without {CARELESS}'s pictures {before + exact[CARELESS]:.4f}")
    print(f"Report: {arguments.out / 'report.html'}")
    assert together.to_dict()["group"][0] == CARELESS, "exact replay blames another annotator"
    assert summed.to_dict()["group"][0] == CARELESS, (
        "the sums of influences blame another annotator"
    )
    assert exact[CARELESS] < 0, "the model is no better without the careless annotator"


if __name__ == "__main__":
    main()
