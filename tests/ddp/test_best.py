"""A run of two processes that is ranked at its best checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from lightning_accie import InfluenceEngine, QueryError, Trajectory
from tests.ddp.best import module
from tests.ddp.cases import loaders


def test_the_ranking_is_that_of_the_best_checkpoint(whole: Path) -> None:
    first, second = (
        pickle.loads((whole / f"best-{rank}.pickle").read_bytes()) for rank in range(2)
    )
    assert first == second
    saved = torch.load(first["path"], weights_only=True)
    assert first["info"]["steps"] == saved["global_step"] < first["info"]["recorded_steps"]
    assert first["info"]["bit_exact_replay"]
    train, valid = loaders()
    trajectory = Trajectory.open(whole / "best" / "trajectory")
    engine = InfluenceEngine(trajectory, module(), train, val_dataloaders=valid, progress=False)
    replay = engine.replay(at="best")
    assert len(replay.walker) == saved["global_step"]
    for name, value in replay.final.state.params.items():
        assert torch.equal(value, saved["state_dict"][name]), name


def test_a_shorter_log_of_one_rank_may_not_reach_it(whole: Path) -> None:
    best = pickle.loads((whole / "best-0.pickle").read_bytes())["info"]["steps"]
    train, valid = loaders()
    short = Trajectory.open(whole / "best" / "trajectory").until(best - 1)
    engine = InfluenceEngine(short, module(), train, val_dataloaders=valid, progress=False)
    with pytest.raises(QueryError, match=f"after {best} steps, but .* ends after {best - 1}"):
        engine.estimate(at="best")
