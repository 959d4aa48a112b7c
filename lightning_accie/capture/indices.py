"""Which dataset indices made each training batch that Lightning delivers.

A sampler runs ahead of its batches: workers prefetch, Lightning may hold one back. So the pairing is
made where batches leave the loaders, from the end: of the index lists that were drawn, all but the
last ``outstanding`` ones (those still with the workers) have been delivered.

Four places are watched, each on the instance alone, and all are put back by ``detach``:

1. ``strategy.process_dataloader`` is where Lightning shows every loader before iterating it. A hook
   of the callback would come too late: workers are sent their first indices before
   ``on_train_start``.
2. Each training loader gets a subclass of its class: its ``__dict__`` and its samplers stay as they
   are, and only the iterators that it makes see ...
3. ... :class:`_DrawnIndices`, the sampler's stand-in, which keeps a copy of what it draws.
4. Lightning's ``CombinedLoader`` gets a subclass too: only it knows which iterators are Lightning's
   and not a user's, and when it starts a short loader again.

Nothing here draws a random number or holds a DataLoader's iterator.
"""

from __future__ import annotations

import inspect
import reprlib
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from lightning_accie.errors import UnsupportedError
from lightning_accie.trajectory.fingerprints import fingerprint
from lightning_accie.trajectory.records import Piece

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


Drawn = tuple[tuple[int, "array[int]"], ...]
"""A batch's samples while training runs: (the loader's position, the indices) of each loader."""


def pieces_of(drawn: Drawn) -> tuple[Piece, ...]:
    """Make records of a batch's samples.

    Args:
        drawn: what `IndexRecorder.claim` gave.

    Returns:
        One piece for each loader that contributed. A sample that was drawn without collation
        (``batch_size=None``) has ``indices`` of shape ``[1]``.
    """
    return tuple(Piece(source, np.array(indices, dtype=np.int64)) for source, indices in drawn)


class IndexRecorder:
    """Pairs each training batch that Lightning delivers with the dataset indices that made it.

    Call ``attach`` in the callback's ``setup("fit")``, ``on_train_start`` in the hook of that name,
    ``claim`` as ``training_step`` is called, ``detach`` in ``teardown`` and ``on_exception``. Batches
    that nobody claims do no harm (a tuner's, which swaps ``trainer.callbacks`` out), and one
    trainer may have several recorders.
    """

    def __init__(self) -> None:
        self._tap: _LoaderTap | None = None
        self._sources: list[DataLoader] = []
        self.prints_left = 0
        """How many samples' checksums may yet be taken, of the batches that are delivered."""

    @property
    def sources(self) -> list[DataLoader]:
        """The flattened training loaders of the latest setup, in order; kept after ``detach``."""
        return list(self._tap.sources if self._tap is not None else self._sources)

    def attach(self, trainer: Trainer) -> None:
        """Start to watch the training loaders that ``trainer`` will set up. Idempotent.

        From here on, setting up a loader whose samples cannot be known raises
        :class:`~lightning_accie.errors.UnsupportedError`, before the first batch.

        Raises:
            UnsupportedError: ``training_step`` takes a ``dataloader_iter``.
        """
        _check_training_step(trainer)
        tap = vars(trainer.strategy).get("process_dataloader")
        if not isinstance(tap, _LoaderTap):
            tap = _LoaderTap(trainer)
        if tap is not self._tap:
            self.detach()
            tap.users.add(self)
            self._tap = tap

    def on_train_start(self, trainer: Trainer) -> None:
        """Make sure that the loaders in use are watched.

        Raises:
            UnsupportedError: the training loaders were set up before ``attach``.
        """
        if not self._watching().watches(trainer.fit_loop._combined_loader):
            raise UnsupportedError(
                "The training dataloader was set up before influence recording began, so its first "
                "batches are unknown. Something read `trainer.estimated_stepping_batches` (or set "
                "up the data itself) in a `setup` hook: put the influence callback first in "
                "`Trainer(callbacks=[...])`, or read it in `configure_optimizers`."
            )

    def claim(self, trainer: Trainer) -> tuple[Drawn, np.ndarray | None]:
        """Give the samples of the batch that was just delivered.

        Returns:
            What each training loader that contributed drew, in the flattened order, for `pieces_of`;
            a loader whose entry is ``None`` (``max_size``, exhausted) stands not in it. And checksums
            of the samples, where they are taken.
        """
        delivered = (self._tap or self._watching()).delivered
        # Nobody claims a `None` batch (it comes without a hook), one that was held back when its
        # epoch ended, or a tuner's. So the batch at hand is found from the end. Where a loader has
        # no length Lightning fetches one batch ahead, to know which one is the last.
        fetcher: Any = trainer.fit_loop._data_fetcher
        held_back = len(fetcher.batches)
        while len(delivered) > held_back + 1:
            delivered.popleft()
        samples, prints = delivered[0]
        if prints is not None:
            self.prints_left -= len(prints)
        return samples, prints

    def detach(self) -> None:
        """Undo every patch: the strategy and all loaders are as they were. Callable twice."""
        if self._tap is not None:
            self._sources = self._tap.sources
            self._tap.release(self)
            self._tap = None

    def _watching(self) -> _LoaderTap:
        if self._tap is None:
            raise RuntimeError("The index recorder is not attached to a trainer.")
        return self._tap


