"""Weights that something besides the optimiser writes to: refused early, or told before the replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceEngine, UnsupportedError
from lightning_accie.errors import ReplayMismatchError
from tests.problems import Classifier, classification, fit, quiet_trainer, record, sgd, smooth_net


class Clips(Callback):
    """By way of `.data`, which torch's counts do not see; little beside what a step moves."""

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        for parameter in module.parameters():
            parameter.data.clamp_(-0.4, 0.4)


class ClipsAtStart(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step:
            Clips().on_train_batch_end(trainer, module)


class Projects(Classifier):
    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.net[0].weight.mul_(0.999)


class HasATeacher(Classifier):
    """Keeps a moving average of its weights as frozen parameters, and learns from it."""

    def __init__(self) -> None:
        super().__init__(smooth_net(), sgd())
        self.teacher = smooth_net().requires_grad_(False)
        self.configure = lambda parameters: sgd()([p for p in parameters if p.requires_grad])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net(x), self.teacher(x))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for mine, theirs in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            theirs.data.lerp_(mine.data, 0.1)


def plain() -> Classifier:
    return Classifier(smooth_net(), sgd())


def data() -> tuple[Any, Any]:
    return (
        DataLoader(classification(24), batch_size=6, shuffle=True),
        DataLoader(classification(11, seed=3), batch_size=7),
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["behind", "ahead"])
@pytest.mark.parametrize(
    ("make", "other", "words"),
    [
        (plain, Clips, ["`Clips`", "parametris"]),
        (plain, ClipsAtStart, ["`ClipsAtStart`"]),
        (lambda: Projects(smooth_net(), sgd()), None, ["`net.0.weight`", "`on_train_batch_end`"]),
        (HasATeacher, None, ["`teacher.0.weight`", "`on_before_zero_grad`", "in buffers"]),
    ],
    ids=["callback", "callback-at-start", "module", "teacher"],
)
def test_a_change_between_steps_is_refused_in_the_first_two(
    tmp_path: Path, make: Any, other: Any, words: list[str], ahead: bool
) -> None:
    influence = InfluenceCallback(console=False)
    callbacks = [influence, *([other()] if other else [])]
    torch.manual_seed(5)
    trainer = quiet_trainer(tmp_path, callbacks=callbacks[::-1] if ahead else callbacks)
    module = make()
    with pytest.raises(UnsupportedError, match=r"chang|moved") as caught:
        trainer.fit(module, *data())
    assert trainer.global_step <= 2
    if not ahead:  # else the first step's own check may see it, which names what it knows
        assert all(word in str(caught.value) for word in words), caught.value


class Shrinks(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net[0].weight.mul_(0.999)
        return super().training_step(batch, batch_idx)


class Renormed(nn.Module):
    """The functional form of `nn.Embedding(max_norm=)`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 4, dtype=torch.float64))
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        numbers = x.abs().long().clamp_max(8)
        return self.head(F.embedding(numbers, self.weight, max_norm=1.0).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=1.0)


def test_a_training_step_that_writes_to_weights(tmp_path: Path) -> None:
    module = Shrinks(smooth_net(), sgd())
    with pytest.raises(
        UnsupportedError, match=r"`training_step` writes to `net\.0\.weight` itself"
    ):
        fit(tmp_path, module, *data())
    assert module.trainer.global_step == 0
    with pytest.raises(UnsupportedError, match=r"`training_step` writes to `net\.weight` itself"):
        fit(tmp_path, Classifier(Renormed(), sgd()), *data())


def test_an_embedding_that_renormalises_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"`net\.embed` is a `Embedding` with `max_norm=1"):
        fit(tmp_path, Classifier(Words(), sgd()), *data())


class Swaps(Callback):
    """Validates with a moving average, and puts the weights back."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.kept = [p.detach().clone() for p in module.parameters()]
        self.average = self.average or self.kept
        for average, parameter in zip(self.average, module.parameters(), strict=True):
            parameter.data.lerp_(average, 0.5)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self.kept, module.parameters(), strict=True):
                parameter.copy_(kept)


def test_weights_that_were_put_back(tmp_path: Path) -> None:
    """Within the first steps that is seen; later it is told, once, and the replay is right."""
    with pytest.warns(UserWarning, match=r"before step 3: a callback \(`Swaps`\)") as caught:
        engine = record(
            tmp_path,
            plain(),
            classification(24),
            classification(11, seed=3),
            callbacks=[Swaps()],
            val_check_interval=1,
        )
    assert len([w for w in caught if "wrote to the weights" in str(w.message)]) == 1
    assert engine.trajectory.header["written"] == 3
    assert engine.estimate(estimator="sgd-ie", verify=2).info["bit_exact_replay"]


class Resets(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            nn.init.zeros_(module.net[0].bias)


def test_a_late_change_is_told_at_once_and_named_by_the_replay(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"before step 8: a callback \(`Resets`\)"):
        engine: InfluenceEngine = record(
            tmp_path, plain(), classification(24), classification(11, seed=3), callbacks=[Resets()]
        )
    with pytest.raises(ReplayMismatchError, match=r"at step 8 .*did write .*before step 8"):
        engine.estimate(verify=0)


class Bounded(nn.Module):
    """The way out: weights that are constrained where they are used."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.4 * torch.tanh(weight / 0.4)


def test_a_parametrisation_instead(tmp_path: Path) -> None:
    net = smooth_net()
    nn.utils.parametrize.register_parametrization(net[0], "weight", Bounded())
    data = classification(24), classification(11, seed=3)
    engine = record(tmp_path, Classifier(net, sgd()), *data)
    scores = engine.estimate(estimator="acc-sgd-ie", verify=4)
    assert scores.info["bit_exact_replay"]
    assert scores.agreement is not None
