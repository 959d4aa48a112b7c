"""A sample as an image, where it is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ReadSample = Callable[[int], Any]
"""Gives what the training dataset has at an index."""

_CHANNELS = (1, 3, 4)
_SMALLEST_SIDE = 4
_SHOWN_AT_LEAST = 64
_SHOWN_AT_MOST = 512


def as_image(sample: Any) -> np.ndarray | None:
    """Find the first image in a sample, and make it fit to be shown.

    Tensors and arrays of floats or bytes count as images if their shape is ``[H, W]``,
    ``[C, H, W]`` or ``[H, W, C]`` with 1, 3 or 4 channels and sides of at least 4. Floats within
    0..1 or 0..255 are taken as such, others (normalised images) are stretched from their smallest
    to their largest value. Small images are enlarged, large ones thinned, by a whole factor.

    Args:
        sample: what ``dataset[i]`` gave: an image, or a tuple, list or dict that may hold one.

    Returns:
        ``[H, W, C]`` uint8; None where there is no image.

    Examples:
        >>> as_image((torch.rand(3, 32, 32), 7)).shape
        (64, 64, 3)
        >>> as_image((torch.rand(64), 7)) is None
        True
    """
    for part in _parts(sample):
        image = _from_pillow(part)
        if image is None:
            image = _from_array(part)
        if image is not None:
            return _resized(image)
    return None


def _parts(sample: Any) -> Iterable[Any]:
    if isinstance(sample, Mapping):
        sample = list(sample.values())
    if isinstance(sample, Sequence) and not isinstance(sample, (str, bytes)):
        for part in sample:
            yield from _parts(part)
    else:
        yield sample


def _from_pillow(part: Any) -> np.ndarray | None:
    module = sys.modules.get("PIL.Image")  # an image's class is there wherever an image is
    if module is None or not isinstance(part, module.Image):
        return None
    image = np.asarray(part if part.mode in {"L", "RGB", "RGBA"} else part.convert("RGB"))
    return image[:, :, None] if image.ndim == 2 else image


def _from_array(part: Any) -> np.ndarray | None:
    if isinstance(part, Tensor) and part.is_floating_point():
        part = part.detach().cpu().float().numpy()
    elif isinstance(part, Tensor) and part.dtype == torch.uint8:
        part = part.cpu().numpy()
    if not isinstance(part, np.ndarray) or (part.dtype.kind != "f" and part.dtype != np.uint8):
        return None
    image = _channels_last(part)
    return None if image is None else _as_bytes(image)


def _channels_last(array: np.ndarray) -> np.ndarray | None:
    if array.ndim == 2 and min(array.shape) >= _SMALLEST_SIDE:
        return array[:, :, None]
    if array.ndim != 3:
        return None
    if array.shape[0] in _CHANNELS and min(array.shape[1:]) >= _SMALLEST_SIDE:
        return array.transpose(1, 2, 0)
    if array.shape[2] in _CHANNELS and min(array.shape[:2]) >= _SMALLEST_SIDE:
        return array
    return None


def _as_bytes(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    known = np.isfinite(image)
    if not known.any():
        return np.zeros(image.shape, np.uint8)
    low, high = float(image[known].min()), float(image[known].max())
    image = np.where(known, image, low).astype(np.float64)
    if low < 0 or high > 255 or 1 < high < 128:  # neither 0..1 nor 0..255
        image = (image - low) / (high - low or 1.0)
        high = 1.0
    return np.rint(image * (255 if high <= 1 else 1)).astype(np.uint8)


def _resized(image: np.ndarray) -> np.ndarray:
    side = max(image.shape[:2])
    thin = -(-side // _SHOWN_AT_MOST)
    enlarge = -(-_SHOWN_AT_LEAST // side)
    return image[::thin, ::thin].repeat(enlarge, axis=0).repeat(enlarge, axis=1)
