"""`engine.explain`: the influence of every training sample on each of many queries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import (
    AccSgdIE,
    Explanation,
    InfluenceCallback,
    InfluenceEngine,
    LowRankAccSgdIE,
    QueryError,
    UnsupportedError,
)
from lightning_accie.estimators import Estimator, LeaveOneOut, SgdIE, TracIn
from lightning_accie.estimators import per_query as room
from lightning_accie.replay import many
from lightning_accie.replay.step import StepMap
from tests.problems import Classifier, adamw, classification, quiet_trainer, sgd, smooth_net

QUERIES = 5


def normed() -> Classifier:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)]
    return Classifier(nn.Sequential(*layers).double(), sgd(momentum=0.9))


MODULES: dict[str, Callable[[], Classifier]] = {
    "momentum": lambda: Classifier(smooth_net(), sgd(momentum=0.9)),
    "adamw": lambda: Classifier(smooth_net(), adamw()),
    "batch norm": normed,
}
ESTIMATORS: dict[str, Estimator] = {
    "sgd-ie": SgdIE(),
    "sgd-ie of a layer": SgdIE(layers="net.0"),
    "tracin": TracIn(),
    "acc-sgd-ie": AccSgdIE(),
    "acc-sgd-ie linear": AccSgdIE([1, 4, 9], query="linear"),
    "leave-one-out": LeaveOneOut(),
}


def engine_of(tmp_path: Path, module: Classifier, **settings: Any) -> InfluenceEngine:
    loader = DataLoader(classification(24), batch_size=6)
    valid = DataLoader(classification(9, seed=3), batch_size=9)
    influence = InfluenceCallback(run="manual", dirpath=tmp_path / "influence")
    quiet_trainer(tmp_path, max_epochs=3, callbacks=[influence], **settings).fit(
        module, loader, valid
    )
    assert influence.directory is not None
    return InfluenceEngine(
        influence.directory / "trajectory", module, loader, val_dataloaders=valid, progress=False
    )


def batch(n: int = QUERIES) -> list[Tensor]:
    return list(classification(n, seed=5).tensors)


CASES = [
    *(("batch norm", name) for name in ESTIMATORS if name != "tracin"),
    *(("momentum", name) for name in ("sgd-ie", "tracin", "leave-one-out")),
    *(("adamw", name) for name in ("sgd-ie", "acc-sgd-ie")),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_query_is_answered_as_if_it_were_the_only_one(
    tmp_path: Path, kind: str, name: str
) -> None:
    engine, estimator = engine_of(tmp_path, MODULES[kind]()), ESTIMATORS[name]
    x, y = batch()
    found = engine.explain([x, y], estimator=estimator, verify=0)
    for place in (0, QUERIES - 1):
        one = DataLoader(TensorDataset(x[place : place + 1], y[place : place + 1]))
        alone = engine.estimate(query_dataloader=one, estimator=estimator, verify=0)
        assert found.index.tolist() == alone.index.tolist()
        torch.testing.assert_close(
            found.influence[place], alone.influence, rtol=1e-9, atol=1e-14, equal_nan=True
        )
        assert float(found.value[place]) == pytest.approx(alone.info["query_value"], rel=1e-12)


@pytest.mark.parametrize("kind", [list, tuple])
def test_as_many_queries_as_fields(tmp_path: Path, kind: type) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    x, y = batch()
    whole = engine.explain([x, y], verify=0)
    two = engine.explain(kind([x[:2], y[:2]]), verify=0)
    torch.testing.assert_close(two.influence, whole.influence[:2], rtol=1e-9, atol=1e-14)


def test_the_mean_of_the_queries_is_the_query_of_their_mean(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    x, y = batch()
    together = engine.estimate(
        query_dataloader=DataLoader(TensorDataset(x, y), QUERIES), estimator="leave-one-out"
    )
    found = engine.explain([x, y], estimator="leave-one-out")
    torch.testing.assert_close(found.influence.mean(0), together.influence, rtol=1e-9, atol=1e-14)
    assert bool((found.exact == found.influence).all())


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_blocks_and_vectorised_passes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    engine = engine_of(tmp_path, normed(), **settings)
    calls: list[bool] = []
    pull = many.vjp_many

    def noted(*args: Any, batched: bool = False) -> Any:
        calls.append(batched)
        return pull(*args, batched=batched)

    monkeypatch.setattr(room, "vjp_many", noted)
    whole = engine.explain(batch(), verify=0)
    assert all(calls)  # side by side
    monkeypatch.setattr(room, "LARGEST_BLOCK", 2)
    blocks = engine.explain(batch(), verify=0)
    assert len(calls) == 4 * len(engine.trajectory)
    monkeypatch.setattr(room, "may_batch", lambda *args: False)
    one_by_one = engine.explain(batch(), verify=0)
    x, y = batch()
    one = DataLoader(TensorDataset(x[2:3], y[2:3]))
    alone = engine.estimate(query_dataloader=one, estimator="sgd-ie", verify=0)
    torch.testing.assert_close(whole.influence[2], alone.influence, rtol=1e-9, atol=1e-14)
    for other in (blocks, one_by_one):
        torch.testing.assert_close(other.influence, whole.influence, rtol=1e-10, atol=1e-15)


def test_a_wrong_or_missing_rule_for_many_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    whole = engine.explain(batch(), verify=0)
    pull = StepMap.pull_loss

    def wrong(self: StepMap, *args: Any, batched: bool) -> Any:
        found = pull(self, *args, batched=batched)
        return [(h, 1.01 * g, n) for h, g, n in found] if batched else found

    def missing(self: StepMap, *args: Any, batched: bool) -> Any:
        if batched:
            raise RuntimeError("no batching rule")
        return pull(self, *args, batched=batched)

    for rule in (wrong, missing):
        monkeypatch.setattr(StepMap, "pull_loss", rule)
        found = engine.explain(batch(), verify=0)
        torch.testing.assert_close(found.influence, whole.influence, rtol=1e-12, atol=1e-16)


def test_verification_answers_all_queries(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    exact = engine.explain(batch(), estimator="leave-one-out")
    found = engine.explain(batch(), verify=7, describe=lambda sample: {"label": int(sample[1])})
    replayed = ~found.exact.isnan()
    assert replayed.sum(1).tolist() == [7] * QUERIES
    torch.testing.assert_close(found.exact[replayed], exact.influence[replayed], rtol=1e-9, atol=0)
    assert torch.equal(found.influence[replayed], found.exact[replayed])
    strongest = found.estimate.abs().amax(0).argsort(descending=True)[:3]
    assert bool(replayed[0, strongest].all())
    assert [one.count for one in found.agreement] == [7] * QUERIES
    assert "5 queries on val_loss, 24 training samples by sgd-ie, 7 replayed" in repr(found)
    scores = found.scores(-1)
    assert scores.replayed == 7
    assert scores.columns["label"] == [int(sample[1]) for sample in classification(24)]
    assert scores.info["query_value"] == float(found.value[-1])
    assert scores.agreement == (found.agreement[-1],)
    with pytest.raises(IndexError, match="There are 5 queries"):
        found.scores(5)


def test_marks_and_noise_are_those_of_each_query_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    x, y = batch()
    change = AccSgdIE().estimate(engine.replay()).extras["relative_change"]
    monkeypatch.setattr("lightning_accie.estimators.acc_sgd_ie.BLOW_UP", float(change.median()))
    found = engine.explain([x, y], estimator="acc-sgd-ie", verify=4)
    one = DataLoader(TensorDataset(x[:1], y[:1]))
    alone = engine.estimate(query_dataloader=one, estimator="acc-sgd-ie", verify=0)
    replayed = ~found.exact[0].isnan()
    assert 0 < int(alone.trusted.sum()) < 24
    assert bool(found.trusted[0, replayed].all())
    assert torch.equal(found.trusted[0, ~replayed], alone.trusted[~replayed])
    assert torch.equal(found.scores(0).trusted, found.trusted[0])
    assert all(0 < one.noise_floor < 1e-12 for one in found.agreement)


def test_one_prediction_without_a_slope_has_influence_0(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))

    def hinge(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.relu(0.2 - module.net(x).gather(1, y[:, None])).mean()

    found = engine.explain(batch(12), hinge, verify=0)
    flat = found.value == 0.0
    assert 0 < int(flat.sum()) < 12
    assert bool((found.influence[flat] == 0.0).all())
    assert bool((found.influence[~flat] != 0.0).any(1).all())
    with pytest.raises(QueryError, match="zero everywhere"):
        engine.explain(batch(), lambda module, batch: module.net(batch[0]).sum() * 0.0)


def test_a_query_that_is_no_number(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))

    def lost(module: Any, batch: Any) -> Tensor:
        return module.net(batch[0]).sum() * float("nan")

    with pytest.raises(QueryError, match="nothing can be ranked by it"):
        engine.explain(batch(), lost)
    with pytest.raises(QueryError, match="nothing can be ranked by it"):
        engine.groups({"some": [1, 2]}, lost)


def test_a_dataloader_gives_a_query_a_batch(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    x, y = batch(6)
    pairs = engine.explain(DataLoader(TensorDataset(x, y), 2), verify=0)
    single = engine.explain((x, y), verify=0)
    halves = single.influence.reshape(3, 2, -1).mean(1)
    torch.testing.assert_close(pairs.influence, halves, rtol=1e-10, atol=1e-15)


def test_a_query_of_the_users_own(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))

    def margin(module: Any, batch: Any) -> Tensor:
        x, y = batch
        logits = module.net(x)
        return -(logits.gather(1, y[:, None]) - logits.mean(1, keepdim=True)).mean()

    found = engine.explain(batch(), margin, verify=0)
    assert found.query == "margin"
    assert isinstance(found, Explanation)
    logits = engine.module.net(batch()[0])
    own = logits.gather(1, batch()[1][:, None])[:, 0] - logits.mean(1)
    torch.testing.assert_close(found.value, -own.detach(), rtol=1e-9, atol=0)


def test_refusals(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, Classifier(smooth_net(), sgd()))
    with pytest.raises(UnsupportedError, match='"low-rank-acc-sgd-ie", whose walks'):
        engine.explain(batch(), estimator=LowRankAccSgdIE())
    with pytest.raises(ValueError, match="has no estimator="):
        engine.explain(batch(), estimator="auto")
    with pytest.raises(QueryError, match="batch_size=1"):
        engine.explain(torch.tensor(3.0))
    with pytest.raises(QueryError, match="has no batch"):
        engine.explain(DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0))))
    with pytest.raises(QueryError, match="is not logged"):
        engine.explain(batch(), "nothing")
    with pytest.raises(ValueError, match="`verify` must be"):
        engine.explain(batch(), verify=-1)


def test_dictionaries_with_texts(tmp_path: Path) -> None:
    class Named(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if isinstance(batch, dict):
                assert len(batch["name"]) == len(batch["x"])
                batch = batch["x"], batch["y"]
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("val_loss", loss, batch_size=len(batch[0]))

    engine = engine_of(tmp_path, Named(smooth_net(), sgd()))
    x, y = batch()
    named = {"x": x, "y": y, "name": [str(i) for i in range(QUERIES)]}
    plain = engine.explain((x, y), verify=0)
    torch.testing.assert_close(engine.explain(named, verify=0).influence, plain.influence)
