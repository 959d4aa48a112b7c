"""Writers that are killed; run by test_killed.py in a process of its own, for it forks.

usage: killed_writer.py DIRECTORY
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory import checkpoints
from lightning_accie.trajectory.records import Checkpoint, MicroBatch, Piece, Step
from lightning_accie.trajectory.splice import After
from lightning_accie.trajectory.writer import TrajectoryWriter

DELAYS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.08, 0.13, 0.3)
FILE_CALLS = ("open", "os.rename", "os.remove", "os.mkdir")


def make_step(t: int) -> Step:
    indices = np.random.default_rng(t).integers(0, 1000, size=8)
    return Step(
        t, (MicroBatch((Piece(0, indices),), t, 0, t, loss=1 / (t + 1)),), ({"lr": 0.1 / (t + 1)},)
    )


def make_checkpoint(t: int, size: int = 500) -> Checkpoint:
    return Checkpoint(t, {"param": torch.full((size,), float(t))})


def write(directory: Path, steps: int) -> None:
    writer = TrajectoryWriter(directory, {}, disk_budget=8000, flush_steps=20, overwrite=True)
    for t in range(steps):
        if writer.wants_checkpoint(t):
            writer.checkpoint(make_checkpoint(t))
        writer.append(make_step(t))
    writer.checkpoint(make_checkpoint(steps))
    writer.close()


def go_on(directory: Path, at: int, steps: int) -> None:
    after = After(directory, at, at)
    writer = TrajectoryWriter(directory, {}, disk_budget=8000, flush_steps=20, after=after)
    writer.checkpoint(make_checkpoint(at))
    for t in range(at, steps):
        writer.append(make_step(t))
    writer.checkpoint(make_checkpoint(steps))
    writer.close()


def sync(descriptor: int) -> None:
    """Take the place of os.fsync: what a killed process has written, the system has."""


def fork(work: Callable[[], None]) -> int:
    """Start ``work`` in a child process and return its number."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def kill_any_time(root: Path) -> None:
    for at, delay in enumerate(DELAYS):
        directory = root / str(at)
        child = fork(lambda directory=directory: write(directory, 10**6))
        begun = directory / ("steps-000000.safetensors" if delay else "manifest.json")
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def kill_before_every_call(root: Path) -> None:
    """Kill a short run before its first call to the file system, its second, and so on."""

    count_calls_and_kill(root, before=0, then=lambda directory: write(directory, 70))


def kill_while_overwriting(root: Path) -> None:
    """The same, where a run of 40 steps is being overwritten by one of 2."""
    count_calls_and_kill(root, before=40, then=lambda directory: write(directory, 2))


def kill_while_going_on(root: Path) -> None:
    """The same, where a run of 40 steps is taken up in its place at step 25."""
    count_calls_and_kill(root, before=40, then=lambda directory: go_on(directory, 25, 30))


def count_calls_and_kill(root: Path, before: int, then: Callable[[Path], None]) -> None:
    def run(directory: Path, survived: int) -> None:
        if before:
            write(directory, before)
        calls = itertools.count()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            ours = event in FILE_CALLS and str(arguments[0]).startswith(str(directory))
            if ours and next(calls) == survived:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        then(directory)

    for survived in itertools.count():
        directory = root / str(survived)
        child = fork(lambda directory=directory, survived=survived: run(directory, survived))
        if os.waitpid(child, 0)[1] == 0:
            return


def refuse_large_files(root: Path) -> None:
    """Let the system refuse in the middle of a write, as a full disk does."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    writer = TrajectoryWriter(root, {}, disk_budget=10**9)
    writer.checkpoint(make_checkpoint(0))
    writer.append(make_step(0))
    try:
        writer.checkpoint(make_checkpoint(1, size=100_000))
    except TrajectoryError as error:
        print(error)  # for the test to compare
    writer.close()


if __name__ == "__main__":
    checkpoints.SPACING = 16  # short runs are to have several
    os.fsync = sync
    root = Path(sys.argv[1])
    kill_any_time(root / "any-time")
    kill_before_every_call(root / "every-call")
    kill_while_overwriting(root / "overwriting")
    kill_while_going_on(root / "going-on")
    refuse_large_files(root / "small-files")
