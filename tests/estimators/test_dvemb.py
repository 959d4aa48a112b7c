"""Data value embeddings: the papers' recursions transcribed, SGD-IE where the curvature is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_accie import (
    AccDataValueEmbedding,
    DataValueEmbedding,
    InfluenceEngine,
    SgdIE,
    UnsupportedError,
)
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.dvemb import EmbeddingEstimator
from lightning_accie.estimators.projected import ProjectedGradients
from lightning_accie.estimators.projection import Projection
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
from tests.truth import recorded_batches, recorded_rates

DATA, VALIDATION = classification(20), classification(11, seed=3)
BOTH: list[type[EmbeddingEstimator]] = [DataValueEmbedding, AccDataValueEmbedding]


def same(found: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    assert float(expected.norm()) > 1e-6
    assert float((found - expected).norm()) <= relative * float(expected.norm())


def recorded(root: Path, module: Classifier, **settings: Any) -> Replay:
    return record(root, module, DATA, VALIDATION, **settings).replay("val_loss")


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


# ---------------------------------------------------------------------- the papers, transcribed


class Plain:
    """The recursions with flat gradients of plain autograd; shares no code with the package."""

    def __init__(
        self, replay: Replay, net: nn.Module, data: TensorDataset, fisher: bool, accumulate: int = 1
    ) -> None:
        self.net, self.fisher, self.accumulate = net, fisher, accumulate
        self.x, self.y = data.tensors
        self.states = [v.state.params for v in replay.walker.forwards()]
        self.batches = recorded_batches(replay.walker.trajectory)
        self.rates = recorded_rates(replay.walker.trajectory)
        self.n = len(self.x)
        query = replay.query.gradient(replay.final.state.params)
        self.query = torch.cat([value.reshape(-1) for value in query.values()])

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {name.removeprefix("net."): value for name, value in params.items()}
        return functional_call(self.net, named, (x[None],))[0]

    def loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(params, x)[None], y[None])

    def gradient(self, params: dict[str, Tensor], i: int) -> Tensor:
        """∇ℓ_i."""
        parts = grad(self.loss)(params, self.x[i], self.y[i])
        return torch.cat([value.reshape(-1) for value in parts.values()])

    def curvature(self, params: dict[str, Tensor], i: int) -> Tensor:
        """∇ℓ_i∇ℓ_iᵀ, or J_iᵀ(diag p - ppᵀ)J_i."""
        if not self.fisher:
            g = self.gradient(params, i)
            return torch.outer(g, g)
        parts = jacrev(self.logits)(params, self.x[i])
        jacobian = torch.cat([value.flatten(1) for value in parts.values()], 1)
        p = torch.softmax(self.logits(params, self.x[i]), 0)
        return jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian

    def draws(self, t: int) -> list[tuple[int, float]]:
        """The samples of a step, with c_m/|m|."""
        return [(i, 1.0 / len(micro) / self.accumulate) for micro in self.batches[t] for i in micro]

    def hessian(self, t: int) -> Tensor:
        terms = [share * self.curvature(self.states[t], i) for i, share in self.draws(t)]
        return torch.stack(terms).sum(0)

    def dvemb(self) -> Tensor:
        """Algorithm 1 of arXiv 2412.09538, with M^(T-1) = 0; visits of a sample add up."""
        size = len(self.query)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        found = torch.zeros(self.n, size, dtype=torch.float64)
        for t in reversed(range(len(self.states))):
            rate = self.rates[t]
            for i, share in self.draws(t):
                g = self.gradient(self.states[t], i)
                found[i] += rate * share * (g - matrix @ g)
            hessian = self.hessian(t)
            matrix = matrix + rate * (hessian - matrix @ hessian)
        return found @ self.query

    def acc(self, momentum: float = 0.0, decay: float = 0.0) -> Tensor:
        """Δ forwards for each sample, with the factor 1 + ⟨∇ℓ, Δ⟩ on its visits."""
        moved = torch.zeros(self.n, len(self.query), dtype=torch.float64)
        buffer = torch.zeros_like(moved)
        for t in range(len(self.states)):
            change = moved @ self.hessian(t) + decay * moved
            for i, share in self.draws(t):
                g = self.gradient(self.states[t], i)
                change[i] -= share * (1.0 + g @ moved[i]) * g
            buffer = momentum * buffer + change
            moved = moved - self.rates[t] * buffer
        return moved @ self.query


@pytest.mark.parametrize("curvature", ["empirical", "fisher"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_recursions_are_the_papers(tmp_path: Path, curvature: str, accumulate: int) -> None:
    module = Classifier(smooth_net(), sgd(lr=0.5), decay)
    replay = recorded(tmp_path, module, accumulate_grad_batches=accumulate)
    plain = Plain(replay, smooth_net(), DATA, curvature == "fisher", accumulate)
    found = DataValueEmbedding(None, curvature).estimate(replay)
    same(found.influence, plain.dvemb())
    assert bool(found.trusted.all())
    accumulated = AccDataValueEmbedding(None, curvature).estimate(replay).influence
    same(accumulated, plain.acc())
    assert float((accumulated - found.influence).norm()) > 1e-3 * float(found.influence.norm())


@pytest.mark.parametrize("cls", BOTH)
def test_a_sample_twice_in_a_batch(tmp_path: Path, cls: type[EmbeddingEstimator]) -> None:
    sampler = RandomSampler(DATA, replacement=True, num_samples=30)
    loader = {"shuffle": False, "sampler": sampler}
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(lr=0.5)), loader=loader)
    plain = Plain(replay, smooth_net(), DATA, fisher=True)
    assert any(len(set(micro)) < len(micro) for step in plain.batches for micro in step)
    expected = plain.dvemb() if cls is DataValueEmbedding else plain.acc()
    same(cls(None).estimate(replay).influence, expected[replay.samples])


def test_the_sign_is_that_of_exact_replay(tmp_path: Path) -> None:
    """SGD-IE's sign is compared with exact replay elsewhere."""
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(lr=0.5)))
    expected = SgdIE().estimate(replay).influence
    for cls in BOTH:
        found = cls(None).estimate(replay).influence
        strong = expected.abs() > expected.abs().median()
        assert torch.equal(found[strong].sign(), expected[strong].sign())


