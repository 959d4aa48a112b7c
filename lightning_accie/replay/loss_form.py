"""How a step's loss splits into the samples' own terms: which reductions carry sample weights, and how.

A reduction's elements belong to samples along one of their dimensions, of length n·B:

| order | element r belongs to sample | as in |
|---|---|---|
| ``"single"`` | r (n is 1) | ``logits`` ``[B, C]`` |
| ``"blocked"`` | r // n: all that is the first sample's, then the next one's | ``reshape(B·T, C)`` |
| ``"interleaved"`` | r % B: one of every sample, then the next of each | ``reshape(T·B, C)`` |

With several training loaders a reduction may be over one loader's samples alone; ``source`` names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BY_HAND = ("no", "whole", "partial")
"""Which reductions by hand carry weights: none, ``x.mean()``, or ``x.mean(dim)`` as well."""


class Layout(NamedTuple):
    """Where a reduction's elements keep their samples: the dimension, the order, the loader."""

    axis: int = 0
    order: str = "single"
    source: int | None = None

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Tell whether elements of this shape can be laid out so, for ``batch`` samples.

        Returns:
            Whether they can. What a batch of one sample reduces is all that sample's.
        """
        if batch == 1:
            return True
        length = shape[self.axis] if self.axis < len(shape) else 0
        if self.order == "single":
            return length == batch
        return batch > 0 and length > 0 and length % batch == 0

    def owners(self, shape: Sequence[int], batch: int) -> Tensor:
        """The sample of every index along ``axis``.

        Returns:
            ``[n·B]`` int64, places in the batch.
        """
        places = torch.arange(shape[self.axis])
        if self.order == "interleaved":
            return places % batch
        return places // max(1, shape[self.axis] // batch)

    def spread(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """Give every element its sample's weight.

        Args:
            weights: ``[B]``.
            shape: the elements' shape.

        Returns:
            The weights, in a shape that broadcasts against the elements.
        """
        along = weights[self.owners(shape, len(weights)).to(weights.device)]
        return along.reshape(-1, *[1] * (len(shape) - self.axis - 1))

    def per_sample(self, elements: Tensor, batch: int) -> Tensor:
        """Add up each sample's elements.

        Args:
            elements: what is reduced.
            batch: B.

        Returns:
            ``[B]``.
        """
        if batch == 1:
            return elements.reshape(1, -1).sum(1)
        rows = elements.movedim(self.axis, 0) if self.axis else elements
        if self.order == "interleaved":
            rows = rows.reshape(-1, batch, *rows.shape[1:]).transpose(0, 1)
        return rows.reshape(batch, -1).sum(1)


ROWS = Layout()


@dataclass(frozen=True)
class LossForm:
    """How the returned loss splits into per-sample parts; found by the first-step self-check.

    Attributes:
        hand_written: which reductions by hand carry sample weights too, one of `BY_HAND`.
        excluded: reductions, by ordinal, that carry none: they do not depend on the data, or are
            made of others that do.
        layouts: by ordinal, how a reduction's elements belong to samples, where that was proven. A
            reduction without one has a row a sample.
        penalty: whether a part R(θ) belongs to no sample.
    """

    hand_written: str = "no"
    excluded: frozenset[int] = frozenset()
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    penalty: bool = False

    def to_json(self) -> dict[str, Any]:
        """Describe the form for a trajectory's header.

        Returns:
            JSON values.
        """
        return {
            "hand_written": self.hand_written,
            "excluded": sorted(self.excluded),
            "layouts": [[place, *layout] for place, layout in sorted(self.layouts.items())],
            "penalty": self.penalty,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LossForm:
        """Read what `to_json` wrote, also in the first release, which had ``hand_written`` as a bool.

        Returns:
            The form.
        """
        by_hand = values["hand_written"]
        if isinstance(by_hand, bool):
            by_hand = "whole" if by_hand else "no"
        layouts = {place: Layout(*layout) for place, *layout in values.get("layouts", [])}
        return cls(by_hand, frozenset(values["excluded"]), layouts, values["penalty"])
