"""Damage, from end to end: a ranking is the true one, or the file that is not right is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    InfluenceScores,
    SgdIE,
    TrajectoryError,
)
from lightning_accie.errors import ReplayMismatchError
from lightning_accie.scores_files import ScoresError
from lightning_accie.trajectory.writer import TrajectoryWriter
from tests.problems import Classifier, adamw, classification, quiet_trainer, sgd
from tests.steady import steady_choices

Damage = Callable[[Path, Path], Iterator[object]]
"""Given a file and the same file of another run: damages it in one way after the other."""


@pytest.fixture(autouse=True, scope="module")
def _steady() -> Iterator[None]:
    with steady_choices():
        yield


def loaders() -> tuple[Any, Any]:
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


def module() -> Classifier:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)]
    return Classifier(nn.Sequential(*layers).double(), adamw())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs of one module, by other seeds, each with several files of each kind."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_accie.trajectory.checkpoints.SPACING", 2)
        patch.setattr(os, "fsync", lambda descriptor: None)
        writer = partial(TrajectoryWriter, flush_steps=5)
        patch.setattr("lightning_accie.capture.opening.TrajectoryWriter", writer)
        patch.setattr("lightning_accie.capture.recorder._MOST_WAITING", 1)
        for seed in (5, 6):
            root = tmp_path_factory.mktemp("run")
            influence = InfluenceCallback(dirpath=root, console=False, verify=4, top_k=2)
            model = module()
            torch.manual_seed(seed)
            quiet_trainer(root, callbacks=[influence]).fit(model, *loaders())
            found.append(root)
    return found[0], found[1]


def rank(directory: Path) -> InfluenceScores:
    train, valid = loaders()
    engine = InfluenceEngine(
        directory / "trajectory", module(), train, val_dataloaders=valid, progress=False
    )
    return engine.estimate(estimator=SgdIE(), verify=0)


def figures(scores: InfluenceScores) -> list[Any]:
    kept = (scores.index, scores.influence, scores.visits, scores.exact.nan_to_num(7.5))
    return [tensor.tolist() for tensor in kept]


# ------------------------------------------------------------------ ways to damage a file


def flipped(path: Path, other: Path) -> Iterator[object]:
    """One byte changed: the length of the header, its first byte, the last, and eight anywhere."""
    content = path.read_bytes()
    rng = np.random.default_rng(len(content))
    anywhere = rng.integers(0, len(content), 8).tolist()
    for place in [0, 7, 8, *anywhere, len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        yield place


def cut(path: Path, other: Path) -> Iterator[object]:
    content = path.read_bytes()
    for length in (0, 1, 7, 8, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        yield length


def grown(path: Path, other: Path) -> Iterator[object]:
    content = path.read_bytes()
    for more in (b"\0", b"\n", content):
        path.write_bytes(content + more)
        yield len(more)


def of_another_run(path: Path, other: Path) -> Iterator[object]:
    shutil.copy(other, path)
    yield "copied"


def exchanged(path: Path, other: Path) -> Iterator[object]:
    """Every file beside it, in its place."""
    for beside in sorted(path.parent.iterdir()):
        if beside.is_file() and beside != path:
            content = path.read_bytes()
            path.write_bytes(beside.read_bytes())
            yield beside.name
            path.write_bytes(content)


def missing(path: Path, other: Path) -> Iterator[object]:
    path.unlink()
    yield "missing"


def a_directory(path: Path, other: Path) -> Iterator[object]:
    path.unlink()
    path.mkdir()
    yield "a directory"


def a_pipe(path: Path, other: Path) -> Iterator[object]:
    """Nobody writes into it: opening it to read would wait for ever."""
    path.unlink()
    os.mkfifo(path)
    yield "a pipe"


def a_device(path: Path, other: Path) -> Iterator[object]:
    """It has no end: reading it whole would take all memory."""
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "a device"


def a_link_to_itself(path: Path, other: Path) -> Iterator[object]:
    path.unlink()
    path.symlink_to(path)
    yield "a loop"


def unreadable(path: Path, other: Path) -> Iterator[object]:
    """By a patched `Path.read_bytes`: root reads whatever its permission bits say."""
    read = Path.read_bytes

    def refuses(self: Path) -> bytes:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuses)
        yield "unreadable"


DAMAGES = [
    flipped, cut, grown, of_another_run, exchanged, missing, a_directory, a_pipe, a_device,
    a_link_to_itself, unreadable,
]  # fmt: skip
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
EVERY = [pytest.param(damage, marks=POSIX) for damage in DAMAGES]


def same_content(path: Path, other: Path) -> bool:
    return path.read_bytes() == other.read_bytes()


def names(directory: Path) -> list[str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path.relative_to(directory).as_posix() for path in paths]


def test_there_are_several_files_of_each_kind(runs: tuple[Path, Path]) -> None:
    found = names(runs[0] / "trajectory")
    assert sum(name.startswith("steps-") for name in found) >= 3
    assert sum(name.startswith("checkpoints/") for name in found) >= 4
    assert names(runs[0]) == [
        *("examples.json", "report.html", "scores.csv", "scores.json", "scores.safetensors"),
        *(f"trajectory/{name}" for name in found),
    ]


@pytest.mark.parametrize("damage", EVERY)
def test_a_damaged_trajectory_is_never_ranked(
    tmp_path: Path, runs: tuple[Path, Path], damage: Damage
) -> None:
    one, other = runs
    expected, refused = figures(rank(one)), 0
    assert expected != figures(rank(other))
    for name in names(one / "trajectory"):
        copy = tmp_path / "run"
        shutil.copytree(one, copy)
        path = copy / "trajectory" / name
        for what in damage(path, other / "trajectory" / name):
            if damage is of_another_run and same_content(path, one / "trajectory" / name):
                assert figures(rank(copy)) == expected  # both runs began in the same state
                continue
            with pytest.raises(TrajectoryError) as caught:
                rank(copy)
            own = name != "manifest.json" or damage is not of_another_run
            assert (path.name if own else "trajectory") in str(caught.value), what
            refused += 1
        shutil.rmtree(copy)
    assert refused >= len(names(one / "trajectory")) - 1
    assert figures(rank(one)) == expected


@pytest.mark.parametrize("damage", EVERY)
def test_damaged_scores_are_never_loaded(
    tmp_path: Path, runs: tuple[Path, Path], damage: Damage
) -> None:
    one, other = runs
    expected = figures(InfluenceScores.load(one))
    assert expected != figures(InfluenceScores.load(other))
    for name in ("scores.csv", "scores.json", "scores.safetensors"):
        copy = tmp_path / name
        copy.mkdir()
        for beside in ("scores.csv", "scores.json", "scores.safetensors"):
            shutil.copy(one / beside, copy)
        for what in damage(copy / name, other / name):
            if name == "scores.csv":  # for people, and never read back
                assert figures(InfluenceScores.load(copy)) == expected
                continue
            with pytest.raises(ScoresError) as caught:
                InfluenceScores.load(copy)
            assert name in str(caught.value) or damage is of_another_run, what


# ------------------------------------------------------------------ what belongs to something else


class Narrow(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 3)).double(), sgd())


def renamed() -> Classifier:
    model = module()
    model.extra = nn.Linear(1, 1)
    return model


def buffered() -> Classifier:
    model = module()
    model.register_buffer("scale", torch.ones(()))
    return model


def longer() -> Any:
    return DataLoader(classification(25), batch_size=6)


@pytest.mark.parametrize(
    ("words", "make", "data"),
    [
        ("another module.*is missing", Narrow, None),
        ("another module.*was not there", renamed, None),
        ("another module.*buffer `scale`", buffered, None),
        (r"another module.*float32, recorded", lambda: module().float(), None),
        (r"hold \[25\] samples.*recorded with \[24\]", module, longer),
        (r"hold \[24, 24\] samples", module, lambda: [loaders()[0], loaders()[0]]),
    ],
    ids=["layers", "names", "buffers", "precision", "length", "loaders"],
)
def test_a_trajectory_of_something_else_is_refused(
    runs: tuple[Path, Path], words: str, make: Any, data: Any
) -> None:
    train, valid = loaders()
    given = train if data is None else data()
    with pytest.raises(TrajectoryError, match=words):
        InfluenceEngine(
            runs[0] / "trajectory", make(), given, val_dataloaders=valid, progress=False
        )


@pytest.mark.parametrize(
    ("check_data", "words"),
    [(True, "in which 6 of 6 differ"), (False, "the dataset or its order changed")],
)
def test_other_data_of_the_same_size_are_found(
    runs: tuple[Path, Path], check_data: bool, words: str
) -> None:
    _, valid = loaders()
    other = DataLoader(classification(24, seed=9), batch_size=6)
    engine = InfluenceEngine(
        runs[0] / "trajectory",
        module(),
        other,
        val_dataloaders=valid,
        progress=False,
        check_data=check_data,
    )
    with pytest.raises(ReplayMismatchError, match=words):
        engine.estimate(estimator=SgdIE(), verify=0)
