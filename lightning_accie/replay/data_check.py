"""Whether the training data are those of the recorded run: by their checksums, before anything else.

A replay compares losses, and most changes of a dataset show there. Some do not: a sample whose loss is
the same to rounding, or one that comes so late that much was computed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lightning_accie.errors import ReplayMismatchError
from lightning_accie.replay.batches import Batches
from lightning_accie.trajectory.fingerprints import fingerprint
from lightning_accie.trajectory.records import MicroBatch


def known_size(micro: MicroBatch) -> int | None:
    """The number of samples that a batch's checksums tell apart.

    Args:
        micro: the batch.

    Returns:
        Its size, where it comes from one dataloader.
    """
    return len(micro.pieces[0].indices) if len(micro.pieces) == 1 else None


def compare_data(micros: Iterable[MicroBatch], source: Batches) -> int:
    """Compare batches with the checksums that were taken when they were delivered.

    Args:
        micros: recorded batches; those without checksums are passed over.
        source: what gives them again, as the dataloaders delivered them.

    Returns:
        How many batches were compared.

    Raises:
        ReplayMismatchError: naming the first sample that differs.
    """
    compared = 0
    for micro in micros:
        if micro.prints is None:
            continue
        compared += 1
        found = fingerprint(source.fetch(micro), known_size(micro))
        if not np.array_equal(found, micro.prints):
            raise ReplayMismatchError(_difference(micro, found, source))
    return compared


def _difference(micro: MicroBatch, found: np.ndarray, source: Batches) -> str:
    place = f"batch {micro.batch_idx} of epoch {micro.epoch}"
    what = f"{place[0].upper()}{place[1:]} is"
    if micro.prints is not None and len(found) == len(micro.prints) > 1:
        samples = (found != micro.prints)[:-1].nonzero()[0]
        if len(samples):
            number = int(source.sample_numbers(micro)[samples[0]])
            count = f"{len(samples)} of {len(found) - 1}"
            what = f"Training sample {number} ({place}, in which {count} differ) is"
    return (
        f"{what} not what it was in training: its bytes have another checksum. The dataset, its order "
        "or `collate_fn` changed since, or the data depend on the process that reads them. Pass the "
        'data that the model was trained on, or record with `capture="batches"`. If only rounding '
        "differs (another image decoder), `InfluenceEngine(..., check_data=False)` compares losses "
        "alone."
    )
