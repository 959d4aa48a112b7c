"""For every other logger: scalars."""

from __future__ import annotations

from typing import Any

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log the scalars.

    Args:
        report: what was found.
        logger: any Lightning logger.
        namespace: what names begin with.
    """
    logger.log_metrics(scalars(report.scores, namespace), step=report.step)
