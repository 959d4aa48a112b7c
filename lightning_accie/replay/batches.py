"""The recorded batches again: dataset indices -> what the dataloader delivered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate, default_convert

from lightning_accie.errors import TrajectoryError
from lightning_accie.replay.state import tree_bytes
from lightning_accie.trajectory.records import MicroBatch, Piece


@dataclass(frozen=True)
class _Held:
    """A batch in the cache, and autograd's version counters of its tensors when it was made."""

    micro: MicroBatch
    batch: Any
    size: int
    versions: list[int]

    def serves(self, micro: MicroBatch) -> bool:
        """Whether it is this batch still; a ``training_step`` may have changed it in place."""
        return _same_samples(self.micro, micro) and versions(self.batch) == self.versions


def versions(batch: Any) -> list[int]:
    """Autograd's version counters of a batch's tensors: they tell whether it was changed in place.

    Args:
        batch: any nested structure.

    Returns:
        One number a tensor.
    """
    leaves = pytree.tree_leaves(batch)
    return [t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference()]


class Batches(Protocol):
    """Where a replay's batches come from."""

    ready: bool
    """Whether batches are as ``training_step`` received them, or still before the transfer hooks."""

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of batches for when they come again."""
        ...

    def sample_numbers(self, micro: MicroBatch) -> np.ndarray:
        """Number the batch's samples."""
        ...

    def sample(self, number: int) -> Any:
        """Read one sample."""
        ...

    def fetch(self, micro: MicroBatch) -> Any:
        """Give the batch."""
        ...

    def spans(self, micro: MicroBatch) -> dict[int, slice]:
        """Tell where each loader's samples lie among the batch's."""
        ...

    def others(self, micro: MicroBatch) -> Iterator[Any]:
        """Give batches of the same sizes made of other samples, as far as there are any."""
        ...

    def with_another(self, micro: MicroBatch, source: int, place: int) -> Iterator[Any]:
        """Give the batch with one sample replaced, as far as there are others."""
        ...


