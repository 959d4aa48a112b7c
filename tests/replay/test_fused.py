"""Fused and foreach implementations of the optimisers, against the single-tensor rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accie.replay.update_rules import rule_for
from tests.problems import Classifier, adam, adamw, record, sgd
from tests.replay.test_bit_exact import float32_data, net, one_cycle

SETTINGS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.02, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
}


def apart(name: str, size: int, dtype: torch.dtype, **how: bool) -> float:
    """The largest difference from the rule over 100 steps, in roundings of the largest weight."""
    kind, settings = SETTINGS[name]
    g = torch.Generator().manual_seed(size)
    parameter = torch.nn.Parameter(torch.randn(size, generator=g, dtype=dtype))
    optimizer = kind([parameter], **settings, **how)  # type: ignore[call-arg]
    rule, replayed, slots = rule_for(kind), parameter.detach().clone(), {}
    worst = 0.0
    for step in range(100):
        gradient = torch.randn(size, generator=g, dtype=dtype)
        parameter.grad = gradient.clone()
        optimizer.step()
        replayed, slots = rule.update(replayed, gradient, slots, step, optimizer.param_groups[0])
        difference = (replayed - parameter.detach()).abs().max() / parameter.detach().abs().max()
        worst = max(worst, float(difference))
    return worst / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_foreach_is_the_rule_to_the_bit(name: str, dtype: torch.dtype) -> None:
    assert apart(name, 1003, dtype, foreach=True) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_fused_is_the_rule_up_to_a_few_roundings(name: str, dtype: torch.dtype) -> None:
    """The kernel adds and multiplies in one rounding where its vector registers are not full."""
    assert apart(name, 1003, dtype, fused=True) < 4.0


@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("kind", [sgd, adam, adamw], ids=lambda kind: kind.__name__)
def test_a_run_of_it_is_replayed(tmp_path: Path, kind: Any, how: str) -> None:
    module = Classifier(net("dropout"), kind(**{how: True}), one_cycle)
    data, valid = float32_data(47, 0), float32_data(20, 1)
    engine = record(tmp_path, module, data, valid, batch_size=5, max_epochs=4)
    info = engine.estimate(estimator="sgd-ie", verify=4).info
    assert info["bit_exact_replay"] or how == "fused"
    assert info["largest_loss_difference"] < 1e-5
    assert info["largest_state_difference"] < 1e-5
