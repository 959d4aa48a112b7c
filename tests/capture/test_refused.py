"""A run that is refused as it begins leaves nothing in the way of the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, QueryError, TrajectoryError, UnsupportedError
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net


class Breaks(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 5:
            raise RuntimeError("the disk of the data is gone")


class Clamps(Classifier):
    """In a hook that comes after the first step's check, from the second step on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2:
            with torch.no_grad():
                self.net[0].weight.data.mul_(0.5)


def fit(root: Path, module: Classifier, **influence: Any) -> InfluenceCallback:
    callback = InfluenceCallback(
        **{"dirpath": root / "influence", "verify": 2, "console": False, "report": "none"}
        | influence
    )
    trainer = quiet_trainer(root, callbacks=[callback])
    trainer.fit(module, DataLoader(classification(), 6), DataLoader(classification(seed=1), 12))
    return callback


def test_a_wrong_monitor_can_be_mended_and_run_again(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="vall_loss"):
        fit(tmp_path, Classifier(smooth_net(), sgd()), monitor="vall_loss")
    assert not (tmp_path / "influence").exists()
    assert fit(tmp_path, Classifier(smooth_net(), sgd())).scores is not None


def test_what_else_is_in_the_directory_stays(tmp_path: Path) -> None:
    own = tmp_path / "influence" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(QueryError):
        fit(tmp_path, Classifier(smooth_net(), sgd()), monitor="vall_loss")
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_weights_that_something_else_writes(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="between the first"):
        fit(tmp_path, Clamps(smooth_net(), sgd()))
    assert not (tmp_path / "influence").exists()


def test_a_run_that_breaks_later_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is gone"):
        fit(tmp_path, Breaks(smooth_net(), sgd()))
    assert (tmp_path / "influence" / "trajectory").is_dir()
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        fit(tmp_path, Classifier(smooth_net(), sgd()))
    assert (tmp_path / "influence" / "trajectory").is_dir()
