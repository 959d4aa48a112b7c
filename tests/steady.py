"""For comparisons to the bit: the ways to compute are chosen by their time, which no test decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def steady_choices() -> Iterator[pytest.MonkeyPatch]:
    """Double backward and refinement by exact replay, whichever is quicker today."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_accie.engine.choose_product", lambda walker: walker.product)
        patch.setattr("lightning_accie.ranking.exact_is_cheaper", lambda replay: True)
        yield patch
