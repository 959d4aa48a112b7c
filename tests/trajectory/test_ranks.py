"""The logs of several processes make one run, or it is said why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.manifest import Rank
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Step
from lightning_accie.trajectory.writer import TrajectoryWriter

Write = Callable[..., Path]


@pytest.fixture
def step(rich_step: Callable[[int], Step]) -> Callable[[int, int], Step]:
    """Step t as a rank has it: batches of its own, the settings of all."""

    def make(t: int, rank: int) -> Step:
        settings = ({"lr": 0.1 / (t + 1), "momentum": 0},)
        return replace(rich_step(1000 * rank + t), number=t, settings=settings)

    return make


@pytest.fixture
def write(tmp_path: Path, step: Any, state: Any) -> Write:
    """Writes a run of three processes, each to a length of its own."""

    def run(name: str = "run", lengths: tuple[int, ...] = (40, 40, 40), **options: Any) -> Path:
        for number, length in enumerate(lengths):
            rank = Rank(number, len(lengths), run=f"the run {name}")
            writer = TrajectoryWriter(
                tmp_path / name,
                {"seed": 7},
                disk_budget=10**6,
                flush_steps=15,
                rank=rank,
                **options,
            )
            for t in range(length):
                if number == 0 and writer.wants_checkpoint(t):
                    writer.checkpoint(state(t))
                writer.append(step(t, number))
            if number == 0:
                writer.checkpoint(state(length))
            whole = length == max(lengths)
            writer.close(*(() if whole else ("stopped", "the disk was full")))
        return tmp_path / name

    return run


def test_a_step_has_the_batches_of_all_ranks(write: Write, step: Any, same: Any) -> None:
    trajectory = Trajectory.open(write())
    trajectory.verify()
    assert (len(trajectory), trajectory.world_size, trajectory.version) == (40, 3, 2)
    assert (trajectory.status, trajectory.reason) == ("finished", "")
    assert trajectory.checkpoint_steps == (0, 16, 40)
    for t, merged in enumerate(trajectory.steps()):
        expected = [
            replace(micro, rank=rank, world_size=3)
            for rank in range(3)
            for micro in step(t, rank).micro_batches
        ]
        assert merged.number == t
        assert same(merged.settings, step(t, 0).settings)
        assert same(list(merged.micro_batches), expected)
        assert all(m.divisor == 3 * m.accumulate for m in merged.micro_batches)


def counted(step: Any, length: int) -> dict[tuple[int, int], int]:
    """How often each sample of each source was drawn, counted one by one."""
    counts: dict[tuple[int, int], int] = {}
    for t in range(length):
        for rank in range(3):
            for micro in step(t, rank).micro_batches:
                for piece in micro.pieces:
                    for index in piece.indices.tolist():
                        key = (piece.source, index)
                        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize(("lengths", "whose"), [((40, 37, 40), 1), ((40, 30, 14), 2)])
def test_the_shortest_log_ends_the_run(
    write: Write, step: Any, lengths: tuple[int, ...], whose: int
) -> None:
    trajectory = Trajectory.open(write(lengths=lengths))
    assert len(trajectory) == min(lengths)
    assert trajectory.status == "stopped"
    assert trajectory.reason == (
        f"the log of rank {whose} ends after {min(lengths)} steps (its status is 'stopped'), that "
        "of rank 0 after 40: the disk was full"
    )
    assert trajectory.checkpoint_steps == ((0, 16) if min(lengths) > 16 else (0,))
    source, index, count = trajectory.visits()
    found = zip(source.tolist(), index.tolist(), strict=True)
    assert dict(zip(found, count.tolist(), strict=True)) == counted(step, min(lengths))
    with pytest.raises(IndexError):
        trajectory.step(min(lengths))


def test_where_rank_0_is_the_shortest_its_own_end_counts(write: Write) -> None:
    trajectory = Trajectory.open(write(lengths=(20, 40, 40)))
    assert (len(trajectory), trajectory.status, trajectory.reason) == (
        20,
        "stopped",
        "the disk was full",
    )


def test_a_missing_log_is_named(write: Write) -> None:
    directory = write()
    shutil.rmtree(directory / "rank-002")
    with pytest.raises(TrajectoryError, match=r"3 processes, .* rank 2 is missing.*rank-002"):
        Trajectory.open(directory)


def test_a_log_of_another_run_or_rank_is_refused(write: Write) -> None:
    one, other = write("one"), write("other")
    shutil.rmtree(one / "rank-001")
    shutil.copytree(other / "rank-001", one / "rank-001")
    with pytest.raises(TrajectoryError, match=r"rank-001 is not rank 1's log of this run"):
        Trajectory.open(one)
    shutil.rmtree(one / "rank-001")
    shutil.copytree(one / "rank-002", one / "rank-001")
    with pytest.raises(TrajectoryError, match=r"rank-001 is not rank 1's log of this run"):
        Trajectory.open(one)


def test_damage_in_another_ranks_log_is_found(write: Write) -> None:
    directory = write()
    path = directory / "rank-001" / "steps-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    trajectory = Trajectory.open(directory)
    trajectory.step(0)
    with pytest.raises(TrajectoryError, match=r"rank-001.steps-000001\.safetensors is damaged"):
        trajectory.step(15)
    with pytest.raises(TrajectoryError, match=r"rank-001.steps-000001\.safetensors is damaged"):
        trajectory.verify()
    path.write_bytes(content[:-1])
    with pytest.raises(TrajectoryError, match=r"rank-001.steps-000001\.safetensors is damaged"):
        Trajectory.open(directory)


def test_the_log_of_one_rank_is_no_trajectory(write: Write) -> None:
    directory = write()
    with pytest.raises(TrajectoryError, match="rank 1 of 3 alone") as caught:
        Trajectory.open(directory / "rank-001")
    assert str(caught.value).endswith(f"{directory}.")


def test_ranks_that_stepped_differently_are_refused(tmp_path: Path, step: Any, state: Any) -> None:
    for number in range(2):
        writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6, rank=Rank(number, 2, "run"))
        if number == 0:
            writer.checkpoint(state(0))
        for t in range(3):
            lr = 0.1 if t < 2 or number == 0 else 0.05
            writer.append(replace(step(t, number), settings=({"momentum": 0, "lr": lr},)))
        writer.close()
    trajectory = Trajectory.open(tmp_path)
    trajectory.step(1)
    with pytest.raises(TrajectoryError, match=r"At step 2 .* rank 1 .*\(`lr` 0.05 and 0.1\)"):
        trajectory.step(2)


def test_the_logs_of_all_ranks_are_overwritten(write: Write, tmp_path: Path) -> None:
    directory = write()
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        TrajectoryWriter(directory, {}, disk_budget=1)
    (directory / "manifest.json").unlink()  # a run that was killed may leave the others' logs alone
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        TrajectoryWriter(directory, {}, disk_budget=1)
    TrajectoryWriter(directory, {}, disk_budget=1, overwrite=True).close()
    assert {path.name for path in directory.iterdir()} == {"manifest.json", "checkpoints"}
    assert Trajectory.open(directory).version == 1


def test_what_is_not_a_log_is_not_deleted(write: Write) -> None:
    directory = write()
    (directory / "rank-001" / "notes.txt").write_text("mine")
    with pytest.raises(
        TrajectoryError, match=r"rank-001 holds something else than a trajectory: notes"
    ):
        TrajectoryWriter(directory, {}, disk_budget=1, overwrite=True)
    assert (directory / "manifest.json").is_file()


def test_the_version_says_that_there_are_other_logs(write: Write) -> None:
    """What reads version 1 alone must not take rank 0's log for the run."""
    directory = write()
    for place in (directory, directory / "rank-001"):
        manifest = json.loads((place / "manifest.json").read_text())
        assert manifest["version"] == 2
        assert manifest["rank"]["of"] == 3
    for change in ({"number": 3}, {"of": 1}, {"number": True}, {"extra": 1}):
        manifest["rank"] = {"number": 1, "of": 3, "run": "x", **change}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(TrajectoryError, match=r"manifest\.json is damaged"):
            Trajectory.open(directory)
