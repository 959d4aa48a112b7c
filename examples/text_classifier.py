"""Texts: which training sentences harm a topic classifier, and are they filed under a wrong topic?

    python examples/text_classifier.py

The sentences are generated: patterns whose blanks are filled with words of a topic, or now and then
of any topic. 50 of 500 training sentences are filed under another topic on purpose. The report
shows the sentences themselves.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback

MISLABELLED, LOOKED_AT = 50, 40
TOPICS = {
    "cooking": "oven dough garlic recipe sauce butter onion kitchen flavour soup",
    "space": "orbit rocket moon telescope launch planet shuttle crater gravity comet",
    "sport": "goal referee match coach stadium striker season penalty league keeper",
    "medicine": "patient dose nurse fever surgery clinic virus symptom vaccine therapy",
}
PATTERNS = [
    "After the {} we talked about the {} and the {}.",
    "Nobody had expected a {} like that, least of all with such a {}.",
    "The {} was late, so the {} had to wait for the {} and a second {}.",
    "Can anyone explain what the {} has to do with the {}?",
    "I read that a good {} matters more than the {} or the {}.",
    "They changed the {} twice, and in the end the {} was fine.",
]


def sentence(topic: str, dice: random.Random) -> str:
    """A pattern whose blanks are filled with the topic's words, 15 in 100 with any topic's."""
    pattern = dice.choice(PATTERNS)
    sources = [
        topic if dice.random() < 0.85 else dice.choice(list(TOPICS))
        for _ in range(pattern.count("{}"))
    ]
    return pattern.format(*(dice.choice(TOPICS[source].split()) for source in sources))


def make_data(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Sentences with the topic on file and the true one: 500 to train with, 300 to validate."""
    dice = random.Random(seed)
    data = []
    for number in range(800):
        topic = dice.choice(list(TOPICS))
        others = [other for other in TOPICS if other != topic]
        filed = dice.choice(others) if number < MISLABELLED else topic
        data.append({"text": sentence(topic, dice), "filed": filed, "topic": topic})
    train, val = data[:500], data[500:]
    dice.shuffle(train)
    return train, val


class TopicClassifier(LightningModule):
    """The mean of the words' vectors, and a linear layer."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(len(vocabulary) + 1, 16)
        self.head = nn.Linear(16, len(TOPICS))

    def collate(self, sentences: list[dict[str, object]]) -> tuple[Tensor, Tensor]:
        """Word numbers ``[B, length]``, filled up with 0, and topics ``[B]``."""
        texts = [torch.tensor([self.vocabulary[w] for w in words(s["text"])]) for s in sentences]
        topics = [list(TOPICS).index(s["filed"]) for s in sentences]
        return nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.tensor(topics)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        # nn.EmbeddingBag would do the same, but torch has no second derivative of it.
        text, topic = batch
        known = (text > 0).unsqueeze(2)
        mean = (self.embedding(text) * known).sum(1) / known.sum(1)
        return F.cross_entropy(self.head(mean), topic)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def words(text: object) -> list[str]:
    return re.findall("[a-z]+", str(text).lower())


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank sentences by their influence.")
    parser.add_argument("--out", type=Path, default=Path("out/text_classifier"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val = make_data(arguments.seed)
    seen = sorted({word for example in train + val for word in words(example["text"])})
    seed_everything(arguments.seed, verbose=False)
    model = TopicClassifier({word: number for number, word in enumerate(seen, 1)})
    influence = InfluenceCallback(
        monitor="val_loss",
        dirpath=arguments.out,
        overwrite=True,
        top_k=5,
        verify=10,
        describe=lambda example: {"filed": example["filed"], "topic": example["topic"]},
    )
    trainer = Trainer(
        max_epochs=12,
        accelerator="cpu",
        callbacks=[influence],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        model,
        DataLoader(train, batch_size=50, shuffle=True, collate_fn=model.collate),
        DataLoader(val, batch_size=300, collate_fn=model.collate),
    )
    scores = influence.scores
    assert scores is not None

    worst = scores.top_harmful(LOOKED_AT)
    print()
    for row in worst.top_harmful(5):
        example = train[row["index"]]
        print(f"{row['influence']:+.4f}  {row['filed']} (truly {row['topic']}): {example['text']}")
    found = sum(row["filed"] != row["topic"] for row in worst)
    print(f"{found} of the {LOOKED_AT} most harmful sentences are filed under a wrong topic")
    print(f"Report: {arguments.out / 'report.html'}")
    assert found >= 0.6 * LOOKED_AT, "the wrongly filed sentences do not lead the ranking"


if __name__ == "__main__":
    main()
