"""`training_step` may return None: at first, now and then, or always by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_accie import InfluenceCallback, InfluenceEngine, LeaveOneOut, UnsupportedError
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net

BATCH = 5


class Silent(Classifier):
    """Returns no loss where ``silent(epoch, batch)``."""

    def __init__(self, silent: Any) -> None:
        super().__init__(smooth_net(), sgd())
        self.silent = silent

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if self.silent(self.current_epoch, batch_idx) else loss


class Doubles(Silent):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(2)


def fit(root: Path, module: Silent, data: Any, *, epochs: int = 3, accumulate: int = 1) -> Any:
    influence = InfluenceCallback(
        dirpath=root / "influence", verify=4, top_k=2, console=False, report="none"
    )
    trainer = quiet_trainer(
        root, callbacks=[influence], max_epochs=epochs, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, DataLoader(data, BATCH), DataLoader(classification(20, seed=1), 20))
    return influence


def module(silent: Any, kind: type[Silent] = Silent) -> Silent:
    torch.manual_seed(0)
    return kind(silent)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_batches_that_never_give_a_loss_might_as_well_not_be_there(tmp_path: Path) -> None:
    data = classification(40)
    first = fit(tmp_path / "a", module(lambda epoch, batch: batch == 0), data).scores
    plain = fit(tmp_path / "b", module(lambda *_: False), Subset(data, range(BATCH, 40))).scores
    assert first.info["bit_exact_replay"]
    assert plain.info["bit_exact_replay"]
    left = first.index >= BATCH
    torch.testing.assert_close(first.estimate[left], plain.estimate, rtol=1e-9, atol=1e-15)
    assert first.estimate[left].abs().min() > 0
    assert not first.influence[~left].any()


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_an_epoch_to_warm_up(tmp_path: Path, accumulate: int) -> None:
    data = classification(40)
    warm = module(lambda epoch, batch: epoch == 0)
    first = fit(tmp_path / "a", warm, data, accumulate=accumulate)
    plain = fit(tmp_path / "b", module(lambda *_: False), data, epochs=2, accumulate=accumulate)
    torch.testing.assert_close(first.scores.estimate, plain.scores.estimate, rtol=1e-9, atol=1e-15)
    loaders = DataLoader(data, BATCH), DataLoader(classification(20, seed=1), 20)
    engine = InfluenceEngine(
        tmp_path / "a/influence/trajectory",
        warm,
        loaders[0],
        val_dataloaders=loaders[1],
        progress=False,
    )
    exact = engine.estimate("val_loss", LeaveOneOut([3, 17]))
    torch.testing.assert_close(exact.influence, first.scores.estimate[[3, 17]], rtol=0.2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_the_first_step_that_has_a_loss_is_checked(tmp_path: Path) -> None:
    doubles = module(lambda epoch, batch: (epoch, batch) < (0, 3), Doubles)
    with pytest.raises(UnsupportedError, match="on_after_backward"):
        fit(tmp_path, doubles, classification(40))
    assert doubles.trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_no_loss_at_all(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="returned no loss in any of the 24 steps.*Return the loss"
    ):
        influence = fit(tmp_path, module(lambda *_: True), classification(40))
    assert influence.scores is None
