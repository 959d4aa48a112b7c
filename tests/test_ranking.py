"""What a ranking announces, and which of its figures it does not trust."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_accie.estimators import AccSgdIE, LeaveOneOut, SgdIE
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.estimators.measure import Chunks, Prices, Walk, measure_walk
from lightning_accie.ranking import chunks_plan, plan, walk_plan
from tests.problems import Classifier, classification, record, sgd, smooth_net

EXACT_CHEAPER, ACC_CHEAPER = Prices(exact=2.0, acc=3.0), Prices(exact=20.0, acc=1.0)


@pytest.mark.parametrize(
    ("prices", "refined", "verify", "words"),
    [
        (
            EXACT_CHEAPER,
            50,
            20,
            "exact replay of 50 of the strongest and 10 at random, which takes about 2 min",
        ),
        (
            EXACT_CHEAPER,
            10,
            40,
            "exact replay of 20 of the strongest and 20 at random, which takes about 80 s",
        ),
        (EXACT_CHEAPER, 50, 0, "exact replay of 50 of the strongest, which takes about 100 s"),
        (
            EXACT_CHEAPER,
            0,
            5,
            "exact replay of 2 of the strongest and 3 at random, which takes about 10 s",
        ),
        (
            ACC_CHEAPER,
            50,
            20,
            "ACC-SGD-IE of 60 samples, then exact replay of 10 of the strongest and 10 at random, "
            "which takes about 8 min",
        ),
        (ACC_CHEAPER, 900, 1000, "exact replay of 300 of the strongest, which takes about 105 min"),
        (
            ACC_CHEAPER,
            0,
            4,
            "then exact replay of 2 of the strongest and 2 at random, which takes about 80 s",
        ),
    ],
)
def test_the_plan(prices: Prices, refined: int, verify: int, words: str) -> None:
    text = plan(300, "sgd-ie", prices, refined, verify)
    assert text.startswith("Influence analysis: sgd-ie, then ")
    assert words in text


@pytest.mark.parametrize(
    ("walk", "words"),
    [
        (
            Walk(480, 1, 12_300_000, 4.2),
            "1 pass forwards and 1 backwards over 480 steps, up to 12.3 MB",
        ),
        (
            Walk(9, 3, 1_200_000_000, 250.0),
            "3 passes forwards and 1 backwards over 9 steps, up to 1.2 GB",
        ),
        (Walk(9, 1, 1200, 0.1), "up to 1 kB of states, about 1 s."),
    ],
)
def test_the_plan_of_a_walk(walk: Walk, words: str) -> None:
    text = walk_plan(300, "sgd-ie", walk)
    assert text.startswith("Influence analysis: sgd-ie of 300 samples, ")
    assert words in text


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        (
            Chunks(300, 75, 480, 250.0),
            "300 samples in 75 chunks, each a pass over 480 steps, about 4 min.",
        ),
        (Chunks(8, 1, 9, 0.1), "8 samples in 1 chunk, a pass over 9 steps, about 1 s."),
    ],
)
def test_the_plan_of_chunks(chunks: Chunks, words: str) -> None:
    assert chunks_plan("acc-sgd-ie", chunks) == f"Influence analysis: acc-sgd-ie of {words}"


@pytest.mark.parametrize("estimator", [AccSgdIE(), LeaveOneOut([1, 2, 5])])
def test_chunks_are_told_before_they_begin(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    estimator: ChunkedEstimator,
) -> None:
    monkeypatch.setattr("lightning_accie.estimators.chunks._LARGEST", 2)
    engine = record(
        tmp_path, Classifier(smooth_net(), sgd()), classification(24), classification(11)
    )
    passed = 0

    class Counted:
        @contextmanager
        def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
            nonlocal passed
            passed += total
            yield lambda units: None

    engine._progress = Counted()
    with caplog.at_level("INFO"):
        engine.estimate(estimator=estimator, verify=0)
    (told,) = [line for line in caplog.messages if "chunks" in line]
    found = re.search(r"in (\d+) chunks, each a pass over (\d+) steps", told)
    assert found is not None
    assert passed == int(found[1]) * int(found[2])


def test_what_a_walk_holds_is_what_was_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The snapshots that are alive at once, with little room."""
    engine = record(
        tmp_path,
        Classifier(smooth_net(), sgd(momentum=0.9)),
        classification(48),
        classification(11),
    )
    assert measure_walk(engine.replay("val_loss"), SgdIE()).passes == 1
    engine._walker.memory_budget = 6_000
    replay = engine.replay("val_loss")
    walk = measure_walk(replay, SgdIE())
    assert walk.steps == 24
    assert walk.passes > 1
    assert 0 < walk.nbytes <= 6_000
    assert replay.walker.passes() == walk.passes
    forwards = 0
    advance = replay.walker._advance

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return advance(*args, **kwargs)

    replay.walker._advance = counted  # type: ignore[method-assign]
    for _ in replay.walker.backwards():
        pass
    assert forwards == round(24 * walk.passes)
    with caplog.at_level("INFO"):
        engine.estimate(verify=0, estimator="sgd-ie")
        engine.estimate(verify=0, estimator="leave-one-out")
    (told,) = [line for line in caplog.messages if " backwards over 24 steps" in line]
    assert f"{walk.passes:.2g} passes" in told


def test_the_plan_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = record(
        tmp_path, Classifier(smooth_net(), sgd()), classification(24), classification(11)
    )
    with caplog.at_level("INFO"):
        scores = engine.estimate(verify=6, top_k=2)
    (told,) = [line for line in caplog.messages if "which takes about" in line]
    found = re.search(r"(\d+) of the strongest and (\d+) at random", told)
    assert found is not None
    assert scores.replayed == int(found[1]) + int(found[2])
    caplog.clear()
    with caplog.at_level("INFO"):
        engine.estimate(verify=0, estimator="sgd-ie")
        engine.estimate(verify=6, estimator="leave-one-out")
    assert not [line for line in caplog.messages if "which takes about" in line]
