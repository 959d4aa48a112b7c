"""Finding the samples' own terms where batches, parameters and losses are degenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_accie import AccSgdIE, LeaveOneOut, SgdIE, UnsupportedError
from tests.problems import Classifier, record, regression
from tests.replay.tasks import Task, drops_its_own_term_alone

VALIDATION = regression(11, outputs=3, seed=1)


def squares(task: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return (task.net(x) - y).square()


def decay(task: Classifier) -> Tensor:
    return 0.05 * sum(p.square().sum() for p in task.net.parameters())  # type: ignore[return-value]


class Penalised(Task):
    """A mean and a penalty, both by hand."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return squares(self, x, y).mean() + decay(self)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return squares(self, x, y).mean(1) / len(x)

    def rest(self) -> Tensor:
        return decay(self)


class PenalisedByLoss(Penalised):
    """Both by functions that are losses elsewhere."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        zeros = [torch.zeros_like(p) for p in self.net.parameters()]
        pairs = zip(self.net.parameters(), zeros, strict=True)
        return F.mse_loss(self.net(x), y) + 0.05 * sum(
            F.mse_loss(p, zero, reduction="sum") for p, zero in pairs
        )


class Masked(Task):
    """A mean over the entries that are known."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        mask = (y > 0).double()
        return (squares(self, x, y) * mask).sum() / mask.sum()

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        mask = (y > 0).double()
        return (squares(self, x, y) * mask).sum(1) / mask.sum()


class Hinged(Task):
    """A second loss that is zero for every sample until later."""

    def hinge(self, x: Tensor) -> Tensor:
        return (self.net(x).abs() - 0.4).clamp_min(0.0)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return squares(self, x, y).mean() + self.hinge(x).mean()

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return (squares(self, x, y) + self.hinge(x)).mean(1) / len(x)


class Variational(Task):
    """Reconstruction by a loss function, the divergence by hand, and noise in between."""

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        encoded, scale = self.net(x), 0.5
        z = encoded + scale * torch.randn_like(encoded)
        return z, 0.5 * (encoded.square() + scale**2 - 1)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        z, divergence = self.parts(x, y)
        return F.mse_loss(z, y, reduction="sum") / len(x) + 0.1 * divergence.sum(1).mean()

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        z, divergence = self.parts(x, y)
        return ((z - y).square().sum(1) + 0.1 * divergence.sum(1)) / len(x)


class ThroughSampleLosses(Penalised):
    """What no probe finds, and the user passes."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return sum(row.mean() for row in squares(self, x, y)) / len(x) + decay(self)  # type: ignore[return-value]


def sample_losses(module: Any, batch: Any) -> Tensor:
    return squares(module, *batch).mean(1)


def zeroed(layer: nn.Linear, *names: str) -> nn.Linear:
    for name in names:
        nn.init.zeros_(getattr(layer, name))
    return layer


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def zero_biases() -> nn.Module:
    """Six rows in a bias that is zero at the start, as many as a batch has samples."""
    return nn.Sequential(
        zeroed(nn.Linear(4, 6), "bias"), nn.Tanh(), zeroed(nn.Linear(6, 3), "bias")
    )


def zero_head() -> nn.Module:
    """No sample's output differs from another's at the start."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), zeroed(nn.Linear(6, 3), "weight", "bias"))


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    )


