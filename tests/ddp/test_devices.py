"""An engine that starts processes of its own: the same scores, and nothing lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import (
    AccSgdIE,
    InfluenceEngine,
    InfluenceScores,
    LeaveOneOut,
    QueryError,
    unfinished,
)
from lightning_accie.estimators import chunks
from tests.problems import Classifier, classification, fit, sgd, smooth_net
from tests.steady import steady_choices

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    with steady_choices():
        yield


def recorded(root: Path, module: Any) -> dict[str, Any]:
    """What an engine takes to rank a run."""
    torch.manual_seed(3)
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    valid = DataLoader(classification(11, seed=3), batch_size=7)
    influence = fit(root, module, train, valid, max_epochs=2)
    return {
        "trajectory": influence.directory,
        "module": module,
        "data": train,
        "val_dataloaders": valid,
        "progress": False,
    }


def same(one: InfluenceScores, other: InfluenceScores) -> None:
    for name in ("index", "influence", "estimate", "exact", "trusted", "visits"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12, equal_nan=True
        )
    assert one.estimator == other.estimator
    assert one.columns == other.columns


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("estimator", ["auto", "leave-one-out", AccSgdIE(), AccSgdIE([3])])
def test_the_scores_are_those_of_one_process(
    tmp_path: Path, estimator: Any, processes: int
) -> None:
    given = recorded(tmp_path, Classifier(smooth_net(), sgd(momentum=0.5)))
    asked = {
        "estimator": estimator,
        "verify": 6,
        "top_k": 4,
        "loss_column": True,
        "describe": lambda sample: {"text": "long" * 10_000},
    }
    whole = InfluenceEngine(**given).estimate(**asked)
    same(InfluenceEngine(**given, devices=processes).estimate(**asked), whole)


class Importable(LightningModule):
    """A spawned process imports it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_spawned_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    given = recorded(tmp_path, Importable())
    whole = InfluenceEngine(**given).estimate(estimator="leave-one-out")
    engine = InfluenceEngine(**given, devices=2, strategy="ddp_spawn")
    same(engine.estimate(estimator="leave-one-out"), whole)


def test_an_error_is_the_same_error(tmp_path: Path) -> None:
    given = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    with pytest.raises(QueryError, match=r'`monitor="loss"` is not logged'):
        InfluenceEngine(**given, devices=2).estimate("loss")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_leaves_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    given = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    whole = InfluenceEngine(**given).estimate(estimator="leave-one-out")
    monkeypatch.setattr(unfinished, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(chunks, "chunk_size", lambda *args: 4)  # three chunks for each
    carry, done = LeaveOneOut.carry, [0]

    def dies(*args: Any) -> Any:
        done[0] += 1
        if done[0] == 3 and os.environ.get("LOCAL_RANK") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return carry(*args)

    monkeypatch.setattr(LeaveOneOut, "carry", dies)
    with pytest.raises(RuntimeError, match=r"has ended.*call `estimate` again"):
        InfluenceEngine(**given, devices=2).estimate(estimator="leave-one-out")
    kept = list((given["trajectory"] / unfinished.FOLDER).glob("*/*.safetensors"))
    assert 2 <= len(kept) <= 5  # its own, and what the other had done when it was stopped

    seen: list[int] = []

    def noted(self: Any, replay: Any, removed: Tensor, *args: Any) -> Any:
        seen.extend(removed.tolist())
        return carry(self, replay, removed, *args)

    monkeypatch.setattr(LeaveOneOut, "carry", noted)
    same(InfluenceEngine(**given).estimate(estimator="leave-one-out"), whole)
    assert len(seen) == 24 - 4 * len(kept)
