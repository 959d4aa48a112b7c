"""For NeptuneLogger: scalars, the files, tables and pictures of the strongest samples."""

from __future__ import annotations

import csv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report, as_picture
from lightning_accie.scores import InfluenceScores


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log everything that Neptune can show.

    Args:
        report: what was found.
        logger: a NeptuneLogger (Lightning has one before 2.6).
        namespace: what names begin with, under the logger's own prefix for metrics.
    """
    logger.log_metrics(scalars(report.scores, namespace), step=report.step)
    run = logger.experiment
    for file in report.files:
        _upload(run, f"{namespace}/{file.stem}", file)
    with TemporaryDirectory() as directory:
        for name, top in report.sides().items():
            _upload_table(report, top, run, f"{namespace}/{name}/table", Path(directory))
            for place, image in report.pictures(top).items():
                file = Path(directory) / f"{place}.png"
                as_picture(image).save(file)
                _upload(run, f"{namespace}/{name}/{place}", file)


def table(top: InfluenceScores, title: str, logger: Any, name: str, step: int) -> None:
    """Log one table, at a path of its own for each step.

    Args:
        top: its rows.
        title: not used here: Neptune shows the file.
        logger: a NeptuneLogger.
        name: the path, without the step.
        step: the training step.
    """
    with TemporaryDirectory() as directory:
        path = f"{name}/step-{step:06d}"
        _upload_table(Report(top, step), top, logger.experiment, path, Path(directory))


def _upload_table(
    report: Report, top: InfluenceScores, run: Any, path: str, directory: Path
) -> None:
    if not len(top):
        return
    columns = report.table(top)
    file = directory / "table.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([list(columns), *zip(*columns.values(), strict=True)])
    _upload(run, path, file)


def _upload(run: Any, path: str, file: Path) -> None:
    # Neptune uploads in the background: the file may be gone by then.
    run[path].upload(str(file), wait=True)
