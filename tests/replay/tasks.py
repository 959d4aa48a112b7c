"""Training steps told twice: as a user writes them, and as each sample's own term plus the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_accie import InfluenceEngine, LeaveOneOut, SgdIE
from tests.problems import Classifier, record, sgd
from tests.truth import recorded_batches

_STEP = 1e-5


class Task(Classifier):
    """A loss that is told as each sample's own term and the rest; trained on what a user writes."""

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__(net, sgd(**settings))
        self.states: list[Tensor] = []

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        """``[B]``: the sum is the loss, up to the rest."""
        raise NotImplementedError

    def rest(self) -> Tensor | float:
        return 0.0

    def query(self, x: Tensor, y: Tensor) -> Tensor:
        """A mean over samples."""
        return F.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.states.append(torch.get_rng_state())
        return self.written(*batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.query(*batch))


def retrained(start: Task, engine: InfluenceEngine, data: TensorDataset, weights: Tensor) -> Task:
    """Plain torch training on the weighted sum of the samples' own terms.

    Noise is as recorded, and so are buffers, at every step: a counterfactual run keeps them, but for
    running statistics.
    """
    task = copy.deepcopy(start).train()
    buffers: list[Any] = []
    if list(task.buffers()):
        buffers = [visit.snapshot.buffers for visit in engine._walker.forwards()]
    optimizer = task.configure(list(task.parameters()))
    recorded = zip(recorded_batches(engine.trajectory), engine.module.states, strict=True)
    for step, ((index,), state) in enumerate(recorded):
        with torch.no_grad():
            for name, buffer in kept_buffers(task):
                buffer.copy_(buffers[step][name])
        torch.set_rng_state(state)
        optimizer.zero_grad()
        terms = task.own(*(tensor[index] for tensor in data.tensors))
        ((terms * weights[index]).sum() + task.rest()).backward()
        optimizer.step()
    return task


def kept_buffers(task: Task) -> list[tuple[str, torch.Tensor]]:
    """The buffers that a counterfactual run keeps as recorded."""
    return [(n, buffer) for n, buffer in task.named_buffers() if "running_" not in n]


def drops_its_own_term_alone(
    root: Path,
    task: Task,
    data: TensorDataset,
    validation: TensorDataset,
    *,
    slope: bool = False,
    **settings: Any,
) -> InfluenceEngine:
    """Exact replay without a sample is plain training without its own term.

    With ``slope``, SGD-IE must also be the central difference of plain training in its weight.
    """
    start = copy.deepcopy(task)
    engine = record(root, task, data, validation, **settings)
    in_last_batch = recorded_batches(engine.trajectory)[-1][0][0]
    chosen = sorted({0, 3, in_last_batch})
    replay = engine.replay("val_loss")
    found = LeaveOneOut(chosen).estimate(replay)
    assert replay.walker.fidelity.bit_exact

    def query(without: int | None = None, by: float = 1.0) -> float:
        weights = torch.ones(len(data), dtype=torch.float64)
        if without is not None:
            weights[without] -= by
        trained = retrained(start, engine, data, weights)
        for name, buffer in kept_buffers(trained):
            buffer.copy_(replay.final.buffers[name])
        with torch.no_grad():
            return trained.eval().query(*validation.tensors).item()

    whole = query()
    assert replay.query.value(replay.final.state.params) == pytest.approx(whole, rel=1e-10)
    differences = [query(j) - whole for j in chosen]
    assert max(map(abs, differences)) > 1e-6
    for difference, influence in zip(differences, found.influence.tolist(), strict=True):
        assert influence == pytest.approx(difference, rel=1e-7, abs=1e-12), (influence, difference)
    if slope:
        first = SgdIE().estimate(replay)
        for j in chosen[:2]:
            expected = (query(j, _STEP) - query(j, -_STEP)) / (2 * _STEP)
            (value,) = first.influence[first.samples == j].tolist()
            assert value == pytest.approx(expected, rel=2e-5, abs=1e-9), (value, expected)
    return engine
