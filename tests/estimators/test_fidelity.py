"""How close estimates come to exact replay on a convex problem, and what a blow-up looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_accie.agreement import kendall_tau, relative_rmse
from lightning_accie.estimators import AccSgdIE, LeaveOneOut, LowRankAccSgdIE, SgdIE, TracIn
from lightning_accie.estimators.base import Replay
from tests.problems import Classifier, classification, record, sgd, smooth_net


@pytest.fixture(scope="module")
def softmax_digits(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """n = 200, batch 50, 40 epochs, lr 0.5, in the order of the file."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16.0), torch.tensor(digits.target)
    torch.manual_seed(10)
    module = Classifier(nn.Linear(64, 10).double(), sgd(lr=0.5))
    train, val = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:700], y[200:700])
    root = tmp_path_factory.mktemp("digits")
    engine = record(root, module, train, val, batch_size=50, max_epochs=40)
    return engine.replay("val_loss")


@pytest.fixture(scope="module")
def exact(softmax_digits: Replay) -> Tensor:
    return LeaveOneOut().estimate(softmax_digits).influence


def test_acc_with_the_evaluated_query(softmax_digits: Replay, exact: Tensor) -> None:
    found = AccSgdIE().estimate(softmax_digits)
    assert bool(found.trusted.all())
    assert relative_rmse(found.influence, exact) <= 0.10
    assert kendall_tau(found.influence, exact) >= 0.97
    linear = found.extras["linear"]
    assert relative_rmse(linear, exact) > relative_rmse(found.influence, exact)


def test_sgd_ie(softmax_digits: Replay, exact: Tensor) -> None:
    found = SgdIE().estimate(softmax_digits).influence
    assert relative_rmse(found, exact) <= 0.30
    assert kendall_tau(found, exact) >= 0.90


def test_low_rank(softmax_digits: Replay, exact: Tensor) -> None:
    found = LowRankAccSgdIE(rank=64, curvature="hessian").estimate(softmax_digits)
    assert bool(found.trusted.all())
    assert relative_rmse(found.influence, exact) <= 0.13
    assert kendall_tau(found.influence, exact) >= 0.97
    few = LowRankAccSgdIE().estimate(softmax_digits)
    assert relative_rmse(found.influence, exact) < relative_rmse(few.influence, exact) <= 0.20
    assert kendall_tau(few.influence, exact) > kendall_tau(few.extras["sgd_ie"], exact)


def test_tracin_is_cheaper_and_worse(softmax_digits: Replay, exact: Tensor) -> None:
    found = TracIn().estimate(softmax_digits).influence
    assert (
        0.05
        < kendall_tau(found, exact)
        < kendall_tau(SgdIE().estimate(softmax_digits).influence, exact)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_tracin_is_the_sum_over_steps(tmp_path: Path, momentum: float) -> None:
    """Σ_t η ⟨∇q(θ_T), ∇ℓ_i(θ_t)⟩/|m|, times 1 + μ + … + μ^(T-1-t) for momentum, by plain autograd."""
    data, val = classification(12), classification(11, seed=3)
    engine = record(tmp_path, Classifier(smooth_net(), sgd(momentum=momentum)), data, val)
    replay = engine.replay("val_loss")
    found = TracIn().estimate(replay)
    slope = replay.query.gradient(replay.final.state.params)
    net = smooth_net()
    expected = torch.zeros(12, dtype=torch.float64)
    for visit in replay.walker.forwards():
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(visit.state.params[f"net.{name}"])
        for i in visit.map.samples.tolist():
            loss = nn.functional.cross_entropy(net(data.tensors[0][i]), data.tensors[1][i])
            grads = torch.autograd.grad(loss, list(net.parameters()))
            names = [f"net.{name}" for name, _ in net.named_parameters()]
            product = sum((slope[n] * g).sum() for n, g in zip(names, grads, strict=True))
            rate = 0.1 * sum(momentum**k for k in range(len(replay.walker) - visit.step))
            expected[i] += rate / len(visit.map.samples) * float(product)
    torch.testing.assert_close(found.influence, expected, rtol=1e-9, atol=1e-15)


def test_a_change_that_blew_up_is_not_trusted(tmp_path: Path) -> None:
    """A step size beyond stability makes Δ grow without bound; the estimate must say so."""
    data, val = classification(12), classification(11, seed=3)
    module = Classifier(smooth_net(), sgd(lr=12.0))
    engine = record(tmp_path, module, data, val, max_epochs=12)
    found = AccSgdIE().estimate(engine.replay("val_loss"))
    assert not bool(found.trusted.all())
    assert bool((found.extras["relative_change"][~found.trusted] > 0.5).all())


def test_small_chunks_give_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, val = classification(20), classification(11, seed=3)
    engine = record(tmp_path, Classifier(smooth_net(), sgd(momentum=0.9)), data, val)
    replay = engine.replay("val_loss")
    whole = AccSgdIE().estimate(replay).influence, LeaveOneOut().estimate(replay).influence
    monkeypatch.setattr("lightning_accie.estimators.chunks._LARGEST", 3)
    parts = AccSgdIE().estimate(replay).influence, LeaveOneOut().estimate(replay).influence
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
