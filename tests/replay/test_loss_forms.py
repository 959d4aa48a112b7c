"""How a returned loss is split by sample: leaving one out must be training without its own term."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_accie import LeaveOneOut, UnsupportedError
from tests.problems import Classifier, record, sgd
from tests.truth import recorded_batches

Own = Callable[[Tensor, Tensor, nn.Module], Tensor]
"""``[B]``: each sample's own term, so that their sum over ``[B]`` plus the rest is the loss."""

CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def penalty(net: nn.Module) -> Tensor:
    return 0.05 * sum(p.square().sum() for p in net.parameters())  # type: ignore[return-value]


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y.clamp_min(0), 3).double()


def ignored(y: Tensor) -> Tensor:
    return torch.where(y == 2, -100, y)


# name: (the loss as a user writes it, each sample's own term, the rest)
FORMS: dict[str, tuple[Any, Own, Any]] = {
    "cross-entropy": (
        lambda z, y, net: F.cross_entropy(z, y),
        lambda z, y, net: F.cross_entropy(z, y, reduction="none") / len(y),
        None,
    ),
    "class-weights": (
        lambda z, y, net: F.cross_entropy(z, y, weight=CLASS_WEIGHT),
        lambda z, y, net: (
            F.cross_entropy(z, y, weight=CLASS_WEIGHT, reduction="none") / CLASS_WEIGHT[y].sum()
        ),
        None,
    ),
    "ignore-index": (
        lambda z, y, net: F.cross_entropy(z, ignored(y), ignore_index=-100),
        lambda z, y, net: F.cross_entropy(z, ignored(y), reduction="none") / (y != 2).sum(),
        None,
    ),
    "label-smoothing": (
        lambda z, y, net: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y, net: F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") / len(y),
        None,
    ),
    "sum": (
        lambda z, y, net: 0.2 * F.cross_entropy(z, y, reduction="sum"),
        lambda z, y, net: 0.2 * F.cross_entropy(z, y, reduction="none"),
        None,
    ),
    "mse-rows": (
        lambda z, y, net: F.mse_loss(z, one_hot(y)),
        lambda z, y, net: (z - one_hot(y)).square().mean(1) / len(y),
        None,
    ),
    "bce-module": (
        lambda z, y, net: nn.BCEWithLogitsLoss()(z, one_hot(y)),
        lambda z, y, net: (
            F.binary_cross_entropy_with_logits(z, one_hot(y), reduction="none").mean(1) / len(y)
        ),
        None,
    ),
    "by-hand-mean": (
        lambda z, y, net: (z - one_hot(y)).square().mean(),
        lambda z, y, net: (z - one_hot(y)).square().mean(1) / len(y),
        None,
    ),
    "by-hand-sum": (
        lambda z, y, net: torch.sum((z - one_hot(y)) ** 2) / len(y),
        lambda z, y, net: (z - one_hot(y)).square().sum(1) / len(y),
        None,
    ),
    "two-losses": (
        lambda z, y, net: F.cross_entropy(z, y) + 0.5 * F.mse_loss(z.softmax(1), one_hot(y)),
        lambda z, y, net: (
            (
                F.cross_entropy(z, y, reduction="none")
                + 0.5 * (z.softmax(1) - one_hot(y)).square().mean(1)
            )
            / len(y)
        ),
        None,
    ),
    "penalty": (
        lambda z, y, net: F.cross_entropy(z, y) + penalty(net),
        lambda z, y, net: F.cross_entropy(z, y, reduction="none") / len(y),
        penalty,
    ),
    "penalty-by-a-loss-function": (
        lambda z, y, net: (
            F.cross_entropy(z, y) + F.mse_loss(net[0].weight, torch.ones_like(net[0].weight))
        ),
        lambda z, y, net: F.cross_entropy(z, y, reduction="none") / len(y),
        lambda net: F.mse_loss(net[0].weight, torch.ones_like(net[0].weight)),
    ),
    "by-hand-with-penalty": (
        lambda z, y, net: (z - one_hot(y)).square().mean() + penalty(net),
        lambda z, y, net: (z - one_hot(y)).square().mean(1) / len(y),
        penalty,
    ),
}


class Formed(Classifier):
    """Trains on one of the forms, with or without normalisation over the batch."""

    def __init__(self, net: nn.Module, form: str) -> None:
        super().__init__(net, sgd(momentum=0.5))
        self.form = form

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"loss": FORMS[self.form][0](self.net(x), y, self.net)}