# ---------------------------------------------------------------------- where the curvature is exact


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": parameters[:1], "lr": 0.2, "weight_decay": 0.05},
        {"params": parameters[1:], "momentum": 0.5},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


OPTIMISERS = {
    "weight-decay": sgd(weight_decay=0.05),
    "momentum": sgd(momentum=0.9),
    "dampening": sgd(momentum=0.8, dampening=0.3, weight_decay=0.02),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": sgd(lr=0.02, maximize=True, momentum=0.5, weight_decay=0.05),
    "two-groups": two_groups,
}


def linear_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 3)).double()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_of_a_linear_model_it_is_sgd_ie(tmp_path: Path, optimiser: str) -> None:
    """Gauss-Newton is the Hessian there."""
    module = Classifier(linear_net(), OPTIMISERS[optimiser], decay)
    replay = recorded(tmp_path, module, accumulate_grad_batches=2)
    found = DataValueEmbedding(None, "fisher").estimate(replay).influence
    same(found, SgdIE().estimate(replay).influence)


class HeardOnce(nn.Module):
    """A layer that is called once more, for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear_net()

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x + 1)
        return self.layer(x)


def test_a_call_whose_output_goes_nowhere(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(HeardOnce(), sgd(lr=0.3)))
    found = DataValueEmbedding(None, "fisher").estimate(replay).influence
    same(found, SgdIE().estimate(replay).influence)


def test_of_least_squares_it_is_sgd_ie(tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = Regressor(nn.Sequential(nn.Linear(4, 2)).double(), sgd(momentum=0.5))
    engine = record(tmp_path, module, regression(), regression(11, seed=3))
    replay = engine.replay("val_loss")
    found = DataValueEmbedding(None, "fisher").estimate(replay).influence
    same(found, SgdIE().estimate(replay).influence)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("cls", BOTH)
def test_more_samples_than_coordinates(
    tmp_path: Path, cls: type[EmbeddingEstimator], momentum: float
) -> None:
    """ACC-DVEmb then walks in windows."""
    data = classification(200, inputs=2, classes=2)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 2)).double()
    module = Classifier(net, sgd(lr=0.5, momentum=momentum, weight_decay=0.1))
    engine = record(tmp_path, module, data, classification(11, 2, 2), batch_size=10, max_epochs=2)
    replay = engine.replay("val_loss")
    plain = Plain(replay, net, data, fisher=True)
    if cls is DataValueEmbedding:
        expected = SgdIE().estimate(replay).influence
    else:
        expected = plain.acc(momentum, decay=0.1)
    same(cls(None).estimate(replay).influence, expected)


@pytest.mark.parametrize("cls", BOTH)
def test_parameters_that_only_some_steps_use(tmp_path: Path, cls: type[EmbeddingEstimator]) -> None:
    class Alternating(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            one, other = self.net
            return self.loss((other if batch_idx % 2 else one)(x), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", self.loss(self.net[0](x) + self.net[1](x), y))

    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)).double()
    replay = recorded(tmp_path, Alternating(net, sgd(momentum=0.8, weight_decay=0.1)))
    assert len({visit.map.used for visit in replay.walker.forwards()}) == 2
    found = cls(None).estimate(replay).influence
    expected = SgdIE().estimate(replay).influence
    same(found, expected, 1e-9 if cls is DataValueEmbedding else 0.3)


def test_layers_are_followed_alone(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(lr=0.5, momentum=0.5)))
    found = DataValueEmbedding(None, "fisher", layers="net.2").estimate(replay).influence
    same(found, SgdIE(layers="net.2").estimate(replay).influence)  # the last layer is linear
    picked = AccDataValueEmbedding(None, layers=lambda name: name.startswith("net.2"))
    assert picked.embed(replay).projection.names == ("net.2.weight", "net.2.bias")


# ---------------------------------------------------------------------- projections by factors


class Text(nn.Module):
    """Tokens, a layer that is used twice, and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=0)
        self.mixed = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 3).long().clamp(-3, 3) + 3
        hidden = torch.tanh(self.mixed(self.table(tokens)))
        return self.out(torch.tanh(self.mixed(hidden)).mean(1))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3, stride=2, padding=1)
        self.second = nn.Conv2d(5, 6, (2, 1), dilation=(1, 2))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        images = torch.outer(torch.ones(6).to(x), torch.ones(6).to(x)) * x[:, :1, None, None]
        images = images + torch.sin(torch.arange(6).to(x)) * x[:, 1:2, None, None]
        hidden = F.relu(self.first(images), inplace=True)
        return self.out(torch.tanh(self.second(hidden)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.cell = nn.GRU(1, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell((x * self.scale)[:, :, None])[0][:, -1])


@pytest.mark.parametrize("curvature", ["empirical", "fisher"])
@pytest.mark.parametrize(
    ("make", "elsewhere"),
    [(Text, ()), (Pictures, ()), (Recurrent, ("scale", "cell"))],
    ids=["text", "pictures", "recurrent"],
)
def test_projected_by_factors_or_as_a_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    elsewhere: tuple[str, ...],
    curvature: str,
) -> None:
    torch.manual_seed(3)
    net = make().double()
    replay = recorded(tmp_path, Classifier(net, sgd()), max_epochs=1)
    visit = next(iter(replay.walker.forwards()))
    params = visit.state.params
    projection = Projection.drawn(tuple(params), params, 9, seed=1)
    gradients = ProjectedGradients(projection, curvature, 2**30)
    step = gradients(visit)
    with monkeypatch.context() as patch:  # without the other way, what it gives is missing
        patch.setattr(ProjectedGradients, "_others", lambda *args: [])
        alone = projection.split(gradients(visit).slopes)
    missing = {name for name, value in alone.items() if not bool(value.any())}
    assert {name.split(".")[1].split("_")[0] for name in missing} == set(elsewhere)
    x, y = (tensor[visit.map.samples] for tensor in DATA.tensors)
    shapes = {name: value.shape for name, value in params.items()}

    def logits(p: dict[str, Tensor], one: Tensor) -> Tensor:
        named = {name.removeprefix("net."): value for name, value in p.items()}
        return functional_call(net, named, (one[None],))[0]

    rows, bends = [], []
    for one, label in zip(x, y, strict=True):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        outputs = logits(leaves, one)
        each = [torch.autograd.grad(o, list(leaves.values()), retain_graph=True) for o in outputs]
        jacobian = dict(zip(leaves, map(torch.stack, zip(*each, strict=True)), strict=True))
        p = torch.softmax(outputs.detach(), 0)
        error = p - F.one_hot(label, 3)
        full = {n: torch.einsum("d,d...->...", error, j) for n, j in jacobian.items()}
        assert {n: g.shape for n, g in full.items()} == shapes
        projected = projection.whole({n: g[None] for n, g in full.items()})[0]
        rows.append(projected)
        through = projection.whole(jacobian)
        middle = torch.diag(p) - torch.outer(p, p)
        bends.append(
            through.T @ middle @ through
            if curvature == "fisher"
            else torch.outer(projected, projected)
        )
    same(step.slopes, torch.stack(rows) / len(x))
    same(step.left.T @ step.right, torch.stack(bends).mean(0))


def test_a_layer_whose_calls_have_no_factors_at_some_steps(tmp_path: Path) -> None:
    """The parameter then goes by its samples' own gradients, at those steps alone."""

    class Sometimes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self.net(torch.cat([x, x]))[: len(x)] if batch_idx % 2 else self.net(x)
            return self.loss(logits, y)

    replay = recorded(tmp_path, Sometimes(linear_net(), sgd(momentum=0.5)))
    found = DataValueEmbedding(None, "fisher").estimate(replay).influence
    same(found, SgdIE().estimate(replay).influence)
    empirical = DataValueEmbedding(None, "empirical").estimate(replay).influence
    plain = recorded(tmp_path / "plain", Classifier(linear_net(), sgd(momentum=0.5)))
    same(empirical, DataValueEmbedding(None, "empirical").estimate(plain).influence)


@pytest.mark.parametrize("curvature", ["empirical", "fisher"])
def test_under_autocast(tmp_path: Path, curvature: str) -> None:
    """In 16 bits the factors are those of the 16-bit layers; all that follows is in 32."""
    x, y = DATA.tensors
    data = TensorDataset(x.float(), y)
    other = TensorDataset(VALIDATION.tensors[0].float(), VALIDATION.tensors[1])
    module = Classifier(smooth_net().float(), sgd(lr=0.5))
    engine = record(tmp_path, module, data, other, precision="bf16-mixed")
    replay = engine.replay("val_loss")
    found = DataValueEmbedding(None, curvature).embed(replay)
    assert found.values.dtype == torch.float32
    full = InfluenceEngine(
        engine.trajectory.directory,
        module,
        DataLoader(data, batch_size=6),
        val_dataloaders=DataLoader(other, batch_size=7),
        full_precision=True,
        progress=False,
    )
    expected = DataValueEmbedding(None, curvature).embed(full.replay("val_loss"))
    same(found.values, expected.values, 0.05)
    assert not torch.equal(found.values, expected.values)


def test_directions_are_the_rows_of_the_projection() -> None:
    params = {
        "w": torch.randn(5, 3, 2).double(),
        "b": torch.randn(30).double(),
        "s": torch.ones(()),
    }
    params["s"] = params["s"].double()
    projection = Projection.drawn(tuple(params), params, 12, seed=3)
    vectors = {name: torch.randn(4, *value.shape).double() for name, value in params.items()}
    expected = {
        name: vectors[name].reshape(4, -1) @ part.directions(params[name]).reshape(part.size, -1).T
        for name, part in projection.parts.items()
    }
    same(projection.whole(vectors), projection.joined(expected, vectors["w"]), 1e-12)
    assert projection.sizes == {"w": 9, "b": 12, "s": 1}


def test_inner_products_are_kept_in_the_mean() -> None:
    """E[RᵀR] = I, with the rows of each factor orthonormal up to their scale."""
    params = {"w": torch.zeros(6, 5).double()}
    total = torch.zeros(30, 30).double()
    for seed in range(400):
        part = Projection.drawn(("w",), params, 6, seed).parts["w"]
        rows = part.directions(params["w"]).reshape(part.size, -1)
        total += rows.T @ rows / 400
        torch.testing.assert_close(rows @ rows.T, torch.eye(part.size).double() * 30 / part.size)
    assert float((total - torch.eye(30)).abs().max()) < 0.35
    assert float((total.diagonal() - 1).abs().mean()) < 0.1


def test_the_seed_alone_draws(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    first = DataValueEmbedding(6, seed=1).estimate(replay).influence
    assert torch.equal(first, DataValueEmbedding(6, seed=1).estimate(replay).influence)
    assert not torch.equal(first, DataValueEmbedding(6, seed=2).estimate(replay).influence)


def test_recomputed_segments_change_nothing(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd(momentum=0.9)), max_epochs=8)
    whole = DataValueEmbedding().estimate(replay).influence
    replay.walker.memory_budget = 1
    assert replay.walker.without_tapes().passes() > 1
    same(DataValueEmbedding().estimate(replay).influence, whole, 1e-12)


# ---------------------------------------------------------------------- what is refused


class Penalised(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return F.cross_entropy(logits, target) + 0.01 * penalty


class Absolute(Regressor):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(logits, target)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("configure", "settings", "words"),
    [
        (adam(), {}, "`Adam`.*sgd-ie"),
        (adamw(), {}, "`AdamW`.*sgd-ie"),
        (sgd(), {"gradient_clip_val": 0.1}, "gradient clipping.*norm"),
    ],
    ids=["adam", "adamw", "clip"],
)
def test_other_updates_are_refused(
    tmp_path: Path,
    cls: type[EmbeddingEstimator],
    configure: Any,
    settings: dict[str, Any],
    words: str,
) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), configure), **settings)
    with pytest.raises(UnsupportedError, match=words):
        cls().estimate(replay)


