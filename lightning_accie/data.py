"""Finding the training and validation dataloaders in whatever the user passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

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
        The loaders; none where there are none.

    Raises:
        UnsupportedError: if a batch comes from several loaders at once.
    """
    loaders = _own_validation(data) if _is_datamodule(data) else data
    if loaders is None:
        return []
    if isinstance(loaders, DataLoader):
        return [loaders]
    if not _is_combined(loaders):
        loaders = CombinedLoader(loaders, "sequential")
    if loaders._mode != "sequential":
        raise UnsupportedError(
            f'The validation data come from a `CombinedLoader(mode="{loaders._mode}")`, whose '
            "batches are put together from several loaders. Pass the loaders as a list, or one "
            "DataLoader as `query_dataloader=`."
        )
    return list(loaders.flattened)


def _own_validation(datamodule: Any) -> Any:
    own = type(datamodule).val_dataloader
    return None if own.__qualname__.startswith("DataHooks.") else datamodule.val_dataloader()


def first_batch(loader: Any) -> list[Any]:
    """Fetch a loader's first batch in this process, without starting its workers.

    Args:
        loader: a DataLoader, or any iterable of batches.

    Returns:
        The batch in a list; an empty list where the loader has none.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return list(islice(iter(loader), 1))
    collates = loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if collates else loader.sampler
    drawn = next(iter(sampler), None)
    if drawn is None:
        return []
    return [fetch(loader, list(drawn) if collates else [drawn])]


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
