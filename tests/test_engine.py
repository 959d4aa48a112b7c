"""A recorded run is analysed elsewhere and later, with the same figures, or refused with the reason."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_accie import (
    AccSgdIE,
    DescribeError,
    InfluenceCallback,
    InfluenceEngine,
    LeaveOneOut,
    QueryError,
    ReplayMismatchError,
    SgdIE,
    TracIn,
    Trajectory,
    TrajectoryError,
)
from lightning_accie.trajectory.records import Checkpoint
from lightning_accie.trajectory.writer import TrajectoryWriter
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
from tests.truth import recorded_batches

pytestmark = pytest.mark.filterwarnings("ignore:The gradient of `net.0.bias`")


def noisy_module() -> Classifier:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return Classifier(nn.Sequential(*layers), adamw())


def single(n: int = 24, seed: int = 0) -> TensorDataset:
    x, y = classification(n, seed=seed).tensors
    return TensorDataset(x.float(), y)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(single(), batch_size=6), DataLoader(single(11, 3), batch_size=7)


def recorded(root: Path, module: Classifier, **callback: Any) -> Path:
    train = DataLoader(single(), batch_size=6, shuffle=True)
    influence = fit(root, module, train, loaders()[1], callback=callback)
    assert influence.directory is not None
    return influence.directory / "trajectory"


# ---------------------------------------------------------------------- elsewhere

ELSEWHERE = """
import sys
from pathlib import Path
import torch
from lightning_accie import InfluenceEngine
from tests.test_engine import loaders, noisy_module

torch.manual_seed(1234)
trajectory, out = map(Path, sys.argv[1:])
train, valid = loaders()
module = noisy_module()
for parameter in module.parameters():
    parameter.data.zero_()
