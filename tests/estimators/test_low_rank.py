"""Low-rank ACC-SGD-IE: exact with a complete basis, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.func import grad as gradient_of
from torch.utils.data import DataLoader, RandomSampler

from lightning_accie import (
    AccSgdIE,
    InfluenceCallback,
    LeaveOneOut,
    LowRankAccSgdIE,
    SgdIE,
    UnsupportedError,
)
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.basis import leading
from lightning_accie.replay.step import TANGENTS
from tests.problems import (
    Classifier,
    Regressor,
    adam,
    classification,
    fit,
    record,
    regression,
    sgd,
    smooth_net,
)
from tests.truth import recorded_batches

ALL = 10_000
DATA, VALIDATION = classification(20), classification(11, seed=3)


def full(**settings: Any) -> LowRankAccSgdIE:
    """All directions, and no approximation of a Hessian."""
    return LowRankAccSgdIE(ALL, "hessian", **{"refresh_every": 1, **settings})


def same(found: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    assert float(expected.norm()) > 1e-6
    assert float((found - expected).norm()) <= relative * float(expected.norm())


def recorded(root: Path, module: Classifier, **settings: Any) -> Replay:
    return record(root, module, DATA, VALIDATION, **settings).replay("val_loss")


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": parameters[:2], "lr": 0.2, "weight_decay": 0.05},
        {"params": parameters[2:], "momentum": 0.5},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


class Penalised(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return F.cross_entropy(logits, target) + 0.01 * penalty


OPTIMISERS = {
    "sgd": sgd(),
    "weight-decay": sgd(weight_decay=0.05),
    "momentum": sgd(momentum=0.9),
    "dampening": sgd(momentum=0.8, dampening=0.3, weight_decay=0.02),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": sgd(lr=0.02, maximize=True, momentum=0.5, weight_decay=0.05),
    "two-groups": two_groups,
}


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "acc"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_with_all_directions_it_is_acc(
    tmp_path: Path, optimiser: str, settings: dict[str, Any]
) -> None:
    module = Classifier(smooth_net(), OPTIMISERS[optimiser], decay)
    replay = recorded(tmp_path, module, **settings)
    found = full(query="linear").estimate(replay)
    acc = AccSgdIE().estimate(replay)
    same(found.influence, acc.extras["linear"])
    same(found.extras["relative_change"], acc.extras["relative_change"])
    same(found.extras["sgd_ie"], SgdIE().estimate(replay).influence, 1e-12)
    assert float((found.influence - found.extras["sgd_ie"]).norm()) > 1e-3 * float(
        found.influence.norm()
    )


def test_a_penalty_in_the_loss(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Penalised(smooth_net(), sgd()))
    same(
        full().estimate(replay).extras["linear"],
        AccSgdIE(query="linear").estimate(replay).influence,
    )


class Alternating(Classifier):
    """Trains one head or the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        body, one, other = self.net
        return self.loss((other if batch_idx % 2 else one)(torch.tanh(body(x))), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        body, one, _ = self.net
        self.log("val_loss", self.loss(one(torch.tanh(body(x))), y))


def test_parameters_that_only_some_steps_use(tmp_path: Path) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)).double()
    configure = sgd(momentum=0.8, dampening=0.2, weight_decay=0.1)
    replay = recorded(tmp_path, Alternating(net, configure))
    assert len({visit.map.used for visit in replay.walker.forwards()}) == 2
    same(
        full(query="linear").estimate(replay).influence,
        AccSgdIE().estimate(replay).extras["linear"],
    )


@pytest.mark.parametrize("configure", [sgd(), sgd(momentum=0.7, dampening=0.2, weight_decay=0.02)])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_it_is_exact_on_least_squares(tmp_path: Path, configure: Any, curvature: str) -> None:
    """F_t is affine and q quadratic: ACC and the query's curvature leave nothing out."""
    data, val = regression(20), regression(11, seed=3)
    engine = record(tmp_path, Regressor(nn.Linear(4, 2).double(), configure), data, val)
    replay = engine.replay("val_loss")
    found = LowRankAccSgdIE(ALL, curvature, refresh_every=1).estimate(replay).influence
    same(found, LeaveOneOut().estimate(replay).influence)


