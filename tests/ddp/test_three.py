"""Three processes: the order in which their gradients are added is not known, so to rounding."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_accie import InfluenceEngine, LeaveOneOut
from tests.ddp.cases import CASES, DATA, datasets, loaders
from tests.ddp.launch import launch
from tests.ddp.test_train import fresh, recorded, settings
from tests.ddp.three import RANKS, TRAINED
from tests.ddp.truth import mean_loss, retrain, windows


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("three")
    ended = launch("tests.ddp.three", str(directory), ranks=RANKS)
    assert [one.code for one in ended] == [0, 0, 0]
    return directory


def opened(three: Path, case: str) -> InfluenceEngine:
    train, valid = loaders()
    return InfluenceEngine(
        three / case / "trajectory",
        CASES[case].make(),
        train,
        val_dataloaders=valid,
        progress=False,
    )


@pytest.mark.parametrize("case", TRAINED)
def test_it_is_replayed_to_rounding(three: Path, case: str) -> None:
    ranks: list[dict[str, Any]] = [
        pickle.loads((three / f"{case}-{rank}.pickle").read_bytes()) for rank in range(RANKS)
    ]
    assert ranks[0]["influence"] == ranks[1]["influence"] == ranks[2]["influence"]
    engine = opened(three, case)
    assert engine.trajectory.world_size == RANKS
    accumulate = CASES[case].trainer.get("accumulate_grad_batches", 1)
    assert recorded(engine.trajectory, RANKS) == list(windows(DATA, 3, 5, accumulate, RANKS))
    del engine.trajectory._checkpoints[len(engine.trajectory)]  # else the end is loaded
    replayed = engine._walker_until(len(engine.trajectory))
    replayed._checkpoints = frozenset(engine.trajectory.checkpoint_steps)
    final = replayed.final().state
    assert replayed.fidelity.losses > 0
    assert replayed.fidelity.largest_loss_difference < 1e-12
    for name, value in final.params.items():
        torch.testing.assert_close(value, ranks[0]["state"][name], rtol=1e-11, atol=1e-13)


def test_influence_is_that_of_a_plain_loop_over_the_shares(three: Path) -> None:
    train, valid = (data.tensors for data in datasets())
    ones = torch.ones(DATA, dtype=torch.float64)
    how = {**settings("momentum"), "ranks": RANKS}
    net = retrain(fresh("momentum"), train, ones, **how)
    base = mean_loss(net, valid)
    chosen = [0, 7, 24]
    found = opened(three, "momentum").estimate(estimator=LeaveOneOut(chosen), verify=0)
    by_index = dict(zip(found.index.tolist(), found.influence.tolist(), strict=True))
    for sample in chosen:
        without = retrain(fresh("momentum"), train, ones * (torch.arange(DATA) != sample), **how)
        expected = mean_loss(without, valid) - base
        assert by_index[sample] == pytest.approx(expected, rel=1e-7, abs=1e-12)
        assert abs(expected) > 1e-5
