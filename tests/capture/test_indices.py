"""Every batch is paired with its indices, over the loaders and trainers that Lightning allows.

The truth is in the batches: each sample is its own index, read in ``training_step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler

from tests.capture.indexed import (
    IGNORED,
    LIGHTNING,
    PYTORCH_LIGHTNING,
    NoLength,
    Numbers,
    fit,
    loader,
    make_callback,
    make_module,
    make_trainer,
)

pytestmark = IGNORED
both_workers = pytest.mark.parametrize("workers", [0, 2])


class Outwards:
    """A batch sampler of the user's own, of NumPy integers."""

    def __iter__(self):
        return iter(np.array([[index, 9 - index] for index in range(4)], dtype=np.int32))

    def __len__(self) -> int:
        return 4


def none_if_four(samples: list[torch.Tensor]) -> torch.Tensor | None:
    batch = torch.stack(samples)
    return None if (batch == 4).any() else batch


def unchanged(sample: torch.Tensor) -> torch.Tensor:
    return sample


def batched(workers: int, batch_sampler: Any) -> DataLoader:
    return DataLoader(Numbers(10), batch_sampler=batch_sampler, num_workers=workers)


def bulk(workers: int) -> DataLoader:
    """The dataset itself is given lists of indices."""
    sampler = BatchSampler(SequentialSampler(range(10)), 3, drop_last=False)
    return loader(workers, batch_size=None, sampler=sampler, collate_fn=unchanged)


def persistent(workers: int) -> DataLoader:
    options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return loader(workers, **options)


def unsized(workers: int, **options: Any) -> DataLoader:
    return loader(workers, sampler=NoLength(10), **options)


def long_and_short(workers: int) -> list[DataLoader]:
    return [loader(workers, 10, 3), loader(workers, 4, 2)]


def unsized_long_and_short(workers: int) -> list[DataLoader]:
    """Four batches and one: when cycled, the short loader starts again a batch ahead, each time."""
    return [loader(workers, size, 3, sampler=NoLength(size)) for size in (10, 2)]


def named(workers: int) -> dict[str, DataLoader]:
    return dict(zip("ab", long_and_short(workers), strict=True))


def nested(workers: int) -> dict[str, Any]:
    return {"a": long_and_short(workers), "b": {"c": loader(workers, 5)}}


