"""Steps that moved nothing: skipped by a `GradScaler`, or without any gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceEngine, LeaveOneOut
from tests.problems import Classifier, Configure, adamw, quiet_trainer, record, sgd
from tests.replay.test_bit_exact import float32_data, net
from tests.truth import recorded_batches


def half(**scaler: Any) -> list[Any]:
    settings = {"init_scale": 2.0**12, "growth_interval": 5, **scaler}
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **settings))]


class Overflows(Classifier):
    """Its loss has no finite gradient in the calls named; counts what training really did."""

    def __init__(self, layers: str, configure: Configure, bad: set[int], none: Any = ()) -> None:
        super().__init__(net(layers), configure)
        self.bad, self.none = bad, set(none)
        self.windows: list[list[Any]] = []
        self.moved: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        call = 8 * self.current_epoch + batch_idx
        loss = self.loss(self.net(x), y)
        if call in self.none:
            return None
        return loss * 1e38 if call in self.bad else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]
        self.step_before = self.global_step
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.windows.append([])
        self.windows[-1].append(batch[1].tolist())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step != self.step_before:
            pairs = zip(self.before, self.parameters(), strict=True)
            self.moved.append(any(not torch.equal(a, b) for a, b in pairs))


def labels(engine: InfluenceEngine, data: Any) -> list[Any]:
    """The labels of the recorded batches, step by step."""
    y = data.tensors[1]
    return [[y[torch.tensor(m)].tolist() for m in s] for s in recorded_batches(engine.trajectory)]


def trained(
    root: Path, module: Overflows, **trainer: Any
) -> tuple[InfluenceEngine, list[Any], list[Any]]:
    """Train over 16 batches of 5; gives the recorded and the true batches of the steps that moved."""
    data = float32_data(40, 0)
    settings = {"plugins": half(), "max_epochs": 2, **trainer}
    engine = record(root, module, data, float32_data(20, 1), batch_size=5, **settings)
    windows = zip(module.windows, module.moved, strict=True)
    return engine, labels(engine, data), [w for w, moved in windows if moved]


FUSED = {"fused": True}


@pytest.mark.parametrize(
    ("bad", "accumulate"),
    [
        ({0}, 1),
        ({0, 1, 2, 9}, 1),
        ({4, 5, 15}, 1),
        ({1}, 2),
        ({2, 7, 15}, 2),
        ({8}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", ["plain", "dropout"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw-fused"])
def test_a_skipped_step_leaves_no_trace(
    tmp_path: Path, kind: str, layers: str, bad: set[int], accumulate: int
) -> None:
    configure = {
        "sgd": sgd(momentum=0.9),
        "adamw": adamw(lr=0.01),
        "adamw-fused": adamw(lr=0.01, **FUSED),
    }[kind]
    module = Overflows(layers, configure, bad)
    engine, found, true = trained(tmp_path, module, accumulate_grad_batches=accumulate)
    skipped = len({(call // 8, call % 8 // accumulate) for call in bad})
    assert module.moved.count(False) == skipped
    assert found == true
    walker = engine._walker
    snapshot = walker.start()
    for _ in range(len(walker)):
        snapshot = walker._advance(snapshot)[1]
    assert walker.fidelity.losses == sum(len(step) for step in true)
    if kind != "adamw-fused":
        assert walker.fidelity.bit_exact
    for name, parameter in module.named_parameters():
        tolerance = 1e-5 if kind == "adamw-fused" else 0.0
        torch.testing.assert_close(
            snapshot.state.params[name], parameter.data, rtol=tolerance, atol=tolerance
        )


def test_a_sample_of_skipped_steps_alone_has_no_influence(tmp_path: Path) -> None:
    """In file order batch 3 is calls 3 and 11: both overflow, so its samples were never drawn."""
    module = Overflows("plain", sgd(), {3, 11})
    engine, *_ = trained(tmp_path, module)
    data = float32_data(40, 0)
    ordered = record(
        tmp_path / "ordered",
        Overflows("plain", sgd(), {3, 11}),
        data,
        float32_data(20, 1),
        batch_size=5,
        loader={"shuffle": False},
        plugins=half(),
        max_epochs=2,
    )
    scores = ordered.estimate(estimator=LeaveOneOut())
    assert scores.index.tolist() == [i for i in range(40) if not 15 <= i < 20]
    assert set(scores.visits.tolist()) == {2}
    every = engine.estimate(estimator=LeaveOneOut())
    assert int(every.visits.sum()) == 70


def test_the_scale_of_the_loss_is_recorded_and_taken_out_again(tmp_path: Path) -> None:
    """Not a power of two, so that scaling rounds; clipped, which is done on unscaled gradients."""
    module = Overflows("plain", sgd(momentum=0.9), {2, 6})
    scaler = half(init_scale=3000.0, growth_factor=3.0, growth_interval=2)
    engine, *_ = trained(tmp_path, module, plugins=scaler, gradient_clip_val=0.3)
    scales = [step.loss_scale for step in engine.trajectory.steps()]
    assert scales[:4] == [3000.0, 3000.0, 4500.0, 4500.0]
    assert len(scales) == module.moved.count(True) < 15
    scores = engine.estimate(estimator="sgd-ie", verify=4)
    assert scores.info["bit_exact_replay"]


@pytest.mark.parametrize("bad", [{7}, {6, 7, 8}], ids=str)
def test_a_run_that_is_resumed_at_a_skipped_step(tmp_path: Path, bad: set[int]) -> None:
    """A checkpoint right after it is one of a complete step, and the run goes on from there."""
    data, valid = float32_data(40, 0), DataLoader(float32_data(20, 1), batch_size=20)
    train = DataLoader(data, batch_size=5, shuffle=True)
    module = Overflows("dropout", adamw(lr=0.01), bad)
    saved = tmp_path / "saved.ckpt"
    influence = InfluenceCallback(run="manual", dirpath=tmp_path / "influence")
    for epochs, path in ((1, None), (2, saved)):
        trainer = quiet_trainer(tmp_path, callbacks=[influence], plugins=half(), max_epochs=epochs)
        trainer.fit(module, train, valid, ckpt_path=path)
        trainer.save_checkpoint(saved)
    engine = InfluenceEngine(
        tmp_path / "influence" / "trajectory",
        module,
        train,
        val_dataloaders=valid,
        progress=False,
    )
    windows = zip(module.windows, module.moved, strict=True)
    assert labels(engine, data) == [w for w, moved in windows if moved]
    assert len(engine.trajectory) == 16 - len(bad)
    assert engine.estimate(estimator="sgd-ie", verify=2).info["bit_exact_replay"]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_calls_that_return_none(
    tmp_path: Path, precision: str, accumulate: int, fused: bool
) -> None:
    """Without a scaler the optimiser steps without a gradient; with one Lightning skips the step."""
    module = Overflows("dropout", adamw(lr=0.01, fused=fused), set(), none={0, 5, 10, 11, 15})
    how: dict[str, Any] = {"plugins": half()} if precision == "16-mixed" else {}
    if precision != "16-mixed":
        how = {"precision": precision, "plugins": None}
    engine, _, _ = trained(tmp_path, module, accumulate_grad_batches=accumulate, **how)
    walker = engine._walker
    snapshot = walker.start()
    for _ in range(len(walker)):
        snapshot = walker._advance(snapshot)[1]
    for name, parameter in module.named_parameters():
        tolerance = 1e-5 if fused else 0.0
        torch.testing.assert_close(
            snapshot.state.params[name], parameter.data, rtol=tolerance, atol=tolerance
        )
    assert fused or walker.fidelity.bit_exact
    recorded = [m for step in engine.trajectory.steps() for m in step.micro_batches]
    lost = sum(micro.loss is None for micro in recorded)
    if precision == "16-mixed":  # a window whose last call returns None is not stepped at all
        assert len(engine.trajectory) == {1: 11, 2: 5}[accumulate]
        assert lost == {1: 0, 2: 1}[accumulate]
    else:
        assert len(engine.trajectory) == 16 // accumulate
        assert lost == 5
