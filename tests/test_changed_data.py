"""A dataset that is not the recorded one is told before any score is computed, by the first sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_accie import InfluenceEngine, ReplayMismatchError, Trajectory, UnsupportedError
from lightning_accie.trajectory.fingerprints import fingerprint
from tests.problems import Classifier, classification, fit, sgd, smooth_net

DATA, VALID = classification(24), classification(11, seed=3)


def loader(x: Tensor, y: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=6, **options)


def recorded(root: Path, **trainer: Any) -> Path:
    module = Classifier(smooth_net(), sgd(lr=1e-3))
    valid = DataLoader(VALID, batch_size=7)
    influence = fit(root, module, loader(*DATA.tensors, shuffle=True), valid, **trainer)
    assert influence.directory is not None
    return influence.directory / "trajectory"


def engine(trajectory: Path, x: Tensor, y: Tensor, **options: Any) -> InfluenceEngine:
    module = Classifier(smooth_net(), sgd(lr=1e-3))
    valid = DataLoader(VALID, batch_size=7)
    data = loader(x, y)
    return InfluenceEngine(
        trajectory, module, data, val_dataloaders=valid, progress=False, **options
    )


def slightly(x: Tensor, y: Tensor) -> None:
    """One sample, by so little that its loss is the same to the tolerance of a replay."""
    x[17] *= 1 + 1e-12


def permuted(x: Tensor, y: Tensor) -> None:
    """Two samples that are equal but for the last bits change places."""
    x[[17, 21]] = x[[21, 17]]


def cleaned(x: Tensor, y: Tensor) -> None:
    """One sample left out, another one twice: of equal length."""
    x[17:-1], y[17:-1] = x[18:].clone(), y[18:].clone()


def relabelled(x: Tensor, y: Tensor) -> None:
    y[17] = (y[17] + 1) % 3


@pytest.mark.parametrize("change", [slightly, permuted, cleaned, relabelled])
def test_a_changed_sample_is_named(
    tmp_path: Path, change: Callable[[Tensor, Tensor], None]
) -> None:
    trajectory = recorded(tmp_path)
    tensors = [tensor.clone() for tensor in DATA.tensors]
    change(*tensors)
    changed = [
        int(i)
        for i in range(24)
        if any(not torch.equal(a[i], b[i]) for a, b in zip(tensors, DATA.tensors, strict=True))
    ]
    order = [
        int(index)
        for step in Trajectory.open(trajectory).steps(0, 4)
        for index in step.micro_batches[0].pieces[0].indices
    ]
    assert sorted(order) == list(range(24))
    first = next(index for index in order if index in changed)
    place = order.index(first) // 6
    with pytest.raises(ReplayMismatchError) as caught:
        engine(trajectory, *tensors).estimate("val_loss", "sgd-ie", verify=0)
    assert f"Training sample {first} (batch {place} of epoch 0" in str(caught.value)
    assert "check_data=False" in str(caught.value)
    if change is slightly:  # nothing else would have told
        free = engine(trajectory, *tensors, check_data=False)
        scores = free.estimate("val_loss", "sgd-ie", verify=0)
        assert 0 < scores.info["largest_loss_difference"] < 1e-9
    same = engine(trajectory, *DATA.tensors).estimate("val_loss", "sgd-ie", verify=0)
    assert same.info["bit_exact_replay"]


def test_the_data_are_compared_once_and_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [tensor.clone() for tensor in DATA.tensors]
    tensors[1][3] = (tensors[1][3] + 1) % 3
    changed = engine(recorded(tmp_path), *tensors)

    def never(*args: Any) -> Any:
        raise AssertionError("something was computed")

    monkeypatch.setattr("lightning_accie.replay.walker.Walker._advance", never)
    for _ in range(2):
        with pytest.raises(ReplayMismatchError, match="Training sample 3 "):
            changed.estimate("val_loss", "sgd-ie")


def test_the_first_epoch_has_checksums(tmp_path: Path) -> None:
    trajectory = Trajectory.open(recorded(tmp_path, accumulate_grad_batches=2))
    x, y = DATA.tensors
    for step in trajectory.steps():
        for micro in step.micro_batches:
            if micro.epoch:
                assert micro.prints is None
                continue
            index = torch.from_numpy(micro.pieces[0].indices)
            assert micro.prints is not None
            assert micro.prints.tolist() == fingerprint([x[index], y[index]], 6).tolist()


class ByWorker(Dataset):
    """Its samples depend on the process that reads them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, y = DATA[index]
        worker = torch.utils.data.get_worker_info()
        return x + (1e-13 if worker is not None else 0.0), y


def test_data_that_depend_on_the_process_are_refused_at_once(tmp_path: Path) -> None:
    module = Classifier(smooth_net(), sgd())
    train = DataLoader(ByWorker(), batch_size=6, num_workers=1)
    with pytest.raises(UnsupportedError, match=r'Training sample 0 .*`?capture="batches"'):
        fit(tmp_path / "a", module, train, DataLoader(VALID, batch_size=7))
    assert module.trainer.global_step == 1
    callback = {"capture": "batches"}
    influence = fit(
        tmp_path / "b", module, train, DataLoader(VALID, batch_size=7), callback=callback
    )
    assert influence.directory is not None


# ---------------------------------------------------------------------- fingerprints

BATCH = {"x": torch.arange(12.0).reshape(3, 4), "y": torch.arange(3), "n": ["a", "b", "c"], "k": 7}


def changed(key: str, value: Any) -> dict[str, Any]:
    return {**BATCH, key: value}


@pytest.mark.parametrize(
    ("other", "places"),
    [
        (changed("x", torch.arange(12.0).reshape(3, 4).t().contiguous().t()), []),
        (changed("x", BATCH["x"].numpy()), []),
        (changed("x", BATCH["x"] + torch.tensor([[0], [0], [1e-6]])), [2]),
        (changed("x", BATCH["x"][[0, 2, 1]]), [1, 2]),
        (changed("y", torch.tensor([0, 5, 2])), [1]),
        (changed("n", ["a", "b", "d"]), [3]),
        (changed("k", 8), [3]),
        (changed("x", -BATCH["x"]), [0, 1, 2]),
    ],
    ids=range(8),
)
def test_fingerprints(other: Any, places: list[int]) -> None:
    one, two = fingerprint(BATCH, 3), fingerprint(other, 3)
    assert one.shape == (4,)
    assert (one != two).nonzero()[0].tolist() == places
    assert fingerprint(BATCH, None).shape == (1,)
    assert (fingerprint(BATCH, None) == fingerprint(other, None)).all() == (places == [])
