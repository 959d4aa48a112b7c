"""Reading and restoring the generators that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.trajectory.records import RandomState


def capture(*, cuda: torch.device | None = None, host: bool = False) -> dict[str, Tensor]:
    """Read the generators' states.

    Args:
        cuda: also read this device's generator.
        host: also read `random` and `numpy.random`, which costs some ten microseconds.

    Returns:
        The states by generator name, as CPU tensors.
    """
    states = {"torch": torch.get_rng_state()}
    if cuda is not None:
        states["cuda"] = torch.cuda.get_rng_state(cuda)
    if host:
        states["numpy"] = _numpy_state()
        states["python"] = _python_state()
    return states


@dataclass(frozen=True)
class Restorable:
    """Generator states in the form in which their generators take them.

    Made outside of `torch.func`'s transforms, it can be restored inside them.
    """

    cpu: Tensor | None
    cuda: Tensor | None
    numpy: tuple[Any, ...] | None
    python: tuple[Any, ...] | None

    @classmethod
    def of(cls, states: RandomState) -> Restorable:
        """Unpack recorded states.

        Returns:
            The states.
        """
        numpy_state = python_state = None
        if "numpy" in states:
            words = states["numpy"].numpy()
            keys = words[:624].astype(np.uint32)
            cached = float(words[626:].view(np.float64)[0])
            numpy_state = ("MT19937", keys, int(words[624]), int(words[625]), cached)
        if "python" in states:
            words = states["python"].numpy()
            gauss = float(words[626:].view(np.float64)[0]) if words[625] else None
            python_state = (3, tuple(words[:625].tolist()), gauss)
        return cls(states.get("torch"), states.get("cuda"), numpy_state, python_state)

    def restore(self, cuda: torch.device | None = None) -> None:
        """Set the generators; those not recorded stay as they are."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.cuda is not None and cuda is not None:
            torch.cuda.set_rng_state(self.cuda, cuda)
        if self.numpy is not None:
            np.random.set_state(self.numpy)  # noqa: NPY002
        if self.python is not None:
            random.setstate(self.python)


def _numpy_state() -> Tensor:
    state: Any = np.random.get_state()  # noqa: NPY002
    _, keys, position, has_gauss, cached = state
    head = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
    return torch.cat([head, torch.tensor([cached], dtype=torch.float64).view(torch.int64)])


def _python_state() -> Tensor:
    _, internal, gauss = random.getstate()
    head = torch.tensor([*internal, int(gauss is not None)], dtype=torch.int64)
    return torch.cat([head, torch.tensor([gauss or 0.0], dtype=torch.float64).view(torch.int64)])


def equal(left: RandomState, right: RandomState) -> bool:
    """Compare two captures.

    Returns:
        Whether every generator stands where it stood.
    """
    # Ten times faster than `torch.equal`, and this runs at every training step.
    return left.keys() == right.keys() and all(
        left[name].numpy().tobytes() == right[name].numpy().tobytes() for name in left
    )


def seed(number: int, *, cuda: torch.device | None = None) -> None:
    """Seed what `capture` reads, and nothing else: `torch.manual_seed` would seed every GPU as well.

    Args:
        number: the seed.
        cuda: also seed this device's generator.
    """
    torch.default_generator.manual_seed(number)
    if cuda is not None:
        with torch.cuda.device(cuda):
            torch.cuda.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


@contextmanager
def isolated(cuda: torch.device | None = None) -> Iterator[None]:
    """Leave every generator as it was found.

    Yields:
        Nothing.
    """
    states = capture(cuda=cuda, host=True)
    try:
        yield
    finally:
        Restorable.of(states).restore(cuda)
