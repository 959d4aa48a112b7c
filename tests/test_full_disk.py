"""Disks that are really full, or read-only: training goes on, and what is known is not lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    InfluenceScores,
    Trajectory,
    TrajectoryError,
)
from tests.disks import fill, make_read_only, small_disk
from tests.problems import Classifier, adamw, classification, quiet_trainer
from tests.steady import steady_choices


@pytest.fixture(autouse=True, scope="module")
def _steady() -> Iterator[None]:
    with steady_choices():
        yield


@pytest.fixture(autouse=True)
def _many_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_accie.trajectory.checkpoints.SPACING", 1)


def module() -> Classifier:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)]
    return Classifier(nn.Sequential(*layers).double(), adamw())


def loaders() -> tuple[Any, Any]:
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


def fit(root: Path, *callbacks: Callback, logger: Any = False) -> Classifier:
    model = module()
    torch.manual_seed(5)
    trainer = quiet_trainer(root, callbacks=list(callbacks), logger=logger, max_epochs=12)
    trainer.fit(model, *loaders())
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def engine(directory: Path) -> InfluenceEngine:
    train, valid = loaders()
    return InfluenceEngine(directory, module(), train, val_dataloaders=valid, progress=False)


@pytest.mark.parametrize("size", ["24k", "32k", "48k", "64k"])
def test_a_disk_that_fills_up_while_recording(tmp_path: Path, size: str) -> None:
    plain = fit(tmp_path / "plain")
    influence = InfluenceCallback(dirpath=tmp_path / "disk" / "run", console=False)
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.warns(UserWarning, match="stopped recording, training goes on.*No space left"):
            trained = fit(tmp_path, influence)
        assert same_weights(trained, plain)
        assert influence.scores is None
        trajectory = Trajectory.open(disk / "run" / "trajectory")
        trajectory.verify()
        assert trajectory.status in ("stopped", "running")  # there may be no room for a word
        assert 0 < len(trajectory) < 48
        assert not list(disk.rglob("*.tmp"))
        scores = engine(disk / "run" / "trajectory").estimate(verify=4, top_k=2)
        assert scores.info["bit_exact_replay"]
        assert scores.info["steps"] == len(trajectory)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    influence = InfluenceCallback(dirpath=tmp_path / "disk" / "run", console=False)
    with small_disk(tmp_path / "disk", "16k") as disk:
        fill(disk)
        with pytest.raises(TrajectoryError, match=r"cannot be written.*No space left.*Free space"):
            fit(tmp_path, influence)


class FillsTheDisk(Callback):
    """Before the analysis begins; stands before InfluenceCallback."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.filler = disk / "filler"

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        fill(self.disk)


def test_a_disk_that_is_full_at_the_end_costs_no_ranking(tmp_path: Path) -> None:
    influence = InfluenceCallback(
        dirpath=tmp_path / "disk" / "run", console=False, verify=4, top_k=2
    )
    with small_disk(tmp_path / "disk", "1m") as disk:
        filling = FillsTheDisk(disk)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained = fit(tmp_path, filling, influence, logger=CSVLogger(disk / "logs"))
        words = "\n".join(str(warning.message) for warning in caught)
        assert "scores could not be saved" in words
        assert "report to CSVLogger is incomplete: OSError" in words
        assert "examples.json, to make the report again with, was not written: OSError" in words
        assert "report.html was not written: OSError" in words
        assert words.count("No space left") == 4
        assert same_weights(trained, fit(tmp_path / "plain"))
        scores = influence.scores
        assert scores is not None
        assert bool(scores.influence.isfinite().all())
        with pytest.raises(OSError, match="No space left"):
            scores.save(disk / "run")
        assert not list((disk / "run").glob("scores*"))
        filling.filler.unlink()
        scores.save(disk / "run")
        assert torch.equal(InfluenceScores.load(disk / "run").influence, scores.influence)
        again = engine(disk / "run" / "trajectory").estimate(verify=4, top_k=2)
        assert torch.equal(again.influence, scores.influence)


def test_scores_that_no_longer_fit_leave_the_earlier_ones(tmp_path: Path) -> None:
    """Or what is refused: never one run's numbers under another's name."""
    one, two = (InfluenceCallback(dirpath=tmp_path / n, console=False, verify=2) for n in "ab")
    fit(tmp_path, one)
    fit(tmp_path, two)
    assert one.scores is not None
    assert two.scores is not None
    more = two.scores.with_columns(text=["x" * 500] * len(two.scores))
    with small_disk(tmp_path / "disk", "64k") as disk:
        one.scores.save(disk)
        filler = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            more.save(disk)
        assert torch.equal(
            InfluenceScores.load(disk).exact.nan_to_num(), one.scores.exact.nan_to_num()
        )
        filler.unlink()


class MakesReadOnly(Callback):
    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 20:
            make_read_only(self.disk)


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    influence = InfluenceCallback(dirpath=tmp_path / "disk" / "run", console=False)
    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.warns(UserWarning, match="stopped recording.*Read-only file system"):
            trained = fit(tmp_path, MakesReadOnly(disk), influence)
        assert same_weights(trained, fit(tmp_path / "plain"))
        trajectory = Trajectory.open(disk / "run" / "trajectory")
        trajectory.verify()
        assert trajectory.status == "running"  # nothing more could be written
        assert 0 < len(trajectory) <= 20
        scores = engine(disk / "run" / "trajectory").estimate(verify=2, top_k=2)
        with pytest.raises(OSError, match="Read-only file system"):
            scores.save(disk / "scores")


def test_a_directory_that_takes_no_writes_is_refused_at_the_start(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        make_read_only(disk)
        for influence in (
            InfluenceCallback(dirpath=disk / "run", console=False),
            InfluenceCallback(console=False),
        ):
            with pytest.raises(TrajectoryError, match="Read-only file system"):
                fit(disk, influence)
