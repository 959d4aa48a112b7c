"""Which states of a run a walk back over it keeps, and how many steps it runs again for the others.

A walk back needs s_{T-1}, …, s_0, and has room for few of them. Some are kept on the way forwards, as
anchors; from each, the steps up to the next one are run again once the walk comes there, with the room
that the anchors behind them have left free. With room for c states, and no step run again more than r
times, a walk has at most

    N(c, r) = N(c, r - 1) + N(c - 1, r),      N(c, 0) = c,      N(1, r) = 1 + r

steps: N(c, r - 1) up to the next anchor, which are run once on the way, and from there on what c - 1
states allow. This is the binomial schedule (Griewank and Walther, ACM TOMS 26, 2000) for a walk that
also keeps the states of its last segment, whose steps are not run again at all.

| symbol | name |
|---|---|
| T | ``length`` |
| c | ``room``, the state before the first step included |
| r | ``again`` |
"""

from __future__ import annotations

from functools import cache
from itertools import count
from math import comb

LEAST_ROOM = 2
"""With one state alone the run would be run from its beginning for every step."""


def split(length: int, room: int) -> int:
    """Tell where the next anchor stands.

    Args:
        length: T, more than ``room``.
        room: c, at least 2.

    Returns:
        Steps from the first, 1 to T - 1.
    """
    again = next(again for again in count(1) if _reach(room, again) >= length)
    return min(_reach(room, again - 1), length - _reach(room - 1, again - 1))


def anchors(length: int, room: int) -> list[int]:
    """Tell which states are kept as anchors on the way forwards.

    Args:
        length: T.
        room: c, at least 2.

    Returns:
        Steps, ascending from 0.

    Examples:
        >>> anchors(100, 8)
        [0, 37, 66, 84, 89, 93, 96, 98]
        >>> anchors(8, 8)
        [0]
    """
    found = [0]
    while (rest := length - found[-1]) > (free := room - len(found) + 1) > 1:
        found.append(found[-1] + split(rest, free))
    return found


@cache
def steps_run(length: int, room: int) -> int:
    """Count the steps that a walk back runs forwards.

    Args:
        length: T.
        room: c.

    Returns:
        T where all states fit.

    Examples:
        >>> steps_run(8, 8), steps_run(100, 8)
        (8, 278)
    """
    total, rest = 0, length
    while rest > room > 1:
        stretch = split(rest, room)
        total += stretch + steps_run(stretch, room)
        rest, room = rest - stretch, room - 1
    return total + (rest if rest <= room else rest * (rest + 1) // 2)


def _reach(room: int, again: int) -> int:
    """N(c, r)."""
    return comb(room + again, again + 1) + (comb(room + again - 1, again - 1) if again else 0)