def test_transcription_with_explicit_hessians(tmp_path: Path) -> None:
    """The recursion and ½ΔᵀHΔ with whole matrices, from plain torch."""
    net = smooth_net()
    initial = copy.deepcopy(net)
    engine = record(tmp_path, Classifier(net, sgd(lr=0.3)), DATA, VALIDATION)
    found = full().estimate(engine.replay("val_loss"))
    shapes = {name: p.shape for name, p in initial.named_parameters()}

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        params = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(initial, params, (x,)), y)

    theta = torch.cat([p.detach().reshape(-1) for p in initial.parameters()])
    delta = torch.zeros(20, len(theta), dtype=torch.float64)
    x, y = DATA.tensors
    for (batch,) in recorded_batches(engine.trajectory):
        moved = delta - 0.3 * delta @ hessian(loss)(theta, x[batch], y[batch])
        for j in batch:
            one = x[j : j + 1], y[j : j + 1]
            own = gradient_of(loss)(theta, *one) + hessian(loss)(theta, *one) @ delta[j]
            moved[j] += 0.3 / len(batch) * own
        theta, delta = theta - 0.3 * gradient_of(loss)(theta, x[batch], y[batch]), moved
    linear = delta @ gradient_of(loss)(theta, *VALIDATION.tensors)
    same(found.extras["linear"], linear)
    bend = ((delta @ hessian(loss)(theta, *VALIDATION.tensors)) * delta).sum(1) / 2
    same(found.influence, linear + bend)


# ---------------------------------------------------------------------- Gauss-Newton


class Logistic(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 3).double())


class Flattened(Classifier):
    """Two tokens a sample, by rows ``[2·B, 3]`` of either order, or ``[B, 3, 2]``."""

    order = "blocked"

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        tokens = logits.view(len(logits), 2, 3)
        targets = torch.stack([target, (target + 1) % 3], 1)
        if self.order == "channels":
            return F.cross_entropy(tokens.transpose(1, 2), targets)
        if self.order == "interleaved":
            tokens, targets = tokens.transpose(0, 1), targets.T
        return F.cross_entropy(tokens.reshape(-1, 3), targets.reshape(-1))


class Interleaved(Flattened):
    order = "interleaved"


class Channels(Flattened):
    order = "channels"


class Summed(Classifier):
    """Losses of the same outputs, and one that is linear in what enters it."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        likelihood = F.nll_loss(logits.log_softmax(1), target)
        squares = F.mse_loss(logits, F.one_hot(target, 3).double())
        return F.cross_entropy(logits, target) + 0.3 * squares + 0.1 * likelihood


class Heads(Classifier):
    """Two heads of one linear map, a loss for each."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        one, other = logits[:, :3], logits[:, 3:]
        return F.cross_entropy(one, target) + 0.3 * F.mse_loss(other, F.one_hot(target, 3).double())


GENERALISED = {
    "softmax": (Classifier, 3),
    "logistic": (Logistic, 3),
    "blocked": (Flattened, 6),
    "interleaved": (Interleaved, 6),
    "channels": (Channels, 6),
    "summed": (Summed, 3),
    "heads": (Heads, 6),
}


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "acc"])
@pytest.mark.parametrize("case", GENERALISED)
def test_gauss_newton_is_the_hessian_of_generalised_linear_models(
    tmp_path: Path, case: str, settings: dict[str, Any]
) -> None:
    kind, outputs = GENERALISED[case]
    torch.manual_seed(3)
    replay = recorded(tmp_path, kind(nn.Linear(4, outputs).double(), sgd(lr=0.4)), **settings)
    gauss_newton = LowRankAccSgdIE(ALL, refresh_every=1).estimate(replay)
    same(gauss_newton.influence, full().estimate(replay).influence)
    same(gauss_newton.extras["linear"], AccSgdIE(query="linear").estimate(replay).influence)


