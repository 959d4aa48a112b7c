"""A writer that is killed leaves what it flushed, whole."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.writer import TrajectoryWriter

SCRIPT = Path(__file__).with_name("killed_writer.py")
ROOT = SCRIPT.parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the script left, and what it printed."""
    directory = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def what_is_left(root: Path, same: Any) -> list[Trajectory | None]:
    """The trajectories that killed writers left, each found whole; None where there is none."""
    script = runpy.run_path(str(SCRIPT))
    left: list[Trajectory | None] = []
    for directory in sorted(root.iterdir(), key=lambda path: int(path.name)):
        if not (directory / "manifest.json").exists():
            with pytest.raises(TrajectoryError, match="holds no trajectory"):
                Trajectory.open(directory)
            left.append(None)
            continue
        trajectory = Trajectory.open(directory)
        trajectory.verify()
        for t, step in enumerate(trajectory.steps()):
            assert same(step, script["make_step"](t))
        for t in trajectory.checkpoint_steps:
            assert same(trajectory.checkpoint(t), script["make_checkpoint"](t))
        left.append(trajectory)
    return left


def test_killed_at_any_time(killed: tuple[Path, str], same: Any) -> None:
    root = killed[0] / "any-time"
    left = what_is_left(root, same)
    assert [trajectory.status for trajectory in left] == ["running"] * 8
    assert any(len(trajectory) > 0 for trajectory in left)
    for directory in root.iterdir():
        assert_a_new_writer_cleans_up(directory)


def test_killed_before_every_call_to_the_file_system(killed: tuple[Path, str], same: Any) -> None:
    root = killed[0] / "every-call"
    left = what_is_left(root, same)
    assert len(left) > 50
    begun = left.count(None)
    assert left[:begun] == [None] * begun
    lengths = [len(trajectory) for trajectory in left[begun:]]
    assert lengths == sorted(lengths)
    assert set(lengths) == {0, 16, 36, 56, 64, 70}
    assert left[-1].status == "finished"  # this one came through
    assert left[-1].checkpoint_steps == (0, 64, 70)
    for directory in root.iterdir():
        assert_a_new_writer_cleans_up(directory)


def test_killed_while_overwriting(killed: tuple[Path, str], same: Any) -> None:
    root = killed[0] / "overwriting"
    left = what_is_left(root, same)
    lengths = [None if trajectory is None else len(trajectory) for trajectory in left]
    assert [length for length, _ in groupby(lengths)] == [40, None, 0, 2]
    for directory in root.iterdir():
        assert_a_new_writer_cleans_up(directory)


def test_killed_while_going_on_in_place(killed: tuple[Path, str], same: Any) -> None:
    """There is always a manifest, the old one or a new one, and its files are whole."""
    root = killed[0] / "going-on"
    left = what_is_left(root, same)
    lengths = [None if trajectory is None else len(trajectory) for trajectory in left]
    assert [length for length, _ in groupby(lengths)] == [40, 25, 30]
    assert left[-1] is not None
    assert left[-1].checkpoint_steps == (0, 16, 30)
    for directory in root.iterdir():
        assert_a_new_writer_cleans_up(directory)


def assert_a_new_writer_cleans_up(directory: Path) -> None:
    TrajectoryWriter(directory, {}, disk_budget=1, overwrite=True).close()
    assert {path.name for path in directory.iterdir()} == {"manifest.json", "checkpoints"}
    assert not list((directory / "checkpoints").iterdir())


def test_a_write_that_the_system_breaks_off(killed: tuple[Path, str]) -> None:
    root, message = killed[0] / "small-files", killed[1]
    assert "cannot be written" in message
    assert "Its first 1 steps are kept." in message
    trajectory = Trajectory.open(root)
    trajectory.verify()
    assert (len(trajectory), trajectory.checkpoint_steps) == (1, (0,))
    assert trajectory.status == "stopped"
    assert trajectory.reason == message.strip()
    assert not list(root.rglob("*.tmp"))
