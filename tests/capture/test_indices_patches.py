"""Recording changes nothing in the run and leaves nothing behind; what it cannot do it refuses."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_accie.capture.indices import IndexRecorder, _as_indices, check_loader, pieces_of
from lightning_accie.errors import UnsupportedError
from tests.capture.indexed import (
    IGNORED,
    LIGHTNING,
    PYTORCH_LIGHTNING,
    NoLength,
    Numbers,
    Probe,
    fit,
    loader,
    make_callback,
    make_module,
    make_trainer,
)

pytestmark = IGNORED
both_namespaces = pytest.mark.parametrize("pl", [LIGHTNING, PYTORCH_LIGHTNING])
both_workers = pytest.mark.parametrize("workers", [0, 2])


class Slotted(DataLoader):
    """A loader class of the user's own, with a layout of its own."""

    __slots__ = ("mark",)


def hooked(pl: ModuleType, name: str, run: Callable[[Any], Any]) -> Any:
    """A callback of one hook, given as a function of the trainer."""
    return make_callback(pl, type("Hook", (), {name: lambda self, trainer, *_, **__: run(trainer)}))


# --- training is the same ----------------------------------------------------------------------


@both_workers
def test_training_is_bit_identical(workers: int) -> None:
    def run(*callbacks: Any) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        module = make_module(
            LIGHTNING, lambda _: [loader(workers), loader(workers, 7, 2, sampler=NoLength(7))]
        )
        make_trainer(LIGHTNING, list(callbacks)).fit(module)
        return module.losses, module.weight.detach(), torch.get_rng_state()

    plain, recorded = run(), run(make_callback(LIGHTNING))
    assert len(plain[0]) == 8
    assert recorded[0] == plain[0]
    assert torch.equal(recorded[1], plain[1])
    assert torch.equal(recorded[2], plain[2])


def test_user_code_sees_its_own_loader() -> None:
    sampler = BatchSampler(range(10), 3, drop_last=False)
    mine = DataLoader(Numbers(10), batch_sampler=sampler)
    before = dict(vars(mine))
    found = []

    def look(trainer: Any) -> None:
        seen = trainer.train_dataloader
        found.append(seen is mine and isinstance(seen, DataLoader) and len(seen) == 4)
        found.append(seen.batch_sampler is sampler and dict(vars(seen)) == before)
        found.append(type(seen).__qualname__ == "DataLoader" and type(seen) is not DataLoader)
        found.append(type(copy.copy(seen)) is DataLoader)
        found.append(isinstance(iter(seen)._index_sampler, BatchSampler))

    looking = hooked(LIGHTNING, "on_train_start", look)
    fit(LIGHTNING, lambda _: mine, looking)
    assert found == [True] * 5


def test_no_iterator_is_held() -> None:
    dead = []

    def iterate(trainer: Any) -> None:
        iterator = iter(trainer.train_dataloader)
        next(iterator)
        reference = weakref.ref(iterator)
        del iterator
        dead.append(reference() is None)  # at once, without a collection of garbage

    fit(LIGHTNING, lambda _: loader(0), hooked(LIGHTNING, "on_train_batch_end", iterate))
    assert dead == [True] * 8


# --- everything is put back --------------------------------------------------------------------


@both_namespaces
@both_workers
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(pl: ModuleType, workers: int, fails: bool) -> None:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    mine = [DataLoader(Numbers(10), 3, **options), Slotted(Numbers(4), 2, **options)]
    combined = pl.utilities.CombinedLoader(mine)
    targets = [*mine, combined]
    before = [(type(each), dict(vars(each))) for each in targets]

    def fail(trainer: Any) -> None:
        assert all(type(each) is not was for each, (was, _) in zip(targets, before, strict=True))
        if fails and trainer.global_step == 3:
            raise KeyError("stop")

    callback, module = make_callback(pl), make_module(pl, lambda _: combined)
    trainer = make_trainer(pl, [callback, hooked(pl, "on_train_batch_end", fail)])
    if fails:
        with pytest.raises(KeyError, match="stop"):
            trainer.fit(module)
    else:
        trainer.fit(module)
    assert len(callback.claimed) == (3 if fails else 4)
    assert callback.claimed == module.seen
    assert "process_dataloader" not in vars(trainer.strategy)
    assert [type(each) for each in targets] == [was for was, _ in before]
    assert [vars(each) for each in mine] == [was for _, was in before[:2]]
    assert callback.recorder.sources == mine
    callback.recorder.detach()


def test_one_loader_for_training_and_validation_and_two_fits() -> None:
    mine = loader(0, shuffle=False)
    module = make_module(LIGHTNING, None)
    callback = make_callback(LIGHTNING)
    trainer = make_trainer(LIGHTNING, [callback], val_check_interval=1)
    for epochs in (2, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, mine, mine)
        assert type(mine) is DataLoader
    assert len(module.seen) == 16
    assert callback.claimed == module.seen


@both_workers
def test_persistent_workers_started_before_the_fit(workers: int) -> None:
    mine = loader(workers, persistent_workers=workers > 0)
    iterator = iter(mine)
    next(iterator)
    callback, module = fit(LIGHTNING, lambda _: mine)
    assert len(module.seen) == 8
    assert callback.claimed == module.seen


def test_two_recorders_of_one_trainer() -> None:
    class Second(Probe):
        state_key = "second"

    first, second = make_callback(LIGHTNING), make_callback(LIGHTNING, Second)
    module = make_module(LIGHTNING, lambda _: [loader(0), loader(0, sampler=NoLength(6))])
    trainer = make_trainer(LIGHTNING, [first, second])
    trainer.fit(module)
    assert len(module.seen) == 8
    assert first.claimed == second.claimed == module.seen
    assert "process_dataloader" not in vars(trainer.strategy)


