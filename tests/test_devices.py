"""The package on other devices than the CPU: `pytest tests/test_devices.py` on a machine that has one.

Where there is none, a second device in software stands for it (`tests.second_device`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import AccSgdIE, InfluenceEngine, LeaveOneOut, SgdIE, UnsupportedError
from lightning_accie.capture.support import check_trainer
from tests.problems import (
    Classifier,
    Regressor,
    adam,
    classification,
    fit,
    quiet_trainer,
    regression,
    sgd,
    smooth_net,
)
from tests.truth import central_difference, mean_loss, recorded_batches, retrain

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, in a process that computes on it alike each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield torch.device(request.param)
    torch.backends.cudnn.deterministic = before


# ---------------------------------------------------------------------- a device made in Python


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the same fits and analyses gave on the CPU and on the second device."""
    if not hasattr(torch._C, "_acc") or not importlib.util.find_spec(
        "torch.utils.backend_registration"
    ):
        pytest.skip("this torch takes no backend written in Python")
    folder = tmp_path_factory.mktemp("second")
    command = [sys.executable, "-W", "ignore", "-m", "tests.second_device_runs", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "found.json").read_text()))


def test_everything_runs_on_a_second_device_and_gives_the_same(
    found: dict[str, list[Any]],
) -> None:
    assert found.pop("steady: device") == ["cpu", "second:0"]
    steady = {name: pair for name, pair in found.items() if name.startswith("steady")}
    assert len(steady) > 15
    for name, (here, there) in steady.items():
        if here != there:
            near(torch.tensor(there).double(), torch.tensor(here).double(), 1e-9, name)


def test_every_way_to_a_replay_draws_the_dropout_that_training_drew(
    found: dict[str, list[Any]],
) -> None:
    # The masks are not those of the CPU, so each device is compared with itself.
    for place in (0, 1):
        of = {
            name: torch.tensor(pair[place]).double()
            for name, pair in found.items()
            if "noisy" in name and "device" not in name
        }
        assert bool(of["noisy: bit-exact"])
        assert bool(of["noisy: noise"])
        near(of["noisy: leave-one-out"], of["noisy: one by one"], 1e-6, "side by side")