def test_a_penalty_is_refused(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Penalised(smooth_net(), sgd()))
    with pytest.raises(UnsupportedError, match=r"no sample.*weight_decay="):
        DataValueEmbedding(None, "empirical").estimate(replay)


def test_running_statistics_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    replay = recorded(tmp_path, Classifier(net, sgd()))
    with pytest.raises(UnsupportedError, match="running statistics"):
        DataValueEmbedding().estimate(replay)


def test_a_loss_without_curvature_in_the_outputs(tmp_path: Path) -> None:
    """The empirical form goes with it."""
    torch.manual_seed(2)
    module = Absolute(nn.Sequential(nn.Linear(4, 2)).double(), sgd())
    engine = record(tmp_path, module, regression(), regression(11, seed=3))
    replay = engine.replay("val_loss")
    with pytest.raises(UnsupportedError, match=r'curvature="fisher".*curvature="empirical"'):
        DataValueEmbedding().estimate(replay)
    assert bool(DataValueEmbedding(None, "empirical").estimate(replay).influence.any())


@pytest.mark.parametrize("cls", BOTH)
def test_too_little_memory(tmp_path: Path, cls: type[EmbeddingEstimator]) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    with pytest.raises(UnsupportedError, match=r"20 samples in 43 coordinates.*memory_budget"):
        cls(None).estimate(replace(replay, memory_budget=10_000))
    need = cls(None)._numbers(20, 43, replay) * 8
    with pytest.raises(UnsupportedError, match=r'step of 6 samples.*curvature="empirical"'):
        cls(None).estimate(replace(replay, memory_budget=need + 5_000))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dimension": 0}, "dimension"),
        ({"dimension": True}, "dimension"),
        ({"curvature": "hessian"}, "'fisher' or 'empirical'"),
        ({"seed": 0.5}, "seed"),
        ({"layers": 3}, "layers"),
    ],
)
def test_arguments(settings: dict[str, Any], words: str) -> None:
    for cls in BOTH:
        with pytest.raises(ValueError, match=words):
            cls(**settings)


def test_side_by_side_or_one_by_one(tmp_path: Path) -> None:
    replay = recorded(tmp_path, Classifier(smooth_net(), sgd()))
    expected = DataValueEmbedding(12).estimate(replay).influence
    replay.walker.vectorize = False
    same(DataValueEmbedding(12).estimate(replay).influence, expected, 1e-12)
