"""Pictures of samples for the loggers."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_accie.images import ReadSample, as_image
from lightning_accie.replay import random_state


def pictures(sample: ReadSample | None, indices: Tensor) -> list[np.ndarray | None]:
    """Read samples as pictures.

    Args:
        sample: reads a sample; None where there are no data at hand.
        indices: ``[k]`` the samples' indices.

    Returns:
        For each sample what `as_image` makes of it. Without pillow, which the loggers need to
        write images, nothing but None, and a warning. The random generators are left as they were.
    """
    if sample is None:
        return [None] * len(indices)
    with random_state.isolated():
        images = [as_image(sample(index)) for index in indices.tolist()]
    if find_spec("PIL") is None and any(image is not None for image in images):
        rank_zero_warn("Samples are not shown as images: that needs pillow (`pip install pillow`).")
        return [None] * len(indices)
    return images
