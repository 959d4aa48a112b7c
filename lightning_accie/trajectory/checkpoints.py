"""Which steps keep a full checkpoint: a pure function of the step reached and of the room.

A replay starts at a checkpoint and recomputes the states up to the next one, so the distance
between two checkpoints is what a backward walk must hold in memory, and their number is what the
disk must hold. Candidates stand at

    t_i = 256 i²,    i = 0, 1, 2, …

After t steps there are about √t / 16 of them, and the next one is t_{i+1} − t_i = 512 i + 256 away,
about 32 √t. Both grow with the square root: that is the balance that bounds the memory of a run
whose length nobody knows yet. The share of steps that write a checkpoint, 1 / (32 √t), goes to zero.

Where there is room for fewer, only every 2^k-th candidate is kept (i % 2^k = 0), with the smallest
k that fits. k grows with the run, so what was thinned is never wanted again: of the candidates up
to t, those kept later are among those kept at t.
"""

from __future__ import annotations

from math import isqrt

SPACING = 256
"""The step number of the first candidate after 0."""


def is_candidate(step: int) -> bool:
    """Whether ``step`` is one of t_i = 256 i².

    Args:
        step: t, counted from 0.

    Returns:
        True at 0, 256, 1024, 2304, …

    Examples:
        >>> [step for step in range(5000) if is_candidate(step)]
        [0, 256, 1024, 2304, 4096]
    """
    return step == SPACING * _index(step) ** 2


def next_candidate(step: int) -> int:
    """The first candidate after a step.

    Args:
        step: t, counted from 0.

    Returns:
        The smallest t_i above t.

    Examples:
        >>> next_candidate(0), next_candidate(255), next_candidate(256)
        (256, 256, 1024)
    """
    return SPACING * (_index(step) + 1) ** 2


def kept(step: int, room: int) -> frozenset[int]:
    """The candidates kept once the run has reached ``step``.

    Args:
        step: t, the step reached.
        room: how many may be kept, at least 1.

    Returns:
        At most ``room`` candidates from 0 to ``step``, always with 0.

    Raises:
        ValueError: where ``room`` is below 1 or ``step`` below 0.

    Examples:
        >>> sorted(kept(4096, room=5))
        [0, 256, 1024, 2304, 4096]
        >>> sorted(kept(4096, room=4))
        [0, 1024, 4096]
    """
    return frozenset(SPACING * i * i for i in range(0, _index(step) + 1, _stride(step, room)))


def is_kept(step: int, room: int) -> bool:
    """Whether ``step`` is a candidate, and kept when the run reaches it.

    Args:
        step: t, the step reached.
        room: how many checkpoints may be kept, at least 1.

    Returns:
        The same as ``step in kept(step, room)``, without building the set.

    Raises:
        ValueError: where ``room`` is below 1 or ``step`` below 0.

    Examples:
        >>> is_kept(2304, room=4), is_kept(2304, room=3)
        (True, False)
    """
    return is_candidate(step) and _index(step) % _stride(step, room) == 0


def _index(step: int) -> int:
    # The i of the last candidate at or before the step.
    return isqrt(step // SPACING)


def _stride(step: int, room: int) -> int:
    # 2^k, the smallest for which no more than `room` candidates remain.
    if room < 1:
        raise ValueError(f"there must be room for at least one checkpoint, not {room}")
    stride = 1
    while _index(step) // stride + 1 > room:
        stride *= 2
    return stride
