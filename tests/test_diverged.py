"""Runs that diverge, and analyses that cannot be done: training stands, and the reason is said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    QueryError,
    ReplayMismatchError,
    SgdIE,
    Trajectory,
    UnsupportedError,
)
from lightning_accie.estimators.base import Estimate
from lightning_accie.ranking import Ranking
from lightning_accie.replay.fidelity import _difference
from tests.problems import Classifier, classification, quiet_trainer, record, sgd

INF, NAN = float("inf"), float("nan")


def data(n: int, seed: int) -> TensorDataset:
    x, y = classification(n, seed=seed).tensors
    return TensorDataset(x.float(), y)


def relu() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def loaders() -> tuple[Any, Any]:
    train = DataLoader(data(24, 0), batch_size=6, shuffle=True)
    return train, DataLoader(data(11, 3), batch_size=7)


def fitted(
    root: Path, module: Classifier, *callbacks: Callback, **influence: Any
) -> tuple[InfluenceCallback, Any]:
    settings = {"console": False, "verify": 4, "top_k": 3, "dirpath": root, **influence}
    callback = InfluenceCallback(**settings)
    trainer = quiet_trainer(root, callbacks=[callback, *callbacks], max_epochs=6)
    torch.manual_seed(5)
    trainer.fit(module, *loaders())
    return callback, trainer


def engine_of(root: Path, module: Classifier) -> InfluenceEngine:
    train, valid = loaders()
    return InfluenceEngine(
        root / "trajectory", module, train, val_dataloaders=valid, progress=False
    )


class TurnsToNan(Classifier):
    """A batch with a fault in it, in the third epoch."""

    fault = NAN

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.fault if (self.current_epoch, batch_idx) == (2, 1) else loss


@pytest.mark.parametrize("fault", [NAN, INF])
def test_losses_that_become_nan_midway(tmp_path: Path, fault: float) -> None:
    module = TurnsToNan(relu(), sgd())
    module.fault = fault
    words = (
        rf"no ranking: `val_loss` is nan .*step 9 \(epoch 2, batch 1\): {fault}\. .*learning rate"
    )
    with pytest.warns(UserWarning, match=words):
        callback, trainer = fitted(tmp_path, module)
    assert callback.scores is None
    assert trainer.state.finished
    assert trainer.global_step == 24
    trajectory = Trajectory.open(tmp_path / "trajectory")
    assert (trajectory.status, len(trajectory)) == ("finished", 24)
    with pytest.raises(QueryError, match="step 9"):
        engine_of(tmp_path, module).estimate()
    with pytest.raises(QueryError, match="step 9"):
        engine_of(tmp_path, module).estimate(at=10)
    before = engine_of(tmp_path, module).estimate(at=9, verify=2)
    assert bool(before.influence.isfinite().all())
    assert before.info["bit_exact_replay"]
    trainer.validate(module, loaders()[1], verbose=False)  # the user's script goes on


class GrowsAtLast(Classifier):
    """The last step alone makes the weights infinite; no loss shows it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        late = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: INF if t == 23 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": late, "interval": "step"}}


class OddQuery(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).sum().log() * 0.0 / 0.0)


@pytest.mark.filterwarnings("ignore:`training_step`")
def test_why_a_query_is_not_finite(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="diverged, in its very last steps"):
        fitted(tmp_path / "weights", GrowsAtLast(relu(), sgd()))
    with pytest.warns(UserWarning, match="weights and losses are finite"):
        fitted(tmp_path / "query", OddQuery(relu(), sgd()))


def test_a_first_step_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"diverged at its first step .*is not finite"):
        fitted(tmp_path, Classifier(relu(), sgd(lr=INF)))


