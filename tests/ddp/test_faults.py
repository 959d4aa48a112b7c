"""Errors, a full disk and killed processes: no process hangs, and nothing is lost unsaid."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lightning_accie import InfluenceEngine, Trajectory, UnsupportedError
from lightning_accie.capture.strategy import check_strategy, check_synchronised
from lightning_accie.capture.support import check_trainer
from tests.ddp.cases import CASES, loaders
from tests.problems import quiet_trainer

Outcomes = list[dict[str, Any]]


@pytest.fixture
def outcomes(faulty: Path) -> Any:
    """What each rank told of a fault."""
    told = [json.loads((faulty / f"{rank}.json").read_text()) for rank in range(2)]
    return lambda fault: [rank[fault] for rank in told]


def engine(directory: Path) -> InfluenceEngine:
    train, valid = loaders()
    return InfluenceEngine(
        directory, CASES["plain"].make(), train, val_dataloaders=valid, progress=False
    )


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("hidden-hand", "UnsupportedError", "`on_before_optimizer_step`"),
        ("all-gather", "UnsupportedError", "`all_gather`"),
        ("monitor", "QueryError", "which logs `val_loss`"),
        (
            "describe",
            "DescribeError",
            r"`describe` failed on sample \d+: ValueError: no such label",
        ),
        ("buffers", "UnsupportedError", r"broadcast_buffers=False"),
        ("hook", "UnsupportedError", "ddp_comm_hook"),
        ("small-budget", "TrajectoryError", "Raise disk_budget"),
    ],
)
def test_every_rank_raises_the_same(outcomes: Any, fault: str, error: str, words: str) -> None:
    first, second = outcomes(fault)
    assert first == second
    assert first["error"] == error
    assert re.search(words, first["message"])


def test_an_error_in_the_users_function_is_a_warning(outcomes: Any) -> None:
    ranks = outcomes("describes-later")
    assert [rank["scores"] for rank in ranks] == [True, True]
    assert "failed on sample 0: ValueError: no such label" in ranks[0]["warnings"][0]


def test_ranks_whose_settings_differ_are_told_so(outcomes: Any) -> None:
    first, second = outcomes("drift")
    assert [first["scores"], second["scores"], second["warnings"]] == [False, False, []]
    words = "made no ranking: At step 4 the optimiser of rank 1 .*`lr` .*sync_dist=True"
    assert re.search(words, first["warnings"][0])
    assert first["weights"] != second["weights"]  # they drifted apart indeed


def test_an_interrupted_analysis_undoes_no_training(outcomes: Any) -> None:
    ranks = outcomes("interrupt")
    assert [rank["scores"] for rank in ranks] == [False, False]
    assert ["interrupted" in str(rank["warnings"]) for rank in ranks] == [True, False]
    assert ranks[0]["weights"] == ranks[1]["weights"] == outcomes("plain")[0]["weights"]


def test_a_full_disk_of_one_rank_ends_the_recording(faulty: Path, outcomes: Any) -> None:
    first, second = outcomes("full-disk")
    assert first["weights"] == second["weights"] == outcomes("plain")[0]["weights"]
    assert "rank 1 stopped recording" in first["warnings"][0]
    assert "No space left" in second["warnings"][0]
    assert not first["scores"]
    assert not second["scores"]
    trajectory = Trajectory.open(faulty / "full-disk" / "trajectory")
    assert len(trajectory) == 2
    assert "rank 1 ends after 2 steps" in trajectory.reason
    scores = engine(trajectory.directory).estimate(verify=3, top_k=1)
    assert scores.info["steps"] == 2
    assert scores.info["bit_exact_replay"]


def test_a_killed_rank_leaves_what_both_have(faulty: Path) -> None:
    told = json.loads((faulty / "killed-in-training-0.json").read_text())
    assert told["error"] == "RuntimeError"  # torch's own, from the collective that training was in
    trajectory = Trajectory.open(faulty / "killed-in-training" / "trajectory")
    trajectory.verify()
    assert len(trajectory) == 6
    assert trajectory.status == "running"
    assert "rank 1 ends after 6 steps" in trajectory.reason
    scores = engine(trajectory.directory).estimate(verify=3, top_k=1)
    assert scores.info["steps"] == 6
    assert scores.info["bit_exact_replay"]


def test_who_waits_for_a_killed_analysis_learns_of_it(whole: Path) -> None:
    told = json.loads((whole / "killed-in-analysis-1.json").read_text())
    assert told["error"] == "ProcessEndedError"  # a RuntimeError
    assert "process of this run has ended" in told["message"]
    trajectory = Trajectory.open(whole / "killed-in-analysis" / "trajectory")
    assert (trajectory.status, len(trajectory)) == ("finished", 9)


# ---------------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ddp_comm_wrapper": len}, "ddp_comm_wrapper.*Leave it out"),
        ({"model_averaging_period": 2}, "model_averaging_period.*Leave it out"),
        ({"init_sync": False}, "init_sync=False.*Leave the argument out"),
        ({"process_group": object()}, r"process_group=\.\.\..*Leave the argument out"),
        ({"process_group_backend": "smoke"}, "'smoke'.*Use one of gloo"),
    ],
)
def test_arguments_of_the_strategy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        check_strategy(DDPStrategy(**options))


def test_harmless_arguments_pass() -> None:
    options = {"static_graph": True, "gradient_as_bucket_view": True, "broadcast_buffers": True}
    check_strategy(DDPStrategy(process_group_backend="cpu:gloo,cuda:nccl", **options))


def test_other_strategies(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r'`FSDPStrategy`.*shard.*`strategy="ddp"`'):
        check_strategy(FSDPStrategy())
    trainer = quiet_trainer(tmp_path, devices=2, strategy="ddp", sync_batchnorm=True)
    with pytest.raises(UnsupportedError, match=r"sync_batchnorm=True.*Use plain BatchNorm"):
        check_trainer(trainer)


def test_synchronised_layers() -> None:
    several: Any = SimpleNamespace(world_size=2)
    module = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(UnsupportedError, match="The layer `1` is a `SyncBatchNorm`"):
        check_synchronised(several, module)
    check_synchronised(SimpleNamespace(world_size=1), module)
    apart = nn.Linear(2, 2)
    apart._ddp_params_and_buffers_to_ignore = ["bias"]  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="out of DistributedDataParallel"):
        check_synchronised(several, apart)