_BY_ID = (
    '`InfluenceCallback(capture="batches", sample_id=...)` stores the batches and takes the ids from '
    "them (docs: Augmentation and streaming data)."
)


def check_loader(dataloader: object, source: int) -> None:
    """Refuse a training dataloader whose batches cannot be traced to dataset indices.

    Args:
        dataloader: what Lightning is about to iterate.
        source: its position among the flattened training loaders, for the message.

    Raises:
        UnsupportedError: it is no ``DataLoader``, reads an ``IterableDataset``, or delivers out of
            order.
    """
    name = f"Training dataloader {source}"
    if not isinstance(dataloader, DataLoader):
        raise UnsupportedError(
            f"{name} is a {type(dataloader).__name__}, so the samples in its batches cannot be "
            "known. Pass a torch.utils.data.DataLoader over a map-style dataset, or name the "
            f"samples: {_BY_ID}"
        )
    if isinstance(dataloader.dataset, IterableDataset):
        raise UnsupportedError(
            f"{name} reads an IterableDataset ({type(dataloader.dataset).__name__}), whose samples "
            "have no indices. Use a map-style dataset (`__getitem__` and `__len__`), or let it yield "
            f"the samples' ids: {_BY_ID}"
        )
    if dataloader.num_workers > 0 and not getattr(dataloader, "in_order", True):
        raise UnsupportedError(
            f"{name} has `in_order=False` with workers, so its batches come in an order that "
            f"cannot be known. Set `in_order=True`, or name the samples: {_BY_ID}"
        )


def _check_shared_iterator(dataloader: DataLoader, others: Sequence[DataLoader]) -> None:
    if dataloader.persistent_workers and any(dataloader is other for other in others):
        raise UnsupportedError(
            "The same training dataloader stands twice in the collection and has "
            "`persistent_workers=True`, so both places share one iterator. Give each place a "
            "DataLoader of its own, or set `persistent_workers=False`."
        )


def _check_training_step(trainer: Trainer) -> None:
    if "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters:
        raise UnsupportedError(
            "`training_step(dataloader_iter)` fetches its batches itself, so the samples of a step "
            "cannot be known. Write it as `training_step(batch, batch_idx)`."
        )


