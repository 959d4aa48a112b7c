from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory import reader
from lightning_accie.trajectory.chunks import Chunk, encode_chunk
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Checkpoint, MicroBatch, Piece, Step
from lightning_accie.trajectory.tensors import dump, load, smallest
from lightning_accie.trajectory.writer import TrajectoryWriter


def test_every_step_comes_back_exactly(recorded: Trajectory, rich_step: Any, same: Any) -> None:
    assert len(recorded) == 40
    assert all(same(step, rich_step(t)) for t, step in enumerate(recorded.steps()))


def test_steps_come_in_any_order(tmp_path: Path, rich_step: Any, same: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_steps=7)
    for t in range(100):  # more chunks than stay in memory
        writer.append(rich_step(t))
    writer.close()
    trajectory = Trajectory.open(tmp_path)
    for t in [*range(99, -1, -1), *np.random.default_rng(0).integers(0, 100, 200).tolist()]:
        assert same(trajectory.step(t), rich_step(t))


def test_only_a_few_chunks_stay_in_memory(tmp_path: Path, rich_step: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_steps=1)
    for t in range(20):
        writer.append(rich_step(t))
    writer.close()
    trajectory = Trajectory.open(tmp_path)
    assert len(list(trajectory.steps())) == 20
    for path in tmp_path.glob("steps-*"):
        path.unlink()
    assert [step.number for step in trajectory.steps(16)] == [16, 17, 18, 19]
    with pytest.raises(TrajectoryError, match="is missing"):
        trajectory.step(15)


def test_a_stretch_of_steps(recorded: Trajectory) -> None:
    assert [step.number for step in recorded.steps(13, 17)] == [13, 14, 15, 16]
    assert [step.number for step in recorded.steps(38)] == [38, 39]
    assert list(recorded.steps(40)) == []


@pytest.mark.parametrize("number", [-1, 40, 10**30])
def test_there_is_no_step_outside(recorded: Trajectory, number: int) -> None:
    with pytest.raises(IndexError, match=f"no step {number} in a trajectory of 40 steps"):
        recorded.step(number)


def test_chunks_of_any_content(rich_step: Any, same: Any) -> None:
    for first in range(0, 2000, 40):
        steps = [rich_step(t) for t in range(first, first + first % 7 + 1)]
        chunk = Chunk(encode_chunk(steps))
        assert (chunk.first, len(chunk)) == (first, len(steps))
        assert all(same(chunk.step(step.number), step) for step in steps)


@pytest.mark.parametrize(
    "values",
    [
        ([1, 2.0, None, True, "1", "float"], (1, [2.0, (3,)])),
        (1, 1.0, True),
        ("int", ("int",), ["int"]),
        (2**53, 2**53 + 1, -(2**53) - 1, 10**30),
        (float("inf"), -float("inf"), float("nan"), 5e-324, 0.1, 1e308),
        {"a": {"b": {"c": ()}}, "": None, "ü/ß": [[]]},
    ],
    ids=repr,
)
def test_settings_keep_their_types(values: Any, same: Any) -> None:
    steps = [Step(t, (), ({"value": values},)) for t in range(3)]
    chunk = Chunk(encode_chunk(steps))
    assert all(same(chunk.step(t), steps[t]) for t in range(3))


def test_settings_that_differ_only_in_kind_stay_apart(same: Any) -> None:
    turns = [1, True, 1.0, "1", None, 0.0, -0.0, False, 0, (1,), [1]]
    steps = [Step(t, (), ({"value": turns[t % len(turns)]},)) for t in range(30)]
    chunk = Chunk(encode_chunk(steps))
    assert all(same(chunk.step(step.number), step) for step in steps)


@pytest.mark.parametrize("turns", [(0.0, -0.0), (float("nan"), 1.0), (2**53, 2**53 + 2)])
def test_settings_that_change_little_are_seen_to_change(turns: Any, same: Any) -> None:
    steps = [Step(t, (), ({"value": turns[t % 2]},)) for t in range(10)]
    chunk = Chunk(encode_chunk(steps))
    assert all(same(chunk.step(t), steps[t]) for t in range(10))


