"""A ranking at the best checkpoint, or at any step: what a run that ended there would give.

The truth is the checkpoint's own file, and a plain torch loop that stops there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    QueryError,
    Trajectory,
    UnsupportedError,
)
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net
from tests.truth import mean_loss, recorded_batches, retrain

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Checkpoint directory .* exists and is not empty",
        ".*resuming from a checkpoint that ended before the epoch ended",
        "Be aware that when using `ckpt_path`",
        "The dirpath has changed from",
    )
]
CONFIGURE = sgd(lr=0.3)


def overshoots(optimizer: torch.optim.Optimizer) -> Any:
    """From step 13 on the rate is far too large."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 13 else 20.0)


class Validations(Callback):
    """Keeps what each validation logged, by the step."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.seen[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    @property
    def best(self) -> int:
        return min(self.seen, key=self.seen.__getitem__)


def saver(root: Path, **given: Any) -> ModelCheckpoint:
    settings = {"monitor": "val_loss", "dirpath": root / "checkpoints", "filename": "{step}"}
    return ModelCheckpoint(**{**settings, **given})


def loaders() -> tuple[Any, Any]:
    train = DataLoader(classification(24), batch_size=4, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


def fit(
    root: Path, *others: Any, ckpt: Any = None, callback: dict[str, Any] | None = None, **given: Any
) -> tuple[InfluenceCallback, Validations]:
    """A run that overshoots: its validation loss is lowest on the way."""
    settings = {"run": "manual", "console": False, "verify": 4, "top_k": 2, **(callback or {})}
    influence, validations = InfluenceCallback(**settings), Validations()
    torch.manual_seed(5)
    quiet_trainer(
        root,
        callbacks=[influence, validations, *others],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in others),
        **{"max_epochs": 4, **given},
    ).fit(Classifier(smooth_net(), CONFIGURE, overshoots), *loaders(), ckpt_path=ckpt)
    return influence, validations


def engine_of(trajectory: Path | Trajectory) -> InfluenceEngine:
    train, valid = loaders()
    return InfluenceEngine(
        trajectory, Classifier(smooth_net(), CONFIGURE, overshoots), train, val_dataloaders=valid,
        progress=False,
    )  # fmt: skip


def check_against_file(influence: InfluenceCallback, path: str) -> int:
    """θ_T of a ranking at the best checkpoint is what stands in the checkpoint's file."""
    assert influence.directory is not None
    replay = engine_of(influence.directory / "trajectory").replay(at="best")
    weights = torch.load(path, weights_only=True)["state_dict"]
    for name, value in replay.final.state.params.items():
        assert torch.equal(value, weights[name]), name
    assert replay.walker.fidelity.bit_exact
    return len(replay.walker)


def test_a_record_that_ends_before_the_best_checkpoint(tmp_path: Path) -> None:
    """As that of several processes does, of which one stopped recording."""
    influence, validations = fit(tmp_path, saver(tmp_path))
    assert influence.directory is not None
    trajectory = Trajectory.open(influence.directory / "trajectory").until(validations.best - 1)
    engine = engine_of(trajectory)
    words = f"saved after {validations.best} steps, .* ends after {validations.best - 1}"
    with pytest.raises(QueryError, match=words):
        engine.replay(at="best")
    assert len(engine.replay(at="last").walker) == validations.best - 1


WHEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({}, {}),
    "within-an-epoch": ({}, {"val_check_interval": 2}),
    "accumulate": ({}, {"accumulate_grad_batches": 4, "max_epochs": 9}),
    "weights-only": ({"save_weights_only": True}, {}),
    "one-name": ({"filename": "best", "enable_version_counter": False}, {}),
    "all-kept": ({"save_top_k": -1, "save_last": True}, {}),
}


