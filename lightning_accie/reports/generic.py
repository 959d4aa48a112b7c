"""For every other logger: scalars."""

from __future__ import annotations

from typing import Any

from lightning_accie.images import ReadSample
from lightning_accie.reports.metrics import scalars
from lightning_accie.scores import InfluenceScores


def report(
    scores: InfluenceScores,
    logger: Any,
    *,
    step: int,
    top_k: int,
    namespace: str = "influence",
    sample: ReadSample | None = None,
) -> None:
    """Log the scalars.

    Args:
        scores: what was found.
        logger: any Lightning logger.
        step: the training step to log at.
        top_k: not used here.
        namespace: what names begin with.
        sample: not used here.
    """
    logger.log_metrics(scalars(scores, namespace), step=step)