def test_a_wrapper_around_process_dataloader_survives() -> None:
    calls = []

    def counting(dataloader: Any) -> Any:
        calls.append(dataloader)
        return dataloader

    def wrap(trainer: Any) -> None:
        trainer.strategy.process_dataloader = counting

    callback, module = make_callback(LIGHTNING), make_module(LIGHTNING, lambda _: loader(0))
    trainer = make_trainer(LIGHTNING, [hooked(LIGHTNING, "setup", wrap), callback])
    trainer.fit(module)
    assert vars(trainer.strategy)["process_dataloader"] is counting
    assert len(calls) == 2  # one for training, one for validation
    assert callback.claimed == module.seen


# --- refusals ----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10))


class Generating(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


class Keys:
    """Draws what no integer index is."""

    def __init__(self, *keys: Any) -> None:
        self.keys = keys

    def __iter__(self):
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Lookup(Numbers):
    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.tensor(len(str(index)))


def keyed(*keys: Any, workers: int = 0) -> DataLoader:
    return DataLoader(Lookup(3), batch_size=2, sampler=Keys(*keys), num_workers=workers)


def twice_persistent() -> list[DataLoader]:
    return [loader(1, persistent_workers=True)] * 2


REFUSED = {
    "iterable_dataset": (lambda: DataLoader(Stream()), "dataloader 0 reads an IterableDataset"),
    "second_of_two": (lambda: [loader(0), DataLoader(Stream())], "dataloader 1 reads an Iterable"),
    "no_dataloader": (lambda: [loader(0), range(5)], "dataloader 1 is a range"),
    "in_order": (lambda: loader(2, in_order=False), "`in_order=False`"),
    "own_iter": (lambda: Generating(Numbers(4)), "gives a generator"),
    "twice_persistent": (twice_persistent, "both places share one iterator"),
    "strings": (lambda: keyed("cat", "dog"), r"drew \['cat', 'dog'\], .*integer indices"),
    "strings_workers": (lambda: keyed("cat", "dog", workers=2), "integer indices"),
    "tuples": (lambda: keyed((0, 1), (1, 1)), "integer indices"),
    "floats": (lambda: keyed(0.0, 1.0), "integer indices"),
    "negative": (lambda: keyed(0, -1), "counted from 0"),
    "one_string": (lambda: DataLoader(Lookup(3), None, sampler=Keys("cat")), "integer indices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loader_that_cannot_be_traced_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    module, callback = make_module(LIGHTNING, lambda _: make()), make_callback(LIGHTNING)
    trainer = make_trainer(LIGHTNING, [callback])
    with pytest.raises(UnsupportedError, match=message):
        trainer.fit(module)
    assert module.losses == []
    assert "process_dataloader" not in vars(trainer.strategy)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_dataloader_iter_is_refused() -> None:
    class Fetching(LIGHTNING.LightningModule):
        def training_step(self, dataloader_iter: Any) -> None:
            raise AssertionError("not reached")

        def configure_optimizers(self) -> None:
            return None

    trainer = make_trainer(LIGHTNING, [make_callback(LIGHTNING)])
    with pytest.raises(UnsupportedError, match="fetches its batches itself"):
        trainer.fit(Fetching(), loader(0))
    assert "process_dataloader" not in vars(trainer.strategy)


def test_loaders_that_were_set_up_too_early_are_refused() -> None:
    early = hooked(LIGHTNING, "setup", lambda trainer: trainer.estimated_stepping_batches)
    with pytest.raises(UnsupportedError, match="set up before influence recording began"):
        fit(LIGHTNING, lambda _: loader(0), early)


@pytest.mark.filterwarnings("ignore:.*sequential")
def test_sequential_is_refused_by_lightning() -> None:
    combined = LIGHTNING.utilities.CombinedLoader(
        [loader(0, sampler=NoLength(4)), loader(0)], "sequential"
    )
    with pytest.raises(ValueError, match="sequential"):
        fit(LIGHTNING, lambda _: combined)
    assert type(combined) is LIGHTNING.utilities.CombinedLoader


def test_workers_out_of_order_are_no_matter_without_workers() -> None:
    check_loader(loader(0, in_order=False), source=0)


def test_claiming_needs_a_trainer() -> None:
    recorder = IndexRecorder()
    assert recorder.sources == []
    recorder.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        recorder.claim(make_trainer(LIGHTNING, []))


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (3, [3]),
        (np.int32(3), [3]),
        (torch.tensor(3), [3]),
        (np.array(3), [3]),
        ([], []),
        ([3, np.int64(1), torch.tensor(2)], [3, 1, 2]),
        ((3, 3), [3, 3]),
        (np.array([3, 1], dtype=np.uint8), [3, 1]),
        (torch.tensor([3, 1]), [3, 1]),
        (range(3), [0, 1, 2]),
    ],
)
def test_what_samplers_draw(drawn: Any, expected: list[int]) -> None:
    [piece] = pieces_of(((0, _as_indices(drawn)),))
    assert piece.indices.dtype == np.int64
    assert piece.indices.tolist() == expected
    assert piece.indices.shape == (len(expected),)


@pytest.mark.parametrize(
    "drawn", [None, 1.0, "a", [1.0], [[1, 2]], {"a": 1}, torch.tensor([1.0]), iter([1]), -1]
)
def test_what_samplers_may_not_draw(drawn: Any) -> None:
    with pytest.raises(UnsupportedError, match="integer indices"):
        _as_indices(drawn)