@pytest.mark.parametrize("when", WHEN)
def test_the_ranking_is_that_of_the_best_checkpoint(tmp_path: Path, when: str) -> None:
    saving, trainer = WHEN[when]
    best = saver(tmp_path, **saving)
    influence, validations = fit(
        tmp_path, best, callback={"run": "fit_end", "at": "best"}, **trainer
    )
    scores = influence.scores
    assert scores is not None
    assert min(validations.seen) < validations.best < max(validations.seen)
    assert scores.info["at"] == "best"
    assert scores.info["steps"] == validations.best
    assert scores.info["recorded_steps"] == max(validations.seen)
    logged = validations.seen[validations.best]  # summed in single precision
    assert scores.info["query_value"] == pytest.approx(logged, rel=1e-6)
    assert float(best.best_model_score) == logged
    assert check_against_file(influence, best.best_model_path) == validations.best


def test_it_is_what_a_run_that_ended_there_gives(tmp_path: Path) -> None:
    """Exact influences and visits, against plain torch training without the sample."""
    influence, validations = fit(tmp_path, saver(tmp_path))
    assert influence.directory is not None
    engine = engine_of(influence.directory / "trajectory")
    steps = validations.best
    scores = engine.estimate(estimator="leave-one-out", at="best", verify=0)
    batches = recorded_batches(engine.trajectory)[:steps]
    data, valid = classification(24).tensors, classification(11, seed=3).tensors

    def value(left_out: int | None) -> float:
        weights = torch.ones(24, dtype=torch.float64)
        if left_out is not None:
            weights[left_out] = 0.0
        return mean_loss(retrain(smooth_net(), data, batches, CONFIGURE, weights), valid)

    whole = value(None)
    assert scores.info["query_value"] == pytest.approx(whole, rel=1e-12)
    expected = torch.tensor([value(j) - whole for j in scores.index.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scores.exact, expected, rtol=1e-8, atol=1e-12)
    drawn = Counter(index for step in batches for micro in step for index in micro)
    assert dict(zip(scores.index.tolist(), scores.visits.tolist(), strict=True)) == drawn
    # An estimator that walks backwards ends at the same place.
    ranked = engine.estimate(estimator="sgd-ie", at=steps, verify=24)
    assert ranked.agreement[0].kendall_tau > 0.5
    replayed = ~ranked.exact.isnan()
    assert int(replayed.sum()) >= 12
    torch.testing.assert_close(ranked.exact[replayed], expected[replayed], rtol=1e-8, atol=1e-12)


def test_what_is_drawn_only_later_is_left_out(tmp_path: Path) -> None:
    influence, _ = fit(tmp_path)
    assert influence.directory is not None
    engine = engine_of(influence.directory / "trajectory")
    scores = engine.estimate(at=2, verify=2, top_k=2, loss_column=True)
    first = [i for step in recorded_batches(engine.trajectory)[:2] for micro in step for i in micro]
    assert sorted(scores.index.tolist()) == sorted(first)
    assert len(first) == 8
    assert (scores.info["steps"], scores.info["drawn"], scores.info["samples"]) == (2, 8, 24)
    assert bool(torch.tensor(scores.columns["loss"]).isfinite().all())
    sources, indices, counts = engine.trajectory.until(2).visits()
    assert indices.tolist() == sorted(first)
    assert counts.tolist() == [1] * 8
    assert sources.tolist() == [0] * 8
    assert len(engine.estimate(at="last", verify=0, estimator="sgd-ie")) == 24


def test_of_several_savers_the_one_of_the_same_monitor_counts(tmp_path: Path) -> None:
    class Both(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("minus", -F.cross_entropy(self.net(batch[0]), batch[1]))

    other = saver(tmp_path, monitor="minus", filename="minus-{step}")
    same, none = saver(tmp_path), saver(tmp_path, monitor=None, filename="none-{step}")
    influence = InfluenceCallback(run="manual")
    torch.manual_seed(5)
    quiet_trainer(
        tmp_path, callbacks=[influence, other, none, same], enable_checkpointing=True, max_epochs=4
    ).fit(Both(smooth_net(), CONFIGURE, overshoots), *loaders())
    assert influence.directory is not None
    best = Trajectory.open(influence.directory / "trajectory").header["best"]
    assert Path(best["path"]) == Path(same.best_model_path)
    assert best["monitor"] == "val_loss"
    assert best["score"] == float(same.best_model_score)
    assert best["step"] == int(Path(same.best_model_path).stem.partition("=")[2])


@pytest.mark.parametrize("first", [1, 3])
def test_the_best_one_may_be_from_before_a_resumption(tmp_path: Path, first: int) -> None:
    """The best one comes before the resumption, or behind it."""
    _, validations = fit(tmp_path / "whole", saver(tmp_path / "whole"))
    assert validations.best == 12
    keep = saver(tmp_path, save_top_k=-1)
    fit(tmp_path, keep, max_epochs=first)
    ckpt = tmp_path / "checkpoints" / f"step={6 * first}.ckpt"
    again = saver(tmp_path, save_top_k=-1)
    influence, later = fit(tmp_path, again, ckpt=ckpt, max_epochs=6)
    assert influence.directory is not None
    best = Trajectory.open(influence.directory / "trajectory").header["best"]
    assert Path(best["path"]) == Path(again.best_model_path)
    assert check_against_file(influence, again.best_model_path) == best["step"]
    assert best["step"] == 12
    assert len(later.seen) == 6 - first


def test_a_killed_run_knows_its_best(tmp_path: Path) -> None:
    root, copy = tmp_path / "run", tmp_path / "copy"

    class Copies(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 18:
                shutil.copytree(root, copy)

    best = saver(root)
    influence, _ = fit(root, best, Copies())
    assert influence.directory is not None
    left = Trajectory.open(copy / influence.directory.name / "trajectory")
    assert left.status == "running"
    assert left.header["best"]["step"] == 12
    assert len(left) >= left.header["best"]["step"]
    assert len(left.header["saved"]) <= 2  # those that are still there, and the latest


def test_without_a_best_checkpoint_it_is_refused_at_fit_start(tmp_path: Path) -> None:
    for savers in ([], [saver(tmp_path, monitor=None)], [saver(tmp_path, save_top_k=0)]):
        with pytest.raises(UnsupportedError, match=r'Add `ModelCheckpoint\(monitor="val_loss"\)`'):
            fit(tmp_path, *savers, callback={"at": "best"})
    with pytest.raises(Exception, match=r"`at` must be one of 'last', 'best', got 3"):
        InfluenceCallback(at=3)  # type: ignore[arg-type]


def test_where_no_best_came_to_be_the_end_says_so(tmp_path: Path) -> None:
    settings = {"run": "fit_end", "at": "best", "dirpath": tmp_path / "here"}
    with pytest.warns(UserWarning, match=r"knows no best checkpoint.*Use `at=\"last\"`"):
        fit(tmp_path, saver(tmp_path, every_n_epochs=2), callback=settings, max_epochs=1)
    engine = engine_of(tmp_path / "here" / "trajectory")
    with pytest.raises(QueryError, match="knows no best checkpoint"):
        engine.estimate(at="best")
    assert engine.estimate(verify=2, top_k=2).info["steps"] == 6
    for at in (0, 7, True, "first"):
        with pytest.raises(ValueError, match="`at` must be"):
            engine.estimate(at=at)


def test_fast_dev_run_saves_none_and_ranks_at_the_end(tmp_path: Path) -> None:
    callback = {"run": "fit_end", "at": "best"}
    influence, _ = fit(tmp_path, saver(tmp_path), callback=callback, fast_dev_run=3)
    assert influence.scores is not None
    assert (influence.scores.info["at"], influence.scores.info["steps"]) == ("last", 3)


def test_a_view_ends_where_it_is_told(tmp_path: Path) -> None:
    influence, _ = fit(tmp_path)
    assert influence.directory is not None
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert (len(trajectory), trajectory.checkpoint_steps) == (24, (0, 24))
    view = trajectory.until(23)
    assert (len(view), view.checkpoint_steps) == (23, (0,))
    assert len(list(view.steps())) == 23
    with pytest.raises(IndexError, match="no step 23"):
        view.step(23)
    assert len(trajectory) == 24
    for steps in (-1, 25):
        with pytest.raises(ValueError, match="there are no"):
            trajectory.until(steps)