def _as_indices(drawn: Any) -> array[int]:
    """Copy what a sampler drew.

    Args:
        drawn: an integer, or a collection of integers.

    Returns:
        b integers; one for a single integer.

    Raises:
        UnsupportedError: something else than indices counted from 0 was drawn.
    """
    # A one-shot iterator has no length: it is the dataset fetcher's to consume, and refused.
    single = type(drawn) is not list and (
        not hasattr(drawn, "__len__") or getattr(drawn, "ndim", 1) == 0
    )
    try:
        return array("Q", (drawn,) if single else drawn)
    except (TypeError, OverflowError) as error:
        raise UnsupportedError(
            f"A training dataloader's sampler drew {reprlib.repr(drawn)}, but influence needs a "
            "dataset with integer indices, counted from 0. Let the sampler draw those, and look "
            "any keys up in the dataset's `__getitem__`."
        ) from error


class _StandIn:
    """Stands in for an object: has its attributes and passes as an instance of its class.

    A stateful loader asks its sampler and the sampler's iterator in that way for their state.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _DrawnIndices(_StandIn):
    """An index sampler that keeps what it drew in its present pass, until that is delivered.

    Each DataLoader iterator has one of its own.
    """

    drawn: deque[array[int] | str] | None = None

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()
        inner = iter(self._inner)
        noting = _noting(inner, self.drawn)
        return noting if isinstance(inner, GeneratorType) else _Pass(inner, noting)

    def __len__(self) -> int:
        return len(self._inner)


def _noting(inner: Iterator[Any], drawn: deque[array[int] | str]) -> Iterator[Any]:
    for indices in inner:
        try:
            drawn.append(_as_indices(indices))
        except UnsupportedError as error:
            # Raised on delivery: where an error comes while the iterators are made, Lightning's
            # teardown hides it behind one of its own.
            drawn.append(str(error))
        yield indices


class _Pass(_StandIn):
    """One pass over an index sampler whose iterator may have a state to be asked for."""

    def __init__(self, inner: Iterator[Any], noting: Iterator[Any]) -> None:
        super().__init__(inner)
        self._noting = noting

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._noting)


def _pop_delivered(iterator: Any) -> array[int] | None:
    """Take the indices of the batch that a DataLoader iterator delivered last.

    What it delivered before that, to a user or while a stateful loader was wound forward, is
    dropped.

    Returns:
        The indices, or None where nothing was delivered since this was asked last.

    Raises:
        UnsupportedError: no indices were drawn, or the iterator is not torch's own.
    """
    sampler = getattr(iterator, "_index_sampler", None)
    if not isinstance(sampler, _DrawnIndices) or sampler.drawn is None:
        raise UnsupportedError(
            "A training dataloader's `__iter__` does not begin a new torch DataLoader iterator but "
            f"gives a {type(iterator).__name__}, so the samples in its batches cannot be known. "
            "Use a plain DataLoader, and change its batches in `collate_fn` or in "
            "`on_after_batch_transfer`."
        )
    # Sent to the workers and not yet returned; without workers the iterator counts neither.
    outstanding = getattr(iterator, "_send_idx", 0) - getattr(iterator, "_rcvd_idx", 0)
    delivered = None
    while len(sampler.drawn) > outstanding:
        delivered = sampler.drawn.popleft()
    if isinstance(delivered, str):
        raise UnsupportedError(delivered)
    return delivered


def _recording_loader(own: Any, tap: _LoaderTap) -> type:
    # A subclass made for one loader: an instance takes only a class of its own layout.
    class RecordingLoader(own):
        @property
        def _index_sampler(self) -> Any:
            return _DrawnIndices(super()._index_sampler)

        def __iter__(self) -> Any:
            started: Any = self._iterator
            if started is not None and not isinstance(started._index_sampler, _DrawnIndices):
                # Persistent workers that were started before `fit` know the sampler of that time.
                started._index_sampler = _DrawnIndices(started._index_sampler)
            tap.watch_combined()
            return super().__iter__()

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A copy, or the `self` of a collate function that goes to a spawned worker, is plain.
            make, args, *state = super().__reduce_ex__(protocol)
            return make, tuple(own if arg is type(self) else arg for arg in args), *state

    return RecordingLoader


def _recording_combined(own: Any, tap: _LoaderTap) -> type:
    class RecordingCombined(own):
        def __next__(self) -> Any:
            item = own.__next__(self)
            tap.record(self._iterator.iterators, item[0])
            return item

    return RecordingCombined


class _LoaderTap:
    """Stands in for ``strategy.process_dataloader``; shared by the recorders of one trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.users: set[IndexRecorder] = set()
        self.delivered: deque[tuple[Drawn, np.ndarray | None]] = deque()
        self._trainer = trainer
        self._patched: list[weakref.ref[Any]] = []
        self._in_setup = False
        self._seen: list[DataLoader] = []
        self._process = trainer.strategy.process_dataloader
        self._replaced = vars(trainer.strategy).get("process_dataloader")
        trainer.strategy.process_dataloader = self  # type: ignore[method-assign]

    def __call__(self, dataloader: object) -> object:
        dataloader = self._process(dataloader)
        # The tuner of batch sizes sets validation loaders up while the Trainer is `training`; that is
        # when Lightning would not set up loaders for training.
        loop = self._trainer.fit_loop
        due = loop._combined_loader is None or loop._should_reload_train_dl
        if self.users and self._trainer.training and due:
            self._watch_loader(dataloader)
        return dataloader

    @property
    def sources(self) -> list[DataLoader]:
        """The flattened training loaders, in order."""
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    def _watch_loader(self, dataloader: Any) -> None:
        if not self._in_setup:
            self._in_setup, self._seen = True, []
        check_loader(dataloader, source=len(self._seen))
        _check_shared_iterator(dataloader, self._seen)
        self._seen.append(dataloader)
        self._put_in_front(dataloader, _recording_loader)

    def watch_combined(self) -> None:
        """Watch the loader that Lightning fetches from.

        Called as an iterator is made: Lightning has put it together by then, and fetched nothing.
        """
        self._in_setup = False
        combined = self._trainer.fit_loop._combined_loader
        if combined is not None and not self.watches(combined):
            self._put_in_front(combined, _recording_combined)

    def record(self, iterators: Sequence[Any], batch: Any) -> None:
        """Note what the batch now leaving the combined loader was made of."""
        samples = []
        for source, iterator in enumerate(iterators):
            indices = _pop_delivered(iterator)
            if indices is not None:
                samples.append((source, indices))
        prints = None
        for user in self.users:
            if user.prints_left > 0:
                prints = fingerprint(batch, len(samples[0][1]) if len(samples) == 1 else None)
                break
        self.delivered.append((tuple(samples), prints))

    def release(self, user: IndexRecorder) -> None:
        """Take a recorder off, and every patch with the last one."""
        self.users.discard(user)
        if self.users:
            return
        for reference in self._patched:
            if (patched := reference()) is not None:
                object.__setattr__(patched, "__class__", _own_class(patched))
        self._patched.clear()
        strategy = self._trainer.strategy
        # Where someone has wrapped the tap in turn it stays in that chain, and only passes on.
        if vars(strategy).get("process_dataloader") is self:
            del strategy.process_dataloader
            if self._replaced is not None:
                strategy.process_dataloader = self._replaced  # type: ignore[method-assign]

    def watches(self, target: object) -> bool:
        return getattr(type(target), "_tap", None) is self

    def _put_in_front(self, target: Any, recording: Callable[[type, _LoaderTap], type]) -> None:
        own = _own_class(target)
        cls: Any = recording(own, self)
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(cls, name, getattr(own, name))
        cls._tap, cls._untapped = self, own
        object.__setattr__(target, "__class__", cls)
        # Loaders can be reloaded each epoch: those that are gone need no putting back.
        self._patched = [known for known in self._patched if known() is not None]
        self._patched.append(weakref.ref(target))


def _own_class(target: Any) -> type:
    # A loader comes by again when it is reloaded, and a clone of one has its class from the start.
    return getattr(type(target), "_untapped", type(target))