def test_optimisers_in_turn_do_not_store_their_settings_each_time() -> None:
    names = ({"generator": "g" * 1000, "lr": 0.1}, {"discriminator": "d" * 1000, "lr": 0.2})
    steps = [Step(t, (), (names[t % 2],)) for t in range(100)]
    assert len(encode_chunk(steps)) < 2 * 1000 + 3000


def test_columns_that_do_not_fit_each_other_are_refused(rich_step: Any) -> None:
    tensors, meta = load(encode_chunk([rich_step(t) for t in range(10)]))
    columns = [name for name in tensors if name.split("/")[0] != "random" and len(tensors[name])]
    assert len(columns) > 12
    for name in columns:
        if name.endswith("/varying"):
            continue
        for damaged in (None, tensors[name][:-1], torch.cat([tensors[name], tensors[name][-1:]])):
            changed = {**tensors, name: damaged} if damaged is not None else dict(tensors)
            if damaged is None:
                del changed[name]
            with pytest.raises(ValueError, match=r"step log|shape|broadcast|index"):
                Chunk(dump(changed, meta))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([], torch.uint8),
        ([0, 255], torch.uint8),
        ([256], torch.uint16),
        ([65_535], torch.uint16),
        ([65_536], torch.int32),
        ([-1, 32_767], torch.int16),
        ([-1, 32_768], torch.int32),
        ([2**31 - 1, -(2**31)], torch.int32),
        ([2**31], torch.int64),
        ([2**63 - 1, -(2**63)], torch.int64),
    ],
)
def test_integers_take_the_smallest_type(values: list[int], dtype: torch.dtype) -> None:
    tensor = smallest(values)
    assert tensor.dtype == dtype
    assert tensor.tolist() == values


def test_an_ordinary_step_costs_its_indices_and_some_tens_of_bytes(
    tmp_path: Path, plain_step: Any
) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1)
    for t in range(2048):
        writer.append(plain_step(t))
    writer.close()
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    indices = 50 * 2  # 60,000 samples fit two bytes
    assert indices < stored / 2048 < indices + 50


def test_visits_count_every_draw(recorded: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter(
        (piece.source, index)
        for step in recorded.steps()
        for micro in step.micro_batches
        for piece in micro.pieces
        for index in piece.indices.tolist()
    )
    assert max(drawn.values()) > 3
    for merge_after in (2**20, 0):
        monkeypatch.setattr(reader, "_MERGE_AFTER", merge_after)
        visits = recorded.visits()
        assert [array.dtype for array in visits] == [np.int64] * 3
        source, index, count = (array.tolist() for array in visits)
        pairs = list(zip(source, index, strict=True))
        assert pairs == sorted(drawn)
        assert count == [drawn[pair] for pair in pairs]


def test_visits_of_a_sample_drawn_twice_in_one_batch(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1, flush_steps=1)
    batches = [
        (Piece(1, np.array([5, 5, -1])), Piece(1, np.array([5]))),
        (Piece(0, np.array([5])),),  # the first source comes last, in a chunk of its own
    ]
    for t, pieces in enumerate(batches):
        writer.append(Step(t, (MicroBatch(pieces, 0, 0, 0, None),), ()))
    writer.close()
    source, index, count = Trajectory.open(tmp_path).visits()
    assert (source.tolist(), index.tolist(), count.tolist()) == ([0, 1, 1], [5, -1, 5], [1, 1, 3])


def test_a_run_without_steps(tmp_path: Path, state: Any, same: Any) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    writer.checkpoint(state(0))
    writer.checkpoint(state(0))  # the last one as well as the first
    writer.close("interrupted", "before the first step")
    trajectory = Trajectory.open(tmp_path)
    assert (len(trajectory), list(trajectory.steps())) == (0, [])
    assert [array.shape for array in trajectory.visits()] == [(0,)] * 3
    assert trajectory.checkpoint_steps == (0,)
    assert same(trajectory.checkpoint(0), state(0))
    assert (trajectory.status, trajectory.reason) == ("interrupted", "before the first step")


def test_checkpoints_keep_every_tensor(tmp_path: Path, same: Any) -> None:
    base = torch.arange(12, dtype=torch.float32)
    tensors = {
        "param/a": base.reshape(3, 4).T,  # not contiguous
        "param/tied": base.reshape(3, 4),  # the same memory
        "param/part": base[2:5],
        "param/expanded": torch.tensor([2.5]).expand(4),
        "param/parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "slot/scalar": torch.tensor(3.0, dtype=torch.float64),
        "slot/empty": torch.empty(0, 5),
        "slot/half": torch.randn(3).to(torch.bfloat16),
        "slot/flags": torch.tensor([True, False]),
        "slot/count": torch.tensor([2**62, -1]),
        "slot/special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "ü / name": torch.zeros(1, dtype=torch.uint8),
    }
    meta = {"step": 3, "best": float("inf"), "nested": [{"a": None, "b": [0.1, True]}], "ü": "ß"}
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    writer.checkpoint(Checkpoint(0, tensors, meta))
    writer.close()
    found = Trajectory.open(tmp_path).checkpoint(0)
    assert same(found.meta, meta)
    assert same(found.tensors, {name: tensor.detach() for name, tensor in tensors.items()})


def test_a_lazily_negated_view_is_stored_as_what_it_shows(tmp_path: Path) -> None:
    view = torch.tensor([1 + 2j]).conj().imag
    assert view.is_neg()  # its memory holds 2, it shows −2
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    writer.checkpoint(Checkpoint(0, {"value": view}))
    writer.close()
    assert Trajectory.open(tmp_path).checkpoint(0).tensors["value"].tolist() == [-2]


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(1).to(torch.complex128)])
def test_a_tensor_that_no_file_can_hold_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=10**6)
    with pytest.raises(TrajectoryError, match="do not fit a safetensors file"):
        writer.checkpoint(Checkpoint(0, {"value": tensor}))
    writer.close()
    assert Trajectory.open(tmp_path).status == "stopped"


