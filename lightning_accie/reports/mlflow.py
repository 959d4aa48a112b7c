"""For MLFlowLogger: scalars, the files, tables and pictures of the strongest samples."""

from __future__ import annotations

from typing import Any

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report
from lightning_accie.scores import InfluenceScores


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log everything that MLflow can show.

    The run's artifacts get ``scores.csv`` and ``report.html`` as they were written beside the scores,
    ``top_harmful.json`` and ``top_helpful.json`` as tables, and the pictures of the samples in them,
    called by their place, all in a folder of the namespace's name.

    Args:
        report: what was found.
        logger: an MLFlowLogger.
        namespace: what the names of metrics begin with, and the folder's name.
    """
    logger.log_metrics(scalars(report.scores, namespace), step=report.step)
    client, run = logger.experiment, logger.run_id
    for file in report.files:
        client.log_artifact(run, str(file), namespace)
    for name, top in report.sides().items():
        if len(top):
            client.log_table(run, report.table(top), f"{namespace}/{name}.json")
        for place, image in report.pictures(top).items():
            client.log_image(run, image, artifact_file=f"{namespace}/{name}/{place}.png")


def table(top: InfluenceScores, title: str, logger: Any, name: str, step: int) -> None:
    """Log one table, as an artifact of its own for each step.

    Args:
        top: its rows.
        title: not used here: MLflow's tables have none.
        logger: an MLFlowLogger.
        name: the artifact's path, without the step.
        step: the training step.
    """
    data = Report(top, step).table(top)
    logger.experiment.log_table(logger.run_id, data, f"{name}/step-{step:06d}.json")
