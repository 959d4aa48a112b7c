"""Checksums of samples, by which a dataset that has changed since training is told.

CRC-32 at memory speed: it finds any change that was not made to deceive it.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from lightning_accie.trajectory.batch_forms import leaves_of


def fingerprint(batch: object, size: int | None) -> np.ndarray:
    """Sum up a batch as a dataloader delivers it.

    Args:
        batch: any nested structure; objects of unknown kinds in it are passed over.
        size: B, how many samples are in it; None where they cannot be told apart.

    Returns:
        ``[B + 1]`` uint32: one sum a sample, of its rows in everything whose leading dimension is the
        batch, and one of all the rest. ``[1]`` without a size.
    """
    sums = [0] * (size or 0)
    rest = 0
    for leaf in leaves_of(batch):
        array = _array(leaf)
        if array is None:
            rest = crc32(repr(leaf).encode("utf-8", "backslashreplace"), rest)
        elif size and array.ndim > 1 and len(array) == size:
            sums = [crc32(row, known) for row, known in zip(array, sums, strict=True)]
        else:
            rest = crc32(array.data, rest)
    return np.array([*sums, rest], dtype=np.uint32)


def _array(leaf: object) -> np.ndarray | None:
    """The bytes of a tensor or array, with its leading dimension in front; None of anything else."""
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided:
            return np.zeros(0, dtype=np.uint8)
        dense = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if dense.numel() == 0:
            return np.zeros(0, dtype=np.uint8)
        rows = len(dense) if dense.dim() else 1
        flat = dense.reshape(-1).view(torch.uint8).numpy()
    elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" and leaf.size:
        rows = len(leaf) if leaf.ndim else 1
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    else:
        return None
    return flat.reshape(rows, -1)
