"""Mixed precision: recorded, replayed bit for bit, split by sample, and left out exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import AccSgdIE, InfluenceEngine, LeaveOneOut, SgdIE, UnsupportedError
from lightning_accie.agreement import measure
from lightning_accie.replay.precision import Precision
from tests.problems import Classifier, Configure, adam, adamw, record, sgd
from tests.replay.test_bit_exact import Noisy, float32_data, net, one_cycle
from tests.truth import mean_loss, recorded_batches, retrain

SMALLEST = 2.0**-8  # the spacing of bfloat16 at 1


def half() -> dict[str, Any]:
    """What `Trainer(precision="16-mixed")` is on a GPU, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def mixed(name: str) -> dict[str, Any]:
    return half() if name == "16-mixed" else {"precision": name}


def walked(engine: InfluenceEngine) -> Any:
    """Replay from the start to the end."""
    snapshot = engine._walker.start()
    for _ in range(len(engine.trajectory)):
        snapshot = engine._walker._advance(snapshot)[1]
    return snapshot


CASES: dict[str, tuple[Any, Any, Any, str, dict[str, Any]]] = {
    "sgd-momentum": (Classifier, sgd(momentum=0.9, weight_decay=0.01), None, "both", {}),
    "adamw-noise-accumulate": (
        Noisy,
        adamw(),
        one_cycle,
        "dropout",
        {"accumulate_grad_batches": 2},
    ),
    "adam-clip-norm": (Classifier, adam(), None, "layernorm", {"gradient_clip_val": 0.2}),
    "sgd-clip-value-accumulate-3": (
        Classifier,
        sgd(),
        None,
        "batchnorm",
        {
            "gradient_clip_val": 0.01,
            "gradient_clip_algorithm": "value",
            "accumulate_grad_batches": 3,
        },
    ),
}


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("case", CASES)
def test_replay_is_bit_exact(tmp_path: Path, case: str, precision: str) -> None:
    kind, configure, schedule, layers, settings = CASES[case]
    module = kind(net(layers), configure, schedule)
    data, valid = float32_data(47, 0), float32_data(20, 1)
    engine = record(
        tmp_path, module, data, valid, batch_size=5, max_epochs=4, **settings, **mixed(precision)
    )
    assert engine.trajectory.header["precision"] == precision
    last = walked(engine)
    fidelity = engine._walker.fidelity
    assert fidelity.losses == 40
    assert fidelity.bit_exact
    for name, parameter in module.named_parameters():
        assert torch.equal(last.state.params[name], parameter), name
    scales = {step.loss_scale for step in engine.trajectory.steps()}
    assert len(scales) > 1 if precision == "16-mixed" else scales == {1.0}


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x + 1.0, x, is_causal=True)


