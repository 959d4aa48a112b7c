"""Batches that cannot be made again are kept, and give a bit-exact replay without any data."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    InfluenceScores,
    Trajectory,
    TrajectoryError,
    UnsupportedError,
)
from tests.problems import Classifier, adamw, classification, fit, quiet_trainer, sgd, smooth_net

DATA, VALID = classification(24), classification(11, seed=3)


def valid() -> DataLoader[Any]:
    return DataLoader(VALID, batch_size=7)


class Mapped(Dataset):
    """The data with something done to each sample when it is read."""

    def __init__(self, change: Callable[[Tensor, int], Tensor] | None = None) -> None:
        self.change = change

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        x, y = DATA[index]
        return (x if self.change is None else self.change(x, index)), y


class Own:
    """Draws from a generator of its own, which training must find as it was."""

    def __init__(self) -> None:
        self.nested = {"generators": [np.random.default_rng(0), random.Random(0)]}

    def __call__(self, x: Tensor, index: int) -> Tensor:
        numpy, python = self.nested["generators"]
        return x * python.random() + numpy.normal()


def by_torch(x: Tensor, index: int) -> Tensor:
    return x + torch.randn_like(x)


def by_numpy(x: Tensor, index: int) -> Tensor:
    return x + np.random.normal()  # noqa: NPY002


def by_python(x: Tensor, index: int) -> Tensor:
    return -x if random.random() < 0.1 else x  # seldom: two makings may be equal


def by_index(x: Tensor, index: int) -> Tensor:
    """Random for those who look at generators, but the same each time."""
    state = torch.get_rng_state()
    torch.manual_seed(index)
    noise = torch.randn_like(x)
    torch.set_rng_state(state)
    return x + noise


def by_seeding(x: Tensor, index: int) -> Tensor:
    np.random.seed(index)  # noqa: NPY002
    return x + np.random.normal()  # noqa: NPY002


def mixed_up(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x + 0.1 * x[torch.randperm(len(x))], y


class Augments(Classifier):
    """Augments on the device, as Kornia's users do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + torch.rand_like(x), y) if self.trainer.training else batch


WORKERS = {"num_workers": 2, "persistent_workers": True}
RANDOM = {
    "torch": (Classifier, lambda: Mapped(by_torch), {}),
    "numpy": (Classifier, lambda: Mapped(by_numpy), {}),
    "python": (Classifier, lambda: Mapped(by_python), {}),
    "own": (Classifier, lambda: Mapped(Own()), {}),
    "collate": (Classifier, lambda: DATA, {"collate_fn": mixed_up}),
    "hooks": (Augments, lambda: DATA, {}),
    "workers": (Classifier, lambda: Mapped(by_torch), {"num_workers": 2}),
    "persistent": (Classifier, lambda: Mapped(by_torch), WORKERS),
}


def trained(root: Path, case: str, callbacks: list[Any]) -> Classifier:
    module_class, dataset, options = RANDOM[case]
    module = module_class(smooth_net(), adamw())
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    train = DataLoader(dataset(), batch_size=6, shuffle=True, **options)
    quiet_trainer(root, callbacks=callbacks).fit(module, train, valid())
    assert type(train) is DataLoader
    return module


def replayed(directory: Path, module: Any, calls: int, **options: Any) -> InfluenceEngine:
    """An engine without training data, whose replay is compared with everything recorded."""
    engine = InfluenceEngine(
        directory / "trajectory", module, val_dataloaders=valid(), progress=False, **options
    )
    for _ in engine._walker.forwards():
        pass
    fidelity = engine._walker.fidelity
    assert fidelity.bit_exact
    assert fidelity.losses == calls
    return engine


