"""Leaving terms of ACC-SGD-IE out, to make it cheaper (arXiv 2510.26185; method: section 6).

    Δ <- (I - η c_t H_t)Δ + 1[j ∈ S_t] (η/|m|)(g_j + o_{j,t} H_j Δ)

ACC-SGD-IE has c_t = o_{j,t} = 1 everywhere. With all o_{j,t} = 0 what is left is SGD-IE,
carried forwards.

| symbol | name |
|---|---|
| c_t | `Thinning.curvature`: the length of a segment of ``every_k_steps`` at one step of it, else 0 |
| o_{j,t} | `Thinning.own`: 1/ρ with probability ρ, so that its mean is 1; 0 outside the chosen steps |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.replay.walker import Visit

Span = range | Sequence[int] | None


@dataclass(frozen=True)
class Thinning:
    """Which terms are computed.

    Attributes:
        every_k_steps: the curvature of one step stands for so many.
        probability: ρ, with which a sample's own correction is applied at a visit.
        steps: the steps at which corrections are applied at all; None for all.
        epochs: the epochs, likewise.
        seed: of the choice at random.
    """

    every_k_steps: int = 1
    probability: float = 1.0
    steps: range | None = None
    epochs: range | None = None
    seed: int = 0

    @classmethod
    def of(
        cls, every_k_steps: int, probability: float, steps: Span, epochs: Span, seed: int
    ) -> Thinning:
        """Validate the arguments of `AccSgdIE`.

        Returns:
            What they ask for.

        Raises:
            ValueError: for the first that will not do, naming it and its value.
        """
        for name, value, least in (("every_k_steps", every_k_steps, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        number = isinstance(probability, Real) and not isinstance(probability, bool)
        if not number or not 0.0 < probability <= 1.0:
            raise ValueError(
                "`correction_probability` must be above 0 and at most 1, got "
                f"{probability!r}. `correction_steps=(0, 0)` leaves every correction out."
            )
        spans = _span("correction_steps", steps), _span("correction_epochs", epochs)
        return cls(every_k_steps, float(probability), *spans, seed)

    def to_json(self) -> dict[str, Any]:
        """Describe what differs from ACC-SGD-IE as it is.

        Returns:
            JSON values by the names of the arguments.
        """
        found: dict[str, Any] = {}
        if self.every_k_steps > 1:
            found["every_k_steps"] = self.every_k_steps
        if self.probability < 1.0:
            found.update(correction_probability=self.probability, seed=self.seed)
        for name, span in (("correction_steps", self.steps), ("correction_epochs", self.epochs)):
            if span is not None:
                found[name] = [span.start, span.stop, span.step]
        return found

    def curvature(self, step: int, total: int) -> float:
        """c_t: the middle step of each segment stands for all of it.

        Args:
            step: t.
            total: how many steps the run has.

        Returns:
            The factor; 0 where the product H_tΔ is not computed.
        """
        begin = step - step % self.every_k_steps
        length = min(self.every_k_steps, total - begin)
        return float(length) if step == begin + length // 2 else 0.0

    def own(self, visit: Visit, samples: Tensor) -> Tensor | None:
        """o_{j,t}. A sample's draw depends on the step and the seed alone, not on those beside it.

        Args:
            visit: step t.
            samples: ``[K]`` sample numbers.

        Returns:
            ``[K]`` factors, which matter for those that the step drew; None where all are 1.
        """
        outside = self.steps is not None and visit.step not in self.steps
        if outside or (self.epochs is not None and visit.epoch not in self.epochs):
            return torch.zeros(len(samples))
        if self.probability == 1.0:
            return None
        drawn = np.random.default_rng((self.seed, visit.step)).random(len(visit.map.samples))
        applied = torch.from_numpy(drawn < self.probability)
        place = (visit.map.samples[None, :] == samples[:, None]).int().argmax(1)
        return applied[place] / self.probability


def _span(name: str, given: Span) -> range | None:
    """A range, or a pair (first, one after the last)."""
    if given is None or isinstance(given, range):
        return given
    pair = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if len(pair) != 2 or not all(type(end) is int and end >= 0 for end in pair):
        raise ValueError(
            f"`{name}` must be a range or a pair (first, one after the last), got {given!r}."
        )
    return range(*pair)
