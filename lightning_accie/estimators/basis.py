"""V: an orthonormal basis of r directions in which changes of the parameters are carried.

| symbol | name |
|---|---|
| V | ``rows``, ``[r, p]``: its r directions are rows here |
| Vᵀx | `Basis.project` |
| Vc | `Basis.combine` |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_accie.replay.state import Params


class Basis:
    """V over the parameters that are trained; it is zero on all others.

    Args:
        rows: ``[r, p]``, orthonormal.
        names: the parameters that the p columns are, in their order.
        params: all parameters, for their shapes.
    """

    def __init__(self, rows: Tensor, names: Sequence[str], params: Params) -> None:
        self.rows = rows
        self.names = tuple(names)
        self._sizes = {name: params[name].numel() for name in names}
        self._params = params
        self.directions = self._unflattened(rows)

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.rows)

    def project(self, vectors: Params) -> Tensor:
        """Vᵀx for K vectors.

        Args:
            vectors: x by parameter name, K of them stacked, for some of the parameters at least;
                it is zero for the others.

        Returns:
            ``[K, r]``.
        """
        parts = self._split(self.rows)
        along = [
            v.reshape(len(v), -1) @ parts[name].T for name, v in vectors.items() if name in parts
        ]
        return torch.stack(along).sum(0)

    def combine(self, coordinates: Tensor) -> Params:
        """Vc for K vectors of coordinates.

        Args:
            coordinates: ``[K, r]``.

        Returns:
            The vectors by name, K of them stacked, for all parameters.
        """
        return self._unflattened(coordinates @ self.rows)

    def overlap(self, names: Iterable[str]) -> Tensor:
        """VᵀPV, with P what keeps only some of the parameters.

        Args:
            names: those that are kept.

        Returns:
            ``[r, r]``.
        """
        parts = self._split(self.rows)
        return torch.stack([parts[name] @ parts[name].T for name in names]).sum(0)

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        """``[K, p]`` by parameter, flat."""
        return dict(zip(self._sizes, rows.split(list(self._sizes.values()), 1), strict=True))

    def _unflattened(self, rows: Tensor) -> Params:
        """``[K, p]`` by parameter; zeros that take no memory for those that are not trained."""
        parts = self._split(rows)
        zero = rows.new_zeros(())
        return {
            name: parts[name].reshape(-1, *value.shape)
            if name in parts
            else zero.expand(len(rows), *value.shape)
            for name, value in self._params.items()
        }


def complete(names: Sequence[str], params: Params) -> Basis:
    """All directions.

    Args:
        names: the parameters that are trained.
        params: all parameters.

    Returns:
        The basis of the unit vectors.
    """
    size = sum(params[name].numel() for name in names)
    like = params[names[0]]
    return Basis(torch.eye(size, dtype=like.dtype, device=like.device), names, params)


def leading(vectors: Tensor, rank: int, names: Sequence[str], params: Params) -> Basis:
    """The leading right singular vectors of a matrix.

    Args:
        vectors: ``[M, p]``.
        rank: how many at most; fewer where the matrix has a lower rank.
        names: the parameters that the columns are.
        params: all parameters.

    Returns:
        Their basis.
    """
    rows = vectors
    for _ in range(2):  # once more, since squaring loses half of the digits
        gram = rows @ rows.T  # M is far smaller than p
        values, left = torch.linalg.eigh(gram.double())
        values, left = values.flip(0)[:rank], left.flip(1)[:, :rank]
        kept = values > values[0] * torch.finfo(rows.dtype).eps * len(rows)
        rows = (left[:, kept] / values[kept].sqrt()).T.to(rows) @ rows
    return Basis(rows, names, params)
