"""Rows of a table: which patients pull a regression away, and was their outcome mistyped?

    python examples/tabular_regression.py

scikit-learn's diabetes: ten measurements of a patient, and the progression of the disease a year
later, from 25 to 346. In 20 of 340 training rows it is 400 too high on purpose. An example is a
dict, so the report shows each row with the names of its columns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback

MISTYPED, SLIP = 20, 400.0
FEATURES = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
Row = dict[str, float]


class Progression(LightningModule):
    """Predicts the progression, measured in its standard deviations, by mean squared error."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        table = torch.tensor([[row[name] for name in FEATURES] for row in rows])
        outcome = torch.tensor([row["progression"] for row in rows])
        self.register_buffer("centre", table.mean(0))
        self.register_buffer("spread", table.std(0))
        self.mean, self.deviation = float(outcome.mean()), float(outcome.std())
        self.net = nn.Sequential(nn.Linear(len(FEATURES), 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        table = torch.stack([batch[name] for name in FEATURES], 1).float()
        predicted = self.net((table - self.centre) / self.spread).squeeze(1)
        return F.mse_loss(predicted, (batch["progression"].float() - self.mean) / self.deviation)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def make_data(seed: int) -> tuple[list[Row], list[Row], set[int]]:
    """340 rows to train with, 102 to validate, and which of the first were mistyped."""
    table, outcome = load_diabetes(return_X_y=True, scaled=False)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        dict(zip([*FEATURES, "progression"], map(float, [*table[i], outcome[i]]), strict=True))
        for i in torch.randperm(len(outcome), generator=generator).tolist()
    ]
    mistyped = set(torch.randperm(340, generator=generator)[:MISTYPED].tolist())
    for number in mistyped:
        rows[number]["progression"] += SLIP
    return rows[:340], rows[340:], mistyped


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank rows of a table by their influence.")
    parser.add_argument("--out", type=Path, default=Path("out/tabular_regression"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val, mistyped = make_data(arguments.seed)
    influence = InfluenceCallback(
        monitor="val_loss",
        dirpath=arguments.out,
        overwrite=True,
        top_k=5,
        verify=10,
        describe=lambda row: {name: row[name] for name in ("bmi", "s5", "progression")},
    )
    seed_everything(arguments.seed, verbose=False)
    trainer = Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        Progression(train),
        DataLoader(train, batch_size=34, shuffle=True),
        DataLoader(val, batch_size=102),
    )
    scores = influence.scores
    assert scores is not None

    worst = scores.top_harmful(MISTYPED)
    for row in worst.top_harmful(3):
        note = "mistyped" if row["index"] in mistyped else "as it was"
        print(f"\n{row['influence']:+.4f}, {note}: {train[row['index']]}")
    found = len(mistyped & set(worst.index.tolist()))
    print(
        f"\n{found} of the {MISTYPED} most harmful rows were mistyped ({MISTYPED} of {len(train)} were)"
    )
    print(f"Report: {arguments.out / 'report.html'}")
    assert found >= 0.5 * MISTYPED, "the mistyped rows do not lead the ranking"


if __name__ == "__main__":
    main()
