"""A validation loader that draws one process's share gives all of its dataset to the query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lightning_accie.data import validation_loaders

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

DATA = TensorDataset(torch.arange(11))


def shared(rank: int = 1) -> DistributedSampler[Any]:
    return DistributedSampler(DATA, 2, rank, shuffle=False)


class EveryThird(DataLoader):
    """A loader with an ``__iter__`` of its own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for number, batch in enumerate(super().__iter__()) if number % 3 == 0)


def drawn(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def test_lightning_s_own_sampler_is_taken_out_again() -> None:
    loader = DataLoader(DATA, 4, sampler=shared())
    (whole,) = validation_loaders(loader)
    assert drawn(whole) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(whole) == 3
    assert drawn(loader) == [[1, 3, 5, 7], [9, 0]]  # left as it was


def test_a_sampler_of_the_user_s_own_comes_back() -> None:
    own = [10, 8, 6, 4, 2, 0]
    wrapped = DistributedSamplerWrapper(own, num_replicas=2, rank=0, shuffle=False)
    loaders = CombinedLoader([DataLoader(DATA, 4, sampler=wrapped)], "sequential")
    (whole,) = validation_loaders(loaders)
    assert drawn(whole) == [[10, 8, 6, 4], [2, 0]]


def test_a_batch_sampler_and_a_loader_s_class_stay() -> None:
    batches = BatchSampler(shared(0), 3, drop_last=True)
    (whole,) = validation_loaders(EveryThird(DATA, batch_sampler=batches))
    assert type(whole) is EveryThird
    assert drawn(whole) == [[0, 1, 2]]
    assert list(whole.batch_sampler) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(batches) == [[0, 2, 4], [6, 8, 10]]


def test_other_loaders_pass_as_they_are() -> None:
    plain, single = DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, batch_size=None)
    assert validation_loaders([plain, single]) == [plain, single]
    (whole,) = validation_loaders(DataLoader(DATA, batch_size=None, sampler=shared()))
    assert [int(batch[0]) for batch in whole] == list(range(11))
