"""The network's outputs, as they enter the losses of the user's own training step.

A step's loss is a function of what the network gives to ``F.cross_entropy(input, target)`` and the
like, its outputs f: L(θ) = Σ_i ℓ_i(f_i(θ)). With J_i = ∂f_i/∂θ, e_i = ∂ℓ_i/∂f_i and S_i = ∂²ℓ_i/∂f_i²,

    g_i = J_iᵀe_i       H_i ≈ J_iᵀS_iJ_i       (Gauss-Newton)

exact where f is linear in θ. J times a direction concerns all samples of a batch at once, and what is
each sample's own comes after it, in the few dimensions of the outputs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_accie.replay.loss_form import Layout


class Outputs(NamedTuple):
    """What entered one of the step's losses."""

    value: Tensor
    """f, with its graph."""
    layout: Layout
    """Which of its rows are whose."""
    batch: int
    """B."""

    def rows(self, values: Tensor) -> Tensor:
        """Gather what belongs to each sample.

        Args:
            values: ``[K, …]``, K of the shape of f.

        Returns:
            ``[K, B, D]``, the D numbers of each sample's outputs.
        """
        count = len(values)
        if self.layout.order == "interleaved":
            values = values.reshape(count, -1, self.batch, *values.shape[2:]).transpose(1, 2)
        return values.reshape(count, self.batch, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo `rows`.

        Args:
            rows: ``[K, B, D]``.

        Returns:
            ``[K, …]``, K of the shape of f.
        """
        if self.layout.order == "interleaved":
            rows = rows.reshape(len(rows), self.batch, -1, *self.value.shape[1:]).transpose(1, 2)
        return rows.reshape(len(rows), *self.value.shape)
