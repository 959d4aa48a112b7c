"""For WandbLogger: scalars, a histogram, and tables with images of the strongest samples."""

from __future__ import annotations

import math
from typing import Any

from lightning_accie.images import ReadSample
from lightning_accie.reports.media import pictures
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
    """Log everything that W&B can show.

    Args:
        scores: what was found.
        logger: a WandbLogger.
        step: the training step to log at.
        top_k: samples to show on each side.
        namespace: what names begin with.
        sample: reads a training sample, for images.
    """
    import wandb

    figures: dict[str, Any] = dict(scalars(scores, namespace))
    known = scores.influence[scores.influence.isfinite()]
    if len(known):
        figures[f"{namespace}/distribution"] = wandb.Histogram(known.tolist())
    # Before anything that reads the user's data, which may fail.
    logger.log_metrics(figures, step=step)
    tables = {
        f"{namespace}/top_harmful": _table(scores.top_harmful(top_k), sample),
        f"{namespace}/top_helpful": _table(scores.top_helpful(top_k), sample),
    }
    logger.log_metrics(tables, step=step)


def _table(top: InfluenceScores, sample: ReadSample | None) -> Any:
    import wandb

    columns = top.to_dict()
    columns["exact_influence"] = [
        None if math.isnan(figure) else figure for figure in columns["exact_influence"]
    ]
    images = pictures(sample, top.index)
    if any(image is not None for image in images):
        columns["image"] = [None if image is None else _image(image) for image in images]
    columns = {name: _of_one_type(values) for name, values in columns.items()}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return wandb.Table(columns=list(columns), data=rows)


def _of_one_type(values: list[Any]) -> list[Any]:
    # W&B refuses a column that mixes texts, numbers and booleans, as a user's may.
    kinds = {{int: float}.get(type(value), type(value)) for value in values if value is not None}
    return values if len(kinds) < 2 else [None if v is None else str(v) for v in values]


def _image(image: Any) -> Any:
    import wandb
    from PIL import Image

    # As an array, W&B would stretch its values.
    return wandb.Image(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image))