def net(normalised: bool) -> nn.Sequential:
    torch.manual_seed(2)
    # Six rows in the first weight: as many as a batch has samples.
    middle: list[nn.Module] = [nn.BatchNorm1d(6)] if normalised else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def data(n: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def retrained(start: nn.Sequential, batches: Any, form: str, without: int | None) -> nn.Sequential:
    """Plain torch training on the sum of the samples' own terms, one of them left out."""
    trained = copy.deepcopy(start).train()
    x, y = data(24, 0).tensors
    _, own, rest = FORMS[form]
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.5)
    for (index,) in batches:
        terms = own(trained(x[index]), y[index], trained)
        kept = torch.tensor([i != without for i in index])
        loss = (terms * kept).sum() + (rest(trained) if rest else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("form", FORMS)
def test_leaving_one_out(tmp_path: Path, form: str, normalised: bool) -> None:
    start = net(normalised)
    module = Formed(copy.deepcopy(start), form)
    engine = record(tmp_path, module, data(24, 0), data(11, 1))
    replay = engine.replay("val_loss")
    found = LeaveOneOut([0, 5, 23]).estimate(replay)
    batches = recorded_batches(engine.trajectory)
    x, y = data(11, 1).tensors

    def query(without: int | None) -> float:
        trained = retrained(start, batches, form, without)
        with torch.no_grad():
            return F.cross_entropy(trained.eval()(x), y).item()

    for j, influence in zip((0, 5, 23), found.influence.tolist(), strict=True):
        assert influence == pytest.approx(query(j) - query(None), rel=1e-7, abs=1e-12)


class Contrastive(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return -torch.logdet(logits.T @ logits + torch.eye(3, dtype=logits.dtype))


class BatchNormalised(Classifier):
    """The mean of the losses is used to scale them: not a sum over samples."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        return loss * loss


class Flattened(Classifier):
    """Two rows for each sample."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.cat([logits, 2 * logits]), torch.cat([target, target]))


class Ragged(Classifier):
    """As many rows as samples are known: rows cannot be counted off by sample."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, target = logits.repeat(2, 1), target.repeat(2)
        return F.cross_entropy(logits[target != 1], target[target != 1])


@pytest.mark.parametrize("module_class", [Contrastive, BatchNormalised, Ragged])
def test_losses_that_are_no_sum_over_samples_are_refused(
    tmp_path: Path, module_class: type[Classifier]
) -> None:
    module = module_class(net(normalised=False), sgd(lr=0.001))
    with pytest.raises(UnsupportedError, match="sample_losses"):
        record(tmp_path, module, data(24, 0), data(11, 1))


def twice(module: Any, batch: Any) -> Tensor:
    x, y = batch
    z = module.net(x)
    rows = F.cross_entropy(torch.cat([z, 2 * z]), torch.cat([y, y]), reduction="none")
    return rows.view(2, -1).mean(0)


def test_sample_losses_of_ones_own(tmp_path: Path) -> None:
    module = Flattened(net(normalised=False), sgd())
    start = copy.deepcopy(module.net)
    callback = {"sample_losses": twice}
    engine = record(tmp_path, module, data(24, 0), data(11, 1), callback=callback)
    found = LeaveOneOut([3]).estimate(engine.replay("val_loss"))
    x, y = data(24, 0).tensors
    values = []
    for without in (3, None):
        trained = copy.deepcopy(start)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for (index,) in recorded_batches(engine.trajectory):
            module.net, kept = trained, torch.tensor([i != without for i in index])
            optimizer.zero_grad()
            ((twice(module, (x[index], y[index])) * kept).sum() / len(index)).backward()
            optimizer.step()
        xv, yv = data(11, 1).tensors
        values.append(Classifier.loss(module, trained(xv), yv).item())
        trained_loss = module.loss(trained(xv), yv).item()
        values[-1] = trained_loss
    assert found.influence.item() == pytest.approx(values[0] - values[1], rel=1e-7)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda module, batch: twice(module, batch).mean(), "one loss a sample"),
        (lambda module, batch: 3 * twice(module, batch), "depends on the data"),
    ],
)
def test_wrong_sample_losses_are_refused(tmp_path: Path, function: Any, message: str) -> None:
    module = Flattened(net(normalised=False), sgd())
    with pytest.raises(UnsupportedError, match=message):
        record(tmp_path, module, data(24, 0), data(11, 1), callback={"sample_losses": function})
