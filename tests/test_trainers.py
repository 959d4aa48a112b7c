"""Whatever way a Trainer runs: capture, replay to the bit, and scores that plain torch confirms.

The truth shares no code with the package: the weights that training itself ended with, and a plain
torch loop over the recorded batches, with and without a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable as Function
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, Trajectory, UnsupportedError
from tests.problems import Classifier, classification, quiet_trainer, smooth_net
from tests.truth import mean_loss, recorded_batches, recorded_rates, retrain

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("You requested to overfit but enabled train",)
]
DATA, VALID = classification(26), classification(11, seed=3)


class Tunable(Classifier):
    """Brings its own loaders, with a batch size and a rate that tuners may change."""

    def __init__(self) -> None:
        super().__init__(smooth_net(), self.optimizer)
        self.lr, self.batch_size = 0.1, 4

    def optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.5)

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(VALID, batch_size=7)


def stopping() -> Callback:
    """Stops when the validation loss has got no better by much, at the second time."""
    return EarlyStopping("val_loss", min_delta=10.0, patience=1)


def find_batch_size() -> Callback:
    return BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=2)


def find_rate() -> Callback:
    return LearningRateFinder(num_training_steps=4, early_stop_threshold=None)


def tuned(trainer: Any, module: Any) -> None:
    tuner = Tuner(trainer)
    tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1, init_val=2)
    tuner.lr_find(module, num_training=4, early_stop_threshold=None)


@dataclass(frozen=True)
class Case:
    """One way to run.

    ``steps`` is counted by hand, of 7 batches an epoch, and 2 epochs; None where tuners change the
    batch size. ``valid``: how many samples the validation takes.
    """

    steps: int | None
    trainer: dict[str, Any] = field(default_factory=dict)
    others: tuple[Function[[], Callback], ...] = ()
    first: bool = False
    before: Function[[Any, Any], None] | None = None
    valid: int = len(VALID)


CASES = {
    "plain": Case(14),
    "fast-dev-run": Case(1, {"fast_dev_run": True}, valid=7),
    "fast-dev-run-3": Case(3, {"fast_dev_run": 3}),
    "max-steps": Case(10, {"max_steps": 10, "max_epochs": -1}),
    "max-steps-accumulate": Case(3, {"max_steps": 3, "accumulate_grad_batches": 2}),
    "val-check-interval": Case(14, {"val_check_interval": 3}),
    "val-check-across-epochs": Case(14, {"val_check_interval": 5, "check_val_every_n_epoch": None}),
    "limited": Case(6, {"limit_train_batches": 3}),
    "overfit": Case(4, {"overfit_batches": 2}),
    "reload": Case(14, {"reload_dataloaders_every_n_epochs": 1}),
    "early-stopping": Case(14, {"max_epochs": 6}, (stopping,)),
    "early-stopping-within": Case(4, {"val_check_interval": 2, "max_epochs": 6}, (stopping,)),
    "scheduler": Case(
        7 + 3 + 4, {"max_epochs": 3},
        (lambda: GradientAccumulationScheduler({1: 3, 2: 2}),),
    ),
    "batch-size-finder": Case(None, others=(find_batch_size,)),
    "rate-finder": Case(14, others=(find_rate,)),
    "finders-first": Case(None, others=(find_batch_size, find_rate), first=True),
    "tuner": Case(None, before=tuned),
}  # fmt: skip


def valid_data(count: int) -> list[torch.Tensor]:
    return [tensor[:count] for tensor in VALID.tensors]


def check(
    influence: InfluenceCallback, module: Classifier, steps: int, valid: int = len(VALID)
) -> None:
    """The record gives the trained weights again, and its scores are the exact ones."""
    scores = influence.scores
    assert scores is not None
    assert scores.info["bit_exact_replay"]
    assert scores.info["steps"] == steps
    exact = (~scores.exact.isnan()).nonzero()[:, 0]
    assert len(exact) >= min(2, len(scores))
    x, y = valid_data(valid)
    with torch.no_grad():
        value = float(module.loss(module.net(x), y))
    assert scores.info["query_value"] == pytest.approx(value, rel=1e-12)


def check_by_torch(
    influence: InfluenceCallback, trajectory: Trajectory, module: Tunable, valid: int
) -> None:
    """Train again in plain torch, on the recorded batches and at the recorded rates."""
    batches, rates = recorded_batches(trajectory), recorded_rates(trajectory)
    windows = [step.micro_batches[0].accumulate for step in trajectory.steps()]

    def trained(left_out: int | None) -> Any:
        weights = torch.ones(len(DATA), dtype=torch.float64)
        if left_out is not None:
            weights[left_out] = 0.0
        return retrain(
            smooth_net(), DATA.tensors, batches, module.optimizer, weights, rates=rates,
            accumulate=windows,
        )  # fmt: skip

    whole = trained(None)
    for again, parameter in zip(whole.parameters(), module.net.parameters(), strict=True):
        torch.testing.assert_close(again, parameter, rtol=1e-12, atol=1e-14)
    scores = influence.scores
    assert scores is not None
    for place in (~scores.exact.isnan()).nonzero()[:2, 0].tolist():
        without = mean_loss(trained(int(scores.index[place])), valid_data(valid))
        expected = without - mean_loss(whole, valid_data(valid))
        assert float(scores.exact[place]) == pytest.approx(expected, rel=1e-7, abs=1e-13)


class Keeps(Callback):
    """Reads the trajectory while it is there: `fast_dev_run` takes it away at the end."""

    def __init__(self, influence: InfluenceCallback, valid: int = len(VALID)) -> None:
        self.influence, self.valid = influence, valid

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        assert self.influence.directory is not None
        trajectory = Trajectory.open(self.influence.directory / "trajectory")
        trajectory.verify()
        check_by_torch(self.influence, trajectory, module, self.valid)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    influence = InfluenceCallback(verify=4, top_k=2, console=False)
    others = [make() for make in case.others]
    callbacks = [*others, influence] if case.first else [influence, *others]
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[*callbacks, Keeps(influence, case.valid)],
        **{"max_epochs": 2, **case.trainer},
    )
    module = Tunable()
    torch.manual_seed(5)
    if case.before is not None:
        case.before(trainer, module)
    trainer.fit(module)
    steps = case.steps or 2 * math.ceil(len(DATA) / module.batch_size)
    assert trainer.global_step == steps
    check(influence, module, steps, case.valid)


class Stream(IterableDataset):
    """Validation data that no index leads to, as no training data may be."""

    def __iter__(self) -> Any:
        return iter(VALID)


class StreamsValidation(Tunable):
    def val_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=7)


class StreamsTraining(Tunable):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=self.batch_size)


def test_a_tuner_sets_validation_data_up_as_if_they_were_for_training(tmp_path: Path) -> None:
    influence = InfluenceCallback(verify=4, top_k=2, console=False)
    finder, module = find_batch_size(), StreamsValidation()
    quiet_trainer(tmp_path, callbacks=[finder, influence], max_epochs=2).fit(module)
    check(influence, module, 2 * math.ceil(len(DATA) / module.batch_size))
    with pytest.raises(UnsupportedError, match="Training dataloader 0 reads an IterableDataset"):
        quiet_trainer(tmp_path, callbacks=[find_rate(), influence]).fit(StreamsTraining())


def test_early_stopping_stopped(tmp_path: Path) -> None:
    """Else two of the cases above would try nothing."""
    trainer = quiet_trainer(tmp_path, callbacks=[stopping()], max_epochs=6)
    trainer.fit(Tunable())
    assert trainer.current_epoch == 2


# ---------------------------------------------------------------------- a second fit


def test_one_callback_in_two_trainers(tmp_path: Path) -> None:
    influence = InfluenceCallback(verify=4, top_k=2, console=False)
    directories = []
    for _ in range(2):
        module = Tunable()
        quiet_trainer(tmp_path, callbacks=[influence, Keeps(influence)], max_epochs=2).fit(module)
        check(influence, module, 14)
        directories.append(influence.directory)
    assert len(set(directories)) == 2


@pytest.mark.parametrize("other_module", [False, True])
def test_a_second_fit_of_one_trainer(tmp_path: Path, other_module: bool) -> None:
    """The Trainer counts on; the weights go on or not; the optimiser is a new one either way."""
    influence = InfluenceCallback(verify=4, top_k=2, console=False)
    trainer = quiet_trainer(tmp_path, callbacks=[influence], max_epochs=2)
    module = Tunable()
    trainer.fit(module)
    first = influence.directory
    check(influence, module, 14)
    trainer.fit_loop.max_epochs = 3
    module = Tunable() if other_module else module
    with pytest.warns(UserWarning, match="starts recording at step 14 of a resumed run"):
        trainer.fit(module)
    check(influence, module, 7)
    assert influence.directory != first
    assert first is not None
    assert influence.directory is not None
    for directory, steps in ((first, 14), (influence.directory, 7)):
        engine = InfluenceEngine(directory / "trajectory", Tunable(), module.train_dataloader(),
                                 val_dataloaders=module.val_dataloader(), progress=False)  # fmt: skip
        assert engine.estimate(verify=4, top_k=2).info["bit_exact_replay"]
        assert len(engine.trajectory) == steps
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert [step.number for step in trajectory.steps()] == list(range(7))
    assert trajectory.step(0).micro_batches[0].global_step == 14
