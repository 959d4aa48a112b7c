"""`memory_budget` bounds what an analysis takes, and one that is too small is refused."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lightning_accie import InfluenceEngine, UnsupportedError
from lightning_accie.trajectory.sizes import parse_bytes
from tests.problems import Classifier, classification, record, sgd, smooth_net

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read on Linux")
@pytest.mark.parametrize(("estimator", "budget"), [("sgd-ie", "80MB"), ("dvemb", "250MB")])
def test_the_peak_of_resident_memory(tmp_path: Path, estimator: str, budget: str) -> None:
    """The states and graphs of these hundred steps take some 240 MB."""
    command = [sys.executable, "-m", "tests.memory_task", str(tmp_path), estimator, budget]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1.25 * parse_bytes(budget)


def test_graphs_go_when_the_walk_has_passed(tmp_path: Path) -> None:
    """At once, and not when the garbage collector comes by: a walk makes too few objects for that."""
    module = Classifier(smooth_net(), sgd())
    engine = record(tmp_path, module, classification(48), classification(11))
    walker = engine.replay("val_loss").walker
    assert walker._keeps_tapes()
    passed = []
    gc.collect()
    gc.disable()
    try:
        for visit in walker.backwards():
            (loss,) = visit.map.losses
            passed.append(weakref.ref(loss.tape))
            visit.map.vjp(visit.state, visit.state)
            assert sum(graph() is not None for graph in passed) == 1
    finally:
        gc.enable()
    assert len(passed) == len(walker) == 24


def again(engine: InfluenceEngine, budget: int | str) -> InfluenceEngine:
    return InfluenceEngine(
        engine.trajectory,
        engine.module,
        engine._given["data"],
        val_dataloaders=engine._given["val_dataloaders"],
        memory_budget=budget,
        progress=False,
    )


@pytest.mark.parametrize("estimator", ["sgd-ie", "tracin", "acc-sgd-ie", "leave-one-out", "auto"])
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_would_do(
    tmp_path: Path, estimator: str
) -> None:
    engine = record(
        tmp_path,
        Classifier(smooth_net(300, 200), sgd()),
        classification(18, inputs=300),
        classification(11, inputs=300),
    )
    with pytest.raises(UnsupportedError, match=r"too little for `[a-z-]+` on this run") as refused:
        again(engine, 5000).estimate("val_loss", estimator, verify=0, top_k=2)
    found = re.search(r'memory_budget="(\d+)MB"', str(refused.value))
    assert found is not None
    least = int(found[1])
    with_least = again(engine, f"{least}MB").estimate("val_loss", estimator, verify=0, top_k=2)
    with_more = again(engine, "1GB").estimate("val_loss", estimator, verify=0, top_k=2)
    assert with_least.influence == pytest.approx(with_more.influence, rel=1e-9, abs=1e-15)
    if least > 1:
        with pytest.raises(UnsupportedError, match="too little"):
            again(engine, f"{least - 1}MB").estimate("val_loss", estimator, verify=0, top_k=2)


def test_a_budget_that_is_too_small_is_refused_when_fit_starts(tmp_path: Path) -> None:
    module = Classifier(smooth_net(300, 200), sgd())
    data = classification(18, inputs=300), classification(11, inputs=300)
    with pytest.raises(UnsupportedError, match=r'too little .* Set `memory_budget="\d+MB"`'):
        record(tmp_path, module, *data, callback={"memory_budget": "1MB", "run": "fit_end"})
    assert module.trainer.global_step <= 1
    record(tmp_path, module, *data, callback={"memory_budget": "1MB"})  # nothing is analysed


def test_without_a_budget_the_least_is_taken_where_the_usual_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = classification(24), classification(11, seed=3)
    whole = record(tmp_path, Classifier(smooth_net(), sgd()), *data)
    usual = whole.estimate("val_loss", verify=2, top_k=2)
    assert "of memory, the least" not in caplog.text
    monkeypatch.setattr("lightning_accie.estimators.room._AUTOMATIC", 1000)
    caplog.set_level("INFO")
    tight = record(
        tmp_path / "tight", Classifier(smooth_net(), sgd()), *data, callback={"run": "fit_end"}
    )
    assert "kB of memory, the least that `" in caplog.text
    found = tight.estimate("val_loss", verify=2, top_k=2)
    assert torch.allclose(found.influence, usual.influence, rtol=1e-9, atol=1e-15)
