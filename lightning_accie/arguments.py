"""What the arguments of `InfluenceCallback` may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_accie.estimators import ESTIMATORS, Estimator
from lightning_accie.trajectory.sizes import parse_bytes

RUNS = ("fit_end", "manual")
ENDS = ("last", "best")


def check_arguments(**given: Any) -> None:
    """Look at every argument.

    Args:
        given: the arguments by name.

    Raises:
        MisconfigurationException: for the first that will not do, naming it and its value.
    """
    for name, value in given.items():
        fits, wanted = _RULES[name]
        if not fits(value):
            raise MisconfigurationException(f"`{name}` must be {wanted}, got {value!r}.")


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def _yes_or_no(value: Any) -> bool:
    return isinstance(value, bool)


def _function(value: Any) -> bool:
    return value is None or callable(value)


def _size(value: Any) -> bool:
    try:
        return parse_bytes(value) > 0
    except ValueError:
        return False


def _loaders(value: Any) -> bool:
    return value is None or (isinstance(value, Iterable) and not isinstance(value, (str, bytes)))


_Rule = tuple[Callable[[Any], bool], str]
_SIZE: _Rule = (_size, 'a number of bytes, or a text such as "2GB" or "512MiB"')
_RULES: dict[str, _Rule] = {
    "monitor": (
        lambda value: (isinstance(value, str) and value != "") or callable(value),
        "a name that `validation_step` logs or a callable(module, batch) -> scalar",
    ),
    "estimator": (
        lambda value: isinstance(value, Estimator) or _one_of("auto", *ESTIMATORS)(value),
        f"one of {', '.join(repr(name) for name in ('auto', *ESTIMATORS))} or an Estimator",
    ),
    "at": (_one_of(*ENDS), f"one of {', '.join(map(repr, ENDS))}"),
    "top_k": (_whole(1), "an integer of at least 1"),
    "verify": (_whole(0), "an integer of at least 0"),
    "run": (_one_of(*RUNS), f"one of {', '.join(map(repr, RUNS))}"),
    "dirpath": (
        lambda value: value is None or (isinstance(value, (str, Path)) and str(value) != ""),
        "a path",
    ),
    "overwrite": (_yes_or_no, "True or False"),
    "disk_budget": _SIZE,
    "memory_budget": _SIZE,
    "sample_losses": (_function, "a callable(module, batch) -> [B] tensor"),
    "query_dataloader": (_loaders, "a DataLoader, or a collection of them"),
    "describe": (_function, "a callable(sample) -> dict"),
    "loss_column": (_yes_or_no, "True or False"),
    "console": (_yes_or_no, "True or False"),
    "full_precision": (_yes_or_no, "True or False"),
    "seed": (_whole(0), "an integer of at least 0"),
}
