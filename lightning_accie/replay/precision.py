"""The numbers that a run computes in, and how far their rounding may carry a replay.

| ``Trainer(precision=)`` | parameters | forward pass | backward pass |
|---|---|---|---|
| ``32-true`` | float32 | float32 | float32 |
| ``64-true`` | float64 | float64, as the default dtype | float64 |
| ``bf16-mixed`` | float32 | under autocast to bfloat16 | as the forward pass was cast |
| ``16-mixed`` | float32 | under autocast to float16 | the same, on the loss times a scale |

Autocast keeps no cache of cast weights, as Lightning has it: under `torch.func` a cached weight would
belong to another transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Tolerances:
    """How far a faithful replay may be off, where another kernel or device rounds otherwise.

    Attributes:
        loss: relative difference of a loss.
        state: difference of a checkpoint's tensor, relative to its largest entry.
        gradient: relative difference of a gradient that is computed in another way (norms).
        parts: relative difference of two gradients that are to be the same function (norms).
    """

    loss: float
    state: float
    gradient: float
    parts: float


_FULL = Tolerances(loss=1e-4, state=1e-3, gradient=1e-3, parts=1e-4)


def _sixteen_bit(eps: float) -> Tolerances:
    """Tolerances in units of one rounding."""
    # Replacing a forward pass's kernels by others (oneDNN by torch's own, fused attention by its
    # maths form) moved the first gradient of a CNN, a transformer and an LSTM by up to one eps, of
    # bfloat16 and of float16 alike, and its loss, a mean over the batch in float32, by a twentieth
    # of one. A gradient that belongs to something else is off by its own size.
    return Tolerances(loss=eps, state=8 * eps, gradient=8 * eps, parts=8 * eps)


@dataclass(frozen=True)
class Precision:
    """One of `PRECISIONS`.

    Attributes:
        name: as ``Trainer(precision=)`` has it.
    """

    name: str

    @property
    def autocast(self) -> torch.dtype | None:
        """What the forward pass is cast to; None where it is not."""
        return _AUTOCAST.get(self.name)

    @property
    def full(self) -> Precision:
        """The precision of the parameters, without autocast."""
        return Precision("32-true") if self.autocast is not None else self

    @property
    def eps(self) -> float | None:
        """The relative spacing of the numbers of the forward pass; None where the parameters' own."""
        return None if self.autocast is None else torch.finfo(self.autocast).eps

    @property
    def tolerances(self) -> Tolerances:
        """How far a replay may be off."""
        return _FULL if self.eps is None else _sixteen_bit(self.eps)

    @contextmanager
    def context(self, device: str) -> Iterator[None]:
        """Compute as ``training_step`` and ``validation_step`` do under the Trainer.

        Args:
            device: the type of device that computes, ``"cpu"`` or ``"cuda"``.

        Yields:
            Nothing.
        """
        if self.autocast is not None:
            with torch.autocast(device, dtype=self.autocast, cache_enabled=False):
                yield
        elif self.name == "64-true":
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                yield
            finally:
                torch.set_default_dtype(default)
        else:
            yield