@pytest.mark.parametrize(
    "step",
    [
        Step(0, (), ({"lr": torch.tensor(0.1)},)),
        Step(0, (), ({"lr": {1: 2}},)),
        Step(0, (MicroBatch((Piece(0, np.array([0.5])),), 0, 0, 0, None),), ()),
        Step(0, (MicroBatch((), 2**70, 0, 0, None),), ()),
        Step(0, (MicroBatch((), 2**63, 0, 0, None),), ()),
    ],
    ids=["tensor", "key", "index", "far too large", "too large by one"],
)
def test_a_step_that_breaks_its_record_is_refused(tmp_path: Path, step: Step) -> None:
    writer = TrajectoryWriter(tmp_path, {}, disk_budget=1)
    writer.append(step)
    with pytest.raises(TrajectoryError, match="cannot be recorded"):
        writer.flush()
    writer.close()
    assert len(Trajectory.open(tmp_path)) == 0


def test_header_and_versions(tmp_path: Path) -> None:
    header = {"a": [1, 2.5, None, True, "ü"], "nested": {"inf": float("inf")}, "betas": (0.9, 1)}
    writer = TrajectoryWriter(tmp_path / "run", header, disk_budget=1)
    header["a"] = "changed afterwards"
    writer.close()
    trajectory = Trajectory.open(str(tmp_path / "run"))
    expected = {"a": [1, 2.5, None, True, "ü"], "nested": {"inf": float("inf")}, "betas": [0.9, 1]}
    assert trajectory.header == expected
    assert trajectory.version == 1
    assert trajectory.writer
    assert trajectory.directory == tmp_path / "run"


def test_a_header_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        TrajectoryWriter(tmp_path / "run", {"a": object()}, disk_budget=1)
    assert not (tmp_path / "run").exists()


def test_the_directory_around_it_will_do(tmp_path: Path, rich_step: Any) -> None:
    writer = TrajectoryWriter(tmp_path / "run" / "trajectory", {}, disk_budget=1)
    writer.append(rich_step(0))
    writer.close()
    trajectory = Trajectory.open(tmp_path / "run")
    assert trajectory.directory == tmp_path / "run" / "trajectory"
    assert len(trajectory) == 1
    with pytest.raises(TrajectoryError):
        Trajectory.open(tmp_path)
