"""Generators that datasets own: `fit` must find them as if nobody had looked at a sample.

The recorder fetches a batch or two again in this process. A dataset that draws from a generator of its
own would go on from another state, and training with it. So these generators are searched for, and put
back. What else a dataset counts or caches when it is read is not known and stays.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_MOST_OBJECTS = 20_000
_MOST_ENTRIES = 1_000
"""Bounds of the search: datasets may hold lists of millions of samples, but not of generators."""
_LEAVES = (str, bytes, int, float, complex, type, ModuleType, torch.Tensor, np.ndarray, np.generic)


@contextmanager
def kept(roots: Iterable[Any]) -> Iterator[None]:
    """Leave the generators inside some objects as they were found.

    Args:
        roots: datasets, collate functions, modules with transfer hooks.

    Yields:
        Nothing.
    """
    states = [(found, _state(found)) for found in generators_in(roots)]
    try:
        yield
    finally:
        for found, state in states:
            _restore(found, state)


def generators_in(roots: Iterable[Any]) -> list[Any]:
    """Search objects for generators.

    Args:
        roots: where to begin. Attributes, containers, closures and bound methods are followed.

    Returns:
        Each `torch.Generator`, `numpy.random.Generator`, `numpy.random.RandomState` and
        `random.Random` once.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = deque(roots)
    while waiting and len(seen) < _MOST_OBJECTS:
        at = waiting.popleft()
        if at is None or isinstance(at, _LEAVES) or id(at) in seen:
            continue
        seen.add(id(at))
        if isinstance(at, _KINDS):
            found.append(at)
        else:
            waiting.extend(islice(_inside(at), _MOST_ENTRIES))
    return found


_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _inside(at: Any) -> Iterator[Any]:
    if isinstance(at, dict):
        yield from at.values()
    elif isinstance(at, (list, tuple, set, frozenset, deque)):
        yield from at
    elif isinstance(at, functools.partial):
        yield from (at.func, at.args, at.keywords)
    elif isinstance(at, MethodType):
        yield from (at.__self__, at.__func__)
    elif isinstance(at, FunctionType):
        yield from (cell.cell_contents for cell in at.__closure__ or () if not _is_empty(cell))
        yield from at.__defaults__ or ()
        yield from (at.__kwdefaults__ or {}).values()
    yield from getattr(at, "__dict__", {}).values()
    for cls in type(at).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(at, name, None)


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _state(found: Any) -> Any:
    if isinstance(found, np.random.Generator):
        return found.bit_generator.state
    if isinstance(found, random.Random):
        return found.getstate()
    return found.get_state()


def _restore(found: Any, state: Any) -> None:
    if isinstance(found, np.random.Generator):
        found.bit_generator.state = state
    elif isinstance(found, random.Random):
        found.setstate(state)
    else:
        found.set_state(state)