engine = InfluenceEngine(trajectory, module, train, val_dataloaders=valid, progress=False)
engine.estimate(verify=6, top_k=3, loss_column=True).save(out)
"""


def test_another_process_finds_the_same_to_the_bit(tmp_path: Path) -> None:
    callback = {"run": "fit_end", "verify": 6, "top_k": 3, "loss_column": True}
    trajectory = recorded(tmp_path, noisy_module(), **callback)
    here = trajectory.parent
    there = tmp_path / "there"
    repository = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(trajectory), str(there)],
        check=True,
        cwd=repository,
        env={
            **os.environ,
            "PYTHONPATH": repository,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        timeout=200,
    )
    texts = [(place / "scores.csv").read_text().splitlines() for place in (here, there)]
    rows = [list(csv.DictReader(lines)) for lines in texts]
    for row in (row for table in rows for row in table):
        if row["estimator"] == "acc-sgd-ie":  # which refinement is cheaper is measured
            row["influence"] = row["estimator"] = ""
    assert [row["index"] for row in rows[0]] == [row["index"] for row in rows[1]]
    both = [
        (a, b) for a, b in zip(*rows, strict=True) if a["exact_influence"] and b["exact_influence"]
    ]
    assert len(both) >= 6
    for a, b in both:
        assert a["exact_influence"] == b["exact_influence"]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


@pytest.mark.parametrize("name", ["sgd-ie", "acc-sgd-ie", "leave-one-out", "tracin"])
def test_an_engine_finds_what_the_callback_found(tmp_path: Path, name: str) -> None:
    module = noisy_module()
    train = DataLoader(single(), batch_size=6, shuffle=True)
    callback = {"run": "fit_end", "estimator": name, "verify": 0}
    first = fit(tmp_path, module, train, loaders()[1], callback=callback)
    assert first.scores is not None
    assert first.directory is not None
    engine = InfluenceEngine(
        Trajectory.open(first.directory / "trajectory"),
        noisy_module(),
        loaders()[0],
        val_dataloaders=loaders()[1],
        progress=False,
    )
    again = engine.estimate(estimator=name, verify=0)
    torch.testing.assert_close(again.influence, first.scores.influence, rtol=1e-5, atol=1e-9)
    assert again.index.tolist() == list(range(24))
    assert set(again.estimator) == {name}
    assert bool(again.exact.isnan().all()) == (name != "leave-one-out")


class Splits(LightningDataModule):
    """Splits at random: a second set-up would be another split."""

    def __init__(self) -> None:
        super().__init__()
        self.set_ups = 0

    def setup(self, stage: str) -> None:
        self.set_ups += 1
        g = torch.Generator().manual_seed(self.set_ups)
        self.train, self.valid = random_split(single(35), [24, 11], generator=g)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=6, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.valid, batch_size=7)


class NoValidation(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()[0]


def test_datamodules(tmp_path: Path) -> None:
    influence = InfluenceCallback(console=False, verify=0)
    torch.manual_seed(5)
    quiet_trainer(tmp_path, callbacks=[influence]).fit(noisy_module(), datamodule=Splits())
    assert influence.scores is not None
    assert influence.directory is not None
    fresh = Splits()
    engine = InfluenceEngine(
        influence.directory / "trajectory", noisy_module(), fresh, progress=False
    )
    assert fresh.set_ups == 1
    again = engine.estimate(verify=0)
    assert again.info["query_value"] == influence.scores.info["query_value"]


def test_a_datamodule_without_validation_data(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path, noisy_module())
    engine = InfluenceEngine(trajectory, noisy_module(), NoValidation(), progress=False)
    with pytest.raises(QueryError, match="no validation data"):
        engine.estimate()
    assert len(engine.estimate(query_dataloader=loaders()[1], verify=0)) == 24


# ---------------------------------------------------------------------- what does not belong


def opened(
    trajectory: Path, module: LightningModule, train: Any = None, **options: Any
) -> InfluenceEngine:
    return InfluenceEngine(
        trajectory,
        module,
        loaders()[0] if train is None else train,
        val_dataloaders=loaders()[1],
        progress=False,
        **options,
    )


class Changed(Classifier):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(nn.Sequential(*layers), adamw())


def test_another_module_is_refused(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path, noisy_module())
    norm, relu, dropout = nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)
    wide = Changed(nn.Linear(4, 9), nn.BatchNorm1d(9), relu, dropout, nn.Linear(9, 3))
    with pytest.raises(TrajectoryError, match=r"another module.*`net.0.bias` has shape \(9,\)"):
        opened(trajectory, wide)
    short = Changed(nn.Linear(4, 8), norm, relu, dropout)
    with pytest.raises(TrajectoryError, match=r"`net\.4\.bias` is missing"):
        opened(trajectory, short)
    stateless = nn.BatchNorm1d(8, track_running_stats=False)
    bare = Changed(nn.Linear(4, 8), stateless, relu, dropout, nn.Linear(8, 3))
    with pytest.raises(TrajectoryError, match=r"buffer `net\.1\.\w+` has shape missing"):
        opened(trajectory, bare)
    other = Changed(nn.Linear(4, 8), norm, nn.Tanh(), dropout, nn.Linear(8, 3))
    with pytest.raises(ReplayMismatchError, match=r"step 0 .*Usual causes"):
        opened(trajectory, other).estimate(verify=0)


def test_a_run_in_double_precision_says_what_the_module_must_be(tmp_path: Path) -> None:
    influence = fit(tmp_path, noisy_module(), *loaders(), precision="64-true")
    assert influence.directory is not None
    trajectory = influence.directory / "trajectory"
    with pytest.raises(TrajectoryError, match=r"`module\.double\(\)`"):
        opened(trajectory, noisy_module())
    scores = opened(trajectory, noisy_module().double()).estimate(verify=2, top_k=1)
    assert scores.info["bit_exact_replay"]


@pytest.mark.parametrize("estimator", ["auto", "tracin", "leave-one-out", "acc-sgd-ie"])
def test_a_changed_label_is_found_by_every_estimator(tmp_path: Path, estimator: str) -> None:
    trajectory = recorded(tmp_path, noisy_module())
    x, y = single().tensors
    y = y.clone()
    y[17] = (y[17] + 1) % 3
    step = next(
        t for t, (batch,) in enumerate(recorded_batches(Trajectory.open(trajectory))) if 17 in batch
    )
    train = DataLoader(TensorDataset(x, y), batch_size=6)
    with pytest.raises(ReplayMismatchError, match="Training sample 17 "):
        opened(trajectory, noisy_module(), train).estimate(estimator=estimator, verify=0)
    engine = opened(trajectory, noisy_module(), train, check_data=False)
    with pytest.raises(ReplayMismatchError, match=f"at step {step} .*the dataset or its order"):
        engine.estimate(estimator=estimator, verify=0)


def test_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    trajectory = recorded(tmp_path, noisy_module())
    with pytest.raises(TrajectoryError, match=r"hold \[23\] samples.*recorded with \[24\]"):
        opened(trajectory, noisy_module(), DataLoader(single(23), batch_size=6))
    with pytest.raises(TrajectoryError, match=r"hold \[24, 24\]"):
        opened(trajectory, noisy_module(), [loaders()[0], loaders()[0]])


def test_a_run_of_no_steps(tmp_path: Path) -> None:
    header = Trajectory.open(recorded(tmp_path, noisy_module())).header
    writer = TrajectoryWriter(tmp_path / "empty", header, disk_budget=10**9)
    writer.checkpoint(Checkpoint(0, {}))
    writer.close("failed", "ValueError: boom")
    with pytest.raises(TrajectoryError, match=r"no complete training step.*boom"):
        opened(tmp_path / "empty", noisy_module())


def test_a_run_that_diverged(tmp_path: Path) -> None:
    module = Classifier(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), sgd(lr=1e30))
    trajectory = recorded(tmp_path, module)
    with pytest.raises(QueryError, match="`val_loss` is nan at the end of the run"):
        opened(trajectory, module).estimate()


# ---------------------------------------------------------------------- losses found anew


class ByHand(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits - F.one_hot(target, 3)).square().mean()


def squares(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return (module.net(x) - F.one_hot(y, 3)).square().mean(1)


def test_the_losses_are_found_where_the_recording_did_not_get_there(tmp_path: Path) -> None:
    """A run that was killed in its first step has no word on them."""
    module = ByHand(nn.Linear(4, 3), sgd())
    trajectory = Trajectory.open(recorded(tmp_path, module))
    expected = opened(tmp_path / "influence" / "trajectory", module).estimate(
        estimator="leave-one-out"
    )
    del trajectory.header["loss_form"]
    engine = InfluenceEngine(
        trajectory, module, loaders()[0], val_dataloaders=loaders()[1], progress=False
    )
    found = engine.estimate(estimator="leave-one-out")
    assert float(found.influence.abs().min()) > 0
    assert torch.equal(found.influence, expected.influence)


@pytest.mark.parametrize("at_first", [True, False])
def test_sample_losses_may_come_later_or_go(tmp_path: Path, at_first: bool) -> None:
    module = ByHand(nn.Linear(4, 3).double(), sgd())
    data, valid = classification(24), classification(11, seed=3)
    given = {"sample_losses": squares} if at_first else {}
    engine = record(tmp_path, module, data, valid, callback=given)
    other = InfluenceEngine(
        engine.trajectory,
        module,
        DataLoader(data, batch_size=6),
        val_dataloaders=DataLoader(valid, batch_size=7),
        sample_losses=None if at_first else squares,
        progress=False,
    )
    pair = [e.estimate(estimator="leave-one-out").influence for e in (engine, other)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-14)


# ---------------------------------------------------------------------- what is asked for


def small(root: Path) -> InfluenceEngine:
    module = Classifier(smooth_net(), sgd())
    return record(root, module, classification(24), classification(11, seed=3))


@pytest.mark.parametrize(
    "estimator",
    [
        SgdIE(),
        TracIn(),
        AccSgdIE(candidates=5),
        AccSgdIE(candidates=torch.tensor([3, 1, 3]), query="linear"),
        LeaveOneOut(candidates=[23, 0]),
        LeaveOneOut(candidates=range(4)),
    ],
    ids=lambda e: f"{e.name}-{e.settings()}",
)
def test_estimators_and_their_candidates(tmp_path: Path, estimator: Any) -> None:
    engine = small(tmp_path)
    scores = engine.estimate(estimator=estimator, verify=0)
    asked = getattr(estimator, "candidates", None)
    if asked is None:
        assert len(scores) == 24
    elif isinstance(asked, int):
        strongest = engine.estimate(estimator=SgdIE(), verify=0).influence.argsort()
        assert set(scores.index.tolist()) == {*strongest[:3].tolist(), *strongest[-2:].tolist()}
    else:
        assert scores.index.tolist() == asked.tolist()
    assert scores.info["estimator"] == estimator.name
    assert scores.info["settings"] == estimator.settings()


def test_candidates_that_were_never_drawn(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), sgd())
    engine = record(
        tmp_path,
        module,
        classification(24),
        classification(11, seed=3),
        limit_train_batches=2,
        max_epochs=1,
    )
    scores = engine.estimate(verify=2, top_k=2)
    assert len(scores) == 12
    assert scores.info["samples"] == 24
    assert scores.info["drawn"] == 12
    absent = next(i for i in range(24) if i not in scores.index.tolist())
    with pytest.raises(ValueError, match=f"never drew: {absent}"):
        engine.estimate(estimator=LeaveOneOut([absent]))
    scores.save(tmp_path / "out")
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == scores.index.tolist()
    influences = [float(row["influence"]) for row in rows]
    assert influences == sorted(influences)
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verify": -1}, "`verify`"),
        ({"top_k": 0}, "`top_k`"),
        ({"estimator": "best"}, "`estimator`"),
    ],
)
def test_wrong_arguments(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path).estimate(**given)


class Keeping(Classifier):
    """Keeps the per-sample losses of every step, as training saw them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        self.seen.append(F.cross_entropy(out, y, reduction="none").detach())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "acc"])
