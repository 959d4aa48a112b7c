"""Leaving out groups at once, against plain torch training without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import GroupScores, InfluenceCallback, InfluenceEngine, InfluenceScores
from lightning_accie.agreement import linear_datamodelling_score
from tests.problems import (
    Classifier,
    Regressor,
    adamw,
    classification,
    quiet_trainer,
    regression,
    sgd,
    smooth_net,
)
from tests.truth import mean_loss, recorded_batches, recorded_rates, retrain

GROUPS: dict[str, Any] = {
    "some": [1, 7, 8, 20],
    "one": [5],
    "overlapping": torch.tensor([7, 8, 9]),
    "mask": torch.arange(24) % 2 == 0,
}
MEMBERS = [[1, 7, 8, 20], [5], [7, 8, 9], list(range(0, 24, 2))]


class Run:
    """A recorded run, and the truth about it."""

    def __init__(self, root: Path, module: Classifier, **settings: Any) -> None:
        squared = isinstance(module, Regressor)
        make = regression if squared else classification
        self.loss: Callable[..., Tensor] = F.mse_loss if squared else F.cross_entropy
        self.data, self.valid = make(24), make(9, seed=3)
        self.before, self.configure = copy.deepcopy(module.net), module.configure
        loader, valid = DataLoader(self.data, 6, shuffle=True), DataLoader(self.valid, 9)
        influence = InfluenceCallback(run="manual", dirpath=root / "influence")
        self.accumulate = settings.get("accumulate_grad_batches", 1)
        trainer = quiet_trainer(root, max_epochs=3, callbacks=[influence], **settings)
        trainer.fit(module, loader, valid)
        assert influence.directory is not None
        self.engine = InfluenceEngine(
            influence.directory, module, loader, val_dataloaders=valid, progress=False
        )

    def without(self, members: list[int]) -> float:
        weights = torch.ones(24).double()
        weights[members] = 0.0
        net = retrain(
            copy.deepcopy(self.before),
            self.data.tensors,
            recorded_batches(self.engine.trajectory),
            self.configure,
            weights,
            rates=recorded_rates(self.engine.trajectory),
            accumulate=self.accumulate,
            loss=self.loss,
        )
        return mean_loss(net, self.valid.tensors, self.loss)


@pytest.mark.parametrize("configure", [sgd(momentum=0.9), adamw()], ids=["momentum", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_exact_is_training_without_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Any, accumulate: int
) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), configure), accumulate_grad_batches=accumulate)
    whole = run.without([])
    monkeypatch.setattr(
        "lightning_accie.estimators.chunks.chunk_size", lambda *args: 3
    )  # several chunks, in another order
    found = run.engine.groups(GROUPS)
    effects = [run.without(members) - whole for members in MEMBERS]
    truth = torch.tensor(effects, dtype=torch.float64)
    torch.testing.assert_close(found.exact, truth, rtol=1e-8, atol=1e-12)
    assert found.name == tuple(GROUPS)
    assert found.count.tolist() == [4, 1, 3, 12]
    assert torch.equal(found.influence, found.exact)
    single = run.engine.estimate(estimator="sgd-ie", verify=0)
    sums = [float(single.influence[members].sum()) for members in MEMBERS]
    torch.testing.assert_close(
        found.summed, torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert torch.equal(found.excess, found.summed - found.exact)


def test_acc_of_a_group_is_exact_on_least_squares(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = Run(tmp_path, Regressor(nn.Linear(4, 2).double(), sgd(momentum=0.9)))
    found = run.engine.groups(GROUPS)
    torch.testing.assert_close(found.acc, found.exact, rtol=1e-9, atol=1e-13)
    acc, summed = found.agreement
    assert (acc.estimator, summed.estimator) == ("acc-sgd-ie", "sum of sgd-ie")
    assert acc.relative_rmse < 1e-9 < summed.relative_rmse


def test_a_group_of_one_is_its_member(tmp_path: Path) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), adamw()))
    groups = {str(number): [number] for number in range(24)}
    found = run.engine.groups(groups)
    for estimator, figures in (("leave-one-out", found.exact), ("acc-sgd-ie", found.acc)):
        alone = run.engine.estimate(estimator=estimator, verify=0)
        torch.testing.assert_close(figures, alone.influence, rtol=1e-9, atol=1e-14)


def test_the_ways_to_name_groups(tmp_path: Path) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), sgd()))
    labels = run.data.tensors[1]
    by_mapping = {k: (labels == k).nonzero()[:, 0] for k in labels.unique().tolist()}
    by_sets = {name: set(numbers.tolist()) for name, numbers in by_mapping.items()}
    ways = [
        by_mapping,
        by_sets,
        labels,
        labels.tolist(),
        labels.numpy(),
        lambda sample: int(sample[1]),
    ]
    tables = [run.engine.groups(way, exact=False).to_dict() for way in ways]
    for table in tables:
        assert table["group"] == tables[0]["group"]
        assert table["acc"] == pytest.approx(tables[0]["acc"], rel=1e-12)
    assert sum(tables[0]["samples"]) == 24


def test_what_a_table_has(tmp_path: Path) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), sgd()))
    found = run.engine.groups({"few": [1, 2], "many": list(range(12))}, acc=False)
    assert found.acc.isnan().all()
    assert [one.estimator for one in found.agreement] == ["sum of sgd-ie"]
    frame = found.to_pandas()
    assert list(frame.columns[:3]) == ["group", "samples", "influence"]
    assert frame.influence.is_monotonic_increasing
    assert "2 groups on val_loss" in repr(found)
    assert "sum of single influences" in repr(found)


def test_a_group_that_was_never_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), sgd()), limit_train_batches=1)  # 18 of 24 at most
    drawn = run.engine.estimate("val_loss", "sgd-ie", verify=0).index.tolist()
    left = sorted({*range(24)} - {*drawn})
    assert left
    with pytest.raises(ValueError, match="'left' has no sample that the run drew"):
        run.engine.groups({"left": left})


def test_refusals(tmp_path: Path) -> None:
    engine = Run(tmp_path, Classifier(smooth_net(), sgd())).engine
    with pytest.raises(
        ValueError, match=r"groups\['a'\].* names sample 99, .* has 24 samples, 0 to 23"
    ):
        engine.groups({"a": [1, 99]})
    with pytest.raises(ValueError, match=r"groups\['a'\].* names sample 24,"):
        engine.groups({"a": [True] * 25})
    with pytest.raises(ValueError, match="gives 3 names, but the training data has 24"):
        engine.groups(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"groups\['a'\].* must hold the indices"):
        engine.groups({"a": [0.5]})
    with pytest.raises(ValueError, match=r"groups\['a'\].* must hold the indices"):
        engine.groups({"a": [-1]})
    with pytest.raises(ValueError, match="must map names"):
        engine.groups("label")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no group"):
        engine.groups({})


def scores(**columns: Any) -> InfluenceScores:
    influence = torch.tensor([1.0, -2.0, 4.0, float("nan")]).double()
    return InfluenceScores(
        index=torch.arange(4),
        influence=influence,
        estimate=influence,
        visits=torch.ones(4, dtype=torch.int64),
        exact=torch.full((4,), float("nan")).double(),
        estimator=("sgd-ie", "acc-sgd-ie", "sgd-ie", "sgd-ie"),
        trusted=torch.ones(4, dtype=torch.bool),
        columns=columns,
        info={"query": "val_loss"},
    )


def test_a_list_is_no_column() -> None:
    with pytest.raises(TypeError, match=r"got list.*InfluenceEngine\.groups"):
        scores().by(["a", "b", "a", "b"])  # type: ignore[arg-type]


def test_scores_by_a_column() -> None:
    found = scores(annotator=["ann", "bob", "bob", "ann"]).by("annotator")
    assert isinstance(found, GroupScores)
    assert found.name == ("ann", "bob")
    assert found.summed.tolist() == found.influence.tolist() == [1.0, 2.0]
    assert found.count.tolist() == [1, 2]  # what is not finite is left out
    assert scores().by("estimator").summed.tolist() == [5.0, -2.0]
    with pytest.raises(KeyError, match=r"no column 'label'\. The columns are: 'annotator'"):
        scores(annotator=[1, 2, 3, 4]).by("label")


def test_the_linear_datamodelling_score(tmp_path: Path) -> None:
    run = Run(tmp_path, Classifier(smooth_net(), sgd()))
    generator = torch.Generator().manual_seed(0)
    sets = torch.rand(16, 24, generator=generator) < 0.3
    effects = run.engine.groups(dict(enumerate(sets)), acc=False).exact
    single = run.engine.estimate(estimator="sgd-ie", verify=0)
    assert linear_datamodelling_score(single.influence, sets, effects) > 0.8
    assert linear_datamodelling_score(-single.influence, sets, effects) < -0.8
    # As the score is defined: by the samples kept, whose influences count the other way round.
    other = linear_datamodelling_score(-single.influence, ~sets, effects)
    assert other == pytest.approx(linear_datamodelling_score(single.influence, sets, effects))
    with pytest.raises(ValueError, match=r"must be \[K, n\]"):
        linear_datamodelling_score(single.influence[:3], sets, effects)
