"""Which calls of ``training_step`` draw random numbers, and which generator states must be kept.

Reading a generator's state costs as much as a third of all the rest of recording a small step, and
comparing two as much again. So each call is read before and after while calls draw; in a run that has
drawn, and draws no more, before each call; and in one that never drew, before every eighth call and
around what may draw in between (the first calls of an epoch, a validation).

Where two readings differ, the calls between them may have drawn, or a sampler beside them. The first of
them brings its state, from which the others go on, and from then on every call is read. That is wrong
for at most one stretch of a run, and only if calls and something beside them draw for the first time in
the same eight calls, in the middle of an epoch; its replay is then refused, as the losses differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_accie.replay import random_state
from lightning_accie.trajectory.records import RandomState

_CLOSELY = 4
"""Calls to watch closely after one that may have drawn."""
_AT_ONCE = 8
"""Calls to judge at once, while none draws."""
_ONE_BY_ONE = 2
"""The first calls of an epoch, where what a run does may change: each is read."""
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
        self.closely = _CLOSELY
        """How many calls are yet to be watched closely, and judged as they end."""
        self._drew = False
        self._one_by_one = 0
        # Before each call not yet judged; None where that was not read.
        self._before: list[dict[str, Tensor] | None] = []
        self.left_behind: RandomState | None = None
        """The states that the last drawing call left, where they were read right after it."""

    def begin(self) -> Sequence[Verdict]:
        """A call begins.

        Returns:
            The verdicts on all calls before that were not judged yet, if it is time for them.
        """
        one_by_one = self._one_by_one > 0
        if one_by_one:
            self._one_by_one -= 1
        elif self._passes_over():  # most calls of most runs end here
            self._before.append(None)
            return ()
        now = self._read()
        verdicts: Sequence[Verdict] = ()
        if self.closely or one_by_one or len(self._before) >= _AT_ONCE:
            verdicts = self._judge(now, right_after=False)
        self._before.append(now)
        return verdicts

    def _passes_over(self) -> bool:
        """Whether the call that begins goes unread."""
        waiting = 0 < len(self._before) < _AT_ONCE
        return waiting and not (self._drew or self.closely or self._cuda or self._reads_host)

    def settle(self, *, right_after: bool) -> Sequence[Verdict]:
        """Judge all calls that were not judged yet; to be asked after each call while ``closely``.

        Args:
            right_after: whether nothing else can have drawn since the last one ended.

        Returns:
            The verdicts.
        """
        return self._judge(self._read(), right_after=right_after) if self._before else ()

    def epoch_ends(self) -> Sequence[Verdict]:
        """The last call of an epoch is over, and nothing else can have drawn since.

        Returns:
            The verdicts on all calls that were not judged yet.
        """
        self._one_by_one = _ONE_BY_ONE
        return self.settle(right_after=True)

    def interrupted(self) -> Sequence[Verdict]:
        """Something that draws, or may, is about to run between two calls.

        Returns:
            The verdicts, where calls went unread.
        """
        return self.settle(right_after=False) if None in self._before else ()

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

    def _judge(self, now: dict[str, Tensor], *, right_after: bool) -> list[Verdict]:
        states = [*self._before, now]
        self._before = []
        readings = [(at, state) for at, state in enumerate(states) if state is not None]
        last = len(states) - 1
        verdicts: list[Verdict] = []
        for (first, before), (following, after) in pairwise(readings):
            end = right_after and following == last
            verdict = self._verdict(before, after, right_after=end)
            rest = Verdict(draws=verdict.draws)  # goes on from what the call before left
            verdicts += [verdict, *[rest] * (following - first - 1)]
        return verdicts

    def _verdict(
        self, before: dict[str, Tensor], after: dict[str, Tensor], *, right_after: bool
    ) -> Verdict:
        if random_state.equal(before, after):
            self.closely = max(0, self.closely - 1)
            return _DREW_NOTHING
        if not self._host_draws:
            pairs = [(before[name], after[name]) for name in _HOST if name in before]
            self._host_draws = not all(torch.equal(a, b) for a, b in pairs)
        if not self._host_draws:
            before, after = _without_host(before), _without_host(after)
        self.closely, self._drew = _CLOSELY, True
        left, self.left_behind = self.left_behind, after if right_after else None
        known = left is not None and random_state.equal(left, before)
        return Verdict(draws=True, random=None if known else before)


def _without_host(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in states.items() if name not in _HOST}
