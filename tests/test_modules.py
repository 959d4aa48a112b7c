"""Operators and data that need care: each module is trained, ranked, and checked by retraining."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceEngine, LeaveOneOut, SgdIE, UnsupportedError
from lightning_accie.agreement import kendall_tau
from tests.problems import Classifier, adamw, fit, record, sgd


class Sequence(nn.Module):
    """Tokens -> classes, by way of attention or recurrence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.middle: nn.Module
        if kind == "transformer":
            self.middle = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        else:
            self.middle = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.middle(self.embed(tokens))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.mean(1))


def tokens(n: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 9, (n, 5), generator=g)
    return TensorDataset(x, x.sum(1) % 3)


def points(n: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def check(engine: InfluenceEngine) -> None:
    """The automatic ranking runs, replays to the bit, and SGD-IE agrees with exact replay."""
    scores = engine.estimate(verify=6, top_k=3)
    assert scores.info["bit_exact_replay"]
    assert bool(scores.influence.isfinite().all())
    assert int((~scores.exact.isnan()).sum()) >= 6
    everyone = engine.estimate(estimator="leave-one-out", verify=0)
    first = engine.estimate(estimator=SgdIE(), verify=0)
    assert kendall_tau(first.influence, everyone.exact) > 0.6


@pytest.mark.parametrize("kind", ["transformer", "lstm", "gru"])
@pytest.mark.parametrize("configure", [sgd(momentum=0.5), adamw(lr=0.003)], ids=["sgd", "adamw"])
def test_sequences(tmp_path: Path, kind: str, configure: Any) -> None:
    torch.manual_seed(2)
    module = Classifier(Sequence(kind).double(), configure)
    check(record(tmp_path, module, tokens(20, 0), tokens(15, 1)))


def test_attention_in_single_precision(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = Classifier(Sequence("transformer"), adamw(lr=0.003))
    engine = record(tmp_path, module, tokens(20, 0), tokens(15, 1))
    assert engine.estimate(verify=4, top_k=3).info["bit_exact_replay"]


class Huber(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(logits, F.one_hot(target, 3).double(), delta=0.3)


class Branching(Classifier):
    """Control flow on a tensor's value, which vmap does not take."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        return loss * 1.1 if logits.abs().max() > 1e-6 else loss


class HostNoise(Classifier):
    """Draws from numpy and from random in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scale = 1 + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        return F.cross_entropy(self.net(x * scale), y)


@pytest.mark.parametrize("module_class", [Huber, Branching, HostNoise])
def test_steps_that_some_transform_does_not_take(
    tmp_path: Path, module_class: type[Classifier]
) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    check(record(tmp_path, module_class(net, sgd()), points(24, 0), points(15, 1)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_weight_norm(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6).double())
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3).double())
    check(record(tmp_path, Classifier(net, sgd()), points(24, 0), points(15, 1)))


class TwoLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y))


@pytest.mark.parametrize("loader", [0, 1])
def test_one_of_two_validation_loaders(tmp_path: Path, loader: int) -> None:
    net = nn.Linear(4, 3).double()
    module = TwoLoaders(net, sgd())
    train = DataLoader(points(24, 0), batch_size=6, shuffle=True)
    valid = [DataLoader(points(15, 1), batch_size=7), DataLoader(points(9, 2), batch_size=4)]
    influence = fit(tmp_path, module, train, valid)
    assert influence.directory is not None
    engine = InfluenceEngine(
        influence.directory / "trajectory", module, train, val_dataloaders=valid, progress=False
    )
    scores = engine.estimate(f"val_loss/dataloader_idx_{loader}", verify=4, top_k=3)
    x, y = points((15, 9)[loader], (1, 2)[loader]).tensors
    assert scores.info["query_value"] == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-12)
    assert scores.agreement[0].kendall_tau > 0.8


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_operator_without_a_derivative_is_refused_at_the_first_step(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = Classifier(Bag().double(), sgd())
    with pytest.raises(UnsupportedError, match=r"lacks a derivative.*leave-one-out"):
        record(tmp_path / "a", module, tokens(20, 0), tokens(15, 1))
    only = {"estimator": LeaveOneOut()}
    engine = record(tmp_path / "b", module, tokens(20, 0), tokens(15, 1), callback=only)
    scores = engine.estimate(estimator="leave-one-out", verify=0)
    assert bool(scores.exact.isfinite().all())


def test_acc_runs_one_by_one_where_vmap_does_not_go(tmp_path: Path) -> None:
    torch.manual_seed(2)
    engine = record(
        tmp_path, Classifier(Sequence("gru").double(), sgd()), tokens(16, 0), tokens(15, 1)
    )
    acc = engine.estimate(estimator="acc-sgd-ie", verify=8)
    assert acc.info["vectorized"] is False
    assert acc.agreement[0].kendall_tau > 0.9
