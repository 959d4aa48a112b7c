"""For TensorBoardLogger: scalars, tables, a histogram, and pictures of the strongest samples."""

from __future__ import annotations

import re
from typing import Any

from lightning_accie.rendered import clean
from lightning_accie.reports import words
from lightning_accie.reports.metrics import scalars
from lightning_accie.reports.report import Report
from lightning_accie.scores import InfluenceScores

_TOLD = 3
"""Columns of the user's that stand in an image's name."""


def report(report: Report, logger: Any, namespace: str) -> None:
    """Log everything that TensorBoard can show.

    Images are called by their place, which is ``#`` in the tables, and by what stands there beside it
    (``top_harmful/01 sample 724 -4.74e-03 label=8``).

    Args:
        report: what was found.
        logger: a TensorBoardLogger.
        namespace: what names begin with.
    """
    scores, step = report.scores, report.step
    logger.log_metrics(scalars(scores, namespace), step=step)
    writer = logger.experiment
    trust = "\n".join(f"* {_escaped(line.strip())}" for line in words.trust(scores))
    reserves = "".join(f"**{_escaped(line)}**\n\n" for line in words.reserves(scores))
    headline = _escaped(words.headline(scores))
    writer.add_text(f"{namespace}/summary", f"{headline}\n\n{reserves}{trust}", step)
    known = scores.influence[scores.influence.isfinite()]
    if len(known):
        writer.add_histogram(f"{namespace}/distribution", known.numpy(), step)
    titles = {"top_harmful": words.harmful_title, "top_helpful": words.helpful_title}
    sides = report.sides()
    for name, top in sides.items():
        table = _markdown(titles[name](scores), top, report.cells(top))
        writer.add_text(f"{namespace}/{name}", table, step)
    for name, top in sides.items():
        for shown, row in zip(report.shown(top), words.cells(top), strict=True):
            if shown.image is not None:
                tag = f"{namespace}/{name}/{_caption(row, top)}"
                writer.add_image(tag, shown.image, step, dataformats="HWC")
    writer.flush()


def table(top: InfluenceScores, title: str, logger: Any, name: str, step: int) -> None:
    """Log one table.

    Args:
        top: its rows.
        title: what stands above it.
        logger: a TensorBoardLogger.
        name: its tag.
        step: the training step to log at.
    """
    logger.experiment.add_text(name, _markdown(title, top, {}), step)
    logger.experiment.flush()


def _caption(row: list[str], top: InfluenceScores) -> str:
    place, index, influence, *_ = row
    own = zip(top.columns, row[len(words.COLUMNS) :], strict=True)
    told = [f"{clean(name)}={value}" for name, value in own if value]
    return " ".join([f"{int(place):02d} sample {index} {influence}", *told[:_TOLD]])


def _markdown(title: str, top: InfluenceScores, shown: dict[str, list[str]]) -> str:
    header = [*words.COLUMNS, *(clean(name) for name in top.columns), *shown]
    rows = zip(words.cells(top), *shown.values(), strict=True)
    lines = [header, *([*row, *of_the_sample] for row, *of_the_sample in rows)]
    lines = [[_escaped(cell) for cell in line] for line in lines]
    lines.insert(1, ["---"] * len(header))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_escaped(title)}\n\n{table}\n\n{words.LEGEND}"


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