class Sequences(nn.Module):
    """Kernels that a derivative replaces by others: fused attention and oneDNN's LSTM."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(1, 8)
        kinds = {
            "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
            "attention": Attention,
            "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True),
        }
        self.mix: nn.Module = kinds[kind]()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.embed(x[..., None]))
        return self.out((mixed[0] if isinstance(mixed, tuple) else mixed).mean(1))


@pytest.mark.parametrize("kind", ["lstm", "attention", "transformer"])
def test_kernels_that_a_derivative_replaces(tmp_path: Path, kind: str) -> None:
    """They round otherwise, within the tolerances of 16 bits and not within those of 32."""
    module = Classifier(Sequences(kind), adam(lr=0.01))
    engine = record(
        tmp_path, module, float32_data(24, 0), float32_data(20, 1), precision="bf16-mixed"
    )
    scores = engine.estimate(estimator="sgd-ie", verify=8)
    assert scores.info["bit_exact_replay"]
    assert scores.agreement[0].kendall_tau > 0.7
    visit = next(engine._walker.forwards())
    (loss,) = visit.map.losses
    plain = torch.cat([g.flatten() for g in visit.map.plain_gradient().values()])
    value = engine._program.plain(loss.micro, loss.random)  # type: ignore[attr-defined]
    assert value is not None
    own = torch.autograd.grad(value, [engine._program.parameters[n] for n in visit.map.used])
    apart = float((plain - torch.cat([g.flatten() for g in own])).norm() / plain.norm())
    assert apart < 2 * SMALLEST
    assert apart > 1e-4 or kind == "attention"


# ---------------------------------------------------------------------- against plain torch


def problem(
    root: Path, *, full: bool, configure: Configure | None = None, **trainer: Any
) -> tuple[InfluenceEngine, Classifier, nn.Module, TensorDataset, TensorDataset]:
    configure = configure or sgd(lr=0.2, momentum=0.5)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    start = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    start.load_state_dict(network.state_dict())
    data, valid = float32_data(24, 0), float32_data(50, 1)
    module = Classifier(network, configure)
    engine = record(root, module, data, valid, max_epochs=8, **trainer)
    loaders = DataLoader(data, batch_size=6), DataLoader(valid, batch_size=50)
    engine = InfluenceEngine(
        engine.trajectory,
        module,
        loaders[0],
        val_dataloaders=loaders[1],
        progress=False,
        full_precision=full,
    )
    return engine, module, start, data, valid


def without(
    sample: int | None,
    start: nn.Module,
    data: TensorDataset,
    valid: TensorDataset,
    batches: Any,
    dtype: torch.dtype | None,
) -> float:
    """Plain torch: the loss after a run without a sample, the forward passes cast to ``dtype``."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    network.load_state_dict(start.state_dict())
    weights = torch.ones(24)
    if sample is not None:
        weights[sample] = 0.0

    def cast(network: nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                return network(x).float()

        return forward

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            return cast(self.net)(x)

    trained = retrain(Cast(), data.tensors, batches, sgd(lr=0.2, momentum=0.5), weights)
    return mean_loss(trained, valid.tensors)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_full_precision_is_the_run_without_the_casts(tmp_path: Path, precision: str) -> None:
    full = precision == "bf16-mixed"  # after float16 it is so in any case
    engine, _, start, data, valid = problem(tmp_path, full=full, **mixed(precision))
    scores = engine.estimate(estimator=LeaveOneOut())
    assert scores.info["precision"] == precision
    assert scores.info["analysis_precision"] == "32-true"
    assert scores.info["noise_floor"] < 1e-6
    batches = recorded_batches(engine.trajectory)
    whole = without(None, start, data, valid, batches, None)
    exact = [without(j, start, data, valid, batches, None) - whole for j in range(24)]
    torch.testing.assert_close(
        scores.influence, torch.tensor(exact, dtype=torch.float64), rtol=1e-3, atol=1e-6
    )
    assert float(scores.influence.abs().max()) > 1e-2


def test_exact_replays_under_autocast_are_the_run_s_own(tmp_path: Path) -> None:
    """One by one they repeat the kernels of plain torch, to the bit but for the order of sums."""
    engine, _, start, data, valid = problem(tmp_path, full=False, precision="bf16-mixed")
    replay = engine.replay()
    replay.walker.vectorize = replay.query.vectorize = False
    found = LeaveOneOut().estimate(replay)
    batches = recorded_batches(engine.trajectory)
    whole = without(None, start, data, valid, batches, torch.bfloat16)
    assert whole == pytest.approx(replay.query.value(replay.final.state.params), abs=1e-6)
    exact = [without(j, start, data, valid, batches, torch.bfloat16) - whole for j in range(24)]
    apart = (found.influence - torch.tensor(exact, dtype=torch.float64)).abs()
    assert float(apart.median()) < 1e-5
    assert float(apart.max()) < found.noise
    assert found.noise == pytest.approx(SMALLEST / 12**0.5 * 2 * whole, rel=1e-3)


def test_the_noise_floor_covers_the_rounding_of_the_casts(tmp_path: Path) -> None:
    cast, *_ = problem(tmp_path / "cast", full=False, precision="bf16-mixed")
    full, *_ = problem(tmp_path / "full", full=True, precision="bf16-mixed")
    pair = [engine.estimate(estimator=LeaveOneOut()) for engine in (cast, full)]
    rounding = (pair[0].influence - pair[1].influence).square().mean().sqrt()
    assert 0.3 * float(rounding) < pair[0].info["noise_floor"] < 0.02
    assert pair[1].info["noise_floor"] < 1e-6


@pytest.mark.parametrize("full", [False, True])
def test_the_estimators_agree_with_exact_replays(tmp_path: Path, full: bool) -> None:
    engine, *_ = problem(tmp_path, full=full, precision="bf16-mixed")
    exact = engine.estimate(estimator=LeaveOneOut())
    for estimator in (SgdIE(), AccSgdIE()):
        found = engine.estimate(estimator=estimator, verify=0)
        agreement = measure(found.influence, exact.influence, estimator=estimator.name)
        assert agreement.kendall_tau > 0.75, estimator
        assert agreement.relative_rmse < 0.5, estimator


# ---------------------------------------------------------------------- the casts themselves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_cache_changes_no_bit_with_or_without_a_transform(dtype: torch.dtype) -> None:
    network = net("layernorm")
    x, y = float32_data(6, 0).tensors
    params = dict(network.named_parameters())

    def loss(values: dict[str, Tensor], cache: bool = False) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
            return F.cross_entropy(torch.func.functional_call(network, values, (x,)), y)

    plain = torch.autograd.grad(loss(params), list(params.values()))
    cached = torch.autograd.grad(loss(params, cache=True), list(params.values()))
    detached = {name: value.detach() for name, value in params.items()}
    mapped = torch.func.grad(loss)(detached)
    for a, b, c in zip(plain, cached, mapped.values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class MeanByHand(Classifier):
    """Its loss is reduced in bfloat16, in which a weighted sum would lose the small samples."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits - F.one_hot(target, 3).to(logits.dtype)).square().mean()


def test_a_loss_that_is_reduced_in_16_bits_is_split_by_sample(tmp_path: Path) -> None:
    module = MeanByHand(net("plain"), sgd())
    data, valid = float32_data(24, 0), float32_data(20, 1)
    engine = record(tmp_path, module, data, valid, precision="bf16-mixed")
    assert engine.trajectory.header["loss_form"]["hand_written"] == "whole"
    scores = engine.estimate(estimator="sgd-ie", verify=8)
    assert scores.info["bit_exact_replay"]
    assert scores.agreement[0].kendall_tau > 0.6


def by_hand(module: Any, batch: Any) -> Tensor:
    x, y = batch
    logits = module.net(x)
    return (logits - F.one_hot(y, 3).to(logits.dtype)).square().mean(1)


def by_half(module: Any, batch: Any) -> Tensor:
    return 0.9 * by_hand(module, batch)


def test_sample_losses_in_16_bits(tmp_path: Path) -> None:
    data, valid = float32_data(24, 0), float32_data(20, 1)
    settings = {"callback": {"sample_losses": by_hand}, "precision": "bf16-mixed"}
    engine = record(tmp_path, MeanByHand(net("plain"), sgd()), data, valid, **settings)
    given = engine.estimate(estimator="leave-one-out")
    engine = record(
        tmp_path / "found", MeanByHand(net("plain"), sgd()), data, valid, precision="bf16-mixed"
    )
    found = engine.estimate(estimator="leave-one-out")
    floor = max(given.info["noise_floor"], found.info["noise_floor"])
    assert float((given.influence - found.influence).abs().max()) < 5 * floor
    settings = {"callback": {"sample_losses": by_half}, "precision": "bf16-mixed"}
    with pytest.raises(UnsupportedError, match="does not fit"):
        record(tmp_path / "wrong", MeanByHand(net("plain"), sgd()), data, valid, **settings)


def test_what_a_precision_is() -> None:
    single, brain, short = map(Precision, ("32-true", "bf16-mixed", "16-mixed"))
    assert (single.autocast, single.eps, single.full) == (None, None, single)
    assert (brain.autocast, brain.eps, brain.full) == (torch.bfloat16, SMALLEST * 2, single)
    assert (short.autocast, short.eps) == (torch.float16, 2.0**-10)
    assert single.tolerances.loss == Precision("64-true").tolerances.loss == 1e-4
    for precision in (brain, short):
        with precision.context("cpu"):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert not torch.is_autocast_cache_enabled()
        assert product.dtype == precision.autocast
    with Precision("64-true").context("cpu"):
        assert torch.ones(1).dtype == torch.float64
    assert torch.ones(1).dtype == torch.float32
