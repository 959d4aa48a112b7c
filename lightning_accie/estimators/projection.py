"""R: a seeded projection of gradients, one parameter at a time, that goes by the layers' factors.

A weight's gradient G ``[out, in]`` becomes R_l G R_rᵀ ``[k_l, k_r]``, which is R_l ⊗ R_r applied to its
entries, and of a gradient Σ δaᵀ needs only R_lδ and R_ra (Wang et al. 2024, arXiv 2412.09538, project
gradients; by the factors as in Choe et al. 2024, arXiv 2405.13954). Rows of R_l are orthonormal, drawn
uniformly, and scaled by √(out/k_l), so that E[RᵀR] = I: inner products are kept in the mean. A
dimension that is no larger than what is kept of it stays as it is.

| symbol | name |
|---|---|
| R_l, R_r | `Projected.left`, `Projected.right`; None for the identity |
| k, the dimension of all that is kept | `Projection.size` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accie.replay.state import Params


@dataclass(frozen=True)
class Projected:
    """How one parameter is projected.

    Attributes:
        shape: the parameter's.
        left: R_l, ``[k_l, rows]``; of a vector, all of R.
        right: R_r, ``[k_r, columns]``; the parameter's further dimensions are its columns.
        kept: (k_l, k_r).
    """

    shape: tuple[int, ...]
    left: Tensor | None
    right: Tensor | None
    kept: tuple[int, int]

    @property
    def size(self) -> int:
        """The number of its coordinates, k_l k_r."""
        return prod(self.kept)

    def rows(self, vectors: Tensor) -> Tensor:
        """R_l x along the last dimension.

        Args:
            vectors: ``[…, rows]``.

        Returns:
            ``[…, k_l]``.
        """
        return vectors if self.left is None else vectors @ self.left.T

    def columns(self, vectors: Tensor) -> Tensor:
        """R_r x along the last dimension.

        Args:
            vectors: ``[…, columns]``.

        Returns:
            ``[…, k_r]``.
        """
        return vectors if self.right is None else vectors @ self.right.T

    def picked(self, rows: Tensor) -> Tensor:
        """R_l of unit vectors.

        Args:
            rows: ``[…]`` int64, which of the rows is 1.

        Returns:
            ``[…, k_l]``.
        """
        return F.one_hot(rows, self.shape[0]) if self.left is None else self.left.T[rows]

    def whole(self, vectors: Tensor) -> Tensor:
        """Project K vectors of the parameter's shape.

        Args:
            vectors: ``[K, *shape]``.

        Returns:
            ``[K, size]``.
        """
        rows, columns = _matrix(self.shape)
        given = vectors.reshape(len(vectors), rows, columns)
        return (
            self.rows(self.columns(given).transpose(1, 2)).transpose(1, 2).reshape(len(given), -1)
        )

    def directions(self, like: Tensor) -> Tensor:
        """The rows of R as vectors of the parameter's shape.

        Args:
            like: of which type and on which device.

        Returns:
            ``[size, *shape]``.
        """
        rows, columns = _matrix(self.shape)
        left = torch.eye(rows).to(like) if self.left is None else self.left.to(like)
        right = torch.eye(columns).to(like) if self.right is None else self.right.to(like)
        return torch.kron(left, right).reshape(self.size, *self.shape)


class Projection:
    """R.

    Args:
        parts: how each parameter is projected, by name.
    """

    def __init__(self, parts: Mapping[str, Projected]) -> None:
        self.parts = dict(parts)
        self.sizes = {name: part.size for name, part in self.parts.items()}

    @classmethod
    def drawn(
        cls, names: Sequence[str], params: Params, dimension: int | None, seed: int
    ) -> Projection:
        """Draw one.

        Args:
            names: the parameters to keep something of.
            params: parameters, for their shapes.
            dimension: how many coordinates each of them keeps at most; None for all.
            seed: of the draw.

        Returns:
            The projection.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for name in names:
            like = params[name]
            shape = tuple(like.shape)
            rows, columns = _matrix(shape)
            kept = _kept(rows, columns, dimension)
            left, right = (
                None if k == size else _orthonormal(k, size, generator).to(like)
                for k, size in zip(kept, (rows, columns), strict=True)
            )
            parts[name] = Projected(shape, left, right, kept)
        return cls(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(self.parts)

    @property
    def size(self) -> int:
        """The number of coordinates of all."""
        return sum(self.sizes.values())

    def whole(self, vectors: Params) -> Tensor:
        """Project K vectors over the parameters.

        Args:
            vectors: by name, K of them stacked; zero for parameters that are not there.

        Returns:
            ``[K, size]``.
        """
        first = next(iter(vectors.values()))
        return self.joined(
            {n: p.whole(vectors[n]) for n, p in self.parts.items() if n in vectors}, first
        )

    def joined(self, parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Put the coordinates of parameters beside each other.

        Args:
            parts: ``[…, size of the parameter]`` by name; zero for those that are not there.
            like: ``[K, …]``, for the leading dimension where nothing is there.

        Returns:
            ``[…, size]``.
        """
        lead = next(iter(parts.values())).shape[:-1] if parts else like.shape[:1]
        columns = [
            parts[name] if name in parts else like.new_zeros(*lead, size)
            for name, size in self.sizes.items()
        ]
        return torch.cat(columns, -1)

    def split(self, coordinates: Tensor) -> dict[str, Tensor]:
        """Undo `joined`.

        Args:
            coordinates: ``[…, size]``.

        Returns:
            ``[…, size of the parameter]`` by name.
        """
        parts = coordinates.split(list(self.sizes.values()), -1)
        return dict(zip(self.sizes, parts, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """What is drawn, to be kept.

        Returns:
            R_l and R_r by name; nothing where they are the identity.
        """
        sides = (
            (f"{side}/{name}", getattr(part, side))
            for name, part in self.parts.items()
            for side in _SIDES
        )
        return {key: value for key, value in sides if value is not None}

    def to_json(self) -> list[list[Any]]:
        """Describe the parameters.

        Returns:
            Name, shape and (k_l, k_r) of each, as JSON values.
        """
        return [[name, list(part.shape), list(part.kept)] for name, part in self.parts.items()]

    @classmethod
    def of(cls, described: Sequence[Sequence[Any]], tensors: Mapping[str, Tensor]) -> Projection:
        """Read what `tensors` and `to_json` gave.

        Args:
            described: from `to_json`.
            tensors: from `tensors`.

        Returns:
            The projection.

        Raises:
            ValueError: where the two do not fit together.
        """
        parts = {}
        for name, shape, kept in described:
            whole = tuple(shape)
            sides = [tensors.get(f"{side}/{name}") for side in _SIDES]
            for one, k, size in zip(sides, kept, _matrix(whole), strict=True):
                if (one is None) != (k == size) or (one is not None and one.shape != (k, size)):
                    raise ValueError(f"the projection of `{name}` does not fit its shape")
            parts[str(name)] = Projected(whole, sides[0], sides[1], tuple(kept))
        return cls(parts)


_SIDES = ("left", "right")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector is a column."""
    return (shape[0] if shape else 1), prod(shape[1:])


def _kept(rows: int, columns: int, dimension: int | None) -> tuple[int, int]:
    """(k_l, k_r): as even as the matrix allows, of a product of at most ``dimension``."""
    if dimension is None or rows * columns <= dimension:
        return rows, columns
    side = isqrt(dimension)
    if rows <= side or columns == 1:
        rows = min(rows, dimension)
        return rows, min(columns, max(1, dimension // rows))
    if columns <= side:
        return min(rows, max(1, dimension // columns)), columns
    return side, side


def _orthonormal(k: int, size: int, generator: torch.Generator) -> Tensor:
    """``[k, size]``: k orthonormal rows, scaled."""
    drawn = torch.randn(size, k, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    return (basis * triangle.diagonal().sign()).T * (size / k) ** 0.5
