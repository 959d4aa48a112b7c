"""One wrong prediction: which training examples made it, and is it right without them?

    python examples/explain_prediction.py

A classifier of scikit-learn's digits learns from 500 pictures, 40 of them mislabelled on purpose.
One test picture that it gets wrong is explained: by how much does each training picture push the
wrong digit above the right one? Then the run is replayed exactly without the 10 that push hardest,
and without 10 others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, write_report

NAMED = 10


class DigitClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        image, label, _ = batch
        return F.cross_entropy(self.net(image), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


def make_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Pictures, labels, and whether the label was changed: 500 to train with, 1297 to test."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    labels = torch.tensor(digits.target)[order]
    wrong = torch.zeros(len(order), dtype=torch.bool)
    wrong[torch.randperm(500, generator=generator)[:40]] = True
    shift = torch.randint(1, 10, (len(order),), generator=generator)
    data = TensorDataset(images, torch.where(wrong, (labels + shift) % 10, labels), wrong)
    return TensorDataset(*data[:500]), TensorDataset(*data[500:])


def choose_mistake(model: DigitClassifier, test: TensorDataset) -> tuple[int, int]:
    """Of the wrong predictions, the one of median margin: its index, and the digit predicted."""
    images, labels, _ = test.tensors
    with torch.no_grad():
        logits = model.net(images)
    margin = logits.amax(1) - logits.gather(1, labels[:, None])[:, 0]  # [n], 0 where it is right
    wrong = margin.nonzero()[:, 0]
    index = int(wrong[margin[wrong].argsort()[len(wrong) // 2]])
    return index, int(logits[index].argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description="Explain one wrong prediction.")
    parser.add_argument("--out", type=Path, default=Path("out/explain_prediction"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, test = make_data(arguments.seed)
    influence = InfluenceCallback(run="manual", dirpath=arguments.out, overwrite=True)
    seed_everything(arguments.seed, verbose=False)
    model = DigitClassifier()
    loader = DataLoader(train, batch_size=50, shuffle=True)
    Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(model, loader)

    picture, taken_for = choose_mistake(model, test)
    label = int(test[picture][1])
    one = DataLoader(Subset(test, [picture]))
    print(f"Test picture {picture} is a {label}, taken for a {taken_for}.")

    def margin(module: DigitClassifier, batch: list[Tensor]) -> Tensor:
        """How far the wrong digit's logit is above the right one's; below 0 the prediction is right."""
        logits = module.net(batch[0])
        return (logits[:, taken_for] - logits[:, label]).mean()

    engine = InfluenceEngine(arguments.out, model, loader, progress=False)
    why = engine.explain(
        one,
        margin,
        verify=10,
        describe=lambda sample: {"label": int(sample[1]), "mislabelled": bool(sample[2])},
    ).scores(0)
    print(why)
    against = why.top_harmful(NAMED)
    for row in against:
        note = ", mislabelled" if row["mislabelled"] else ""
        print(f"  {row['influence']:+.4f}  training picture {row['index']}, a {row['label']}{note}")
    write_report(why, arguments.out / "report.html", top_k=NAMED, sample=engine.sample)

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    others = [number for number in order if number not in against.index][:NAMED]
    without = engine.groups(
        {"named": against.index, "others": others}, margin, query_dataloader=one, acc=False
    )
    before = why.info["query_value"]
    without_named, without_others = (before + without.exact).tolist()
    print(f"Margin of the wrong digit: {before:+.3f}")
    print(f"  trained without these {NAMED}:    {without_named:+.3f}")
    print(f"  trained without {NAMED} others:   {without_others:+.3f}")
    print(f"Report: {arguments.out / 'report.html'}")
    assert without_named < 0 < before, "without the named pictures the prediction is still wrong"
    assert without_named < without_others, "leaving out any others does as much"


if __name__ == "__main__":
    main()
