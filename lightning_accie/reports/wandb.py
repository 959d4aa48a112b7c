"""For WandbLogger: scalars, a histogram, and tables with what is shown of the strongest samples."""

from __future__ import annotations

from typing import Any

from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import IMAGE, Report, as_picture, free_name
from lightning_accie.scores import InfluenceScores


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log everything that W&B can show.

    Args:
        report: what was found.
        logger: a WandbLogger.
        namespace: what names begin with.
    """
    import wandb

    scores = report.scores
    figures: dict[str, Any] = dict(scalars(scores, namespace))
    known = scores.influence[scores.influence.isfinite()]
    if len(known):
        figures[f"{namespace}/distribution"] = wandb.Histogram(known.tolist())
    figures |= {f"{namespace}/{name}": _table(report, top) for name, top in report.sides().items()}
    logger.log_metrics(figures, step=report.step)


def table(top: InfluenceScores, title: str, logger: Any, name: str, step: int) -> None:
    """Log one table.

    Args:
        top: its rows.
        title: not used here: W&B's tables have none.
        logger: a WandbLogger.
        name: its key.
        step: the training step to log at.
    """
    logger.log_metrics({name: _table(Report(top, step), top)}, step=step)


def _table(report: Report, top: InfluenceScores) -> Any:
    import wandb

    columns = report.table(top)
    images = [one.image for one in report.shown(top)]
    if any(image is not None for image in images):
        pictures = [None if image is None else wandb.Image(as_picture(image)) for image in images]
        columns = {free_name(IMAGE, columns): pictures, **columns}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return wandb.Table(columns=list(columns), data=rows)
