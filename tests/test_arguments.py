"""A wrong type or value for any argument is refused at once, by the argument's name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_accie import (
    AccSgdIE,
    InfluenceCallback,
    InfluenceEngine,
    InfluenceScores,
    LeaveOneOut,
)
from tests.problems import Classifier, classification, record, sgd, smooth_net
from tests.score_examples import small_scores

NAN = float("nan")
YES_NO = [1, None, "yes"]
WHOLE = [-1, 1.5, "3", None, True]
BYTES = [0, -5, 1.5, None, "much", "2 apples", [1]]
FUNCTION = [3, "name", []]
LAYERS = [3, "", [], [3], [""]]
LOADERS = [3, "train", 1.5]

CALLBACK: dict[str, list[Any]] = {
    "monitor": [None, "", 3, ["val_loss"]],
    "estimator": [None, "sgd", 3, AccSgdIE, ["auto"]],
    "layers": LAYERS,
    "at": [None, 3, "first", ["last"]],
    "top_k": [*WHOLE, 0],
    "verify": WHOLE,
    "run": [None, "end", True],
    "capture": [None, "all", True],
    "sample_id": ["", 3, ["id"]],
    "dirpath": [3, "", ["a"]],
    "overwrite": YES_NO,
    "disk_budget": BYTES,
    "memory_budget": BYTES,
    "sample_losses": FUNCTION,
    "query_dataloader": LOADERS,
    "describe": FUNCTION,
    "render": FUNCTION,
    "loss_column": YES_NO,
    "report": [None, True, False, "html"],
    "console": YES_NO,
    "live": YES_NO,
    "full_precision": YES_NO,
    "seed": WHOLE,
}
ENGINE: dict[str, list[Any]] = {
    "trajectory": [None, "", 3],
    "module": [None, 3, nn.Linear(1, 1), Classifier],
    "data": [3, "train"],
    "check_data": YES_NO,
    "val_dataloaders": LOADERS,
    "sample_losses": FUNCTION,
    "memory_budget": BYTES,
    "device": [None, 3, "warp", ["cpu"]],
    "progress": [None, 3, "yes"],
    "full_precision": YES_NO,
    "devices": [*WHOLE, 0],
    "accelerator": [None, 3, "warp"],
    "strategy": [None, 3, "fsdp", "ddp"],
}
INTERNAL = {"live", "datamodule", "val_limits", "processes"}  # the callback's own
ESTIMATE: dict[str, list[Any]] = {
    "query": ["", 3, ["val_loss"]],
    "estimator": [None, "sgd", 3, AccSgdIE, ["auto"]],
    "layers": LAYERS,
    "query_dataloader": LOADERS,
    "at": [None, 0, 10**6, 1.5, True, "first"],
    "verify": WHOLE,
    "top_k": [*WHOLE, 0],
    "seed": WHOLE,
    "describe": FUNCTION,
    "loss_column": YES_NO,
    "resume": YES_NO,
}
CANDIDATES = [0, -1, 1.5, True, "all", [], [-1], [0.5], ["a"], [True], [[1, 2]], [None], object()]


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(n, v, id=f"{n}={v!r}"[:40]) for n, values in table.items() for v in values]


def names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_every_argument_is_among_them() -> None:
    assert names(InfluenceCallback.__init__) == set(CALLBACK)
    assert names(InfluenceEngine.__init__) == set(ENGINE) | INTERNAL
    assert names(InfluenceEngine.estimate) == set(ESTIMATE)
    assert {"candidates", "query"} < names(AccSgdIE.__init__)  # the rest: test_cheaper_acc.py
    assert names(LeaveOneOut.__init__) == {"candidates"}
    assert {field.name for field in fields(InfluenceScores)} == set(SCORES)


@pytest.mark.parametrize(("name", "value"), cases(CALLBACK))
def test_the_callback(name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"^`{name}` must be .*got "):
        InfluenceCallback(**{name: value})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> InfluenceEngine:
    root = tmp_path_factory.mktemp("run")
    module = Classifier(smooth_net(), sgd())
    return record(root, module, classification(12), classification(5, seed=3), max_epochs=1)


@pytest.mark.parametrize(("name", "value"), cases(ENGINE))
def test_the_engine(engine: InfluenceEngine, name: str, value: Any) -> None:
    right = {
        "trajectory": engine.trajectory,
        "module": engine.module,
        "data": DataLoader(classification(12), batch_size=6),
    }
    with pytest.raises(ValueError, match=f"^`{name}` must be .*got "):
        InfluenceEngine(**{**right, name: value})


@pytest.mark.parametrize(("name", "value"), cases(ESTIMATE))
def test_an_estimate(engine: InfluenceEngine, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` must be .*got "):
        engine.estimate(**{name: value})


@pytest.mark.parametrize("value", CANDIDATES, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("kind", [AccSgdIE, LeaveOneOut])
def test_candidates(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^`candidates` must .*got "):
        kind(candidates=value)


@pytest.mark.parametrize("value", [None, 3, "exact", ["linear"]])
def test_the_form_of_the_query(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^`query` must be .*got "):
        AccSgdIE(query=value)


@pytest.mark.parametrize(
    "value",
    [[3, 1], (1, 3), {1, 3}, range(1, 4, 2), torch.tensor([3, 1, 3]), list(torch.tensor([1, 3]))],
)
def test_candidates_in_any_form(value: Any) -> None:
    assert LeaveOneOut(value).settings() == {"candidates": [1, 3]}


SCORES: dict[str, list[Any]] = {
    "index": [[0, 1], None, torch.tensor(3), torch.zeros(4, 2).long(), torch.zeros(4)],
    "influence": [[0.5], None, torch.zeros(7), torch.zeros(3).double()],
    "estimate": [[0.5], None, torch.zeros(4)],
    "visits": [[1], None, torch.zeros(4)],
    "exact": [[NAN], None, torch.zeros(4)],
    "estimator": ["sgd-ie", None, (1,) * 7, ("sgd-ie",)],
    "trusted": [[True], None, torch.zeros(4)],
    "agreement": [None, "good", (0.5,)],
    "columns": [None, [1], {3: [1]}, {"label": 3}, {"label": [1]}, {"rank": [1] * 7}],
    "info": [None, "info", [1], {1: 2}],
    "rank": [[1], "first", torch.zeros(4)],
}


@pytest.mark.parametrize(("name", "value"), cases(SCORES))
def test_scores(name: str, value: Any) -> None:
    scores = small_scores()
    right = {field.name: getattr(scores, field.name) for field in fields(scores)}
    column = name == "columns" and isinstance(value, dict)
    words = "column" if column else f"`{name}`"
    with pytest.raises((TypeError, ValueError), match=words):
        InfluenceScores(**{**right, name: value})


@pytest.mark.parametrize("k", [-1, 1.5, "3", None, True])
def test_how_many(k: Any, tmp_path: Path) -> None:
    scores = small_scores()
    for choose in (scores.top_harmful, scores.top_helpful):
        with pytest.raises(ValueError, match=r"^`k` must be"):
            choose(k)
    with pytest.raises(ValueError, match=r"^`k` must be"):
        scores.cleaned(list(range(10)), k)  # type: ignore[arg-type]
