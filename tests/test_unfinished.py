"""An analysis that is killed goes on from what it has finished, with the same figures."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_accie import (
    AccSgdIE,
    InfluenceEngine,
    InfluenceScores,
    LeaveOneOut,
    LowRankAccSgdIE,
)
from lightning_accie import unfinished as room
from lightning_accie.estimators import chunks, low_rank, sgd_ie
from lightning_accie.estimators.own_curvature import FullHessian, GaussNewton
from lightning_accie.replay.walker import Walker
from lightning_accie.trajectory.sizes import parse_bytes
from lightning_accie.trajectory.tensors import load
from tests.problems import (
    Classifier,
    adamw,
    classification,
    fit,
    quiet_trainer,
    record,
    sgd,
    smooth_net,
)
from tests.steady import steady_choices

CHUNK = 5


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small chunks, each written as it is finished, and every step of a walk."""
    monkeypatch.setattr(room, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(sgd_ie, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(low_rank, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(chunks, "chunk_size", lambda *args: CHUNK)
    with steady_choices():
        yield


def engine_in(root: Path, budget: str = "1GB") -> InfluenceEngine:
    torch.manual_seed(3)
    module = Classifier(smooth_net(), adamw())
    data, valid = classification(24), classification(11, seed=3)
    engine = record(root, module, data, valid, max_epochs=2)
    engine._walker.memory_budget = parse_bytes(budget)
    return engine


class FaultError(Exception):
    pass


def fails_after(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException
) -> list[Any]:
    """Let the method fail once, after so many calls; the calls' first arguments are noted."""
    method: Callable[..., Any] = getattr(owner, name)
    seen: list[Any] = []
    armed = [True]

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if armed[0] and len(seen) == calls:
            armed[0] = False
            seen.clear()
            raise error
        seen.append(args)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return seen


def folder(engine: InfluenceEngine) -> Path:
    return engine.trajectory.directory.parent / room.FOLDER


def same(one: InfluenceScores, other: InfluenceScores) -> None:
    for name in ("index", "influence", "estimate", "exact", "trusted"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
        )
    assert one.info["noise_floor"] == pytest.approx(other.info["noise_floor"], nan_ok=True)


# ---------------------------------------------------------------------- goes on


def test_exact_replays_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    whole = engine.estimate(estimator="leave-one-out")
    assert not folder(engine).exists()
    seen = fails_after(monkeypatch, LeaveOneOut, "carry", 3, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator="leave-one-out")
    assert len(list(folder(engine).glob("*/*.safetensors"))) == 3
    same(engine.estimate(estimator="leave-one-out"), whole)
    assert [len(samples) for _, samples, *_ in seen] == [CHUNK, 4]  # 24 samples, 15 were done
    assert not folder(engine).exists()


@pytest.mark.parametrize("query", ["evaluated", "linear"])
def test_acc_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    engine = engine_in(tmp_path)
    whole = engine.estimate(estimator=AccSgdIE(query=query), verify=0)
    seen = fails_after(monkeypatch, AccSgdIE, "carry", 2, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator=AccSgdIE(query=query), verify=0)
    # Other settings give other figures: nothing of these is used.
    other = AccSgdIE(query="linear" if query == "evaluated" else "evaluated")
    seen.clear()
    replay = engine.replay()
    other.estimate(replay)
    assert len(seen) == 5
    seen.clear()
    same(engine.estimate(estimator=AccSgdIE(query=query), verify=0), whole)
    assert len(seen) == 3


@pytest.mark.parametrize("budget", ["1GB", "1kB"])
@pytest.mark.parametrize("kill_at", [1, 5, 8])
def test_a_backward_walk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, budget: str
) -> None:
    """Under AdamW, whose moments the cotangent carries too; of eight steps."""
    engine = engine_in(tmp_path, budget)
    whole = engine.estimate(estimator="sgd-ie", verify=0)
    backwards = Walker.backwards
    visited: list[int] = []
    armed = [True]

    def broken(self: Walker, *, before: int | None = None) -> Iterator[Any]:
        for visit in backwards(self, before=before):
            visited.append(visit.step)
            yield visit
            if armed[0] and len(visited) == kill_at:
                armed[0] = False
                raise FaultError

    monkeypatch.setattr(Walker, "backwards", broken)
    with pytest.raises(FaultError):
        engine.estimate(estimator="sgd-ie", verify=0)
    assert len(list(folder(engine).glob("*/*.safetensors"))) == 1
    same(engine.estimate(estimator="sgd-ie", verify=0), whole)
    assert visited == [7, 6, 5, 4, 3, 2, 1, 0]


class Skips(Classifier):
    """Returns no loss for the second batch of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


ignoring_none = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")


def low_rank_engine(root: Path, budget: str = "1GB") -> InfluenceEngine:
    """Eight steps, two of them without a loss."""
    torch.manual_seed(3)
    module = Skips(smooth_net(), sgd(momentum=0.8))
    engine = record(root, module, classification(24), classification(11, seed=3), max_epochs=2)
    engine._walker.memory_budget = parse_bytes(budget)
    return engine


@ignoring_none
@pytest.mark.parametrize("budget", ["1GB", "1kB"])
@pytest.mark.parametrize("walk", ["forwards", "backwards"])
@pytest.mark.parametrize("kill_at", [0, 1, 4, 5])
@pytest.mark.parametrize("way", [GaussNewton, FullHessian])
def test_the_walks_of_the_low_rank_form_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: type[GaussNewton | FullHessian],
    kill_at: int,
    walk: str,
    budget: str,
) -> None:
    engine = low_rank_engine(tmp_path, budget)
    curvature = "hessian" if way is FullHessian else "gauss-newton"
    estimator = LowRankAccSgdIE(3, curvature, refresh_every=2)
    whole = engine.estimate(estimator=estimator, verify=0)
    seen = fails_after(monkeypatch, way, walk, kill_at, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator=estimator, verify=0)
    found: list[Any] = []
    monkeypatch.setattr(low_rank, "sketched", _noted(low_rank.sketched, found))
    if walk == "backwards":
        monkeypatch.setattr(way, "forwards", _noted(way.forwards, found))
    same(engine.estimate(estimator=estimator, verify=0), whole)
    assert len(seen) == 6 - kill_at
    assert not found  # neither the directions, nor the walk forwards once that was done
    assert not folder(engine).exists()


@ignoring_none
@pytest.mark.parametrize("kind", ["directions", "notes", "forwards", "backwards"])
def test_what_the_low_rank_form_lacks_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine = low_rank_engine(tmp_path)
    estimator = LowRankAccSgdIE(3)
    whole = engine.estimate(estimator=estimator, verify=0)
    fails_after(monkeypatch, GaussNewton, "backwards", 3, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator=estimator, verify=0)
    files = [
        path
        for path in folder(engine).glob("*/*.safetensors")
        if load(path.read_bytes())[1]["key"].endswith(kind)
    ]
    files[0].unlink()
    seen: list[Any] = []
    monkeypatch.setattr(GaussNewton, "forwards", _noted(GaussNewton.forwards, seen))
    same(engine.estimate(estimator=estimator, verify=0), whole)
    assert bool(seen) == (kind in ("notes", "forwards"))


@ignoring_none
def test_the_low_rank_form_of_other_samples_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = low_rank_engine(tmp_path)
    some = LowRankAccSgdIE(3, candidates=[2, 5, 11])
    whole = engine.estimate(estimator=some, verify=0)
    fails_after(monkeypatch, GaussNewton, "backwards", 3, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator=LowRankAccSgdIE(3), verify=0)
    same(engine.estimate(estimator=some, verify=0), whole)


def test_an_automatic_ranking_goes_on_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_in(tmp_path)
    whole = engine.estimate(verify=8, top_k=5)
    walked: list[Any] = []
    begun = _noted(sgd_ie.WalkBack.begun, walked)
    monkeypatch.setattr(sgd_ie.WalkBack, "begun", begun)
    seen = fails_after(monkeypatch, LeaveOneOut, "carry", 1, KeyboardInterrupt())
    assert engine.estimate(verify=8, top_k=5).info["interrupted"]
    assert len(walked) == 1
    found = engine.estimate(verify=8, top_k=5)
    assert not found.info["interrupted"]
    same(found, whole)
    assert len(walked) == 1  # the backward walk was not made again
    assert sum(len(samples) for _, samples, *_ in seen) == whole.replayed - CHUNK
    assert not folder(engine).exists()


def _noted(method: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return method(*args, **kwargs)

    return wrapped


KILLED = """
import os, signal
from pathlib import Path
from tests import test_unfinished as tests
from lightning_accie.estimators import chunks, LeaveOneOut
from lightning_accie import unfinished

unfinished.WRITE_EVERY = 0.0
chunks.chunk_size = lambda *args: tests.CHUNK
engine = tests.engine_in(Path({root!r}))
replay, calls = LeaveOneOut.carry, []

def dies(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replay(*args)

LeaveOneOut.carry = dies
engine.estimate(estimator="leave-one-out")
"""


def test_a_killed_process_leaves_what_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = KILLED.format(root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    module = Classifier(smooth_net(), adamw())
    engine = InfluenceEngine(
        tmp_path / "influence" / "trajectory",
        module,
        DataLoader(classification(24), batch_size=6, shuffle=True),
        val_dataloaders=DataLoader(classification(11, seed=3), batch_size=7),
        progress=False,
    )
    seen: list[Any] = []
    monkeypatch.setattr(LeaveOneOut, "carry", _noted(LeaveOneOut.carry, seen))
    scores = engine.estimate(estimator="leave-one-out")
    assert len(seen) == 3  # of five
    same(engine.estimate(estimator="leave-one-out", resume=False), scores)


# ---------------------------------------------------------------------- only what is the same


def left(engine: InfluenceEngine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let an analysis of exact replays break off after three of its five chunks."""
    seen = fails_after(monkeypatch, LeaveOneOut, "carry", 3, FaultError())
    with pytest.raises(FaultError):
        engine.estimate(estimator="leave-one-out")
    return seen


def test_another_question_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    seen = left(engine, monkeypatch)

    def query(module: Any, batch: Any) -> Any:
        return 2.0 * module.loss(module.net(batch[0]), batch[1])

    def name(module: Any, batch: Any) -> Any:
        return module.loss(module.net(batch[0][:3]), batch[1][:3])

    name.__name__ = "val_loss"
    for given in ({"query": query}, {"query": name}, {"at": 5}):
        seen.clear()
        engine.estimate(estimator="leave-one-out", **given)  # type: ignore[arg-type]
        assert len(seen) == 5
    seen.clear()
    engine.estimate(estimator="leave-one-out", resume=False)
    assert len(seen) == 5
    assert not folder(engine).exists()


def test_a_new_run_in_its_place_deletes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    left(engine, monkeypatch)
    fit(
        tmp_path,
        Classifier(smooth_net(), adamw()),
        DataLoader(classification(24), batch_size=6),
        DataLoader(classification(11, seed=3), batch_size=7),
        callback={"overwrite": True, "dirpath": folder(engine).parent},
    )
    assert not folder(engine).exists()


def test_a_damaged_file_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    whole = engine.estimate(estimator="leave-one-out")
    seen = left(engine, monkeypatch)
    first, second, _ = folder(engine).glob("*/*.safetensors")
    content = bytearray(first.read_bytes())
    content[-1] ^= 1  # in the last figure
    first.write_bytes(content)
    second.write_bytes(b"")
    with pytest.warns(UserWarning, match="of an earlier analysis, is left out") as caught:
        same(engine.estimate(estimator="leave-one-out"), whole)
    assert len(caught) == 2
    assert sum(len(samples) for _, samples, *_ in seen) >= 24 - CHUNK


# ---------------------------------------------------------------------- the disk


def test_a_short_analysis_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    monkeypatch.setattr(room, "WRITE_EVERY", 10.0)
    monkeypatch.setattr(sgd_ie, "KEEP_EVERY", 60.0)

    def never(*args: Any) -> Any:
        raise AssertionError("it writes")

    monkeypatch.setattr(room, "write", never)
    engine.estimate(verify=8, top_k=5)


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_in(tmp_path)
    whole = engine.estimate(estimator="leave-one-out")

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room, "write", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left on device") as caught:
        same(engine.estimate(estimator="leave-one-out"), whole)
    assert len(caught) == 1
    assert not folder(engine).exists()


def test_fit_end_analyses_leave_theirs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted there, it is finished with the engine."""
    from lightning_accie import InfluenceCallback

    module = Classifier(smooth_net(), adamw())
    influence = InfluenceCallback(dirpath=tmp_path, console=False, estimator="leave-one-out")
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    valid = DataLoader(classification(11, seed=3), batch_size=7)
    seen = fails_after(monkeypatch, LeaveOneOut, "carry", 2, KeyboardInterrupt())
    with pytest.warns(UserWarning, match="was interrupted"):
        quiet_trainer(tmp_path, callbacks=[influence]).fit(module, train, valid)
    engine = InfluenceEngine(tmp_path, module, train, val_dataloaders=valid, progress=False)
    assert len(engine.estimate(estimator="leave-one-out")) == 24
    assert [len(samples) for _, samples, *_ in seen] == [CHUNK, CHUNK, 4]
