"""Data value embeddings: a vector a sample, whose product with a query's gradient is its influence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_accie.estimators.projection import Projection
from lightning_accie.replay.state import Params


@dataclass(frozen=True)
class Embeddings:
    """E: what leaving each sample out does to the trained parameters, in R's coordinates.

    Attributes:
        samples: ``[n]`` int64, sample numbers, ascending.
        values: ``[n, k]``, R Δ_i.
        projection: R.
    """

    samples: Tensor
    values: Tensor
    projection: Projection

    def influence(self, gradients: Params) -> Tensor:
        """⟨R∇q, RΔ_i⟩ for K queries at once.

        Args:
            gradients: ∇q(θ_T) by parameter name, K of them stacked.

        Returns:
            ``[K, n]`` float64, in units of the query; positive where leaving the sample out raises it.
        """
        return self.products(self.projection.whole(gradients))

    def products(self, along: Tensor) -> Tensor:
        """The same from gradients that are projected already.

        Args:
            along: ``[K, k]``, R∇q.

        Returns:
            ``[K, n]`` float64.
        """
        return (self.values @ along.to(self.values).T).T.double().cpu().contiguous()

    def influence_on(self, gradient: Params) -> Tensor:
        """The same for one query.

        Args:
            gradient: ∇q(θ_T) by parameter name.

        Returns:
            ``[n]`` float64.
        """
        return self.influence({name: value[None] for name, value in gradient.items()})[0]
