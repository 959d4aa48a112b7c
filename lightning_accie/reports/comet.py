"""For CometLogger: scalars, the files, tables and pictures of the strongest samples."""

from __future__ import annotations

from typing import Any

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report, as_picture
from lightning_accie.scores import InfluenceScores


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log everything that Comet can show.

    The experiment's assets get ``scores.csv`` and ``report.html`` as they were written beside the
    scores, and the tables ``top_harmful.csv`` and ``top_helpful.csv``; its graphics the pictures.

    Args:
        report: what was found.
        logger: a CometLogger.
        namespace: what names begin with.
    """
    logger.log_metrics(scalars(report.scores, namespace), step=report.step)
    experiment = logger.experiment
    for file in report.files:
        experiment.log_asset(str(file), file_name=f"{namespace}/{file.name}", step=report.step)
    for name, top in report.sides().items():
        _log_table(report, top, experiment, f"{namespace}/{name}.csv")
        for place, image in report.pictures(top).items():
            experiment.log_image(
                as_picture(image), name=f"{namespace}/{name}/{place}", step=report.step
            )


def table(top: InfluenceScores, title: str, logger: Any, name: str, step: int) -> None:
    """Log one table, as an asset of its own for each step.

    Args:
        top: its rows.
        title: not used here: Comet's tables have none.
        logger: a CometLogger.
        name: the asset's name, without the step.
        step: the training step.
    """
    _log_table(Report(top, step), top, logger.experiment, f"{name}/step-{step:06d}.csv")


def _log_table(report: Report, top: InfluenceScores, experiment: Any, name: str) -> None:
    columns = report.table(top)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    if rows:
        experiment.log_table(name, tabular_data=rows, headers=list(columns))
