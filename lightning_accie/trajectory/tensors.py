"""Tensors and a JSON value as the bytes of one safetensors file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

_META = "lightning_accie"
"""The one key of the file's own metadata, under which the JSON text stands."""


def dump(tensors: Mapping[str, Tensor], meta: Any) -> bytes:
    """Write tensors and ``meta`` as a safetensors file's bytes.

    Views of one storage (tied weights) are written separately.

    Args:
        tensors: dense tensors of any shape, on any device, by name.
        meta: a JSON value; NaN and infinities may stand in it.

    Returns:
        The content of the file.

    Raises:
        TypeError: for a tensor or a value that such a file cannot hold.
    """
    text = json.dumps(meta, separators=(",", ":"))
    try:
        return save_safetensors(_separate(tensors), metadata={_META: text})
    except (KeyError, ValueError) as error:  # an unknown dtype, a sparse tensor
        raise TypeError(f"these tensors do not fit a safetensors file: {error}") from error


def load(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """Read what `dump` wrote.

    Args:
        data: the content of a file.

    Returns:
        The tensors by name, on the CPU, and the JSON value.

    Raises:
        ValueError: where ``data`` is not such a file.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load_safetensors(data), json.loads(header["__metadata__"][_META])
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not one of this package's safetensors files: {error!r}") from error


def smallest(values: ArrayLike) -> Tensor:
    """Integers as a tensor of the smallest type that holds them all.

    Args:
        values: ``[n]`` integers.

    Returns:
        ``[n]``, of type uint8, uint16, int16, int32 or int64.

    Raises:
        TypeError: where they are no integers.
        OverflowError: where one does not fit int64.

    Examples:
        >>> smallest([0, 255]).dtype, smallest([50_000]).dtype, smallest([-1]).dtype
        (torch.uint8, torch.uint16, torch.int16)
    """
    array = np.asarray(values)
    if array.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if array.dtype.kind not in "iu":
        raise TypeError(f"expected integers, not {array.dtype}")
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint8, np.uint16, np.int16, np.int32, np.int64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return torch.from_numpy(array.astype(dtype))
    raise OverflowError(f"{high} does not fit an integer of 64 bits")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors takes contiguous tensors only, and refuses two that overlap in memory.
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu()
        if dense.layout == torch.strided:
            dense = dense.resolve_conj().resolve_neg().contiguous()
            storage = dense.untyped_storage().data_ptr()
            dense = dense.clone() if storage in storages else dense
            storages.add(storage)
        separate[name] = dense
    return separate
