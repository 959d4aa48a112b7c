from __future__ import annotations

import errno
import os
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory import files
from lightning_accie.trajectory import writer as writer_module
from lightning_accie.trajectory.checkpoints import kept
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Checkpoint, Step
from lightning_accie.trajectory.writer import TrajectoryWriter


def names(directory: Path) -> set[str]:
    """Every file under the directory."""
    found = (path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix() for path in found}


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names(directory)}


def empty_step(t: int) -> Step:
    return Step(t, (), ())


def record(directory: Path, steps: int = 3, **options: Any) -> None:
    writer = TrajectoryWriter(directory, {"run": "first"}, disk_budget=10**6, **options)
    for t in range(steps):
        writer.append(empty_step(t))
    writer.close()


# ---------------------------------------------------------------- what is there already


def test_a_trajectory_is_not_overwritten_by_itself(tmp_path: Path) -> None:
    record(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(TrajectoryError, match=r"already holds a trajectory\..*overwrite=True"):
        TrajectoryWriter(tmp_path / "run", {}, disk_budget=1)
    assert contents(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_one(recorded: Trajectory) -> None:
    directory = recorded.directory
    assert len(names(directory)) == 1 + 4 + 3
    record(directory, steps=1, overwrite=True)
    assert names(directory) == {"manifest.json", "steps-000000.safetensors"}
    assert len(Trajectory.open(directory)) == 1


def test_what_a_killed_writer_left_is_cleaned_up(tmp_path: Path) -> None:
    record(tmp_path)
    leftovers = [
        "manifest.json.tmp",
        "steps-000007.safetensors",
        "steps-000001.safetensors.tmp",
        "checkpoints/step-000000016.safetensors",
        "checkpoints/step-000000064.safetensors.tmp",
    ]
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half of something")
    assert len(Trajectory.open(tmp_path)) == 3  # they count for nothing
    record(tmp_path, steps=5, overwrite=True)
    assert names(tmp_path) == {"manifest.json", "steps-000000.safetensors"}


def test_leftovers_of_a_first_write_need_no_permission(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "manifest.json.tmp").write_bytes(b"{")
    record(tmp_path)
    assert len(Trajectory.open(tmp_path)) == 3


def test_a_damaged_trajectory_can_be_overwritten(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"nonsense")
    record(tmp_path, steps=2, overwrite=True)
    assert len(Trajectory.open(tmp_path)) == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        ".hidden",
        "steps-1.safetensors",
        "steps-000000.safetensors.txt",
        "checkpoints/last.ckpt",
        "checkpoints/deep/step-000000000.safetensors",
        "other/manifest.json",
        "step-000000000.safetensors",
        "steps-000001.safetensors/file",
    ],
)
def test_other_things_are_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    record(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(TrajectoryError, match="holds something else than a trajectory"):
        TrajectoryWriter(tmp_path, {}, disk_budget=1, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_nothing_is_deleted_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "step-000000000.safetensors").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(TrajectoryError, match="something else than a trajectory: checkpoints"):
        TrajectoryWriter(tmp_path / "run", {}, disk_budget=1, overwrite=True)
    assert names(elsewhere) == {"step-000000000.safetensors"}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(TrajectoryError, match="is a file"):
        TrajectoryWriter(tmp_path / "run", {}, disk_budget=1, overwrite=True)
    with pytest.raises(TrajectoryError, match="cannot be written"):
        TrajectoryWriter(tmp_path / "run" / "below", {}, disk_budget=1)
    with pytest.raises(TrajectoryError, match="holds no trajectory"):
        Trajectory.open(tmp_path / "run")


def test_a_relative_directory_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = TrajectoryWriter(Path("run"), {}, disk_budget=1)
    monkeypatch.chdir("/")
    writer.append(empty_step(0))
    writer.close()
    assert len(Trajectory.open(tmp_path / "run")) == 1


# ---------------------------------------------------------------- order, flushing, closing


@pytest.mark.parametrize("number", [0, 2, -1])
def test_steps_come_one_after_the_other(tmp_path: Path, number: int) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1)
    writer.append(empty_step(0))
    with pytest.raises(ValueError, match=f"step {number} cannot follow 1 steps"):
        writer.append(empty_step(number))
    writer.append(empty_step(1))
    writer.close()
    assert len(Trajectory.open(tmp_path)) == 2


def test_a_running_trajectory_ends_at_its_last_flush(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_steps=4, flush_seconds=1000)
    lengths = []
    for t in range(9):
        writer.append(empty_step(t))
        lengths.append(len(Trajectory.open(tmp_path)))
    assert lengths == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    writer.flush()
    writer.flush()
    running = Trajectory.open(tmp_path)
    assert (len(running), running.status) == (9, "running")