@pytest.mark.parametrize("case", RANDOM)
def test_random_data_are_noticed_and_kept(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(tmp_path / "plain", case, [])
    influence = InfluenceCallback(console=False, verify=4, top_k=2)
    with caplog.at_level("INFO"):
        module = trained(tmp_path, case, [influence])
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert influence.directory is not None
    assert influence.scores is not None
    assert influence.scores.info["capture"] == "batches"
    where = "transfer hooks" if case == "hooks" else "dataset or its `collate_fn`"
    assert [where in text and "a batch" in text for text in caplog.messages].count(True) == 1
    engine = replayed(influence.directory, module, 12)
    again = engine.estimate("val_loss", verify=4, top_k=2)
    assert again.info["bit_exact_replay"]
    torch.testing.assert_close(again.estimate, influence.scores.estimate, rtol=1e-6, atol=1e-12)
    assert torch.equal(again.index, torch.arange(24))


@pytest.mark.parametrize("case", RANDOM)
def test_with_indices_alone_they_are_refused(tmp_path: Path, case: str) -> None:
    influence = InfluenceCallback(console=False, capture="indices", dirpath=tmp_path / "run")
    with pytest.raises(UnsupportedError, match=r'at random in the .*`capture="batches"`'):
        trained(tmp_path, case, [influence])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [None, by_index, by_seeding])
def test_what_is_the_same_each_time_is_kept_by_index(tmp_path: Path, change: Any) -> None:
    module = Classifier(smooth_net(), sgd())
    train = DataLoader(Mapped(change), batch_size=6, shuffle=change is not by_seeding)
    influence = fit(tmp_path, module, train, valid(), callback={"run": "fit_end", "verify": 0})
    assert influence.scores is not None
    assert influence.scores.info["capture"] == "indices"
    assert influence.scores.info["bit_exact_replay"]
    assert influence.directory is not None
    assert not list(influence.directory.rglob("batches-*"))
    with pytest.raises(TrajectoryError, match="Pass the training data as `data`"):
        InfluenceEngine(influence.directory / "trajectory", module, val_dataloaders=valid())


# ---------------------------------------------------------------------- each sample once


def kept(root: Path, epochs: int, **options: Any) -> tuple[InfluenceCallback, Trajectory]:
    train = DataLoader(DATA, batch_size=7, shuffle=True)
    module = Classifier(smooth_net(), sgd())
    callback = {"capture": "batches", **options}
    influence = fit(root, module, train, valid(), callback=callback, max_epochs=epochs)
    assert influence.directory is not None
    return influence, Trajectory.open(influence.directory / "trajectory")


def test_an_unchanging_dataset_is_stored_once(tmp_path: Path) -> None:
    trajectory = kept(tmp_path, epochs=10)[1]
    assert trajectory.batches is not None
    assert len(trajectory.batches) == 40
    assert sum(stored.records for stored in trajectory.batches._stored) == 24
    x, y = DATA.tensors
    for step in trajectory.steps():
        (micro,) = step.micro_batches
        index = torch.from_numpy(micro.pieces[0].indices)
        batch = trajectory.batches.batch(micro.batch, torch.device("cpu"))
        assert torch.equal(batch[0], x[index])
        assert torch.equal(batch[1], y[index])
    trajectory.verify()


def test_kept_batches_give_what_indices_give(tmp_path: Path) -> None:
    def describe(sample: Any) -> dict[str, Any]:
        x, y = sample
        assert x.shape == (4,)
        return {"label": y, "first": x[0]}

    scores = []
    for capture in ("indices", "batches"):
        influence = kept(tmp_path / capture, epochs=3, capture=capture)[0]
        assert influence.directory is not None
        data = DataLoader(DATA) if capture == "indices" else None
        engine = InfluenceEngine(
            influence.directory / "trajectory",
            Classifier(smooth_net(), sgd()),
            data,
            val_dataloaders=valid(),
            progress=False,
        )
        scores.append(engine.estimate(estimator="acc-sgd-ie", verify=5, describe=describe))
    assert torch.equal(scores[0].influence, scores[1].influence)
    assert scores[0].columns == scores[1].columns
    assert scores[1].columns["label"] == DATA.tensors[1].tolist()
    assert len(scores[1].cleaned(DATA, 3)) == 21


# ---------------------------------------------------------------------- streams


class Stream(IterableDataset):
    """The data in order, named."""

    def __init__(self, name: Callable[[int], Any] = int) -> None:
        self.name = name

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(DATA)):
            x, y = DATA[index]
            yield {"x": x, "y": y, "id": self.name(index)}