def test_a_first_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Faulty(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * NAN

    with pytest.raises(UnsupportedError, match=r"diverged at its first step \(loss nan"):
        fitted(tmp_path, Faulty(relu(), sgd()))


class NanOnce(Classifier):
    """A loss of NaN without any gradient moves nothing, and does no harm."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0.0 + NAN if (self.current_epoch, batch_idx) == (2, 1) else loss


def test_a_nan_that_moves_nothing_is_replayed(tmp_path: Path) -> None:
    callback, _ = fitted(tmp_path, NanOnce(relu(), sgd()), estimator="leave-one-out")
    assert callback.scores is not None
    assert callback.scores.info["bit_exact_replay"]
    assert bool(callback.scores.influence.isfinite().all())


# ---------------------------------------------------------------------- explodes, but stays finite


@pytest.mark.parametrize("rate", [5.0, 20.0])
def test_blown_up_estimates_do_not_rank_high(tmp_path: Path, rate: float) -> None:
    module = Classifier(relu(), sgd(lr=rate))
    influence = InfluenceCallback(verify=4, top_k=6, dirpath=tmp_path)
    logger = CSVLogger(tmp_path)
    torch.manual_seed(5)
    trainer = quiet_trainer(tmp_path, callbacks=[influence], max_epochs=6, logger=logger)
    trainer.fit(module, *loaders())
    scores = influence.scores
    assert scores is not None
    value = scores.info["query_value"]
    assert value > 100.0
    assert bool(scores.top_harmful(6).trusted.all())
    assert bool(scores.top_helpful(6).trusted.all())
    assert float(scores.influence[scores.trusted].min()) >= -value * (1 + 1e-6)
    alone = engine_of(tmp_path, module).estimate(estimator=SgdIE(), verify=0)
    exact = engine_of(tmp_path, module).estimate(estimator=LeaveOneOut())
    assert float(alone.influence.abs().max()) > 10 * value
    assert not bool(alone.trusted[alone.influence.abs() > value].any())
    assert bool(exact.influence.isfinite().all())


def test_small_estimates_stay_trusted_where_the_query_is_next_to_zero(tmp_path: Path) -> None:
    """A prediction that training has settled: influences exceed the loss that is left of it."""
    engine = record(
        tmp_path, Classifier(relu(), sgd(lr=0.5)), data(24, 0), data(11, 3), max_epochs=60
    )
    settled = TensorDataset(*data(24, 0)[:1])
    scores = engine.estimate(estimator="sgd-ie", query_dataloader=DataLoader(settled), verify=0)
    assert float(scores.influence.abs().max()) > scores.info["query_value"]
    assert bool(scores.trusted.all())


def test_a_run_that_diverges_without_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no exact figure then; the estimate stands, is not trusted, and is not tried again."""
    engine = record(tmp_path, Classifier(relu(), sgd()), data(24, 0), data(11, 3))
    asked: list[int] = []
    estimate = LeaveOneOut.estimate

    def diverges(self: LeaveOneOut, replay: Any) -> Estimate:
        found = estimate(self, replay)
        asked.extend(found.samples.tolist())
        lost = (found.samples == 3) | (found.samples == 4)
        values = torch.where(found.samples == 3, INF, torch.where(lost, NAN, found.influence))
        return Estimate(found.estimator, found.samples, values, values.isfinite(), noise=1e-8)

    monkeypatch.setattr(LeaveOneOut, "estimate", diverges)
    replay = engine.replay()
    ranking = Ranking(replay, seed=0)
    ranking.run(None, top_k=12, verify=24)
    assert sorted(asked) == list(range(24))
    for sample in range(24):
        assert bool(ranking.exact[sample].isnan()) == (sample in (3, 4))
        assert bool(ranking.trusted[sample]) == (sample not in (3, 4))
    assert bool(ranking.influence.isfinite().all())
    assert all(math.isfinite(found.kendall_tau) for found in ranking.agreement())


# ---------------------------------------------------------------------- other analyses that fail


class ChangesTheData(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.train_dataloader.dataset.tensors[0][17] += 1.0


def test_a_departing_replay_is_a_warning_in_fit_and_an_error_in_the_engine(tmp_path: Path) -> None:
    module = Classifier(relu(), sgd())
    with pytest.warns(UserWarning, match=r"no ranking: Training sample 17 \(.*InfluenceEngine"):
        callback, trainer = fitted(tmp_path, module, ChangesTheData())
    assert callback.scores is None
    assert trainer.state.finished
    train, valid = loaders()
    train.dataset.tensors[0][17] += 1.0
    engine = InfluenceEngine(
        tmp_path / "trajectory", module, train, val_dataloaders=valid, progress=False
    )
    with pytest.raises(ReplayMismatchError, match="Training sample 17 "):
        engine.estimate()


def test_the_users_own_errors_are_not_swallowed(tmp_path: Path) -> None:
    described: list[Any] = []

    def query(module: Any, batch: Any) -> torch.Tensor:
        if len(described) > 1:  # one is described when fit starts
            raise LookupError("no such label")
        return module.loss(module.net(batch[0]), batch[1])

    def describe(sample: Any) -> dict[str, Any]:
        described.append(sample)
        return {}

    with pytest.raises(LookupError, match="no such label"):
        fitted(tmp_path, Classifier(relu(), sgd()), monitor=query, describe=describe)
    assert Trajectory.open(tmp_path / "trajectory").status == "finished"


@pytest.mark.parametrize(
    ("replayed", "stored", "difference"),
    [
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, INF, -INF], [1.0, INF, -INF], 0.0),
        ([1.0, NAN], [2.0, NAN], 0.5),
        ([1.0, 1.0], [1.0, NAN], NAN),
        ([1.0, NAN], [1.0, 1.0], NAN),
        ([1.0, INF], [1.0, 1.0], INF),
        ([INF], [-INF], INF),
    ],
)
def test_differences_of_states_that_are_not_finite(
    replayed: list[float], stored: list[float], difference: float
) -> None:
    found = _difference(torch.tensor(replayed), torch.tensor(stored))
    assert found == difference or (math.isnan(found) and math.isnan(difference))
