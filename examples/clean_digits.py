"""Find mislabelled digits, drop the most harmful examples, and see whether the model gets better.

    python examples/clean_digits.py --out out/clean_digits

scikit-learn's digits, a tenth of the training labels flipped on purpose. One callback records the
run and ranks the training examples by their influence on the validation loss. Then the network is
trained again, several times, without the most harmful examples, and without as many drawn at random.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_accie import InfluenceCallback

EPOCHS, BATCH, RATE = 30, 50, 0.2
FLIPPED_SHARE = 0.1


class DigitClassifier(LightningModule):
    """An ordinary module: it knows nothing of influence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, label, _ = batch
        loss = F.cross_entropy(self.net(image), label)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        image, label, _ = batch
        self.log("val_loss", F.cross_entropy(self.net(image), label))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        image, label, _ = batch
        logits = self.net(image)
        self.log("test_loss", F.cross_entropy(logits, label))
        self.log("test_accuracy", (logits.argmax(1) == label).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def make_data(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """800 training digits with a tenth of the labels flipped, 400 to validate, the rest to test."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[order, None]
    labels = torch.tensor(digits.target)[order]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[torch.randperm(800, generator=generator)[: int(800 * FLIPPED_SHARE)]] = True
    shift = torch.randint(1, 10, (len(labels),), generator=generator)
    labels = torch.where(flipped, (labels + shift) % 10, labels)
    parts = (slice(0, 800), slice(800, 1200), slice(1200, None))
    train, val, test = (TensorDataset(images[p], labels[p], flipped[p]) for p in parts)
    return train, val, test


def make_trainer(**settings: Any) -> Trainer:
    """One process on the CPU."""
    return Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, enable_model_summary=False, **settings
    )


def test_after_training(
    dataset: Dataset[Any], test: Dataset[Any], seed: int
) -> tuple[float, float]:
    """Train a fresh network on ``dataset``; its test loss and accuracy."""
    seed_everything(seed, verbose=False)
    model = DigitClassifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = make_trainer(**quiet)
    trainer.fit(model, DataLoader(dataset, batch_size=BATCH, shuffle=True))
    (result,) = trainer.test(model, DataLoader(test, batch_size=200), verbose=False)
    return result["test_loss"], result["test_accuracy"]


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    found = torch.tensor(values)
    spread = f" ± {found.std():.4f}" if len(found) > 1 else ""
    return f"{found.mean():.4f}{spread}"


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    quieten()
    train, val, test = make_data(arguments.seed)

    influence = InfluenceCallback(
        monitor="val_loss",
        dirpath=arguments.out,
        overwrite=True,
        top_k=10,
        verify=20,
        loss_column=True,
        describe=lambda sample: {"label": int(sample[1]), "flipped": bool(sample[2])},
    )
    seed_everything(arguments.seed, verbose=False)
    trainer = make_trainer(
        callbacks=[influence],
        logger=[TensorBoardLogger(arguments.out, "tensorboard"), CSVLogger(arguments.out, "csv")],
        default_root_dir=arguments.out,
        enable_checkpointing=False,
    )
    loaders = DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(val, batch_size=200)
    trainer.fit(DigitClassifier(), *loaders)
    scores = influence.scores
    assert scores is not None

    drop = int(train.tensors[2].sum())
    worst = scores.top_harmful(drop)
    hits = sum(worst.columns["flipped"])
    console.print(
        f"\n{hits} of the {len(worst)} most harmful examples carry a flipped label "
        f"({drop} of {len(train)} were flipped; at random: {drop * drop / len(train):.0f})."
    )
    by_loss = torch.tensor(scores.columns["loss"]).argsort(descending=True)[:drop]
    flipped_by_loss = sum(scores.columns["flipped"][i] for i in by_loss.tolist())
    console.print(f"By plain training loss: {flipped_by_loss} of {drop}.\n")

    compare(console, scores, train, test, len(worst), arguments.seeds)
    console.print(
        f"\nRanking: {arguments.out / 'scores.csv'}\nReport:  {arguments.out / 'report.html'}"
    )
    assert hits >= 0.6 * len(worst), "the flipped labels do not lead the ranking"


def compare(
    console: Console, scores: Any, train: TensorDataset, test: TensorDataset, drop: int, seeds: int
) -> None:
    """Retrain without the most harmful examples, and without as many at random."""
    results: dict[str, list[tuple[float, float]]] = {"all": [], "at random": [], "harmful": []}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        kept = torch.randperm(len(train), generator=generator)[drop:].tolist()
        results["all"].append(test_after_training(train, test, seed))
        results["at random"].append(test_after_training(Subset(train, kept), test, seed))
        results["harmful"].append(test_after_training(scores.cleaned(train, drop), test, seed))
    times = "once" if seeds == 1 else f"{seeds} times each"
    spread = "" if seeds == 1 else " (mean ± sd)"
    console.print(f"Retrained {times}, on the test set{spread}:")
    for name, runs in results.items():
        what = "trained on everything  " if name == "all" else f"without {drop} {name}"
        losses, accuracies = zip(*runs, strict=True)
        console.print(
            f"  {what:26s} loss {mean_and_spread(list(losses))}   "
            f"accuracy {mean_and_spread(list(accuracies))}"
        )
    mean = {name: sum(loss for loss, _ in runs) / len(runs) for name, runs in results.items()}
    gain, chance = mean["all"] - mean["harmful"], mean["all"] - mean["at random"]
    verdict = "helped" if gain > max(chance, 0.0) else "did not help"
    console.print(
        f"\nDropping the {drop} most harmful examples {verdict}: the test loss changed by "
        f"{-gain:+.4f}, against {-chance:+.4f} when as many were dropped at random. To find flipped "
        "labels alone, the plain training loss is as good or better; influence says which "
        "examples move this validation loss, and by how much."
    )


def quieten() -> None:
    """Keep Lightning's advice on tiny runs out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        for part in ("", ".utilities.rank_zero"):
            logging.getLogger(name + part).setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*no `val_dataloader`.*",
    ):
        warnings.filterwarnings("ignore", advice)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/clean_digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5, help="retrainings of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    main()
