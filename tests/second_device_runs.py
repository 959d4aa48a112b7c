"""Fits and analyses on the CPU and on `tests.second_device`, side by side.

    python -m tests.second_device_runs FOLDER

Writes what each gave to FOLDER/found.json, as ``{name: [on the CPU, on the second device]}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_accie import AccSgdIE, InfluenceEngine, LeaveOneOut, LowRankAccSgdIE, SgdIE
from lightning_accie.estimators import ESTIMATORS
from tests.problems import Classifier, classification, fit, sgd
from tests.second_device import DEVICE

DATA, VAL = classification(8), classification(5, seed=3)


def steady_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def noisy_net() -> nn.Module:
    between = nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3)
    return nn.Sequential(nn.Linear(4, 4), *between, nn.Linear(4, 3))


class SecondAccelerator(CPUAccelerator):
    """Lightning's, for the second device."""

    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE


def module(net: Callable[[], nn.Module], configure: Any) -> Classifier:
    torch.manual_seed(1)
    return Classifier(net().double(), configure)


def fitted(root: Path, model: Classifier, device: torch.device, **callback: Any) -> Any:
    trainer: dict[str, Any] = {"max_epochs": 2}
    if device == DEVICE:
        strategy = SingleDeviceStrategy(device=device, accelerator=SecondAccelerator())
        trainer |= {"accelerator": "auto", "strategy": strategy}
    loaders = DataLoader(DATA, 4, shuffle=True), DataLoader(VAL, 3)
    found = fit(root, model, *loaders, callback=callback, **trainer)
    assert found.directory is not None
    return found


def engine(trajectory: Path, model: Classifier, device: torch.device) -> InfluenceEngine:
    loaders = DataLoader(DATA, 4), DataLoader(VAL, 3)
    return InfluenceEngine(
        trajectory, model, loaders[0], val_dataloaders=loaders[1], device=device, progress=False
    )


def estimates(run: InfluenceEngine) -> Iterator[tuple[str, Any]]:
    """Every estimator, and everything else that the engine answers."""
    for name in ESTIMATORS:
        yield name, run.estimate(estimator=name, verify=0).influence
    hessian = LowRankAccSgdIE(2, curvature="hessian")
    yield "low-rank, Hessian", run.estimate(estimator=hessian, verify=0).influence
    thinned = AccSgdIE(correction_probability=0.5, every_k_steps=2)
    yield "thinned", run.estimate(estimator=thinned, verify=0).influence
    yield "some layers", run.estimate(estimator=AccSgdIE(layers="net.0"), verify=0).influence
    auto = run.estimate(top_k=2, verify=2, loss_column=True)
    yield "auto", auto.influence
    yield "losses", torch.tensor(auto.to_dict()["loss"])
    yield "explain", run.explain(DataLoader(VAL, 1), verify=1).influence
    sets = run.groups({"a": [0, 1], "b": [5]}, acc=True)
    yield "groups", torch.stack([sets.summed, sets.acc, sets.exact])
    replay = run.replay()
    walker = replay.walker
    yield "ways", [walker.vectorize, walker.tangents, replay.query.vectorize]


def noisy(run: InfluenceEngine) -> Iterator[tuple[str, Any]]:
    """What is drawn, and what is followed beside the weights."""
    for estimator in (LeaveOneOut(), AccSgdIE(), SgdIE()):
        yield estimator.name, run.estimate(estimator=estimator, verify=0).influence
    replay = run.replay()
    yield "noise", [LeaveOneOut().estimate(replay).noise < 1e-9]
    replay.walker.vectorize = replay.query.vectorize = False
    yield "one by one", LeaveOneOut().estimate(replay).influence


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def analysed(root: Path, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases: tuple[tuple[str, Any, Any, Any], ...] = (
        ("steady", steady_net, sgd(momentum=0.9, weight_decay=0.01), estimates),
        ("noisy", noisy_net, lambda p: torch.optim.NAdam(p, lr=0.05), noisy),
    )
    for name, net, configure, ask in cases:
        model = module(net, configure)
        run = "fit_end" if name == "steady" else "manual"
        influence = fitted(root / name, model, device, run=run, live=run == "fit_end", top_k=2)
        trajectory = influence.directory / "trajectory"
        opened = engine(trajectory, model, device)
        found[f"{name}: device"] = opened.trajectory.header["device"]
        found |= {f"{name}: {key}": plain(value) for key, value in ask(opened)}
        found[f"{name}: bit-exact"] = opened._walker.fidelity.bit_exact
        if influence.scores is not None:
            found[f"{name}: at the end of fit"] = plain(influence.scores.influence)
            found[f"{name}: live"] = plain(influence.live_scores.influence)
            elsewhere = engine(trajectory, model, torch.device("cpu"))
            found[f"{name}: on the CPU"] = plain(
                elsewhere.estimate(estimator=SgdIE(), verify=0).influence
            )
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    here, there = (analysed(folder / d.type, d) for d in (torch.device("cpu"), DEVICE))
    assert here.keys() == there.keys()
    text = json.dumps({name: [here[name], there[name]] for name in here})
    (folder / "found.json").write_text(text)


if __name__ == "__main__":
    main()
