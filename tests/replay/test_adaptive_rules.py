"""The other adaptive optimisers of torch: their rules against torch itself, and against retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_accie.replay.update_rules import rule_for
from tests.problems import regression
from tests.replay.tasks import Task, drops_its_own_term_alone

OPTIMISERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-all": (
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.7, "weight_decay": 0.02, "alpha": 0.9},
    ),
    "rmsprop-momentum": (torch.optim.RMSprop, {"momentum": 0.5, "maximize": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adagrad-all": (
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.02, "maximize": True},
    ),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adadelta-all": (
        torch.optim.Adadelta,
        {"lr": 0.7, "rho": 0.8, "weight_decay": 0.02, "maximize": True, "eps": 1e-5},
    ),
    "adamax": (torch.optim.Adamax, {}),
    "adamax-all": (
        torch.optim.Adamax,
        {"betas": (0.8, 0.9), "weight_decay": 0.02, "maximize": True},
    ),
    "radam": (torch.optim.RAdam, {}),
    "radam-long": (torch.optim.RAdam, {"betas": (0.8, 0.9), "weight_decay": 0.02}),
    "radam-decoupled": (
        torch.optim.RAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "nadam": (torch.optim.NAdam, {}),
    "nadam-coupled": (
        torch.optim.NAdam,
        {"betas": (0.8, 0.95), "weight_decay": 0.02, "momentum_decay": 0.1},
    ),
    "nadam-decoupled": (
        torch.optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("case", OPTIMISERS)
def test_every_bit_is_torchs(case: str, dtype: torch.dtype) -> None:
    kind, given = OPTIMISERS[case]
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=dtype))
    optimizer = kind([parameter], **{"lr": 0.01, **given})
    rule = rule_for(kind)
    slots, count = rule.slots_from(optimizer.state[parameter])
    value = parameter.detach().clone()
    for step in range(25):  # RAdam rectifies from its sixth step on
        grad = torch.randn(7, 5, generator=generator, dtype=dtype)
        grad[0] = 0.0  # a weight that never gets a gradient
        optimizer.param_groups[0]["lr"] *= 0.97
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        value, slots = rule.update(value, grad, slots, count + step, settings)
        parameter.grad = grad.clone()
        optimizer.step()
        kept, steps = rule.slots_from(optimizer.state[parameter])
        assert torch.equal(value, parameter.detach()), step
        assert steps == step + 1
        assert slots.keys() == kept.keys()
        assert all(torch.equal(slots[name], kept[name]) for name in slots)
    assert not rule.linear_in_gradient(settings)


class Squares(Task):
    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean(1) / len(x)


def with_a_dead_input(n: int, seed: int = 0) -> TensorDataset:
    x, y = regression(n, seed=seed).tensors
    x[:, 3] = 0.0
    return TensorDataset(x, y)


@pytest.mark.parametrize("case", [c for c in OPTIMISERS if "maximize" not in OPTIMISERS[c][1]])
def test_estimates_follow_training(tmp_path: Path, case: str) -> None:
    kind, given = OPTIMISERS[case]
    torch.manual_seed(2)
    task = Squares(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double())
    task.configure = lambda parameters: kind(parameters, **{"lr": 0.01, **given})
    data = with_a_dead_input(11), with_a_dead_input(9, seed=1)
    drops_its_own_term_alone(tmp_path, task, *data, slope=True, batch_size=4)