def test_the_loss_column_is_the_loss_at_the_last_visit(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    module = Keeping(smooth_net(), sgd())
    engine = record(tmp_path, module, classification(25), classification(11, seed=3), **settings)
    truth = torch.zeros(25, dtype=torch.float64)
    batches = [micro for step in recorded_batches(engine.trajectory) for micro in step]
    for batch, losses in zip(batches, list(module.seen), strict=True):
        truth[batch] = losses
    scores = engine.estimate(estimator="sgd-ie", verify=0, loss_column=True)
    found = torch.tensor(scores.columns["loss"], dtype=torch.float64)
    torch.testing.assert_close(found, truth[scores.index], rtol=1e-12, atol=0)


def test_described_columns(tmp_path: Path) -> None:
    engine = small(tmp_path)

    def describe(sample: Any) -> dict[str, Any]:
        x, y = sample
        return {"label": int(y)} | ({"large": True} if x.norm() > 2 else {})

    scores = engine.estimate(estimator=LeaveOneOut([2, 20]), describe=describe, loss_column=True)
    x, y = classification(24).tensors
    assert scores.columns["label"] == [int(y[2]), int(y[20])]
    assert scores.columns["large"] == [True if x[i].norm() > 2 else None for i in (2, 20)]
    assert list(scores.columns) == ["loss", "label", "large"]


def test_an_error_in_describe_comes_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small(tmp_path)

    def fails(sample: Any) -> dict[str, Any]:
        raise LookupError("no such label")

    def never(*args: Any) -> Any:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(SgdIE, "estimate", never)
    with pytest.raises(
        ValueError, match="`describe` failed on sample 0: LookupError: no such label"
    ):
        engine.estimate(describe=fails)
    with pytest.raises(ValueError, match=r"must return a dict .* returned a int for sample 0"):
        engine.estimate(describe=lambda sample: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"column that cannot be kept.*called 'influence'"):
        engine.estimate(describe=lambda sample: {"influence": 1})


def described_fit(root: Path, describe: Any, **callback: Any) -> InfluenceCallback:
    return fit(
        root,
        Classifier(smooth_net(), sgd()),
        DataLoader(classification(24), 6),
        DataLoader(classification(11, seed=3), 7),
        callback={"run": "fit_end", "verify": 2, "top_k": 1, "describe": describe, **callback},
    )


def test_describe_is_tried_when_fit_starts(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), sgd())
    train = DataLoader(classification(24), 6, sampler=range(5, 24))
    valid = DataLoader(classification(11, seed=3), 7)
    given: dict[str, Any] = {"run": "fit_end", "describe": lambda sample: {}[1]}
    with pytest.raises(DescribeError, match="`describe` failed on sample 5: KeyError"):
        fit(tmp_path, module, train, valid, callback=given)
    assert module.trainer.global_step == 1
    # Nobody describes anything where nothing is ranked.
    assert described_fit(tmp_path, given["describe"], run="manual", overwrite=True).directory


