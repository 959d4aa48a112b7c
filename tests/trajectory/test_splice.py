"""A trajectory that takes up another one has its first steps, and nothing of the other one is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.splice import After
from lightning_accie.trajectory.writer import TrajectoryWriter


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def go_on(after: After, directory: Path, rich_step: Any, state: Any, to: int, **given: Any) -> Any:
    """Record on to step ``to``, with other steps than the first run had."""
    writer = TrajectoryWriter(
        directory, {"seed": 8}, **{"disk_budget": 10**6, "flush_steps": 15, "after": after, **given}
    )
    for t in range(after.steps, to):
        if writer.wants_checkpoint(t):
            writer.checkpoint(state(t))
        writer.append(rich_step(t))
    writer.checkpoint(state(to))
    writer.close()
    return Trajectory.open(directory)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 15, 16, 29, 31, 40])
def test_any_step_can_be_taken_up(
    tmp_path: Path, recorded: Trajectory, rich_step: Any, state: Any, same: Any,
    steps: int, in_place: bool,
) -> None:  # fmt: skip
    before = contents(recorded.directory)
    target = recorded.directory if in_place else tmp_path / "other"
    trajectory = go_on(After(recorded.directory, steps, steps), target, rich_step, state, 45)
    assert same(list(trajectory.steps()), [rich_step(t) for t in range(45)])
    assert trajectory.checkpoint_steps == (0, 16, 45)
    assert all(same(trajectory.checkpoint(t), state(t)) for t in (0, 16, 45))
    assert (trajectory.status, trajectory.header) == ("finished", {"seed": 8})
    trajectory.verify()
    named = {
        stored.file
        for stored in (*trajectory._logs[0].manifest.chunks, *trajectory._checkpoints.values())
    }
    assert contents(target).keys() == {"manifest.json", *named}
    if not in_place:
        assert contents(recorded.directory) == before


def test_files_are_linked(tmp_path: Path, recorded: Trajectory, rich_step: Any, state: Any) -> None:
    target = tmp_path / "other"
    go_on(After(recorded.directory, 31, 31), target, rich_step, state, 32)
    for name in ("steps-000000.safetensors", "checkpoints/step-000000016.safetensors"):
        assert (target / name).samefile(recorded.directory / name)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM])
def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, recorded: Trajectory, rich_step: Any, state: Any, same: Any,
    monkeypatch: pytest.MonkeyPatch, error: int,
) -> None:  # fmt: skip
    def refuse(*args: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "other"
    trajectory = go_on(After(recorded.directory, 31, 31), target, rich_step, state, 33)
    assert same(list(trajectory.steps()), [rich_step(t) for t in range(33)])
    trajectory.verify()
    name = "steps-000000.safetensors"
    assert not (target / name).samefile(recorded.directory / name)


def test_what_a_killed_writer_left_is_not_taken_for_a_part(
    recorded: Trajectory, rich_step: Any, state: Any, same: Any
) -> None:
    directory = recorded.directory
    for name in ("steps-000004.safetensors", "steps-000009.safetensors.tmp"):
        (directory / name).write_bytes(b"half")
    (directory / "checkpoints" / "step-000000025.safetensors").write_bytes(b"half")
    (directory / "notes.txt").write_text("mine")
    trajectory = go_on(After(directory, 20, 20), directory, rich_step, state, 45)
    assert same(list(trajectory.steps()), [rich_step(t) for t in range(45)])
    assert [chunk.file for chunk in trajectory._logs[0].manifest.chunks][
        2
    ] == "steps-000010.safetensors"
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "steps-000004.safetensors").exists()
    assert not (directory / "checkpoints" / "step-000000025.safetensors").exists()


def test_a_pinned_checkpoint_is_never_thinned(
    recorded: Trajectory, rich_step: Any, state: Any, same: Any
) -> None:
    directory = recorded.directory
    size = max(stored.bytes for stored in recorded._checkpoints.values())
    after = After(directory, 20, 19, pinned=frozenset({20}))
    writer = TrajectoryWriter(directory, {}, disk_budget=4 * size, after=after)
    writer.checkpoint(state(20))
    for t in range(20, 300):
        if writer.wants_checkpoint(t):
            writer.checkpoint(state(t))
        writer.append(rich_step(t))
    writer.checkpoint(state(300))
    writer.close()
    trajectory = Trajectory.open(directory)
    assert trajectory.checkpoint_steps == (0, 20, 256, 300)  # four fit
    assert same(trajectory.checkpoint(20), state(20))


@pytest.mark.parametrize("budget", [1, 2])
def test_a_budget_that_got_too_small_is_an_error(
    recorded: Trajectory, state: Any, budget: int
) -> None:
    directory = recorded.directory
    size = max(stored.bytes for stored in recorded._checkpoints.values())
    after = After(directory, 20, 20, pinned=frozenset({16}))
    writer = TrajectoryWriter(directory, {}, disk_budget=budget * size, after=after)
    assert not writer.wants_checkpoint(21)
    with pytest.raises(TrajectoryError, match=r"and those of 1 resumptions, .* Raise disk_budget"):
        writer.checkpoint(state(20))
    assert len(Trajectory.open(directory)) == 20


def test_another_place_that_is_taken_is_left_alone(
    tmp_path: Path, recorded: Trajectory, rich_step: Any, state: Any
) -> None:
    TrajectoryWriter(tmp_path / "taken", {}, disk_budget=1).close()
    after = After(recorded.directory, 20, 20)
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        TrajectoryWriter(tmp_path / "taken", {}, disk_budget=10**6, after=after)
    again = go_on(after, tmp_path / "taken", rich_step, state, 25, overwrite=True)
    assert len(again) == 25


def test_only_what_the_steps_need_is_looked_at(recorded: Trajectory) -> None:
    name = recorded._logs[0].manifest.chunks[-1].file
    content = bytearray((recorded.directory / name).read_bytes())
    content[-1] ^= 1
    (recorded.directory / name).write_bytes(content)
    recorded.verify(recorded._logs[0].manifest.chunks[-1].first)
    with pytest.raises(TrajectoryError, match="is damaged"):
        recorded.verify(recorded._logs[0].manifest.chunks[-1].first + 1)
