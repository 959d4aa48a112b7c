"""Ctrl-C, errors and full disks: nothing that was computed is lost, and training goes on."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceEngine, Trajectory, TrajectoryError
from lightning_accie.trajectory import files
from tests.problems import Classifier, classification, quiet_trainer, record, sgd, smooth_net
from tests.truth import recorded_batches


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """Lightning ignores further Ctrl-C after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Raises(Callback):
    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def loaders() -> tuple[Any, Any]:
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


def fit(root: Path, influence: InfluenceCallback, *callbacks: Callback) -> Classifier:
    module = Classifier(smooth_net(), sgd())
    torch.manual_seed(5)
    quiet_trainer(root, callbacks=[influence, *callbacks]).fit(module, *loaders())
    return module


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [(KeyboardInterrupt(), "interrupted", SystemExit), (ValueError("boom"), "failed", ValueError)],
)
def test_a_fit_that_ends_early_leaves_what_ran(
    tmp_path: Path, error: BaseException, status: str, raised: type[BaseException]
) -> None:
    influence = InfluenceCallback(console=False)
    with pytest.raises(raised):
        fit(tmp_path, influence, Raises(error, 7))
    assert influence.directory is not None
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert trajectory.status == status
    assert len(trajectory) == 7
    train, valid = loaders()
    module = Classifier(smooth_net(), sgd())
    engine = InfluenceEngine(trajectory, module, train, val_dataloaders=valid, progress=False)
    scores = engine.estimate(verify=4, top_k=2)
    assert scores.info["steps"] == 7
    assert scores.info["bit_exact_replay"]
    assert scores.agreement[0].kendall_tau > 0.7


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    write, calls = files.write, [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(files, "write", fails)
    monkeypatch.setattr("lightning_accie.trajectory.writer.write", fails)


@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_full_disk_stops_the_recording_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plain = Classifier(smooth_net(), sgd())
    torch.manual_seed(5)
    quiet_trainer(tmp_path).fit(plain, *loaders())
    monkeypatch.setattr("lightning_accie.trajectory.checkpoints.SPACING", 2)
    full_disk(monkeypatch, after)
    influence = InfluenceCallback(console=False)
    with pytest.warns(UserWarning, match="stopped recording, training goes on.*disk_budget|space"):
        module = fit(tmp_path, influence)
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert influence.scores is None
    assert influence.directory is not None
    assert len(Trajectory.open(influence.directory / "trajectory")) < 12


def test_a_callback_that_stops_leaves_another_one_recording(tmp_path: Path) -> None:
    """Both watch the same strategy, one on top of the other."""
    whole = InfluenceCallback(console=False, run="manual")
    fit(tmp_path / "whole", whole)
    for stopped in (0, 1):
        monitors = ("val_loss", loss_of_class_0)
        pair = [InfluenceCallback(m, console=False, verify=4, top_k=2) for m in monitors]

        class Stops(Callback):
            def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
                if trainer.global_step == 4:
                    pair[stopped]._recording._stop(TrajectoryError("The disk is full."))  # noqa: B023

        with pytest.warns(UserWarning, match="stopped recording, training goes on"):
            fit(tmp_path / str(stopped), pair[0], pair[1], Stops())
        assert pair[stopped].scores is None
        goes_on = pair[1 - stopped]
        assert goes_on.scores is not None
        assert goes_on.scores.info["bit_exact_replay"]
        assert goes_on.directory is not None
        assert whole.directory is not None
        one, other = (Trajectory.open(c.directory / "trajectory") for c in (whole, goes_on))
        assert recorded_batches(one) == recorded_batches(other)


def loss_of_class_0(module: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return (module.net(x)[:, 0].square() * (y == 0)).mean()


def test_a_disk_that_is_full_at_the_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, 0)
    with pytest.raises(TrajectoryError, match="space"):
        fit(tmp_path, InfluenceCallback(console=False))


def test_ctrl_c_in_the_refinement_keeps_the_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = record(
        tmp_path, Classifier(smooth_net(), sgd()), classification(24), classification(11, seed=3)
    )
    whole = engine.estimate(verify=6, top_k=3)
    from lightning_accie.estimators.leave_one_out import LeaveOneOut

    monkeypatch.setattr("lightning_accie.estimators.chunks._LARGEST", 2)
    replay, calls = LeaveOneOut.carry, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return replay(*args)

    monkeypatch.setattr(LeaveOneOut, "carry", interrupted)
    scores = engine.estimate(estimator="sgd-ie", verify=8)
    assert scores.info["interrupted"] is True
    assert len(scores) == len(whole) == 24
    done = ~scores.exact.isnan()
    assert int(done.sum()) == 4
    assert int(scores.agreement[0].count) == 4


def test_ctrl_c_before_any_ranking_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_accie.estimators.sgd_ie.SgdIE.estimate", interrupted)
    influence = InfluenceCallback(console=False, dirpath=tmp_path)
    with pytest.warns(UserWarning, match="InfluenceEngine"):
        fit(tmp_path, influence)
    assert influence.scores is None
    assert Trajectory.open(tmp_path / "trajectory").status == "finished"