def test_an_error_in_describe_does_not_end_fit(tmp_path: Path) -> None:
    seen: list[Any] = []

    def describe(sample: Any) -> dict[str, Any]:
        seen.append(sample)
        return {} if len(seen) == 1 else {}[1]

    with pytest.warns(
        UserWarning, match=r"without the columns of `describe=`.*failed on sample 0: KeyError"
    ):
        influence = described_fit(tmp_path, describe)
    assert influence.scores is not None
    assert influence.scores.columns == {}


def test_the_analysis_leaves_module_and_generators_alone(tmp_path: Path) -> None:
    module = noisy_module()
    trajectory = recorded(tmp_path, module)
    for parameter in module.parameters():
        parameter.data.fill_(0.5)
    module.eval()
    module.net[0].weight.requires_grad_(False)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    engine = opened(trajectory, module)
    engine.replay()
    engine.estimate(verify=2, top_k=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(bool((p == 0.5).all()) for p in module.parameters())
    assert not module.training
    assert [p.requires_grad for p in module.parameters()] == [False, *[True] * 5]
    assert not {"log", "log_dict", "print"} & vars(module).keys()


def test_what_was_drawn_at_random_is_not_among_the_strongest(tmp_path: Path) -> None:
    """The two kinds of replayed samples are told apart, and together they are all of them."""
    data, val = classification(24), classification(11, seed=3)
    engine = record(tmp_path, Classifier(smooth_net(), sgd()), data, val)
    scores = engine.estimate(estimator="sgd-ie", verify=9)
    counts = {found.sample: found.count for found in scores.agreement}
    assert counts["verified"] == scores.replayed
    assert counts["random"] == 5
    assert counts["strongest"] == counts["verified"] - counts["random"] > 0
