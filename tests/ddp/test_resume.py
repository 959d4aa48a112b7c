"""A fit of two processes that is resumed goes on with the logs of both."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from lightning_accie import InfluenceEngine, Trajectory
from tests.ddp.cases import CASES, DATA, loaders
from tests.ddp.truth import windows


@pytest.mark.parametrize("directory", ["elsewhere", "first"])
def test_a_resumed_fit_is_replayed_as_one(whole: Path, directory: str) -> None:
    trajectory = Trajectory.open(whole / directory / "trajectory")
    trajectory.verify()
    assert (trajectory.status, trajectory.world_size) == ("finished", 2)
    recorded = [
        [
            [m.pieces[0].indices.tolist() for m in step.micro_batches if m.rank == rank]
            for rank in range(2)
        ]
        for step in trajectory.steps()
    ]
    assert recorded == list(windows(DATA, 4, 5, 1))
    assert [entry["step"] for entry in trajectory.header["resumed"]] == [6]
    train, valid = loaders()
    module = CASES["drawing"].make()
    engine = InfluenceEngine(trajectory, module, train, val_dataloaders=valid, progress=False)
    walker = engine._walker
    *_, last = walker.forwards()
    assert last.step == 11
    assert walker.fidelity.bit_exact
    assert walker.fidelity.losses == 24
    states = [pickle.loads((whole / f"resumed-{rank}.pickle").read_bytes()) for rank in range(2)]
    final = walker.final()
    for name, value in final.state.params.items():
        for state in states:
            assert torch.equal(state[directory][name], value), name
