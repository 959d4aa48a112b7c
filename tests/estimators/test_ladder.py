"""The ways to the same derivatives: side by side, one by one, backwards twice, without torch.func."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_accie import AccSgdIE, InfluenceEngine, LeaveOneOut, SgdIE, TracIn, UnsupportedError
from lightning_accie.estimators.measure import choose_ways
from tests.problems import (
    Classifier,
    adam,
    classification,
    record,
    regression,
    sgd,
    smooth_net,
)
from tests.replay.tasks import Task, drops_its_own_term_alone

CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}


class Penalised(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        decay = sum(p.square().sum() for p in self.net.parameters())
        return F.cross_entropy(logits, target) + 0.01 * decay


def recorded(root: Path, configure: Any, **trainer: Any) -> InfluenceEngine:
    net = nn.Sequential(smooth_net(), nn.Dropout(0.2))
    data = classification(8), classification(5, seed=3)
    return record(root, Penalised(net, configure), *data, batch_size=4, max_epochs=2, **trainer)


@pytest.mark.parametrize(
    ("configure", "trainer"),
    [(sgd(momentum=0.9), {}), (adam(), CLIPPED), (sgd(), CLIPPED)],
    ids=["momentum", "adam-clipped", "sgd-clipped"],
)
def test_all_ways_give_the_same(tmp_path: Path, configure: Any, trainer: dict[str, Any]) -> None:
    engine = recorded(tmp_path, configure, **trainer)
    replay = engine.replay("val_loss")
    acc = AccSgdIE().estimate(replay).influence
    first = {kind: kind().estimate(replay).influence for kind in (SgdIE, TracIn)}
    exact = LeaveOneOut().estimate(replay).influence
    assert float(acc.abs().max()) > 1e-4

    def same(found: Tensor, reference: Tensor) -> None:
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-13)

    for way in ("one-by-one", "double-backward"):
        replay.walker.tangents = way
        same(AccSgdIE().estimate(replay).influence, acc)
        same(TracIn().estimate(replay).influence, first[TracIn])
    replay.walker.tangents = "vectorized"
    engine._program.untransformed = "(said the test)"
    same(AccSgdIE().estimate(replay).influence, acc)
    same(LeaveOneOut().estimate(replay).influence, exact)
    for kind, reference in first.items():
        same(kind().estimate(replay).influence, reference)


# ---------------------------------------------------------------------- operators


class Squares(Task):
    """A regression whose own terms are given by the network's outputs."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean(1) / len(x)


class Huber(Squares):
    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(self.net(x), y, delta=5.0)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(self.net(x), y, delta=5.0, reduction="none").mean(1) / len(x)


class Packed(nn.Module):
    """Recurrence over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0] > 0).long()
        packed = pack_padded_sequence(
            x.view(len(x), 2, 2), lengths, batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.rnn(packed)
        return self.head(torch.cat([hidden[0], hidden[1]], 1))


class Warped(nn.Module):
    """Samples a small image where a network says."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = 0.5 * torch.tanh(self.where(x)).view(len(x), 2, 1, 2)
        return F.grid_sample(x.view(len(x), 1, 2, 2), grid, align_corners=True).view(len(x), 2)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=False)


