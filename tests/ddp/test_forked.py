"""`ddp_fork`, as notebooks use it: the processes that train end with `fit`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_accie import Trajectory
from tests.ddp.launch import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_scores_are_on_disk_when_fit_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ddp.forked", str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trajectory = Trajectory.open(tmp_path / "influence" / "trajectory")
    assert (trajectory.status, trajectory.world_size, len(trajectory)) == ("finished", 2, 9)
