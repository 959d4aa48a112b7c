"""For CSVLogger: scalars among its metrics, and the whole table beside them."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_accie.images import ReadSample
from lightning_accie.reports.metrics import scalars
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import CSV_FILE


def report(
    scores: InfluenceScores,
    logger: Any,
    *,
    step: int,
    top_k: int,
    namespace: str = "influence",
    sample: ReadSample | None = None,
) -> None:
    """Log the scalars, and write ``scores.csv`` into the logger's directory.

    Args:
        scores: what was found.
        logger: a CSVLogger.
        step: the training step to log at.
        top_k: not used here: the table has every sample.
        namespace: what names begin with.
        sample: not used here.
    """
    logger.log_metrics(scalars(scores, namespace), step=step)
    logger.save()  # the file otherwise waits for more metrics
    files = get_filesystem(logger.log_dir)  # which may be remote
    with files.open(f"{logger.log_dir}/{CSV_FILE}", "w", newline="", encoding="utf-8") as file:
        scores.to_csv(file)
