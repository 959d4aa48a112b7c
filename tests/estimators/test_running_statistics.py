"""Running statistics are a part of the state: without a sample they come out otherwise too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_accie import AccSgdIE, LeaveOneOut, SgdIE, TracIn
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.measure import choose_ways
from lightning_accie.replay.step import TANGENTS
from tests.problems import Classifier, Configure, adam, classification, record, sgd
from tests.truth import mean_loss, recorded_batches, retrain

CHOSEN = [0, 7, 19]


class Images(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 2, 2)


class Twice(nn.Module):
    """One layer that normalises two things in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.between = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.between(self.norm(x).tanh()))


def batch_norm(**settings: Any) -> list[nn.Module]:
    # No bias before it: BatchNorm cancels it, and Adam would scale up the rounding of its gradient.
    first = nn.Linear(4, 5, bias=False)
    return [first, nn.BatchNorm1d(5, **settings), nn.Tanh(), nn.Linear(5, 3)]


def images(norm: nn.Module) -> list[nn.Module]:
    middle = [norm, nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.BatchNorm2d(2)]
    return [Images(), nn.Conv2d(1, 3, 1, bias=False), *middle, nn.Flatten(), nn.Linear(2, 3)]


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "batch": batch_norm,
    "cumulative": lambda: batch_norm(momentum=None),
    "plain-scale": lambda: batch_norm(affine=False, momentum=0.4, eps=1e-2),
    "twice": lambda: [nn.Linear(4, 4, bias=False), Twice(), nn.Tanh(), nn.Linear(4, 3)],
    "images": lambda: images(nn.BatchNorm2d(3)),
    "instances": lambda: images(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
}
OPTIMISERS: dict[str, Configure] = {"sgd": sgd(momentum=0.5), "adam": adam()}
DATA, VALIDATION = classification(20), classification(11, seed=3)


def made(net: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*NETS[net]()).double()


def recorded(root: Path, net: str, configure: Configure, **settings: Any) -> Replay:
    module = Classifier(made(net), configure)
    return record(root, module, DATA, VALIDATION, **settings).replay("val_loss")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("net", NETS)
def test_the_query_reads_the_statistics_of_the_run_without_the_sample(
    tmp_path: Path, net: str, optimiser: str, accumulate: int
) -> None:
    configure = OPTIMISERS[optimiser]
    replay = recorded(tmp_path, net, configure, accumulate_grad_batches=accumulate)
    batches = recorded_batches(replay.walker.trajectory)

    def query(sample: int = 0, by: float = 0.0) -> float:
        weights = torch.ones(20, dtype=torch.float64)
        weights[sample] -= by
        trained = retrain(
            made(net), DATA.tensors, batches, configure, weights, accumulate=accumulate
        )
        return mean_loss(trained.eval(), VALIDATION.tensors)

    whole = query()
    assert replay.query.value(replay.final.state.visible) == pytest.approx(whole, rel=1e-12)
    exact = [query(j, 1.0) - whole for j in CHOSEN]
    found = LeaveOneOut(CHOSEN).estimate(replay).influence.tolist()
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-10)
    assert max(map(abs, exact)) > 1e-4
    first = SgdIE().estimate(replay)
    for j in CHOSEN:
        slope = (query(j, 1e-5) - query(j, -1e-5)) / 2e-5
        (value,) = first.influence[first.samples == j].tolist()
        assert value == pytest.approx(slope, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("net", NETS)
def test_acc_is_sgd_ie_where_every_sample_is_drawn_once(tmp_path: Path, net: str) -> None:
    """Fact 3, which ties the forward derivatives of the statistics to the backward ones."""
    replay = recorded(tmp_path, net, sgd(momentum=0.5), max_epochs=1, batch_size=5)
    first = SgdIE().estimate(replay).influence
    for way in TANGENTS:
        replay.walker.tangents = way
        found = AccSgdIE(query="linear").estimate(replay).influence
        torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-13)
    assert first.abs().max() > 1e-4