def near(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Equal, measured by the largest entry; NaN is equal to itself."""
    assert found.shape == expected.shape, name
    scale = float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(
        found,
        expected,
        rtol=0,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


# ---------------------------------------------------------------------- end to end, on what there is


def single(n: int, inputs: int = 4, seed: int = 0) -> TensorDataset:
    x, y = classification(n, inputs, seed=seed).tensors
    return TensorDataset(x.float(), y)


def dropout_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def convolutional_net() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Linear(27, 3))


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dropout": (dropout_net, sgd(momentum=0.9), {}),
    "batchnorm": (convolutional_net, sgd(), {}),
    "bf16-mixed": (dropout_net, sgd(), {"precision": "bf16-mixed"}),
    "adam-accumulate": (dropout_net, adam(), {"accumulate_grad_batches": 2}),
    "fused-sgd": (dropout_net, sgd(fused=True), {}),
}


def recorded(
    root: Path, device: torch.device, module: Any, data: Any, val: Any, **run: Any
) -> Path:
    loaders = DataLoader(data, 6, shuffle=True), DataLoader(val, 7)
    influence = fit(root, module, *loaders, accelerator=device.type, **run)
    assert influence.directory is not None
    return influence.directory / "trajectory"


def opened(
    trajectory: Path, device: torch.device, module: Any, data: Any, val: Any
) -> InfluenceEngine:
    return InfluenceEngine(
        trajectory,
        module,
        DataLoader(data, 6),
        val_dataloaders=DataLoader(val, 7),
        device=device,
        progress=False,
    )


@pytest.mark.parametrize("case", list(CASES))
def test_a_replay_follows_the_run_on_its_device(
    tmp_path: Path, device: torch.device, case: str
) -> None:
    net, configure, settings = CASES[case]
    data, val, module = single(24), single(9, seed=3), Classifier(net(), configure)
    trajectory = recorded(tmp_path, device, module, data, val, **settings)
    engine = opened(trajectory, device, module, data, val)
    assert engine.trajectory.header["device"].startswith(device.type)
    replay = engine.replay()
    fidelity = replay.walker.fidelity
    for _ in replay.walker.forwards():  # raises beyond the tolerance
        pass
    assert fidelity.losses >= 12
    assert fidelity.checkpoints >= 1
    if device == CPU and case != "fused-sgd":
        assert fidelity.bit_exact
    exact = LeaveOneOut().estimate(replay)
    assert exact.noise < 1e-3 * float(exact.influence.abs().max()) or case == "bf16-mixed"
    replay.walker.vectorize = replay.query.vectorize = False
    if case != "bf16-mixed":  # there a row rounds by what stands beside it
        near(LeaveOneOut([0, 1]).estimate(replay).influence, exact.influence[:2], 1e-2)


def test_exact_replay_is_training_without_the_sample(tmp_path: Path, device: torch.device) -> None:
    data, val, module = (
        classification(18),
        classification(9, seed=3),
        Classifier(smooth_net(), sgd()),
    )
    engine = opened(recorded(tmp_path, device, module, data, val), device, module, data, val)
    batches = recorded_batches(engine.trajectory)
    there = [t.to(device) for t in data.tensors], [t.to(device) for t in val.tensors]

    def query(weights: Tensor) -> float:
        net = smooth_net().to(device)
        retrain(net, there[0], batches, sgd(), weights.to(device))
        return mean_loss(net, there[1])

    ones = torch.ones(18).double()
    whole = query(ones)
    without = [query(ones.index_fill(0, torch.tensor([j]), 0.0)) - whole for j in (0, 5)]
    replay = engine.replay()
    near(LeaveOneOut([0, 5]).estimate(replay).influence, torch.tensor(without).double(), 1e-6)
    slopes = [-central_difference(query, 18, j) for j in (0, 5)]
    near(SgdIE().estimate(replay).influence[[0, 5]], torch.tensor(slopes).double(), 1e-6)


def test_acc_is_exact_on_least_squares(tmp_path: Path, device: torch.device) -> None:
    data, val = regression(18), regression(9, seed=3)
    torch.manual_seed(1)
    module = Regressor(nn.Linear(4, 2).double(), sgd(momentum=0.9))
    engine = opened(recorded(tmp_path, device, module, data, val), device, module, data, val)
    replay = engine.replay()
    exact = LeaveOneOut().estimate(replay).influence
    near(AccSgdIE().estimate(replay).influence, exact, 1e-9)


@pytest.mark.parametrize("to", ["recorded elsewhere", "replayed elsewhere"])
def test_a_run_is_analysed_on_another_device(tmp_path: Path, device: torch.device, to: str) -> None:
    data, val, module = (
        classification(18),
        classification(9, seed=3),
        Classifier(smooth_net(), sgd()),
    )
    first, second = (CPU, device) if to == "recorded elsewhere" else (device, CPU)
    trajectory = recorded(tmp_path, first, module, data, val)
    here, there = (opened(trajectory, d, module, data, val) for d in (first, second))
    for name in ("sgd-ie", "acc-sgd-ie", "leave-one-out"):
        expected = here.estimate(estimator=name, verify=0).influence
        near(there.estimate(estimator=name, verify=0).influence, expected, 1e-8, name)


# ---------------------------------------------------------------------- what is left alone, and refused


def test_an_analysis_on_the_cpu_leaves_the_generators_of_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, val, module = single(12), single(6, seed=3), Classifier(dropout_net(), sgd())
    trajectory = recorded(tmp_path, CPU, module, data, val)
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    opened(trajectory, CPU, module, data, val).estimate(estimator="sgd-ie", verify=0)
    assert not seeded


def test_mps_is_refused_by_name(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.strategy._root_device = torch.device("mps")
    with pytest.raises(UnsupportedError, match='accelerator="mps"'):
        check_trainer(trainer)
