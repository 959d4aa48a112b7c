"""For CSVLogger: scalars among its metrics, and the whole table beside them."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.namespaces import numbered
from lightning_accie.reports.report import Report
from lightning_accie.scores_files import CSV_FILE


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log the scalars, and write ``scores.csv`` into the logger's directory.

    Args:
        report: what was found; the table has every sample.
        logger: a CSVLogger.
        namespace: what names begin with; a further run's file is ``scores-1.csv``, and so on.
    """
    logger.log_metrics(scalars(report.scores, namespace), step=report.step)
    logger.save()  # the file otherwise waits for more metrics
    files = get_filesystem(logger.log_dir)  # which may be remote
    path = f"{logger.log_dir}/{numbered(CSV_FILE, namespace)}"
    with files.open(path, "w", newline="", encoding="utf-8") as file:
        report.scores.to_csv(file)
