"""When each estimator is exact (the method's facts 1 to 5), in float64, against outside truths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_accie.estimators import AccSgdIE, LeaveOneOut, SgdIE
from lightning_accie.replay.update_rules import _RULES, SGD
from tests.problems import (
    Classifier,
    Regressor,
    adam,
    adamw,
    classification,
    record,
    regression,
    sgd,
    smooth_net,
)
from tests.truth import central_difference, mean_loss, recorded_batches, recorded_rates, retrain


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=40, cycle_momentum=False
    )


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


OPTIMISERS = {
    "sgd": sgd(),
    "sgd-weight-decay": sgd(weight_decay=0.05),
    "sgd-maximize": sgd(lr=0.02, maximize=True, momentum=0.5, weight_decay=0.05),
    "adam-maximize": adam(lr=0.01, maximize=True),
    "momentum": sgd(momentum=0.9),
    "dampening": sgd(momentum=0.8, dampening=0.3),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": adam(),
    "adam-coupled-decay": adam(weight_decay=0.1),
    "amsgrad": adam(amsgrad=True, betas=(0.8, 0.9)),
    "adamw": adamw(weight_decay=0.1),
}
TRAINERS: dict[str, tuple[dict[str, Any], tuple[str, float] | None]] = {
    "plain": ({}, None),
    "clip-norm": ({"gradient_clip_val": 0.3}, ("norm", 0.3)),
    "clip-value": (
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ("value", 0.05),
    ),
    "accumulate": ({"accumulate_grad_batches": 2}, None),
    "accumulate-clip": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, ("norm", 0.3)),
}
CASES = [(name, "plain") for name in OPTIMISERS]
CASES += [
    (name, trainer)
    for name in ("sgd", "nesterov", "adam")
    for trainer in TRAINERS
    if trainer != "plain"
]


@pytest.mark.parametrize(("optimiser", "trainer"), CASES)
def test_sgd_ie_is_the_derivative_of_training(tmp_path: Path, optimiser: str, trainer: str) -> None:
    """Fact 1: SGD-IE is -dq/dw_j, by a central difference through plain torch training."""
    configure = OPTIMISERS[optimiser]
    settings, clip = TRAINERS[trainer]
    schedule = one_cycle if optimiser in ("sgd", "momentum") else decay
    data, val = classification(20), classification(11, seed=3)
    net = smooth_net()
    initial = copy.deepcopy(net)
    module = Classifier(net, configure, schedule)
    engine = record(tmp_path, module, data, val, **settings)
    estimate = SgdIE().estimate(engine.replay("val_loss"))
    batches, rates = recorded_batches(engine.trajectory), recorded_rates(engine.trajectory)
    accumulate = settings.get("accumulate_grad_batches", 1)

    def query(weights: torch.Tensor) -> float:
        trained = retrain(
            copy.deepcopy(initial),
            data.tensors,
            batches,
            configure,
            weights,
            rates=rates,
            clip=clip,
            accumulate=accumulate,
        )
        return mean_loss(trained, val.tensors)

    assert query(torch.ones(20)) == pytest.approx(mean_loss(module.net, val.tensors), rel=1e-12)
    for j in (0, 7, 19):
        slope = central_difference(query, 20, j)
        position = int((estimate.samples == j).nonzero())
        assert float(estimate.influence[position]) == pytest.approx(-slope, rel=2e-5, abs=1e-9)


@pytest.mark.parametrize(
    "configure",
    [
        sgd(),
        sgd(momentum=0.9),
        sgd(momentum=0.9, nesterov=True),
        sgd(weight_decay=0.1),
        sgd(momentum=0.7, dampening=0.2, weight_decay=0.02),
    ],
    ids=["sgd", "momentum", "nesterov", "weight-decay", "all"],
)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "acc"])
def test_acc_is_exact_on_least_squares(
    tmp_path: Path, configure: Any, settings: dict[str, Any]
) -> None:
    """Fact 2: F_t is affine in s, so ACC with the evaluated query is the truth; SGD-IE is not."""
    data, val = regression(20), regression(11, seed=3)
    net = nn.Linear(4, 2).double()
    initial = copy.deepcopy(net)
    module = Regressor(net, configure)
    engine = record(tmp_path, module, data, val, **settings)
    replay = engine.replay("val_loss")
    acc = AccSgdIE().estimate(replay).influence
    batches = recorded_batches(engine.trajectory)
    whole = mean_loss(net, val.tensors, F.mse_loss)
    truth = []
    for j in range(20):
        weights = torch.ones(20).double()
        weights[j] = 0
        trained = retrain(
            copy.deepcopy(initial),
            data.tensors,
            batches,
            configure,
            weights,
            loss=F.mse_loss,
            accumulate=settings.get("accumulate_grad_batches", 1),
        )
        truth.append(mean_loss(trained, val.tensors, F.mse_loss) - whole)
    exact = torch.tensor(truth, dtype=torch.float64)
    assert float((acc - exact).norm() / exact.norm()) < 1e-9
    assert float((LeaveOneOut().estimate(replay).influence - exact).norm() / exact.norm()) < 1e-9
    assert float((SgdIE().estimate(replay).influence - exact).norm() / exact.norm()) > 1e-3


@pytest.mark.parametrize("configure", [sgd(), sgd(momentum=0.9, weight_decay=0.01)])
def test_acc_linear_is_sgd_ie_when_each_sample_is_drawn_once(
    tmp_path: Path, configure: Any
) -> None:
    """Fact 3: the correction needs a second visit."""
    data, val = classification(24), classification(11, seed=3)
    module = Classifier(smooth_net(), configure)
    replay = record(tmp_path, module, data, val, max_epochs=1).replay("val_loss")
    acc = AccSgdIE(query="linear").estimate(replay).influence
    first = SgdIE().estimate(replay).influence
    assert float((acc - first).abs().max()) < 1e-14
    assert float(first.abs().max()) > 1e-4


def test_never_drawn_samples_have_no_score(tmp_path: Path) -> None:
    """Fact 4: influence exactly 0; such samples are not among the scores."""
    data, val = classification(24), classification(11, seed=3)
    module = Classifier(smooth_net(), sgd())
    engine = record(tmp_path, module, data, val, max_epochs=1, limit_train_batches=2)
    replay = engine.replay("val_loss")
    assert len(replay.samples) == 12
    absent = next(i for i in range(24) if i not in replay.samples.tolist())
    with pytest.raises(ValueError, match="never drew"):
        LeaveOneOut([absent]).estimate(replay)
    step = next(replay.walker.forwards())
    same = step.map.advance_many(
        step.state.map(lambda v: v.expand(2, *v.shape)), torch.tensor([absent, -1])
    )
    assert all(torch.equal(value[0], value[1]) for value in same.leaves())


def test_numpy_transcription_of_logistic_regression(tmp_path: Path) -> None:
    """Fact 5: the paper's recursion with explicit Hessians, in plain NumPy."""
    data, val = classification(18, classes=2), classification(11, classes=2, seed=3)
    net = nn.Linear(4, 1, bias=False).double()
    start = net.weight.detach().numpy().ravel().copy()

    class Logistic(Classifier):
        def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(logits[:, 0], target.double())

    engine = record(tmp_path, Logistic(net, sgd(lr=0.5)), data, val, max_epochs=4)
    replay = engine.replay("val_loss")
    x, y = data.tensors[0].numpy(), data.tensors[1].numpy()
    xv, yv = val.tensors[0].numpy(), val.tensors[1].numpy()
    theta, delta, lr = start, np.zeros((18, 4)), 0.5

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    for (batch,) in recorded_batches(engine.trajectory):
        xb, yb = x[batch], y[batch]
        p = sigmoid(xb @ theta)
        hessian = (xb * (p * (1 - p))[:, None]).T @ xb / len(batch)
        new = delta - lr * delta @ hessian
        for place, j in enumerate(batch):
            g = (p[place] - yb[place]) * xb[place]
            own = p[place] * (1 - p[place]) * np.outer(xb[place], xb[place])
            new[j] += lr / len(batch) * (g + own @ delta[j])
        theta = theta - lr * xb.T @ (p - yb) / len(batch)
        delta = new

    def query(w: np.ndarray) -> float:
        z = xv @ w
        return float(np.mean(np.logaddexp(0, z) - yv * z))

    slope = xv.T @ (sigmoid(xv @ theta) - yv) / len(yv)
    found = AccSgdIE().estimate(replay)
    np.testing.assert_allclose(found.extras["linear"].numpy(), delta @ slope, rtol=1e-9, atol=1e-14)
    evaluated = np.array([query(theta + row) - query(theta) for row in delta])
    np.testing.assert_allclose(found.influence.numpy(), evaluated, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("optimiser", ["nesterov", "adam", "amsgrad", "adamw"])
def test_leave_one_out_is_retraining_without_the_sample(tmp_path: Path, optimiser: str) -> None:
    """The vectorised replay against plain torch training with the sample's weight at 0."""
    configure = OPTIMISERS[optimiser]
    data, val = classification(20), classification(11, seed=3)
    net = smooth_net()
    initial = copy.deepcopy(net)
    module = Classifier(net, configure, decay)
    engine = record(tmp_path, module, data, val, gradient_clip_val=0.3)
    found = LeaveOneOut([0, 7, 19]).estimate(engine.replay("val_loss"))
    batches, rates = recorded_batches(engine.trajectory), recorded_rates(engine.trajectory)
    for j, influence in zip((0, 7, 19), found.influence.tolist(), strict=True):
        weights = torch.ones(20).double()
        weights[j] = 0
        trained = retrain(
            copy.deepcopy(initial),
            data.tensors,
            batches,
            configure,
            weights,
            rates=rates,
            clip=("norm", 0.3),
        )
        truth = mean_loss(trained, val.tensors) - mean_loss(net, val.tensors)
        assert influence == pytest.approx(truth, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "momentum"])