class ByHand(nn.BatchNorm1d):
    """Written out: differentiating torch's own forward-mode derivative of it is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean(0), x.var(0)
        if self.track_running_stats:
            for running, now in ((self.running_mean, mean), (self.running_var, variance)):
                assert running is not None
                running.mul_(0.9).add_(0.1 * now.detach())
        scaled = (x - mean) / (variance * (len(x) - 1) / len(x) + self.eps).sqrt()
        return scaled * self.weight + self.bias


NETS["by-hand"] = lambda: [nn.Linear(4, 5, bias=False), ByHand(5), nn.Tanh(), nn.Linear(5, 3)]


def test_every_way_gives_the_same(tmp_path: Path) -> None:
    replay = recorded(tmp_path, "by-hand", adam(), accumulate_grad_batches=2)
    assert len(replay.final.state.statistics) == 2
    found = []
    for product in ("double-backward", "reverse-over-forward"):
        replay.walker.product = product
        found.append(SgdIE().estimate(replay).influence)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
    one_by_one, together = [], []
    for rows, vectorize in ((together, True), (one_by_one, False)):
        replay.walker.vectorize = vectorize
        rows.append(LeaveOneOut(CHOSEN).estimate(replay).influence)
        rows.append(AccSgdIE(CHOSEN).estimate(replay).influence)
    torch.testing.assert_close(one_by_one, together, rtol=1e-9, atol=1e-12)
    assert "reverse-over-forward" not in choose_ways(replay).reasons


@pytest.mark.parametrize("rate", [0.1, 1e-7])
@pytest.mark.parametrize("net", ["batch", "instances"])
def test_a_wrong_way_is_not_taken(tmp_path: Path, net: str, rate: float) -> None:
    """Whichever is faster, and however little the curvature does in one step."""
    replay = recorded(tmp_path, net, sgd(lr=rate))
    right = SgdIE().estimate(replay).influence
    replay.walker.product = "reverse-over-forward"
    if rate == 0.1:
        assert (SgdIE().estimate(replay).influence - right).abs().max() > 1e-2 * right.abs().max()
    ladder = choose_ways(replay)
    assert ladder.reasons["reverse-over-forward"].startswith("torch gets it wrong")
    assert replay.walker.product == "double-backward"


def test_the_estimates_see_the_statistics(tmp_path: Path) -> None:
    """Without them the same run would be ranked otherwise."""
    replay = recorded(tmp_path, "batch", sgd(), max_epochs=8)
    with_them = LeaveOneOut().estimate(replay).influence
    assert TracIn().estimate(replay).influence.isfinite().all()
    replay.walker.program.statistics.leave_out()
    frozen = dataclasses.replace(replay, final=replay.walker.final())
    without = LeaveOneOut().estimate(frozen).influence
    scale = with_them.square().mean().sqrt()
    assert (without - with_them).square().mean().sqrt() > 0.1 * scale


def test_a_network_that_is_frozen_in_part(tmp_path: Path) -> None:
    """Nothing before the layer is trained: its statistics move, but not with the weights."""
    net = made("batch")
    net[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    replay = record(tmp_path, Classifier(net, sgd()), DATA, VALIDATION).replay("val_loss")
    assert len(replay.final.state.statistics) == 2
    exact = LeaveOneOut(CHOSEN).estimate(replay).influence
    assert exact.abs().max() > 1e-4
    assert (
        AccSgdIE(CHOSEN).estimate(replay).influence - exact
    ).abs().max() < 0.3 * exact.abs().max()


def test_statistics_that_are_not_given_are_those_of_the_end(tmp_path: Path) -> None:
    replay = recorded(tmp_path, "batch", sgd())
    state, query = replay.final.state, replay.query
    query.gradient(replay.walker.start().state.visible)  # leaves others behind
    both = {name: torch.stack([value, value]) for name, value in state.params.items()}
    assert query.values(both).tolist() == pytest.approx([query.value(state.visible)] * 2, rel=1e-12)


class Checkpointed(nn.Module):
    """Its backward pass runs the layer again, and updates the statistics twice a batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)


def test_statistics_that_follow_something_else_stay_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(1)
    inner = Checkpointed(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()))
    module = Classifier(nn.Sequential(inner, nn.Linear(5, 3)).double(), sgd())
    with pytest.warns(UserWarning, match=r"running statistics `net\.0\.inner\.1\.running_mean`"):
        engine = record(tmp_path, module, DATA, VALIDATION)
    replay = engine.replay("val_loss")
    assert replay.final.state.statistics == {}
    replay.walker.tangents, replay.walker.vectorize = "double-backward", False
    replay.query.vectorize = False
    assert LeaveOneOut(CHOSEN).estimate(replay).influence.abs().max() > 1e-4
    assert replay.walker.fidelity.bit_exact
