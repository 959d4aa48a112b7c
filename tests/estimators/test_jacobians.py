"""J_jV by the layers' factors: it is that of the whole Jacobian, and used only where it is right."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_accie import AccSgdIE, LowRankAccSgdIE
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import Basis
from lightning_accie.estimators.jacobians import FactoredJacobian, WholeJacobian
from lightning_accie.replay.gauss_newton import outputs_along
from lightning_accie.replay.tape import Tape
from tests.problems import Classifier, classification, record, sgd

DATA, VALIDATION = classification(20), classification(11, seed=3)
ALL = 10_000


class Image(nn.Module):
    """Four features as an image of 2 by 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, 2, 2)


class Tokens(nn.Module):
    """Four features as the same token, six times."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * (k + 1) for k in range(6)], 1)


class Twice(nn.Module):
    """A layer that is called twice, and a ReLU that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(x))).sigmoid_()


def layers(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(*parts).double()


def convolutions() -> nn.Module:
    return layers(
        Image(),
        nn.Conv2d(1, 2, 3, padding=2, bias=False),
        nn.Tanh(),
        Twice(),
        nn.Conv2d(2, 3, (2, 3), stride=(2, 1)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def linear_in_its_weights() -> nn.Module:
    """A generalised linear model: a convolution, and the mean over its 16 positions."""
    return layers(Image(), nn.Conv2d(1, 3, 3, padding=2), nn.AvgPool2d((1, 2)), _Sums())


class _Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(8, dtype=x.dtype).cos()
        return (x.flatten(2) * places).sum(2)


class Unheard(nn.Module):
    """A layer whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return x


NETS = {
    "a layer unheard": lambda: layers(Tokens(), Unheard(), nn.Flatten(), nn.Linear(24, 3)),
    "convolutions": convolutions,
    "tokens": lambda: layers(Tokens(), nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
    "vectors": lambda: layers(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
}


def recorded(root: Path, net: nn.Module, **settings: Any) -> Replay:
    return record(root, Classifier(net, sgd(lr=0.2)), DATA, VALIDATION, **settings).replay()


def same(found: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float(expected.norm()) > 1e-6
    assert float((found - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("rows", [1, 2, 512])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "one bias frozen"])
@pytest.mark.parametrize("net", NETS)
def test_it_is_the_jacobian(tmp_path: Path, net: str, frozen: bool, rows: int) -> None:
    """Against `jacrev` of the outputs in all parameters."""
    module = NETS[net]()
    if frozen:
        next(p for n, p in module.named_parameters() if n.endswith("bias")).requires_grad_(False)
    replay = recorded(tmp_path, module)
    visit = next(iter(replay.walker.forwards()))
    (loss,) = visit.map.losses
    names, params = replay.trainable, visit.state.params
    size = sum(params[name].numel() for name in names)
    basis = Basis(torch.randn(5, size, dtype=torch.float64), names, params)
    rest = {n: p for n, p in module.named_parameters() if f"net.{n}" not in params}

    def outputs(some: dict[str, Tensor]) -> Tensor:
        mine = {name.removeprefix("net."): value for name, value in some.items()}
        return functional_call(module, {**rest, **mine}, (DATA.tensors[0][loss.samples],))

    parts = jacrev(outputs)(OrderedDict((name, params[name]) for name in names))
    whole = torch.cat([parts[name].flatten(2) for name in names], 2) @ basis.rows.T  # [B, D, r]
    tape = Tape.of(loss, visit.map.used)
    ways = [
        FactoredJacobian(loss, basis, rows),
        WholeJacobian(outputs_along(tape, basis.directions, rows=rows)),
    ]
    c, x = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    for way in ways:
        same(way.whole(), whole.permute(2, 0, 1))
        same(way.along(c), torch.einsum("bdr,br->bd", whole, c))
        same(way.back(x), torch.einsum("bdr,bd->br", whole, x))


class Counted:
    """Counts the Jacobians by factors that a walk makes of use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.along = self.whole = 0
        for name in ("along", "whole"):
            monkeypatch.setattr(FactoredJacobian, name, self._counting(name))

    def _counting(self, name: str) -> Any:
        method = getattr(FactoredJacobian, name)

        def counted(jacobian: FactoredJacobian, *args: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return method(jacobian, *args)

        return counted


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "acc"])
def test_acc_of_a_generalised_linear_model(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step has the whole of it, as there are more directions than outputs."""
    replay = recorded(tmp_path, linear_in_its_weights(), **settings)
    acc = AccSgdIE(query="linear").estimate(replay)
    counted = Counted(monkeypatch)
    found = LowRankAccSgdIE(ALL, refresh_every=1).estimate(replay)
    same(found.extras["linear"], acc.influence)
    assert (counted.along, counted.whole) == (0, 12)  # micro-batches of three epochs
    LowRankAccSgdIE(ALL, refresh_every=2).estimate(replay)
    assert counted.along == 12 - (counted.whole - 12) > 0


@pytest.mark.parametrize("rank", [2, 7], ids=["fewer than outputs", "more than outputs"])
def test_both_ways_give_the_same(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = recorded(tmp_path, convolutions())
    counted = Counted(monkeypatch)
    found = LowRankAccSgdIE(rank, refresh_every=3).estimate(replay)
    assert counted.along == 8
    assert counted.whole == (4 if rank > 3 else 0)
    monkeypatch.setattr("lightning_accie.estimators.own_curvature.FEW", 1000)
    other = LowRankAccSgdIE(rank, refresh_every=3).estimate(replay)
    assert counted.along == 8
    assert float((other.influence - other.extras["sgd_ie"]).norm()) > 0
    same(found.influence, other.influence)


class Stranger(nn.Module):
    """Reads a layer's weight besides calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.weight.cos().mean()


class Scale(nn.Module):
    """A parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Weights(nn.Module):
    """A network of no layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


OTHERS = {
    "no layers": lambda: layers(Weights()),
    "samples see each other": lambda: layers(
        Image(),
        nn.Conv2d(1, 2, 3, padding=2),
        nn.BatchNorm2d(2, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(32, 3),
    ),
    "used elsewhere": lambda: layers(Tokens(), Stranger(), nn.Flatten(), nn.Linear(18, 3)),
    "of no layer": lambda: layers(
        Tokens(), nn.Linear(4, 3), Scale(), nn.Flatten(), nn.Linear(18, 3)
    ),
    "in groups": lambda: layers(
        Image(),
        nn.Conv2d(1, 2, 3, padding=2),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.Flatten(),
        nn.Linear(32, 3),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_where_factors_do_not_tell_it_goes_by_directions(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = recorded(tmp_path, OTHERS[case]())
    counted = Counted(monkeypatch)
    found = LowRankAccSgdIE(6, query="linear").estimate(replay)
    assert (counted.along, counted.whole) == (0, 0)
    assert bool(found.influence.isfinite().all())


def test_where_they_do_not_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = recorded(tmp_path, convolutions())
    counted = Counted(monkeypatch)
    monkeypatch.setattr("lightning_accie.replay.walker.Walker.graph_bytes", lambda _: 1)
    small = replace(replay, memory_budget=30_000)
    found = LowRankAccSgdIE(2, refresh_every=1).estimate(small).influence
    assert (counted.along, counted.whole) == (0, 0)
    same(found, LowRankAccSgdIE(2, refresh_every=1).estimate(replay).influence)
