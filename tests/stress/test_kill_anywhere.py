"""One point of each phase of the stress script; and that its judges would see a false figure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_accie import InfluenceScores
from tests.stress import kill_anywhere

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOT = Path(__file__).parents[2]


def test_whatever_is_killed_leaves_the_truth_or_is_refused() -> None:
    command = [sys.executable, "-m", "tests.stress.kill_anywhere", "--points", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [row.split(" | ")[:2] for row in done.stdout.splitlines()[2:]]
    assert rows == [[f"| {phase.name}", "1"] for phase in kill_anywhere.PHASES]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("run")
    with kill_anywhere.close_checkpoints():
        kill_anywhere.fit(directory, kill_anywhere.recording(directory))
        yield directory


def test_the_judges_find_nothing_wrong_with_a_whole_run(run: Path) -> None:
    assert kill_anywhere.judge_trajectory(run) == "40 steps"
    assert kill_anywhere.judge_scores(run) == "whole"


def test_the_judges_see_false_scores(tmp_path: Path, run: Path) -> None:
    scores = InfluenceScores.load(run)
    object.__setattr__(scores, "estimate", scores.estimate.clone())
    scores.estimate[3] += 1e-15 * scores.estimate[3].abs() + 1e-18
    scores.save(tmp_path)
    with pytest.raises(AssertionError, match=r"scores\.csv is neither|the scores are false"):
        kill_anywhere.judge_scores(tmp_path)
    shutil.copy(run / "scores.csv", tmp_path)
    with pytest.raises(AssertionError, match="the scores are false"):
        kill_anywhere.judge_scores(tmp_path)


def test_the_judges_see_a_false_state(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [dict(state) for state in kill_anywhere.true_states(5)]
    name = "net.0.weight"
    states[17][name] = torch.nextafter(states[17][name], torch.tensor(1e9).double())
    monkeypatch.setattr(kill_anywhere, "true_states", lambda seed: states)
    with pytest.raises(AssertionError, match=r"`net\.0\.weight` before step 17"):
        kill_anywhere.judge_trajectory(run)


def test_the_judges_see_the_scores_of_another_run(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    kill_anywhere.true_scores(6, kill_anywhere.STEPS).save(tmp_path / "run")
    with pytest.raises(AssertionError, match="the scores are another run's"):
        kill_anywhere.judge_trajectory(tmp_path / "run")
