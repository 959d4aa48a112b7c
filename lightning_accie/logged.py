"""What a module logs, caught instead of sent to its Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_accie.errors import QueryError


@dataclass(frozen=True)
class Logged:
    """One call of ``self.log``.

    Attributes:
        value: what was logged.
        batch_size: the argument of that name.
        reduce_fx: how the values of an epoch's batches are reduced.
    """

    value: Any
    batch_size: int | None
    reduce_fx: Any

    def weight(self, name: str, batch: Any) -> float:
        """The weight of this batch in the epoch's value.

        Args:
            name: what it is logged as.
            batch: the batch.

        Returns:
            As `WeightedMean.add` takes it.

        Raises:
            QueryError: if the epoch's value is neither a mean nor a sum.
        """
        if self.reduce_fx in ("sum", torch.sum):
            return SUM
        if self.reduce_fx not in ("mean", "avg", torch.mean):
            raise QueryError(
                f"`{name}` is logged with `reduce_fx={self.reduce_fx!r}`; only the mean and "
                "the sum over batches can be measured. Pass a callable `monitor(module, batch)`."
            )
        return float(self.batch_size or extract_batch_size(batch))


SUM = -1.0
"""The weight of a value that is added up instead of averaged."""

_LOG = inspect.signature(LightningModule.log)
_LOG_DICT = inspect.signature(LightningModule.log_dict)


class LogCatcher:
    """Stands for ``log`` and ``log_dict`` of a copied module."""

    def __init__(self) -> None:
        self.logged: dict[str, list[Logged]] = {}
        """What one step logged, by the names that Lightning gives it."""
        self.seen: set[str] = set()
        """The names of all steps."""
        self.suffix = ""

    def begin(self, suffix: str) -> None:
        """Forget the last step; ``suffix`` is what Lightning adds to names, for several loaders."""
        self.logged.clear()
        self.suffix = suffix

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Stand for `LightningModule.log`."""
        given = _LOG.bind(self, *args, **kwargs)
        given.apply_defaults()
        self._keep(given.arguments["name"], given.arguments["value"], given.arguments)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Stand for `LightningModule.log_dict`."""
        given = _LOG_DICT.bind(self, *args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments["dictionary"].items():
            self._keep(name, value, given.arguments)

    def _keep(self, name: str, value: Any, settings: Mapping[str, Any]) -> None:
        key = name + self.suffix if settings["add_dataloader_idx"] else name
        entry = Logged(value, settings["batch_size"], settings["reduce_fx"])
        self.logged.setdefault(key, []).append(entry)
        self.seen.add(key)


class WeightedMean:
    """The mean over batches by weight, or their sum."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.weight = 0.0

    def add(self, value: Any, weight: float) -> None:
        """Take a batch's value; ``weight`` is its size, or `SUM`."""
        if weight == SUM:
            self.total, self.weight = self.total + value, SUM
        else:
            self.total, self.weight = self.total + value * weight, self.weight + weight

    def result(self) -> Any:
        """The mean, or the sum."""
        return self.total / abs(self.weight)