class Cube(torch.autograd.Function):
    """As they were written before `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Classic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(Cube.apply(0.5 * torch.tanh(self.inner(x))))


def weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2))


def spectral_norm() -> nn.Module:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2))


def orthogonal() -> nn.Module:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2))


class Prototypes(nn.Module):
    """Distances to learned points, one of which is where another is."""

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        self.p, self.inner, self.head = p, nn.Linear(4, 3), nn.Linear(30, 2)
        self.points = nn.Parameter(torch.randn(30, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        among = torch.cdist(self.points[:5], self.points[:5], p=self.p)
        near = torch.exp(-torch.cdist(hidden, self.points, self.p))
        return self.head(near) + 0.1 * torch.exp(-among).mean()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


# name: (task, network, the way for tangents, what is named as the reason)
OPERATORS: dict[str, tuple[type[Task], Any, str, str]] = {
    "huber": (Huber, plain, "double-backward", "huber_loss"),
    "weight-norm": (Squares, weight_norm, "vectorized", ""),
    "spectral-norm": (Squares, spectral_norm, "double-backward", "in-place"),
    "packed": (Squares, Packed, "double-backward", ""),
    "grid-sample": (Squares, Warped, "double-backward", "grid_sampl"),
    "checkpoint": (Squares, Recomputed, "double-backward", "torch.func"),
    "classic-function": (Squares, Classic, "double-backward", "setup_context"),
    "orthogonal": (Squares, orthogonal, "vectorized", ""),
    "cdist": (Squares, Prototypes, "vectorized", ""),
    "cdist-1": (Squares, lambda: Prototypes(1.0), "vectorized", ""),
    "cdist-3": (Squares, lambda: Prototypes(3.0), "vectorized", ""),
    "plain": (Squares, plain, "vectorized", ""),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", OPERATORS)
def test_operators(tmp_path: Path, case: str) -> None:
    """Bit-exact replay; SGD-IE, ACC and exact replay against plain training."""
    kind, net, tangents, reason = OPERATORS[case]
    torch.manual_seed(2)
    task = kind(net().double(), momentum=0.5)
    engine = drops_its_own_term_alone(
        tmp_path,
        task,
        regression(13),
        regression(9, seed=1),
        slope=case != "spectral-norm",  # its power iteration is detached: no derivative sees it
        max_epochs=2,
        callback={"estimator": "acc-sgd-ie"},
    )
    replay = engine.replay("val_loss")
    assert replay.walker.tangents == tangents
    ladder = choose_ways(replay)
    assert reason in " ".join(ladder.reasons.values())
    acc = AccSgdIE().estimate(replay).influence
    exact = LeaveOneOut().estimate(replay).influence
    near = 0.5 if case == "orthogonal" else 0.15  # a sample turns its whole matrix
    assert float((acc - exact).norm() / exact.norm()) < near


def test_the_choice_is_logged_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(2)
    engine = record(tmp_path, Huber(plain().double()), regression(13), regression(9, seed=1))
    caplog.clear()
    with caplog.at_level("INFO"):
        info = engine.estimate(estimator="acc-sgd-ie", verify=2).info
    lines = [line for line in caplog.messages if line.startswith("Influence analysis:")]
    assert len(lines) == 3  # the others say what will be done
    assert "huber_loss" in lines[0]
    assert "by double-backward" in lines[0]
    assert info["tangent_product"] == info["hessian_product"] == "double-backward"
    assert info["vectorized"] is True
    assert "huber_loss" in info["refused"]["tangents side by side"]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("estimator", ["acc-sgd-ie", "sgd-ie"])
def test_the_engine_refuses_what_no_way_reaches(tmp_path: Path, estimator: str) -> None:
    torch.manual_seed(2)
    words = torch.randint(0, 9, (13, 4), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(words, regression(13).tensors[1])
    given = {"estimator": "leave-one-out"}
    engine = record(tmp_path, Squares(Bag().double()), data, data, callback=given)
    with pytest.raises(UnsupportedError, match=r"embedding_bag.*leave-one-out"):
        engine.estimate(estimator=estimator, verify=0)
    exact = engine.estimate(estimator="leave-one-out", verify=0)
    assert "embedding_bag" in " ".join(exact.info["refused"].values())


# ---------------------------------------------------------------------- switches


def switches() -> dict[str, bool]:
    return {
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }


class Faulty(nn.Module):
    """Attention and recurrence; raises on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.seen: list[dict[str, bool]] = []
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(switches())
        if self.fails:
            raise ValueError("on demand")
        return self.head(self.rnn(self.mix(x.view(len(x), 1, 4)))[0][:, -1])


def test_switches_stand_as_before_also_after_an_exception(tmp_path: Path) -> None:
    torch.manual_seed(2)
    before = switches()
    assert before["mkldnn"]
    assert before["flash"]
    data = regression(12), regression(9, seed=1)
    engine = record(tmp_path, Squares(Faulty().double()), *data, max_epochs=1)
    assert switches() == before
    replay = engine.replay("val_loss")
    SgdIE().estimate(replay)
    assert switches() == before
    inner, outer = engine._program.module.net, replay.query.module.net
    assert not inner.seen[-1]["mkldnn"]
    inner.fails = outer.fails = True
    for action in (
        lambda: SgdIE().estimate(replay),
        lambda: LeaveOneOut([0]).estimate(replay),
        lambda: replay.query.value(replay.final.state.params),
        lambda: engine.replay("val_loss"),
    ):
        with pytest.raises(ValueError, match="on demand"):
            action()
        assert switches() == before
