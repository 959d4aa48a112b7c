"""Finding the training and validation dataloaders in whatever the user passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.batches import fetch

Assemble = Callable[[list[Any]], Any]


def training_loaders(data: Any) -> tuple[list[DataLoader[Any]], Assemble | None]:
    """Flatten training data into its dataloaders.

    Args:
        data: a LightningDataModule (already set up), a DataLoader, a CombinedLoader, or a
            collection of DataLoaders.

    Returns:
        The dataloaders, and what puts one batch a loader back into the structure that
        ``training_step`` receives (None for a single loader).

    Raises:
        UnsupportedError: if a loader is not a map-style DataLoader.
    """
    loaders = data.train_dataloader() if _is_datamodule(data) else data
    if isinstance(loaders, DataLoader):
        return [_checked(loaders)], None
    if not _is_combined(loaders):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    return [_checked(loader) for loader in loaders.flattened], assembler(loaders)


def assembler(combined: Any) -> Assemble | None:
    """Find how a combined loader puts its batches together.

    Returns:
        A function of one batch a loader, or None where batches come as they are.
    """
    if isinstance(combined.iterables, DataLoader) or combined._mode == "sequential":
        return None
    spec = combined._spec

    def assemble(batches: list[Any]) -> Any:
        assert spec is not None
        return tree_unflatten(batches, spec)

    return assemble


def validation_loaders(data: Any) -> list[Any]:
    """List the validation dataloaders of a datamodule, or of what was passed.

    Returns:
        The loaders; none where there are none. Each draws its whole dataset, also where several
        processes were to share it.

    Raises:
        UnsupportedError: if a batch comes from several loaders at once.
    """
    loaders = _own_validation(data) if _is_datamodule(data) else data
    if loaders is None:
        return []
    if isinstance(loaders, DataLoader):
        return [undistributed(loaders)]
    if not _is_combined(loaders):
        loaders = CombinedLoader(loaders, "sequential")
    if loaders._mode != "sequential":
        raise UnsupportedError(
            f'The validation data come from a `CombinedLoader(mode="{loaders._mode}")`, whose '
            "batches are put together from several loaders. Pass the loaders as a list, or one "
            "DataLoader as `query_dataloader=`."
        )
    return [undistributed(loader) for loader in loaders.flattened]


def fitted_validation(trainer: Any) -> tuple[Any, list[int | float] | None]:
    """Find the validation data of the Trainer whose `fit` is at its end.

    Args:
        trainer: the Trainer. Where several processes trained this may be a collective call.

    Returns:
        The dataloaders, None where there are none, and the batches to take from each, or None.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.world_size == 1:
        loop.setup_data()  # where validation was never due
        return loop._combined_loader, loop._max_batches or None
    if not trainer.enable_validation or not loop._data_source.is_defined():
        return None, None
    # What the loop has is one process's share. (A CombinedLoader is changed in place, so the
    # share may be in here too.)
    loaders = validation_loaders(loop._data_source.dataloader())
    limit = trainer.limit_val_batches
    if isinstance(limit, int):
        return loaders, [limit] * len(loaders)
    # As the Trainer has it; 1.0 also goes for loaders without a length.
    return loaders, None if limit == 1.0 else [int(len(loader) * limit) for loader in loaders]


def undistributed(loader: Any) -> Any:
    """Let a dataloader that draws one process's share of its dataset draw all of it.

    Args:
        loader: a DataLoader, or any iterable of batches; it is left as it is.

    Returns:
        A twin without the ``DistributedSampler``; the loader itself where it has none.
    """
    if not isinstance(loader, DataLoader):
        return loader
    batches: Any = loader.batch_sampler
    sampler: Any = getattr(batches, "sampler", loader.sampler)
    if not isinstance(sampler, DistributedSampler):
        return loader
    # Lightning wraps a sampler of the user's own as the "dataset" of a distributed one.
    whole = getattr(sampler.dataset, "_sampler", None) or SequentialSampler(sampler.dataset)  # type: ignore[arg-type]
    twin = copy.copy(loader)
    twin.__dict__["sampler"] = whole  # a DataLoader takes no other samplers once it is made
    if batches is not None:
        twin.__dict__["batch_sampler"] = batches = copy.copy(batches)
        batches.sampler = whole
    return twin


def _own_validation(datamodule: Any) -> Any:
    own = type(datamodule).val_dataloader
    return None if own.__qualname__.startswith("DataHooks.") else datamodule.val_dataloader()


def first_batches(loader: Any, count: int) -> list[Any]:
    """Fetch a loader's first batches in this process, without starting its workers.

    Args:
        loader: a DataLoader, or any iterable of batches.
        count: how many.

    Returns:
        The batches; fewer where the loader has fewer.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return list(islice(iter(loader), count))
    collates = loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if collates else loader.sampler
    draws = islice(iter(sampler), count)
    return [fetch(loader, list(drawn) if collates else [drawn]) for drawn in draws]


@contextmanager
def kept_generators(loaders: Iterable[Any]) -> Iterator[None]:
    """Leave the generators that dataloaders and their samplers own as they were found.

    Args:
        loaders: DataLoaders; anything else has no generators.

    Yields:
        Nothing.
    """
    owners = [owner for loader in loaders for owner in _generator_owners(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    kept = {id(g): (g, g.get_state()) for g in found if isinstance(g, torch.Generator)}
    try:
        yield
    finally:
        for generator, state in kept.values():
            generator.set_state(state)


def _generator_owners(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


def _is_combined(data: Any) -> bool:
    """Whether ``data`` is a CombinedLoader; each of Lightning's namespaces has its own class."""
    return any(base.__name__ == "CombinedLoader" for base in type(data).__mro__)


def _is_datamodule(data: Any) -> bool:
    return hasattr(data, "train_dataloader") and hasattr(data, "setup")


def set_up(data: Any) -> None:
    """Set up a LightningDataModule that no Trainer has set up; leaves anything else as it is.

    Args:
        data: the training data.
    """
    if _is_datamodule(data) and getattr(data, "trainer", None) is None:
        data.prepare_data()
        data.setup("fit")


def _checked(loader: Any) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader).__name__ if not isinstance(loader, DataLoader) else "IterableDataset"
        raise UnsupportedError(
            f"The training data come from a `{kind}`, which cannot be asked for a sample by its "
            "index. Pass a DataLoader over a map-style dataset (`__getitem__` and `__len__`)."
        )
    return loader