@pytest.mark.parametrize("product", ["double-backward", "reverse-over-forward"])
def test_both_hessian_products_agree(tmp_path: Path, optimiser: str, product: str) -> None:
    data, val = classification(20), classification(11, seed=3)
    module = Classifier(smooth_net(), OPTIMISERS[optimiser])
    engine = record(tmp_path, module, data, val, accumulate_grad_batches=2, gradient_clip_val=0.3)
    replay = engine.replay("val_loss")
    reference = SgdIE().estimate(replay).influence
    replay.walker.product = product
    other = SgdIE().estimate(replay).influence
    torch.testing.assert_close(other, reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("configure", [adam(), adam(amsgrad=True), adamw(weight_decay=0.1)])
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.05}], ids=["plain", "clip"])
def test_acc_is_exact_for_what_only_the_last_step_drew(
    tmp_path: Path, configure: Any, settings: dict[str, Any]
) -> None:
    """Δ is then the bracket alone, F_T(s, 1 - e_j) - F_T(s, 1), which no optimiser makes linear."""
    data, val = classification(24), classification(11, seed=3)
    engine = record(
        tmp_path, Classifier(smooth_net(), configure), data, val, max_epochs=1, **settings
    )
    replay = engine.replay("val_loss")
    last = replay.samples[replay.last == len(replay.walker) - 1]
    assert len(last) == 6
    found = AccSgdIE(last).estimate(replay).influence
    exact = LeaveOneOut(last).estimate(replay).influence
    assert float(exact.abs().max()) > 1e-5
    assert float((found - exact).abs().max()) < 1e-9 * float(exact.abs().max())