class BatchCache:
    """Keeps batches in memory, the latest used last.

    Args:
        limit: how many bytes of batches.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[int, int, int, int], _Held] = OrderedDict()
        self._held = 0

    def get(self, micro: MicroBatch, build: Callable[[MicroBatch], Any]) -> Any:
        """Give a batch.

        Args:
            micro: which.
            build: what makes it, where it is not there.

        Returns:
            The batch.
        """
        key = (micro.epoch, micro.global_step, micro.batch_idx, micro.rank)
        held = self._kept.get(key)
        if held is not None and held.serves(micro):
            self._kept.move_to_end(key)
            return held.batch
        if held is not None:
            self._held -= self._kept.pop(key).size
        # A transform of `torch.func` may be running, and would wrap what is made, which stays.
        with torch._C._DisableFuncTorch():
            batch = build(micro)
        size = tree_bytes(batch)
        if size <= self.limit:
            self._kept[key] = _Held(micro, batch, size, versions(batch))
            self._held += size
            while self._held > self.limit:
                self._held -= self._kept.popitem(last=False)[1].size
        return batch

    def resize(self, limit: int) -> None:
        """Change the limit.

        Args:
            limit: how many bytes of batches.
        """
        self.limit = limit
        while self._held > self.limit:
            self._held -= self._kept.popitem(last=False)[1].size


def numbered(pieces: Sequence[Piece], offsets: Sequence[int]) -> np.ndarray:
    """Number a batch's samples: the dataset index, later loaders after earlier ones.

    Args:
        pieces: of the batch.
        offsets: the number of each loader's first sample.

    Returns:
        ``[B]`` int64, one number a place of the batch.
    """
    if not pieces:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([piece.indices + offsets[piece.source] for piece in pieces])


def spans_of(pieces: Sequence[Piece]) -> dict[int, slice]:
    """Find where each loader's samples lie among a batch's.

    Args:
        pieces: of the batch.

    Returns:
        By loader, a slice of ``[B]``.
    """
    found, start = {}, 0
    for piece in pieces:
        found[piece.source] = slice(start, start + len(piece.indices))
        start += len(piece.indices)
    return found


class BatchSource:
    """Fetches and collates recorded batches as the training dataloaders did.

    Args:
        loaders: the flattened training dataloaders; only their datasets and `collate_fn` are used.
        assemble: puts one batch a loader (None where a loader gave none) into the structure that
            ``training_step`` received; None where there is a single loader.
        cache_bytes: batches are kept in memory up to this many bytes, latest used last.
    """

    ready = False

    def __init__(
        self, loaders: Sequence[DataLoader[Any]], assemble: Any = None, *, cache_bytes: int
    ) -> None:
        self.loaders = list(loaders)
        self.assemble = assemble
        self._cache = BatchCache(cache_bytes)
        offsets = [0]
        for loader in self.loaders:
            offsets.append(offsets[-1] + len(loader.dataset))  # type: ignore[arg-type]
        self.offsets = tuple(offsets)

    def keep(self, nbytes: int) -> None:
        """Keep so many bytes of batches for when they come again."""
        self._cache.resize(nbytes)

    def sample_numbers(self, micro: MicroBatch) -> np.ndarray:
        """Number the batch's samples: the dataset index, later loaders after earlier ones.

        Returns:
            ``[B]`` int64, one number a place of the batch.
        """
        return numbered(micro.pieces, self.offsets)

    def spans(self, micro: MicroBatch) -> dict[int, slice]:
        """Where each loader's samples lie among the batch's.

        Returns:
            By loader, a slice of ``[B]``.
        """
        return spans_of(micro.pieces)

    def sample(self, number: int) -> Any:
        """Read one sample.

        Args:
            number: its sample number.

        Returns:
            What its dataset gives for it.
        """
        source = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.loaders[source].dataset[number - self.offsets[source]]

    def fetch(self, micro: MicroBatch) -> Any:
        """Build the batch, or take it from the cache.

        Returns:
            The batch on the CPU, before any transfer hook.
        """
        return self._cache.get(micro, lambda micro: self.build(micro.pieces))

    def others(self, micro: MicroBatch) -> Iterator[Any]:
        """Batches of the same sizes made of other samples, for a look at what depends on them.

        Args:
            micro: the batch at hand.

        Yields:
            The samples that follow its last one (in a full batch: the same ones in another order),
            then one sample in every place; as `fetch` gives them, None included.
        """
        for change in (_following, _one_sample):
            pieces = (
                Piece(piece.source, change(piece.indices, self._size(piece.source)))
                for piece in micro.pieces
            )
            yield self.build(tuple(pieces))

    def with_another(self, micro: MicroBatch, source: int, place: int) -> Iterator[Any]:
        """The batch with one sample replaced.

        Args:
            micro: the batch at hand.
            source: the loader whose sample to replace.
            place: its place among that loader's samples.

        Yields:
            The batch with others of its own samples in that place, which keep the shape that a
            collate function gives it, then with the one that follows its last; None included.
        """
        indices = next(piece.indices for piece in micro.pieces if piece.source == source)
        own = [indices[(place + step) % len(indices)] for step in range(1, min(len(indices), 4))]
        for index in [*own, (indices.max() + 1) % self._size(source)]:
            changed = indices.copy()
            changed[place] = index
            pieces = (Piece(source, changed) if p.source == source else p for p in micro.pieces)
            yield self.build(tuple(pieces))

    def _size(self, source: int) -> int:
        return self.offsets[source + 1] - self.offsets[source]

    def build(self, pieces: Sequence[Piece]) -> Any:
        """Build a batch anew.

        Args:
            pieces: its samples, by loader.

        Returns:
            The batch on the CPU, before any transfer hook.
        """
        if self.assemble is None and len(pieces) == 1:
            return self._piece(pieces[0])
        by_source: list[Any] = [None] * len(self.loaders)
        for piece in pieces:
            by_source[piece.source] = self._piece(piece)
        return self.assemble(by_source)

    def _piece(self, piece: Piece) -> Any:
        if piece.source >= len(self.loaders):
            raise TrajectoryError(
                f"The trajectory was recorded with at least {piece.source + 1} training "
                f"dataloaders, but {len(self.loaders)} were given. Pass the same data."
            )
        loader = self.loaders[piece.source]
        indices = [int(index) for index in piece.indices]
        size = len(loader.dataset)  # type: ignore[arg-type]
        if indices and max(indices) >= size:
            raise TrajectoryError(
                f"The trajectory drew sample {max(indices)}, but the dataset has {size} samples. "
                "Pass the dataset that the model was trained on."
            )
        return fetch(loader, indices)


def fetch(loader: DataLoader[Any], indices: list[int]) -> Any:
    """Fetch samples and collate them as a dataloader does, in this process.

    Args:
        loader: the dataloader over a map-style dataset.
        indices: the samples; a single one where the loader does not collate (``batch_size=None``).

    Returns:
        The batch.
    """
    dataset = loader.dataset
    if loader.batch_sampler is None:
        return (loader.collate_fn or default_convert)(dataset[indices[0]])
    collate = loader.collate_fn or default_collate
    if collate is default_collate and (rows := _tensor_rows(dataset, indices)) is not None:
        return rows
    many = getattr(dataset, "__getitems__", None)
    return collate(many(indices) if many else [dataset[index] for index in indices])


def _tensor_rows(dataset: Any, indices: list[int]) -> list[Tensor] | None:
    """The rows of a `TensorDataset`, which is what collating its samples gives, without the loop."""
    while type(dataset) is Subset:
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    chosen = torch.tensor(indices)
    return [tensor[chosen] for tensor in dataset.tensors]


def _following(indices: np.ndarray, count: int) -> np.ndarray:
    return (indices.max() + 1 + np.arange(len(indices))) % count


def _one_sample(indices: np.ndarray, count: int) -> np.ndarray:
    return np.full_like(indices, (indices[0] + 1) % count)


def _same_samples(left: MicroBatch, right: MicroBatch) -> bool:
    return len(left.pieces) == len(right.pieces) and all(
        a.source == b.source and np.array_equal(a.indices, b.indices)
        for a, b in zip(left.pieces, right.pieces, strict=True)
    )
