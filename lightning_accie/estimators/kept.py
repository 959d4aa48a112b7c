"""Finished parts of an analysis, so that one that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor

Figures = Mapping[str, Tensor]


class Kept(Protocol):
    """Where an estimator's finished parts are kept, under the estimator's name and settings."""

    def parts(self, key: str) -> Sequence[Figures]:
        """Give the parts that an earlier analysis has finished."""
        ...

    def add(self, key: str, part: Figures) -> None:
        """Keep another finished part."""
        ...

    def replace(self, key: str, state: Figures) -> None:
        """Keep the state of work that has no parts, instead of the one before."""
        ...


class NothingKept:
    """Keeps nothing, for those who call estimators themselves."""

    def parts(self, key: str) -> Sequence[Figures]:
        """Give nothing.

        Returns:
            No parts.
        """
        return ()

    def add(self, key: str, part: Figures) -> None:
        """Forget the part."""

    def replace(self, key: str, state: Figures) -> None:
        """Forget the state."""


class Collected:
    """The figures of samples, as they are found.

    Args:
        span: one more than the largest sample number.
    """

    def __init__(self, span: int) -> None:
        self.known = torch.zeros(span, dtype=torch.bool)
        self._figures: dict[str, Tensor] = {}

    def add(self, samples: Tensor, figures: Figures) -> None:
        """Take figures.

        Args:
            samples: ``[c]`` sample numbers.
            figures: ``[c]`` float64 each.
        """
        for name, values in figures.items():
            empty = torch.full(self.known.shape, float("nan"), dtype=torch.float64)
            self._figures.setdefault(name, empty)[samples] = values.double()
        self.known[samples] = True

    def of(self, samples: Tensor) -> dict[str, Tensor]:
        """Give the figures of samples.

        Args:
            samples: ``[k]`` sample numbers, all of them known.

        Returns:
            ``[k]`` float64 each; nothing where no figure is known at all.
        """
        return {name: values[samples] for name, values in self._figures.items()}


class Regularly:
    """Does something once in a while.

    Args:
        seconds: how often.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = monotonic()

    def __call__(self, action: Callable[[], None]) -> None:
        """Do it, if it is time."""
        if monotonic() - self._last >= self.seconds:
            action()
            self._last = monotonic()