class Shifted(torch.optim.SGD):
    """Twice the learning rate, and every weight a bit lower."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.copy_(p - 2 * group["lr"] * p.grad - 1e-3)
        return loss


class ShiftedRule(SGD):
    """Takes the rest of the rule, shortcuts included, from that of SGD."""

    def update(
        self, param: Any, grad: Any, slots: Any, step: int, settings: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return param - 2 * settings["lr"] * grad - 1e-3, {}


def test_a_rule_that_inherits_shortcuts_is_differentiated_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_RULES, Shifted, ShiftedRule())
    data, val = classification(20), classification(11, seed=3)

    def configure(parameters: Any) -> Any:
        return Shifted(parameters, lr=0.1)

    net = smooth_net()
    initial = copy.deepcopy(net)
    engine = record(tmp_path, Classifier(net, configure), data, val, max_epochs=1)
    replay = engine.replay("val_loss")
    found = SgdIE().estimate(replay).influence
    batches = recorded_batches(engine.trajectory)

    def query(weights: torch.Tensor) -> float:
        start = copy.deepcopy(initial)
        return mean_loss(retrain(start, data.tensors, batches, configure, weights), val.tensors)

    for j in (0, 7, 19):
        slope = central_difference(query, 20, j)
        assert float(found[j]) == pytest.approx(-slope, rel=2e-5, abs=1e-9)
    forwards = AccSgdIE(query="linear").estimate(replay).influence  # each drawn once
    torch.testing.assert_close(forwards, found, rtol=1e-9, atol=1e-14)
