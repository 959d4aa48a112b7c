"""What the arguments of `InfluenceCallback` and `InfluenceEngine` may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_accie.estimators import ESTIMATORS, Estimator, takes_layers
from lightning_accie.estimators.layers import check_layers
from lightning_accie.launch import STRATEGIES
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.sizes import parse_bytes

RUNS = ("fit_end", "manual")
CAPTURES = ("auto", "indices", "batches")
ENDS = ("last", "best")
REPORTS = ("full", "figures", "none")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def check_arguments(**given: Any) -> None:
    """Look at every argument of the callback.

    Args:
        given: the arguments by name.

    Raises:
        MisconfigurationException: for the first that will not do, naming it and its value.
    """
    complaint = _complaint(given)
    if complaint:
        raise MisconfigurationException(complaint)


def check_engine_arguments(**given: Any) -> None:
    """Look at arguments of the engine.

    Args:
        given: the arguments by name.

    Raises:
        ValueError: for the first that will not do, naming it and its value.
    """
    complaint = _complaint(given)
    if complaint:
        raise ValueError(complaint)


def _complaint(given: dict[str, Any]) -> str:
    for name, value in given.items():
        fits, wanted = _RULES[name]
        if not fits(value):
            return f"`{name}` must be {wanted}, got {value!r}."
    if given.get("capture") == "indices" and given["sample_id"] is not None:
        return (
            f'`sample_id={given["sample_id"]!r}` reads ids off the batches, which `capture="indices"` '
            'does not keep. Use `capture="batches"`, or leave one of the two out.'
        )
    layers, estimator = given.get("layers"), given.get("estimator", "auto")
    if layers is not None and not takes_layers(estimator):
        if not isinstance(estimator, str):
            return (
                f"`layers` is an argument of the estimator: give it to {type(estimator).__name__}."
            )
        able = ", ".join(repr(name) for name in ("auto", *ESTIMATORS) if takes_layers(name))
        return f"`estimator={estimator!r}` has no `layers`; {able} have."
    return ""


def _layers(value: Any) -> bool:
    try:
        check_layers(value)
    except ValueError:
        return False
    return True


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


def _data(value: Any) -> bool:
    return hasattr(value, "train_dataloader") or _loaders(value)


def _monitor(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or callable(value)


def _path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and str(value) != ""


def _device(value: Any) -> bool:
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return isinstance(value, (str, torch.device))


_Rule = tuple[Callable[[Any], bool], str]
_SIZE: _Rule = (_size, 'a number of bytes, or a text such as "2GB" or "512MiB"')
_RULES: dict[str, _Rule] = {
    "monitor": (
        _monitor,
        "a name that `validation_step` logs or a callable(module, batch) -> scalar",
    ),
    "query": (
        lambda value: value is None or _monitor(value),
        "a name that `validation_step` logs, a callable(module, batch) -> scalar, or None",
    ),
    "estimator": (
        lambda value: isinstance(value, Estimator) or _one_of("auto", *ESTIMATORS)(value),
        f"one of {', '.join(repr(name) for name in ('auto', *ESTIMATORS))} or an Estimator",
    ),
    "layers": (
        _layers,
        'a glob of module or parameter names such as "head", several of them, or a '
        "callable(parameter_name) -> bool",
    ),
    "at": (_one_of(*ENDS), f"one of {', '.join(map(repr, ENDS))}"),
    "top_k": (_whole(1), "an integer of at least 1"),
    "verify": (_whole(0), "an integer of at least 0"),
    "run": (_one_of(*RUNS), f"one of {', '.join(map(repr, RUNS))}"),
    "capture": (_one_of(*CAPTURES), f"one of {', '.join(map(repr, CAPTURES))}"),
    "sample_id": (
        lambda value: value is None or callable(value) or (isinstance(value, str) and value != ""),
        "a key of the batch or a callable(batch) -> ids",
    ),
    "check_data": (_yes_or_no, "True or False"),
    "dirpath": (lambda value: value is None or _path(value), "a path"),
    "trajectory": (
        lambda value: _path(value) or isinstance(value, Trajectory),
        "a trajectory's directory, or an open Trajectory",
    ),
    "module": (
        lambda value: isinstance(value, torch.nn.Module) and hasattr(value, "training_step"),
        "the LightningModule that was trained",
    ),
    "data": (_data, "a LightningDataModule, a DataLoader, or a collection of them"),
    "val_dataloaders": (
        lambda value: hasattr(value, "val_dataloader") or _loaders(value),
        "a DataLoader, a collection of them, or a LightningDataModule",
    ),
    "device": (_device, 'a device such as "cpu" or "cuda"'),
    "progress": (
        lambda value: isinstance(value, bool) or callable(getattr(value, "task", None)),
        "True, False, or an object with a method `task(description, total)`",
    ),
    "devices": (_whole(1), "an integer of at least 1"),
    "accelerator": (_one_of(*ACCELERATORS), f"one of {', '.join(map(repr, ACCELERATORS))}"),
    "strategy": (_one_of(*STRATEGIES), f"one of {', '.join(map(repr, STRATEGIES))}"),
    "overwrite": (_yes_or_no, "True or False"),
    "disk_budget": _SIZE,
    "memory_budget": (
        lambda value: value == "auto" or _size(value),
        'a number of bytes, a text such as "2GB" or "512MiB", or "auto"',
    ),
    "sample_losses": (_function, "a callable(module, batch) -> [B] tensor"),
    "query_dataloader": (_loaders, "a DataLoader, or a collection of them"),
    "describe": (_function, "a callable(sample) -> dict"),
    "render": (_function, "a callable(sample) -> picture, text or dict"),
    "loss_column": (_yes_or_no, "True or False"),
    "exact": (_yes_or_no, "True or False"),
    "acc": (_yes_or_no, "True or False"),
    "resume": (_yes_or_no, "True or False"),
    "report": (_one_of(*REPORTS), f"one of {', '.join(map(repr, REPORTS))}"),
    "live": (_yes_or_no, "True or False"),
    "console": (_yes_or_no, "True or False"),
    "full_precision": (_yes_or_no, "True or False"),
    "seed": (_whole(0), "an integer of at least 0"),
}