# name: (task, network, samples, batch size)
CASES: dict[str, tuple[type[Task], Any, int, int]] = {
    "last-batch-of-one": (Penalised, plain, 19, 6),
    "last-batch-as-large-as-a-weight": (Penalised, plain, 15, 6),
    "last-batch-as-large-as-a-weight-by-loss": (PenalisedByLoss, plain, 15, 6),
    "batches-of-one": (Penalised, plain, 7, 1),
    "batches-of-one-by-loss": (PenalisedByLoss, plain, 7, 1),
    "whole-dataset-in-a-batch": (Penalised, plain, 12, 12),
    "biases-of-zero": (Penalised, zero_biases, 18, 6),
    "head-of-zero": (PenalisedByLoss, zero_head, 18, 6),
    "penalty-with-noise": (Penalised, noisy, 18, 6),
    "penalty-by-loss-with-noise": (PenalisedByLoss, noisy, 18, 6),
    "masked": (Masked, plain, 19, 6),
    "masked-with-noise": (Masked, noisy, 18, 6),
    "hinge-asleep": (Hinged, zero_head, 18, 6),
    "variational": (Variational, plain, 18, 6),
    "variational-with-noise": (Variational, noisy, 18, 6),
    "sample-losses": (ThroughSampleLosses, plain, 19, 6),
    "sample-losses-with-noise": (ThroughSampleLosses, noisy, 18, 6),
}


def made(case: str) -> tuple[Task, TensorDataset, int, dict[str, Any]]:
    kind, net, count, batch_size = CASES[case]
    torch.manual_seed(2)
    task = kind(net().double(), momentum=0.5)
    given = {"sample_losses": sample_losses} if kind is ThroughSampleLosses else {}
    return task, regression(count, outputs=3), batch_size, given


@pytest.mark.parametrize("case", CASES)
def test_leaving_one_out_drops_its_own_term_alone(tmp_path: Path, case: str) -> None:
    task, data, batch_size, given = made(case)
    drops_its_own_term_alone(
        tmp_path, task, data, VALIDATION, batch_size=batch_size, callback=given
    )


@pytest.mark.parametrize("kind", [Penalised, PenalisedByLoss])
def test_a_penalty_that_starts_at_zero_is_none_of_the_samples(
    tmp_path: Path, kind: type[Task]
) -> None:
    """On least squares ACC is exact, if it takes the penalty out of each sample's curvature."""
    net = zeroed(nn.Linear(4, 3), "weight", "bias").double()
    engine = record(tmp_path, kind(net), regression(19, outputs=3), VALIDATION)
    replay = engine.replay("val_loss")
    exact = LeaveOneOut().estimate(replay).influence
    found = AccSgdIE().estimate(replay).influence
    assert float((found - exact).norm() / exact.norm()) < 1e-9
    assert float((SgdIE().estimate(replay).influence - exact).norm() / exact.norm()) > 1e-3


class Statistics(Task):
    """The loss's scale is a statistic of the batch."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        loss = squares(self, x, y).mean()
        return loss / loss.detach()


class Unreduced(Task):
    """No reduction that could carry weights."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.net(x) - y)


class Hidden(Task):
    """One term is found, the other is not."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y) + torch.linalg.vector_norm(self.net(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Statistics, "not a weighted sum"),
        (Unreduced, "no reduction"),
        (Hidden, "depends on the data but on no sample's own term"),
    ],
)
def test_what_is_no_sum_over_samples_is_refused(
    tmp_path: Path, kind: type[Task], reason: str
) -> None:
    task = kind(plain().double(), lr=1e-6)
    with pytest.raises(UnsupportedError, match=rf"(?s){reason}.*def sample_losses"):
        record(tmp_path, task, regression(18, outputs=3), VALIDATION)


def detached(module: Any, batch: Any) -> Tensor:
    return sample_losses(module, batch).detach()


def doubled(module: Any, batch: Any) -> Tensor:
    return 2 * sample_losses(module, batch)


def too_few(module: Any, batch: Any) -> Tensor:
    return sample_losses(module, batch)[1:]


@pytest.mark.parametrize(
    ("function", "reason"),
    [(detached, "with their graph"), (doubled, "the very losses"), (too_few, r"shape \(5,\)")],
)
def test_wrong_sample_losses_are_refused(tmp_path: Path, function: Any, reason: str) -> None:
    task = Penalised(plain().double(), lr=1e-6)
    given = {"sample_losses": function}
    with pytest.raises(UnsupportedError, match=reason):
        record(tmp_path, task, regression(18, outputs=3), VALIDATION, callback=given)
