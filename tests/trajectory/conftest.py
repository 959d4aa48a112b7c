"""Runs to store, and an exact comparison of what comes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Checkpoint, MicroBatch, Piece, Step
from lightning_accie.trajectory.writer import TrajectoryWriter


@pytest.fixture(autouse=True)
def _close_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates at 0, 16, 64, 144, …, so that short runs have several checkpoints."""
    monkeypatch.setattr("lightning_accie.trajectory.checkpoints.SPACING", 16)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing guards against the machine's end, which no test brings about; it takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


LOSSES = (0.25, None, float("nan"), float("inf"), -float("inf"), -0.0, 0.1 + 0.2, 5e-324)


def plain(value: Any) -> Any:
    """A value as something whose ``==`` is exact: types, NaN, the sign of zero, bits of tensors."""
    if isinstance(value, Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).tolist()
        return "Tensor", value.dtype, tuple(value.shape), bits
    if isinstance(value, np.ndarray):
        return "ndarray", value.dtype.name, value.tolist()
    if is_dataclass(value):
        return type(value), {
            field.name: plain(getattr(value, field.name)) for field in fields(value)
        }
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(entry) for entry in value]
    return type(value), repr(value)


def _piece(rng: np.random.Generator, source: int) -> Piece:
    high = int(rng.choice([3, 300, 70_000, 2**40]))
    return Piece(source, rng.integers(0, high, size=int(rng.integers(0, 6))))


def _random_state(rng: np.random.Generator) -> dict[str, Tensor] | None:
    states = {
        "torch": torch.from_numpy(rng.integers(0, 256, 40).astype(np.uint8)),
        "cuda/0": torch.from_numpy(rng.integers(0, 2**40, 3)),
        "none": torch.empty(0, dtype=torch.uint8),
    }
    chosen = [name for name in states if rng.random() < 0.5]
    return None if rng.random() < 0.5 else {name: states[name] for name in chosen}


def _micro_batch(rng: np.random.Generator) -> MicroBatch:
    return MicroBatch(
        pieces=tuple(_piece(rng, source) for source in range(int(rng.integers(0, 3)))),
        batch_idx=int(rng.integers(0, 1000)),
        epoch=int(rng.integers(0, 5)),
        global_step=int(rng.integers(0, 10**6)),
        loss=LOSSES[rng.integers(len(LOSSES))],
        accumulate=int(rng.integers(1, 5)),
        draws=bool(rng.random() < 0.5),
        random=_random_state(rng),
    )


def _settings(rng: np.random.Generator, t: int) -> tuple[dict[str, Any], ...]:
    group = {
        "lr": 0.1 / (t + 1),
        "betas": (0.9 - t / 1000, 0.999),
        "fused": None,
        "amsgrad": bool(rng.random() < 0.2),
        "nested": {"milestones": [1, 2.5, (t, "x", None)], "empty": (), "none": {}},
        "max_iter": t,
        "huge": 2**80 + t,
        "nan": float("nan"),
        "zero": -0.0 if t % 2 else 0.0,
    }
    return (group, {"lr": 1.0, "momentum": 0})[: int(rng.integers(0, 3))]


@pytest.fixture
def rich_step() -> Callable[[int], Step]:
    """Step t of a run that has everything in it that a step can have; the same at each call."""

    def make(t: int) -> Step:
        rng = np.random.default_rng(t)
        micros = tuple(_micro_batch(rng) for _ in range(int(rng.integers(0, 4))))
        scale = 1.0 if t % 3 else 2.0 ** int(rng.integers(0, 24))
        return Step(t, micros, _settings(rng, t), scale)

    return make


@pytest.fixture
def plain_step() -> Callable[[int], Step]:
    """Step t of an ordinary run: one batch of 50 of 60,000 samples, AdamW under OneCycle."""

    def make(t: int) -> Step:
        indices = np.random.default_rng(t).integers(0, 60_000, size=50)
        micro = MicroBatch((Piece(0, indices),), t % 1200, t // 1200, t, loss=1 / (t + 1))
        settings = {
            "lr": 1e-3 / (t + 1),
            "betas": (0.95 - t * 1e-6, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "amsgrad": False,
            "foreach": None,
            "initial_lr": 4e-5,
        }
        return Step(t, (micro,), (settings,))

    return make


@pytest.fixture
def state() -> Callable[[int], Checkpoint]:
    """The state before step t, of about 1 kB."""

    def make(t: int) -> Checkpoint:
        tensors = {"param/weight": torch.full((200,), float(t)), "slot/step": torch.tensor(t)}
        return Checkpoint(t, tensors, {"epoch": t // 10})

    return make


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Whether two records are exactly the same."""
    return lambda one, other: plain(one) == plain(other)


@pytest.fixture
def recorded(tmp_path: Path, rich_step: Any, state: Any) -> Trajectory:
    """A finished run of 40 steps in four chunks, with checkpoints at 0, 16 and 40."""
    writer = TrajectoryWriter(tmp_path / "run", {"seed": 7}, disk_budget=10**6, flush_steps=15)
    for t in range(40):
        if writer.wants_checkpoint(t):
            writer.checkpoint(state(t))
        writer.append(rich_step(t))
    writer.checkpoint(state(40))
    writer.close()
    return Trajectory.open(tmp_path / "run")