def test_flushes_grow_apart_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(writer_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(files, "_write_through", lambda path, content: path.write_bytes(content))
    flushed_at: list[float] = []
    commit = TrajectoryWriter._commit
    monkeypatch.setattr(
        TrajectoryWriter,
        "_commit",
        lambda self, manifest: (flushed_at.append(now[0]), commit(self, manifest)),
    )
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_seconds=5)
    for t in range(4500):
        now[0] += 1.0
        writer.append(empty_step(t))
    gaps = {flushed: after - flushed for flushed, after in pairwise(flushed_at)}
    assert all(gap == 5 for flushed, gap in gaps.items() if flushed <= 250)
    assert all(0.02 * at <= gap <= 0.02 * at + 1 for at, gap in gaps.items() if 250 < at < 3000)
    assert all(gap == 60 for at, gap in gaps.items() if at >= 3000)
    assert len(gaps) < 250


def test_chunks_of_a_fast_run_grow(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_steps=2, flush_seconds=1000)
    for t in range(1500):
        writer.append(empty_step(t))
    writer.close()
    chunks = len(list(tmp_path.glob("steps-*")))
    assert 64 < chunks < 250
    assert len(list(Trajectory.open(tmp_path).steps())) == 1500


def test_after_close_nothing_more_is_written(tmp_path: Path, state: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    writer.append(empty_step(0))
    writer.close("failed", "CUDA error")
    writer.close("finished")
    for write in (
        lambda: writer.append(empty_step(1)),
        lambda: writer.checkpoint(state(0)),
        writer.flush,
    ):
        with pytest.raises(TrajectoryError, match="is closed"):
            write()
    trajectory = Trajectory.open(tmp_path)
    assert (len(trajectory), trajectory.status, trajectory.reason) == (1, "failed", "CUDA error")


@pytest.mark.parametrize("status", ["running", "done", ""])
def test_the_last_status_is_one_of_four(tmp_path: Path, status: str) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1)
    with pytest.raises(ValueError, match="status must be one of"):
        writer.close(status)


def test_reading_writes_nothing(recorded: Trajectory) -> None:
    def seen() -> dict[Path, tuple[int, int]]:
        paths = [recorded.directory, *recorded.directory.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    (recorded.directory / "manifest.json.tmp").write_text("left over")
    before = seen()
    trajectory = Trajectory.open(recorded.directory)
    trajectory.verify()
    trajectory.visits()
    trajectory.checkpoint(0)
    assert seen() == before


# ---------------------------------------------------------------- checkpoints and their budget


def test_checkpoints_follow_the_schedule_and_the_budget(
    tmp_path: Path, state: Any, same: Any
) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    assert [t for t in range(300) if writer.wants_checkpoint(t)] == [0, 16, 64, 144, 256]
    writer.checkpoint(state(0))
    writer.close()
    size = (tmp_path / "checkpoints" / "step-000000000.safetensors").stat().st_size

    room = 6
    budget = room * (size + 8)  # the later ones have some digits more in their metadata
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=budget, overwrite=True, flush_steps=4096)
    written = 0
    for t in range(4000):
        if writer.wants_checkpoint(t):
            writer.checkpoint(state(t))
            written += 1
            expected = {f"step-{step:09d}.safetensors" for step in kept(t, room - 1)}
            assert names(tmp_path / "checkpoints") == expected
        writer.append(empty_step(t))
    writer.checkpoint(state(4000))
    writer.close()
    trajectory = Trajectory.open(tmp_path)
    assert trajectory.checkpoint_steps == (*sorted(kept(4000, room - 1)), 4000)
    assert all(same(trajectory.checkpoint(t), state(t)) for t in trajectory.checkpoint_steps)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "checkpoints").iterdir())
    assert on_disk <= budget
    assert written < 13  # of 16 candidates


