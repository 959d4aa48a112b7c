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

from lightning_accie import InfluenceEngine, LeaveOneOut
from tests.problems import Classifier, record, sgd
from tests.truth import recorded_batches


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


def retrained(start: Task, engine: InfluenceEngine, data: TensorDataset, without: int) -> Task:
    """Plain torch training on the sum of the samples' own terms, with the recorded noise."""
    task = copy.deepcopy(start).train()
    optimizer = task.configure(list(task.parameters()))
    recorded = zip(recorded_batches(engine.trajectory), engine.module.states, strict=True)
    for (index,), state in recorded:
        torch.set_rng_state(state)
        kept = torch.tensor([i != without for i in index])
        optimizer.zero_grad()
        terms = task.own(*(tensor[index] for tensor in data.tensors))
        ((terms * kept).sum() + task.rest()).backward()
        optimizer.step()
    return task


def drops_its_own_term_alone(
    root: Path, task: Task, data: TensorDataset, validation: TensorDataset, **settings: Any
) -> InfluenceEngine:
    """Exact replay without a sample is plain training without its own term."""
    start = copy.deepcopy(task)
    engine = record(root, task, data, validation, **settings)
    in_last_batch = recorded_batches(engine.trajectory)[-1][0][0]
    chosen = sorted({0, 3, in_last_batch})
    replay = engine.replay("val_loss")
    found = LeaveOneOut(chosen).estimate(replay)
    assert replay.walker.fidelity.bit_exact

    def query(without: int) -> float:
        trained = retrained(start, engine, data, without)
        for name, buffer in trained.named_buffers():  # the recorded statistics stay
            buffer.copy_(replay.final.buffers[name])
        with torch.no_grad():
            return trained.eval().query(*validation.tensors).item()

    whole = query(-1)
    assert replay.query.value(replay.final.state.params) == pytest.approx(whole, rel=1e-10)
    differences = [query(j) - whole for j in chosen]
    assert max(map(abs, differences)) > 1e-6
    for difference, influence in zip(differences, found.influence.tolist(), strict=True):
        assert influence == pytest.approx(difference, rel=1e-7, abs=1e-12)
    return engine
