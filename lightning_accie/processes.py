"""What the processes of one run tell each other besides training.

They talk over a process group of their own, so that nothing here gets between training's collectives,
and so that waiting has no timeout to run into: an analysis may take rank 0 hours. Whoever waits learns
at once if the other process dies, since its connection closes.
"""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_accie.errors import InfluenceError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=30)
_ORDER, _END = "order", "end"


class Processes:
    """The processes that train together; for a single one everything here is done at once.

    Args:
        rank: this one's number.
        count: how many there are. Where there are several, making this is a collective call, and
            torch's default process group must be there.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count
        self._group: Any = None
        if count > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def close(self) -> None:
        """Give the group back; only where all processes do."""
        group, self._group, self.count = self._group, None, 1
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    def share(self, value: _T) -> list[_T]:
        """Exchange a value.

        Args:
            value: this process's own; it is pickled.

        Returns:
            The values of all processes, in rank order.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _talking():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, action: Callable[[], _T]) -> list[_T]:
        """Do something on every process; an error on one is raised on all.

        Args:
            action: what to do. It must not call for the other processes.

        Returns:
            What it gave on each, in rank order.

        Raises:
            BaseException: the error of the first process that had one; its own where it had one.
        """
        if self.count == 1:
            return [action()]
        try:
            value = action()
        except BaseException as error:
            self.share((None, _portable(error, self.rank)))
            raise
        answers = self.share((value, None))
        for _, failure in answers:
            if failure is not None:
                raise failure
        return [answer for answer, _ in answers]

    def on_first(self, action: Callable[[], _T]) -> _T:
        """Do something on rank 0 while the others wait, as long as it takes.

        Args:
            action: what to do. On its way it finds no process group, as if it ran by itself: a
                collective call would wait for processes that wait for it.

        Returns:
            What it gave, on every process.

        Raises:
            BaseException: what it raised, on every process.
        """
        return self.lead(action, lambda: _refuse)

    def lead(self, action: Callable[[], _T], helper: Callable[[], Callable[[Any], Any]]) -> _T:
        """Do something on rank 0, which may `call` on the others for help.

        Args:
            action: as for `on_first`.
            helper: makes, at the first call, what the others do when they are called:
                ``serve(order) -> answer``. Both too find no process group.

        Returns:
            What the action gave, on every process.

        Raises:
            BaseException: what it raised, on every process.
        """
        if self.count == 1:
            return action()
        if not self.first:
            return self._served(helper)
        try:
            with _alone():
                value = action()
            message = pickle.dumps((_END, value, None))
        except BaseException as error:
            self._broadcast(pickle.dumps((_END, None, _portable(error, self.rank))))
            raise
        self._broadcast(message)
        return value

    def _served(self, helper: Callable[[], Callable[[Any], Any]]) -> Any:
        """Wait for orders until rank 0 has done."""
        serve: Callable[[Any], Any] | None = None
        while True:
            kind, value, failure = pickle.loads(self._broadcast(b""))
            if kind == _END:
                if failure is not None:
                    raise failure
                return value
            answer: Any = None
            try:
                with _alone():
                    serve = serve or helper()
                    answer = serve(value)
            except BaseException as error:
                failure = _portable(error, self.rank)
            self.share((answer, failure))

    def call(self, order: Any) -> None:
        """Call on the other processes, within a `lead` on rank 0; then `answers` must be asked for.

        Args:
            order: what they are to `serve`; it is pickled.
        """
        message = pickle.dumps((_ORDER, order, None))
        with _among():
            self._broadcast(message)

    def answers(self) -> list[tuple[Any, Any]]:
        """Wait for what the others have to say to a `call`.

        Returns:
            Of each of the other ranks, in order, its answer and None, or None and its error.
        """
        with _among():
            return self.share((None, None))[1:]

    def _broadcast(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""
        box = [message]
        with _talking():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class ProcessEndedError(RuntimeError):
    """Another process of the run can no longer be talked to."""


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error as another process may raise it."""
    if type(error).__module__ == InfluenceError.__module__ or isinstance(error, KeyboardInterrupt):
        return error
    return RuntimeError(f"Rank {rank} failed: {type(error).__name__}: {error}")


@contextmanager
def _talking() -> Iterator[None]:
    """Wait in peace: a Ctrl-C goes to every process, and rank 0, at work, answers it for all."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    except RuntimeError as error:
        raise ProcessEndedError(
            "Another process of this run has ended, or cannot be reached, so the influence of its "
            f"samples will not be known. See what it printed. ({error})"
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


_world: list[Any] = []
"""Torch's default process group, while it is hidden."""


@contextmanager
def _alone() -> Iterator[None]:
    """Hide torch's default process group: what runs here runs as a single process would."""
    _world.append(dist.GroupMember.WORLD)
    dist.GroupMember.WORLD = None
    try:
        yield
    finally:
        dist.GroupMember.WORLD = _world.pop()


@contextmanager
def _among() -> Iterator[None]:
    """Show it again, to talk to the others."""
    dist.GroupMember.WORLD = _world[-1]
    try:
        yield
    finally:
        dist.GroupMember.WORLD = None


def _refuse(order: Any) -> Any:
    raise RuntimeError(f"This process has not offered to help, but was asked to: {order!r}")
