"""The settings in force at a step, however they are changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.problems import Classifier, adamw, classification, record, sgd, smooth_net


class Halves(Callback):
    """Halves the rate after every step, in the way it is told."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        (group,) = trainer.optimizers[0].param_groups
        if self.how == "in place":
            group["lr"].mul_(0.5)
        elif self.how == "a list":
            if not isinstance(group["betas"], list):
                group["betas"] = list(group["betas"])
            group["betas"][0] *= 0.5
        else:
            group["lr"] = group["lr"] * 0.5


@pytest.mark.parametrize("how", ["a float", "a tensor", "in place", "a list", "not at all"])
def test_every_step_has_its_own_settings(tmp_path: Path, how: str) -> None:
    configure = {
        "a tensor": sgd(lr=torch.tensor(0.1, dtype=torch.float64)),
        "in place": sgd(lr=torch.tensor(0.1, dtype=torch.float64)),
        "a list": adamw(betas=(0.8, 0.99)),
    }.get(how, sgd(lr=0.1))
    module = Classifier(smooth_net(), configure)
    callbacks = [] if how == "not at all" else [Halves(how)]
    engine = record(
        tmp_path, module, classification(), classification(10, seed=1), callbacks=callbacks
    )
    settings = [step.settings[0] for step in engine.trajectory.steps()]
    rates = [one["betas"][0] if how == "a list" else one["lr"] for one in settings]
    first = 0.8 if how == "a list" else 0.1
    expected = [first if how == "not at all" else first * 0.5**t for t in range(len(settings))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert len(settings) == 12
    for _ in engine._walker.forwards():
        pass
    assert engine._walker.fidelity.bit_exact
