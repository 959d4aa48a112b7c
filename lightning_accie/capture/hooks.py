"""Hooks that a callback does without for a while, so that Lightning passes them over.

Lightning calls every hook of every callback, empty ones too, inside a context of the Trainer's
profiler: some four microseconds each, six times a batch. A hook that is not callable it leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNUSED = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
"""What Lightning calls at every batch, besides ``on_train_batch_end``."""


def skip(callback: Any, owner: type, names: Sequence[str]) -> None:
    """Have hooks passed over, on the instance alone.

    Args:
        callback: the callback.
        owner: the class that has no use for them. What a subclass made of them is still called.
        names: of the hooks.
    """
    own = vars(callback)
    for name in names:
        if name not in own and getattr(type(callback), name) is getattr(owner, name):
            own[name] = None


def unskip(callback: Any) -> None:
    """Have every hook called again; callable twice.

    Args:
        callback: the callback.
    """
    own = vars(callback)
    for name in [name for name in (*UNUSED, "on_train_batch_end") if name in own]:
        if own[name] is None:
            del own[name]