class HandWritten(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return -logits.log_softmax(1).gather(1, target[:, None]).mean()


class LogLikelihood(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(logits.log_softmax(1), target)


class Backwards(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(F.one_hot(target, 3).double(), logits)


@pytest.mark.parametrize("kind", [HandWritten, LogLikelihood, Backwards, Penalised])
def test_gauss_newton_is_refused_where_the_loss_is_no_function_of_outputs(
    tmp_path: Path, kind: type[Classifier]
) -> None:
    engine = record(tmp_path, kind(smooth_net(), sgd()), DATA, VALIDATION)
    with pytest.raises(UnsupportedError, match=r"gauss-newton.*its loss.*curvature=\"hessian\""):
        engine.estimate(estimator="low-rank-acc-sgd-ie", verify=0)
    replay = engine.replay("val_loss")
    same(
        full(query="linear").estimate(replay).influence,
        AccSgdIE().estimate(replay).extras["linear"],
    )


def test_gauss_newton_takes_operators_without_forward_mode(tmp_path: Path) -> None:
    class Huber(Regressor):
        def loss(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.huber_loss(logits, target, delta=0.5)

    data, val = regression(20), regression(11, seed=3)
    replay = record(tmp_path, Huber(nn.Linear(4, 2).double(), sgd()), data, val).replay("val_loss")
    found = LowRankAccSgdIE(ALL, refresh_every=1).estimate(replay)
    same(found.extras["linear"], AccSgdIE(query="linear").estimate(replay).influence)


# ---------------------------------------------------------------------- which samples


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_samples_drawn_once_have_no_correction(tmp_path: Path, curvature: str) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(momentum=0.9)), max_epochs=1)
    found = LowRankAccSgdIE(4, curvature).estimate(replay)
    assert torch.equal(found.extras["linear"], found.extras["sgd_ie"])
    assert torch.equal(found.samples, replay.samples)


def test_never_drawn_samples_are_not_in_it(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), sgd())
    replay = recorded(tmp_path, module, max_epochs=1, limit_train_batches=2)
    assert len(LowRankAccSgdIE(4).estimate(replay).samples) == 12
    absent = next(i for i in range(20) if i not in replay.samples.tolist())
    with pytest.raises(ValueError, match="never drew"):
        LowRankAccSgdIE(4, candidates=[absent]).estimate(replay)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_candidates_get_what_they_get_among_all(tmp_path: Path, curvature: str) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(momentum=0.5)))
    whole = LowRankAccSgdIE(5, curvature).estimate(replay)
    some = LowRankAccSgdIE(5, curvature, candidates=[3, 11]).estimate(replay)
    assert some.samples.tolist() == [3, 11]
    same(some.influence, whole.influence[[3, 11]], 1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_a_sample_may_be_twice_in_a_batch(tmp_path: Path, curvature: str) -> None:
    torch.manual_seed(3)
    sampler = RandomSampler(DATA, replacement=True, num_samples=24)
    module = Classifier(nn.Linear(4, 3).double(), sgd(lr=0.4))
    replay = recorded(tmp_path, module, loader={"shuffle": False, "sampler": sampler})
    found = LowRankAccSgdIE(ALL, curvature, refresh_every=1).estimate(replay)
    same(found.extras["linear"], AccSgdIE(query="linear").estimate(replay).influence)


# ---------------------------------------------------------------------- the same in other ways


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_all_ways_give_the_same(
    tmp_path: Path, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(smooth_net(), nn.Dropout(0.2))
    engine = record(tmp_path, Classifier(net, sgd(momentum=0.5)), DATA, VALIDATION)
    replay = engine.replay("val_loss")
    estimator = LowRankAccSgdIE(6, curvature)
    reference = estimator.estimate(replay).influence
    for way in TANGENTS:
        replay.walker.tangents = way
        same(estimator.estimate(replay).influence, reference)
    replay.walker.tangents, replay.walker.product = TANGENTS[0], "reverse-over-forward"
    same(estimator.estimate(replay).influence, reference)
    replay.walker.product = "double-backward"
    room = replay.walker.memory_budget
    replay.walker.memory_budget = 0
    same(estimator.estimate(replay).influence, reference)
    replay.walker.memory_budget = room
    monkeypatch.setattr("lightning_accie.estimators.chunks._LARGEST", 2)
    same(estimator.estimate(replace(replay, memory_budget=90_000)).influence, reference)
    replay.walker.vectorize = replay.query.vectorize = False
    same(estimator.estimate(replay).influence, reference)
    engine._program.untransformed = "(said the test)"
    same(estimator.estimate(replay).influence, reference)


def test_seeds_and_refreshing(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    one, again, other, rarely = (
        LowRankAccSgdIE(6, seed=seed, refresh_every=every).estimate(replay).influence
        for seed, every in ((0, 1), (0, 1), (1, 1), (0, 3))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    same(other, one, 0.1)
    assert not torch.equal(rarely, one)
    same(rarely, one, 0.02)


def test_a_basis_is_orthonormal_and_has_the_rank_of_what_it_spans() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(12, 5) @ torch.randn(5, 40) * torch.logspace(0, 3, 40)
    basis = leading(vectors, 8, ["a", "b"], {"a": torch.zeros(4, 5), "b": torch.zeros(20)})
    assert basis.rank == 5
    torch.testing.assert_close(basis.rows @ basis.rows.T, torch.eye(5), rtol=0, atol=1e-5)
    shaped = {"a": vectors[:, :20].view(12, 4, 5), "b": vectors[:, 20:]}
    back = basis.combine(basis.project(shaped))
    for name, value in shaped.items():
        torch.testing.assert_close(back[name], value, rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("configure", "trainer", "reason"),
    [
        (adam(), {}, r"`Adam`.*AccSgdIE"),
        (sgd(), {"gradient_clip_val": 0.3}, r"gradient clipping.*\"norm\".*AccSgdIE"),
    ],
    ids=["adam", "clipping"],
)
def test_what_it_does_not_follow_is_refused_when_fit_starts(
    tmp_path: Path, configure: Any, trainer: dict[str, Any], reason: str
) -> None:
    module = Classifier(smooth_net(), configure)
    loader = DataLoader(DATA, batch_size=6), DataLoader(VALIDATION, batch_size=7)
    with pytest.raises(UnsupportedError, match=reason):
        fit(tmp_path, module, *loader, callback={"estimator": "low-rank-acc-sgd-ie"}, **trainer)
    replay = recorded(tmp_path / "other", Classifier(smooth_net(), configure), **trainer)
    with pytest.raises(UnsupportedError, match=reason):
        LowRankAccSgdIE().estimate(replay)


def test_running_statistics_need_the_linear_query(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    replay = recorded(tmp_path, Classifier(net.double(), sgd(momentum=0.5)))
    with pytest.raises(UnsupportedError, match=r"running statistics.*query=\"linear\""):
        full().estimate(replay)
    same(
        full(query="linear").estimate(replay).influence,
        AccSgdIE(query="linear").estimate(replay).influence,
    )
    gauss_newton = LowRankAccSgdIE(ALL, query="linear").estimate(replay)
    same(gauss_newton.extras["sgd_ie"], SgdIE().estimate(replay).influence, 1e-9)


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    module = Classifier(nn.Linear(4, 3).double(), sgd())
    replay = replace(recorded(tmp_path, module, max_epochs=9), memory_budget=2000)
    with pytest.raises(UnsupportedError, match=r"4 directions.*take 0 MB.*`memory_budget`"):
        LowRankAccSgdIE(4).estimate(replay)
    with pytest.raises(UnsupportedError, match=r"3 numbers for every visit.*`memory_budget`"):
        LowRankAccSgdIE(ALL).estimate(replay)


def test_arguments() -> None:
    for given in ({"rank": 0}, {"rank": 2.0}, {"refresh_every": 0}, {"rank": True}):
        with pytest.raises(ValueError, match="must be an integer from 1"):
            LowRankAccSgdIE(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        LowRankAccSgdIE(seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`curvature` must be 'gauss-newton' or 'hessian'"):
        LowRankAccSgdIE(curvature="fisher")
    with pytest.raises(ValueError, match=r"`query` must be"):
        LowRankAccSgdIE(query="evaluated")
    with pytest.raises(ValueError, match="candidates"):
        LowRankAccSgdIE(candidates=0)


# ---------------------------------------------------------------------- in use


def test_by_name_at_the_end_of_fit(tmp_path: Path) -> None:
    loader = DataLoader(DATA, batch_size=6, shuffle=True), DataLoader(VALIDATION, batch_size=7)
    callback = {"run": "fit_end", "estimator": "low-rank-acc-sgd-ie", "monitor": "val_loss"}
    influence = fit(tmp_path, Classifier(smooth_net(), sgd()), *loader, callback=callback)
    assert isinstance(influence, InfluenceCallback)
    assert influence.scores is not None
    assert {row.estimator for row in influence.scores.agreement} == {"low-rank-acc-sgd-ie"}


class Interrupting:
    """Ctrl-C at the third unit of work."""

    def __init__(self) -> None:
        self.left = 3

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        yield self.advance

    def advance(self, units: int) -> None:
        self.left -= units
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_ends_it_as_it_ends_sgd_ie(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    for estimator in (SgdIE(), LowRankAccSgdIE(4)):
        with pytest.raises(KeyboardInterrupt):
            estimator.estimate(replace(replay, progress=Interrupting()))