def test_a_last_state_gives_way_to_the_next(tmp_path: Path, state: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    writer.checkpoint(state(0))
    for t in range(30):
        writer.append(empty_step(t))
    writer.checkpoint(state(20))  # a moment ago
    writer.checkpoint(state(30))
    writer.checkpoint(state(30))
    writer.close()
    assert Trajectory.open(tmp_path).checkpoint_steps == (0, 30)


def test_checkpoints_come_in_order_and_with_the_initial_state(tmp_path: Path, state: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    for t in range(20):
        writer.append(empty_step(t))
    with pytest.raises(ValueError, match="cannot come here"):
        writer.checkpoint(state(16))
    writer.checkpoint(state(0))
    writer.checkpoint(state(16))
    for step in (21, 3, 0, -1):
        with pytest.raises(ValueError, match=f"a checkpoint of step {step} cannot come here"):
            writer.checkpoint(state(step))


def test_the_log_reaches_every_checkpoint(tmp_path: Path, state: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6, flush_seconds=1000)
    writer.checkpoint(state(0))
    for t in range(16):
        writer.append(empty_step(t))
    writer.checkpoint(state(16))
    assert len(Trajectory.open(tmp_path)) == 16


def test_a_budget_for_less_than_two_is_refused_at_the_first(tmp_path: Path) -> None:
    first = Checkpoint(0, {"param": torch.zeros(1000)})
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=8000)
    with pytest.raises(TrajectoryError, match=r"take 8\d\d\d bytes .*disk_budget is 8000 bytes"):
        writer.checkpoint(first)
    writer.close("stopped", "no room")
    assert names(tmp_path) == {"manifest.json"}


def slots(step: int, size: int) -> Checkpoint:
    return Checkpoint(step, {"all": torch.zeros(size, dtype=torch.uint8)})


def test_states_that_grow_after_the_first_step_fit_if_both_do(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=4500)
    writer.checkpoint(slots(0, 1000))
    writer.append(empty_step(0))
    writer.checkpoint(slots(1, 3000))
    writer.close()
    assert Trajectory.open(tmp_path).checkpoint_steps == (0, 1)


def test_room_is_counted_with_the_largest_state(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=4400)
    sizes = {0: 1000, 16: 3000, 64: 500}
    for t in range(65):
        if t in sizes:
            writer.checkpoint(slots(t, sizes[t]))
        writer.append(empty_step(t))
    writer.close()
    assert Trajectory.open(tmp_path).checkpoint_steps == (0, 64)


def test_states_that_grow_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=4500)
    writer.checkpoint(slots(0, 1000))
    writer.append(empty_step(0))
    with pytest.raises(TrajectoryError, match=r"take 5\d\d\d bytes .*Raise disk_budget"):
        writer.checkpoint(slots(1, 4000))
    assert writer.wants_checkpoint(16)
    writer.close("stopped", "no room")
    trajectory = Trajectory.open(tmp_path)
    assert (trajectory.checkpoint_steps, len(trajectory)) == ((0,), 1)


# ---------------------------------------------------------------- the file system


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for names")
def test_content_reaches_the_disk_before_its_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, int]] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", path.name, 0 if path.is_dir() else path.stat().st_size))

    def replace(old: Path, new: Path) -> None:
        calls.append(("rename", new.name, 0))
        old.rename(new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write(tmp_path, "manifest.json", b"x" * 100_000)
    assert calls == [
        ("sync", "manifest.json.tmp", 100_000),
        ("rename", "manifest.json", 0),
        ("sync", tmp_path.name, 0),
    ]


class Refusing:
    """Lets ``n`` calls through, then refuses: once, or for good."""

    def __init__(self, function: Any, n: int, for_good: bool, halfway: bool) -> None:
        self.function, self.n, self.for_good, self.halfway = function, n, for_good, halfway
        self.calls = 0
        self.refused = False

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.n + 1 or (self.for_good and self.calls > self.n):
            self.refused = True
            if self.halfway:
                path, content = arguments
                path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*arguments)


def short_run(directory: Path, rich_step: Any, state: Any) -> list[TrajectoryError]:
    """Record a run as a callback would, and say what was raised."""
    raised = []
    writer = TrajectoryWriter(directory, {}, disk_budget=3500, flush_steps=10)
    try:
        for t in range(70):
            if writer.wants_checkpoint(t):
                writer.checkpoint(state(t))
            writer.append(rich_step(t))
        writer.checkpoint(state(70))
    except TrajectoryError as error:
        raised.append(error)
        with pytest.raises(TrajectoryError, match="No space left"):
            writer.append(rich_step(70))
    try:
        writer.close()
    except TrajectoryError as error:
        raised.append(error)
    writer.close()
    return raised


@pytest.mark.parametrize("for_good", [True, False])
@pytest.mark.parametrize("place", ["_write_through", "_sync_directory", "remove", "replace"])
def test_a_full_disk_at_every_write(
    tmp_path: Path,
    rich_step: Any,
    state: Any,
    same: Any,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    for_good: bool,
) -> None:
    owner = {"replace": os, "remove": writer_module}.get(place, files)
    for n in count():
        directory = tmp_path / str(n)
        refusing = Refusing(getattr(owner, place), n, for_good, place == "_write_through")
        with monkeypatch.context() as patched:
            patched.setattr(owner, place, refusing)
            if place != "remove" and n == 0:
                with pytest.raises(TrajectoryError, match="No space left"):
                    TrajectoryWriter(directory, {}, disk_budget=1)
                continue
            raised = short_run(directory, rich_step, state)
        assert [type(error.__cause__) for error in raised] == [OSError] * refusing.refused
        assert not list(directory.rglob("*.tmp"))
        trajectory = Trajectory.open(directory)
        trajectory.verify()
        assert all(same(step, rich_step(t)) for t, step in enumerate(trajectory.steps()))
        if not refusing.refused:
            break
        if not for_good:
            assert trajectory.status == "stopped"
            assert "No space left" in trajectory.reason
    assert (trajectory.status, len(trajectory)) == ("finished", 70)
    assert n >= (1 if place == "remove" else 18)  # the loop did go through the run
