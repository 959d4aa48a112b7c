"""What the names in a logger begin with, so that no report overwrites another.

Two callbacks of one Trainer, or a second `fit` with the same logger, report to the same place, often at
the same step. The first gets ``influence``, the next ``influence-1``, and so on, as directories do.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_FIRST = "influence"
_RUNS: WeakKeyDictionary[Any, list[object]] = WeakKeyDictionary()


def namespace_of(logger: Any, run: object) -> str:
    """Name a run's place in a logger.

    Args:
        logger: a Lightning logger.
        run: what stands for one callback in one `fit`; the same one gets the same name.

    Returns:
        ``influence``, or ``influence-1``, ``influence-2``, … where earlier runs have reported there.
    """
    runs = _RUNS.setdefault(logger, [])
    if not any(known is run for known in runs):
        runs.append(run)
    number = next(place for place, known in enumerate(runs) if known is run)
    return f"{_FIRST}-{number}" if number else _FIRST


def numbered(file: str, namespace: str) -> str:
    """Name a file of a run's.

    Args:
        file: its name, such as ``scores.csv``.
        namespace: what `namespace_of` gave.

    Returns:
        The name with the run's number, if it has one: ``scores-1.csv``.
    """
    stem, dot, ending = file.rpartition(".")
    return f"{stem}{namespace.removeprefix(_FIRST)}{dot}{ending}"
