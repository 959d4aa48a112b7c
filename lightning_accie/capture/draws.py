"""Which calls of ``training_step`` draw random numbers, and which generator states must be kept.

Reading a generator's state costs as much as all the rest of recording a small step. So a run that
draws nothing is read once a step: the state before a call, compared with the state before the next.
Where they differ it may have been the call, or a sampler between the calls; the state is kept to be
safe, and the next calls are watched closely, before and after, until they draw nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_accie.replay import random_state
from lightning_accie.trajectory.records import RandomState

_CLOSELY = 4
"""Calls to watch closely after one that may have drawn."""
_HOST = ("numpy", "python")


@dataclass(frozen=True)
class Verdict:
    """What is known of one call.

    Attributes:
        draws: whether it may have drawn.
        random: the states before it, where they must be kept to replay it.
    """

    draws: bool
    random: RandomState | None = None


_DREW_NOTHING = Verdict(draws=False)


class DrawWatch:
    """Watches the generators around calls.

    `random` and ``numpy.random`` cost ten times as much to read as torch's generator; they are
    watched in the first calls, and further on only if one of those drew from them.

    Args:
        cuda: the CUDA device whose generator is watched too, or None.
    """

    def __init__(self, cuda: torch.device | None) -> None:
        self._cuda = cuda
        self._reads = 0
        self._host_draws = False
        self._closely = _CLOSELY
        self._before: dict[str, Tensor] | None = None
        self._quiet: bytes | None = None  # torch's state, while nothing draws and a call is open
        self.left_behind: RandomState | None = None
        """The states that the last drawing call left, where they were read right after it."""

    def begin(self) -> Verdict | None:
        """A call begins.

        Returns:
            The verdict on the call before, if it was still open.
        """
        # The way of a run that draws nothing. It runs between two steps of a model, with cold
        # caches, where every line of Python costs several times what it costs in a loop.
        if (
            self._quiet is not None
            and torch.default_generator.get_state().numpy().tobytes() == self._quiet
        ):
            return _DREW_NOTHING
        now = self._read()
        verdict = self._judge(now, right_after=False)
        self._before = now
        watched = self._closely or self._reads_host or self._cuda is not None
        if verdict is _DREW_NOTHING and not watched:
            self._quiet = now["torch"].numpy().tobytes()
        return verdict

    def end(self) -> Verdict | None:
        """The call has ended.

        Returns:
            The verdict on it, if it was watched closely; else it stays open.
        """
        return self.settle(right_after=True) if self._closely else None

    def settle(self, *, right_after: bool) -> Verdict | None:
        """Judge the call that is still open.

        Args:
            right_after: whether nothing else can have drawn since it ended.

        Returns:
            The verdict; None if none is open.
        """
        return None if self._before is None else self._judge(self._read(), right_after=right_after)

    def forget(self) -> None:
        """The last drawing call leaves the record: the next one must bring its state along."""
        self.left_behind = None

    def _read(self) -> dict[str, Tensor]:
        host = self._reads_host
        self._reads += 1
        return random_state.capture(cuda=self._cuda, host=host)

    @property
    def _reads_host(self) -> bool:
        return self._host_draws or self._reads < 2 * _CLOSELY  # the first calls: two reads each

    def _judge(self, now: dict[str, Tensor], *, right_after: bool) -> Verdict | None:
        before, self._before, self._quiet = self._before, None, None
        if before is None:
            return None
        if random_state.equal(before, now):
            self._closely = max(0, self._closely - 1)
            return _DREW_NOTHING
        if not self._host_draws:
            pairs = [(before[name], now[name]) for name in _HOST if name in before]
            self._host_draws = not all(torch.equal(a, b) for a, b in pairs)
        if not self._host_draws:
            before, now = _without_host(before), _without_host(now)
        self._closely = _CLOSELY
        left, self.left_behind = self.left_behind, now if right_after else None
        known = left is not None and random_state.equal(left, before)
        return Verdict(draws=True, random=None if known else before)


def _without_host(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in states.items() if name not in _HOST}