class Peeking:
    """A user's callback that reads the training loaders while they are in use."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for each in tree_leaves(trainer.train_dataloader) if batch_idx % 2 else ():
            iterator = iter(each)
            for _ in range(batch_idx):
                next(iterator, None)


def peeking(pl: ModuleType) -> Any:
    return make_callback(pl, Peeking)


def stopping(pl: ModuleType) -> Any:
    """Stops after the first epoch."""
    options = {"stopping_threshold": 1e9, "check_on_train_epoch_end": True}
    return pl.callbacks.EarlyStopping("loss", **options)


@dataclass(frozen=True)
class Case:
    """One kind of loader under one kind of trainer.

    ``batches``: how many a right run delivers, counted by hand: 2 epochs of 4 where nothing is
    said. ``mode``: what a ``CombinedLoader`` does with the loaders.
    """

    name: str
    loaders: Callable[[int], Any]
    batches: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    other: Callable[[ModuleType], Any] | None = None


CASES = [
    Case("shuffle", loader),
    Case("persistent", persistent),
    Case("drop_last", lambda workers: loader(workers, drop_last=True), 6),
    Case("batch_sampler", lambda workers: batched(workers, Outwards())),
    Case("list_batch_sampler", lambda workers: batched(workers, [[0, 1, 2], [9, 9], [4]]), 6),
    Case("weighted", lambda workers: loader(workers, sampler=WeightedRandomSampler([1, 2], 7)), 6),
    Case("no_length", unsized),
    Case("persistent_limit", persistent, 4, {"limit_train_batches": 2}),
    Case("no_collation", lambda workers: loader(workers, batch_size=None), 20),
    Case("bulk", bulk),
    Case("limit_int", loader, 4, {"limit_train_batches": 2}),
    Case("limit_float", loader, 6, {"limit_train_batches": 0.75}),
    Case("limit_no_length", unsized, 4, {"limit_train_batches": 2}),
    Case("reload", loader, 12, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 2}),
    Case("reload_list", long_and_short, options={"reload_dataloaders_every_n_epochs": 1}),
    Case("overfit", loader, 4, {"overfit_batches": 2}),
    Case("accumulate", loader, options={"accumulate_grad_batches": 3}),
    Case("val_check_interval", loader, options={"val_check_interval": 2}),
    Case("max_steps", loader, 6, {"max_steps": 6, "max_epochs": -1}),
    Case("list", long_and_short),
    Case("dict", named),
    Case("nested", nested),
    Case("min_size", long_and_short, 4, mode="min_size"),
    Case("max_size", named, mode="max_size"),
    Case("max_size_cycle", nested, mode="max_size_cycle"),
    Case("min_size_ahead", unsized_long_and_short, 2, mode="min_size"),
    Case("max_size_ahead", unsized_long_and_short, mode="max_size"),
    Case("cycle_ahead", unsized_long_and_short, mode="max_size_cycle"),
    Case("twice", lambda workers: [loader(workers)] * 2),
    Case("fast_dev_run", loader, 1, {"fast_dev_run": True}),
    Case("early_stopping", loader, 4, {"max_epochs": 3}, other=stopping),
    Case("peeking", loader, other=peeking),
    Case("peeking_list", long_and_short, other=peeking),
    Case("peeking_persistent", persistent, other=peeking),  # at the very iterator in use
    Case("none", lambda workers: loader(workers, collate_fn=none_if_four), 6),
    Case("none_ahead", lambda workers: unsized(workers, collate_fn=none_if_four), 6),
]
BOTH = {"shuffle", "persistent", "no_length", "nested", "max_size", "reload_list", "peeking"}
MATRIX = [pytest.param(LIGHTNING, case, id=case.name) for case in CASES]
MATRIX += [
    pytest.param(PYTORCH_LIGHTNING, case, id=f"{case.name}-pytorch_lightning")
    for case in CASES
    if case.name in BOTH
]


@both_workers
@pytest.mark.parametrize(("pl", "case"), MATRIX)
def test_each_batch_is_paired_with_its_indices(pl: ModuleType, case: Case, workers: int) -> None:
    def loaders(_: Any) -> Any:
        found = case.loaders(workers)
        return pl.utilities.CombinedLoader(found, case.mode) if case.mode else found

    others = [case.other(pl)] if case.other else []
    callback, module = fit(pl, loaders, *others, **case.options)
    assert len(module.seen) == case.batches
    assert callback.claimed == module.seen
    assert callback.recorder.sources == tree_leaves(module.trainer.train_dataloader)


def test_a_sampler_may_reuse_its_buffer() -> None:
    def buffered() -> Any:
        batch = np.empty(2, dtype=np.int64)
        for index in range(4):
            batch[:] = index, 9 - index
            yield batch

    class Buffered:
        def __iter__(self):
            return buffered()

    callback, module = fit(LIGHTNING, lambda _: batched(0, Buffered()), max_epochs=1)
    assert callback.claimed == module.seen == [[(0, [index, 9 - index])] for index in range(4)]


def checkpointed(directory: Path, loaders: Callable[[Any], Any], **when: int) -> tuple[Any, Any]:
    """Fit one epoch of four batches, with a checkpoint ``stopped.ckpt``."""
    saver = LIGHTNING.callbacks.ModelCheckpoint(directory, "stopped", **when)
    return fit(LIGHTNING, loaders, saver, max_epochs=1, enable_checkpointing=True)


@both_workers
@pytest.mark.parametrize("when", [{"every_n_train_steps": 3}, {"every_n_epochs": 1}])
def test_a_resumed_run(workers: int, when: dict[str, int], tmp_path: Path) -> None:
    checkpointed(tmp_path, lambda _: loader(workers), **when)
    callback, module = fit(
        LIGHTNING, lambda _: loader(workers), ckpt_path=tmp_path / "stopped.ckpt", max_epochs=3
    )
    rest = (1, 2) if "every_n_train_steps" in when else (0,)  # of epoch 0; 2 before Lightning 2.5
    assert len(module.seen) - 8 in rest
    assert callback.claimed == module.seen


@both_workers
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_stateful_loader(workers: int, shuffle: bool, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loaders(_: Any) -> Any:
        return stateful.StatefulDataLoader(
            Numbers(10), batch_size=3, shuffle=shuffle, num_workers=workers
        )

    whole, first = checkpointed(tmp_path, loaders, every_n_train_steps=3)
    callback, module = fit(LIGHTNING, loaders, ckpt_path=tmp_path / "stopped.ckpt")
    assert whole.claimed == first.seen
    assert callback.claimed == module.seen
    assert module.seen[:1] == first.seen[3:]
    assert len(module.seen) == 5


def find_batch_size(pl: ModuleType) -> Any:
    return pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1)


def find_lr(pl: ModuleType) -> Any:
    return pl.callbacks.LearningRateFinder(num_training_steps=3, early_stop_threshold=None)


@both_workers
@pytest.mark.parametrize("finder", [find_batch_size, find_lr])
@pytest.mark.parametrize(("pl", "position"), [(LIGHTNING, 0), (PYTORCH_LIGHTNING, 1)])
def test_tuners_are_passed_over(
    pl: ModuleType, workers: int, finder: Any, position: int, tmp_path: Path
) -> None:
    module = make_module(pl, lambda module: unsized(workers, batch_size=module.batch_size))
    callback, other = make_callback(pl), finder(pl)
    callbacks = [callback, other] if position else [other, callback]
    make_trainer(pl, callbacks, default_root_dir=tmp_path).fit(module)
    assert len(module.losses) > len(module.seen) >= math.ceil(10 / module.batch_size)
    assert callback.claimed == module.seen
    assert callback.recorder.sources == tree_leaves(module.trainer.train_dataloader)


@both_workers
def test_a_tuner_before_the_fit(workers: int, tmp_path: Path) -> None:
    module = make_module(LIGHTNING, lambda _: loader(workers))
    callback = make_callback(LIGHTNING)
    trainer = make_trainer(LIGHTNING, [callback], default_root_dir=tmp_path)
    LIGHTNING.tuner.Tuner(trainer).lr_find(module, num_training=3)
    assert callback.claimed == module.seen == []
    trainer.fit(module)
    assert len(module.seen) == 8
    assert callback.claimed == module.seen