class Named(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def by_position(batch: Any) -> list[str]:
    return [f"label {int(y)}/{x[0]:.9f}" for x, y in zip(batch["x"], batch["y"], strict=True)]


def scores_of(root: Path, train: Any, **callback: Any) -> InfluenceScores:
    module = Named(smooth_net(), sgd(momentum=0.5))
    settings = {"run": "fit_end", "estimator": "sgd-ie", "verify": 4, **callback}
    influence = fit(root, module, train, valid(), callback=settings)
    assert influence.directory is not None
    replayed(influence.directory, module, 12)
    assert influence.scores is not None
    return influence.scores


class Plainly(Dataset):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        x, y = DATA[index]
        return {"x": x, "y": y}


NAMES: dict[str, tuple[Callable[[int], Any], Any]] = {
    "numbers": (int, "id"),
    "texts": (lambda index: f"sample {index}", "id"),
    "negative": (lambda index: index - 24, lambda batch: batch["id"]),
    "callable": (int, by_position),
}


@pytest.mark.parametrize("names", NAMES)
def test_a_stream_gives_what_a_dataset_gives(tmp_path: Path, names: str) -> None:
    """The reference is the same data as a map-style dataset, drawn in order."""
    name, sample_id = NAMES[names]
    stream = DataLoader(Stream(name), batch_size=6)
    scores = scores_of(tmp_path / "a", stream, sample_id=sample_id)
    truth = scores_of(tmp_path / "b", DataLoader(Plainly(), batch_size=6), capture="batches")
    assert torch.equal(scores.index, torch.arange(24))
    assert torch.equal(scores.influence, truth.influence)
    assert torch.equal(scores.visits, truth.visits)
    if names == "numbers":
        assert "sample_id" not in scores.columns
        assert len(scores.cleaned(DATA, 2)) == 22
        return
    batch = {"x": DATA.tensors[0], "y": DATA.tensors[1], "id": [name(i) for i in range(24)]}
    expected = by_position(batch) if names == "callable" else batch["id"]
    assert scores.columns["sample_id"] == expected
    assert InfluenceScores.load(tmp_path / "a" / "influence").columns["sample_id"] == expected
    with pytest.raises(ValueError, match="named by `sample_id`"):
        scores.cleaned(DATA, 2)


class Iterable:
    """No DataLoader at all."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(24)
        for index in order.split(6):
            yield {"x": DATA.tensors[0][index], "y": DATA.tensors[1][index], "id": index}


class WithIds(Plainly):
    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "id": index}


STREAMS = {
    "no DataLoader": Iterable,
    "in_order=False": lambda: DataLoader(
        WithIds(), batch_size=6, num_workers=2, in_order=False, shuffle=True
    ),
    "workers": lambda: DataLoader(Stream(), batch_size=6, num_workers=1),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_other_streams(tmp_path: Path, stream: str) -> None:
    scores = scores_of(tmp_path, STREAMS[stream](), sample_id="id")
    assert torch.equal(scores.index, torch.arange(24))
    assert scores.visits.tolist() == [3] * 24
    assert scores.info["bit_exact_replay"]


@pytest.mark.parametrize("capture", ["auto", "indices", "batches"])
@pytest.mark.parametrize("stream", ["no DataLoader", "in_order=False", "workers"])
def test_streams_without_names_are_refused(tmp_path: Path, stream: str, capture: str) -> None:
    module = Named(smooth_net(), sgd())
    with pytest.raises(UnsupportedError, match=r"sample_id=\.\.\."):
        fit(tmp_path, module, STREAMS[stream](), valid(), callback={"capture": capture})


ODD_NAMES: list[tuple[Any, str]] = [
    ("key", r"'key'.* not in the batch, which has 'x', 'y', 'id'"),
    (lambda batch: "abcdef", "gave a str"),
    (lambda batch: 5, "gave a int"),
    (lambda batch: [1.5] * 6, r"gave 1\.5 for a sample"),
    (lambda batch: [True] * 6, "gave True for a sample"),
    (lambda batch: [0, 1, 2, "d", "e", "f"][: len(batch["id"])], None),
    (lambda batch: batch["id"][:3], "per-sample losses"),
]


@pytest.mark.parametrize(("sample_id", "message"), ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_odd_names_are_refused(tmp_path: Path, sample_id: Any, message: str | None) -> None:
    train = DataLoader(Stream(), batch_size=6)
    module = Named(smooth_net(), sgd())
    if message is None:  # numbers and texts together: all are names
        influence = fit(tmp_path, module, train, valid(), callback={"sample_id": sample_id})
        assert influence.directory is not None
        batches = Trajectory.open(influence.directory / "trajectory").batches
        assert batches is not None
        assert batches.ids() == [0, 1, 2, "d", "e", "f"]
        return
    with pytest.raises(UnsupportedError, match=message):
        fit(tmp_path, module, train, valid(), callback={"sample_id": sample_id})


def test_names_that_change_their_kind_stop_the_recording(tmp_path: Path) -> None:
    train = DataLoader(Stream(lambda i: i if i < 12 else -i), batch_size=6)
    module = Named(smooth_net(), sgd())
    with pytest.warns(
        UserWarning, match="stopped recording, training goes on: `sample_id` gave -12"
    ):
        influence = fit(tmp_path, module, train, valid(), callback={"sample_id": "id"})
    assert influence.directory is not None
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert trajectory.status == "stopped"
    assert len(trajectory) >= 1


def test_arguments() -> None:
    with pytest.raises(MisconfigurationException, match="`capture` must be one of 'auto'"):
        InfluenceCallback(capture="everything")
    with pytest.raises(MisconfigurationException, match="`sample_id` must be a key"):
        InfluenceCallback(sample_id=3)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match='`capture="indices"` does not keep'):
        InfluenceCallback(capture="indices", sample_id="id")


# ---------------------------------------------------------------------- the disk


def test_over_budget_recording_stops_and_training_goes_on(tmp_path: Path) -> None:
    plain = Classifier(smooth_net(), sgd())
    torch.manual_seed(5)
    train = DataLoader(Mapped(by_torch), batch_size=6, shuffle=True)
    quiet_trainer(tmp_path).fit(plain, train, valid())
    module = Classifier(smooth_net(), sgd())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        influence = fit(tmp_path, module, train, valid(), callback={"disk_budget": 6000})
    texts = [str(warning.message) for warning in caught]
    assert any("keeps the training batches" in text for text in texts)
    assert any("training goes on: The run's batches take" in text for text in texts)
    for a, b in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert influence.directory is not None
    trajectory = Trajectory.open(influence.directory / "trajectory")
    assert trajectory.status == "stopped"
    assert 2 <= len(trajectory) < 12
    replayed(influence.directory, module, len(trajectory))


def test_a_budget_too_small_for_the_first_batch_is_refused(tmp_path: Path) -> None:
    train = DataLoader(DATA, batch_size=24)
    module = Classifier(smooth_net(), sgd())
    options = {"capture": "batches", "disk_budget": 4000}
    with pytest.raises(TrajectoryError, match="Raise disk_budget"):
        fit(tmp_path, module, train, valid(), callback=options)


# ---------------------------------------------------------------------- resuming


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("ids", [int, lambda index: f"sample {index}"], ids=["numbers", "texts"])
def test_a_resumed_stream_goes_on(tmp_path: Path, ids: Any) -> None:
    """Half the run, then the rest: the same scores as in one go."""

    def run(root: Path, epochs: int, ckpt_path: Any = None) -> InfluenceScores:
        influence = InfluenceCallback(
            sample_id="id", estimator="sgd-ie", verify=0, console=False, dirpath=tmp_path / root
        )
        saver = ModelCheckpoint(tmp_path / root, "last", every_n_epochs=1)
        module = Named(smooth_net(), adamw())
        trainer = quiet_trainer(
            tmp_path, callbacks=[influence, saver], max_epochs=epochs, enable_checkpointing=True
        )
        train = DataLoader(Stream(ids), batch_size=6)
        trainer.fit(module, train, valid(), ckpt_path=ckpt_path)
        assert influence.directory is not None
        calls = len(Trajectory.open(influence.directory / "trajectory"))
        engine = replayed(influence.directory, module, calls)
        return engine.estimate("val_loss", "sgd-ie", verify=0)

    whole = run(Path("whole"), 4)
    run(Path("parts"), 2)
    both = run(Path("parts"), 4, tmp_path / "parts" / "last.ckpt")
    assert both.info["steps"] == whole.info["steps"] == 16
    assert torch.equal(both.influence, whole.influence)
    assert both.columns == whole.columns
