"""For comparisons to the bit: the ways to compute are chosen by their time, which no test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def steady_choices() -> Iterator[pytest.MonkeyPatch]:
    """Every way takes as long as the next: the first that goes is chosen."""

    def no_time(action: Callable[[], object], repeats: int = 3) -> float:
        action()
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_accie.estimators.measure._best_of", no_time)
        yield patch
