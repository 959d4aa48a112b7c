"""What a logger is told of an analysis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accie.rendered import Rendered, as_text
from lightning_accie.scores import InfluenceScores

IMAGE = "image"
"""The column for pictures, in the tables of loggers that can show them there."""

_LONGEST_CELL = 120


@dataclass(frozen=True)
class Report:
    """An analysis, and what is shown of the samples in it.

    Attributes:
        scores: what was found.
        step: the training step to log at.
        top_k: samples to show on each side.
        rendered: what is shown of the strongest samples, by index; of none where samples are not shown.
        files: what was written beside the scores, for loggers that keep files.
    """

    scores: InfluenceScores
    step: int
    top_k: int = 25
    rendered: Mapping[int, Rendered] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def sides(self) -> dict[str, InfluenceScores]:
        """Take both ends of the ranking.

        Returns:
            ``top_harmful`` and ``top_helpful``.
        """
        return {
            "top_harmful": self.scores.top_harmful(self.top_k),
            "top_helpful": self.scores.top_helpful(self.top_k),
        }

    def shown(self, top: InfluenceScores) -> list[Rendered]:
        """Tell what is shown of samples.

        Args:
            top: one of the `sides`.

        Returns:
            One a sample, in their order.
        """
        return [self.rendered.get(index, Rendered()) for index in top.index.tolist()]

    def pictures(self, top: InfluenceScores) -> dict[str, np.ndarray]:
        """Take the pictures of samples, for loggers that keep each as a file of its own.

        Args:
            top: one of the `sides`.

        Returns:
            ``[H, W, C]`` uint8, by a name that has the sample's place and index.
        """
        indices = top.index.tolist()
        rows = enumerate(zip(indices, self.shown(top), strict=True), 1)
        return {
            f"{place:02d}-sample-{index}": one.image
            for place, (index, one) in rows
            if one.image is not None
        }

    def table(self, top: InfluenceScores) -> dict[str, list[Any]]:
        """Make a table with typed columns, for loggers whose tables can be sorted.

        Args:
            top: one of the `sides`.

        Returns:
            Values by column: those of `InfluenceScores.to_dict`, ``text`` where samples have one, and
            ``data.NAME`` or ``data[PLACE]`` of their values. What is unknown is None; a column of
            numbers and texts becomes one of texts. Names that the user's columns have taken get a
            ``_``.
        """
        columns = top.to_dict()
        exact = columns["exact_influence"]
        columns["exact_influence"] = [None if math.isnan(figure) else figure for figure in exact]
        shown = self.shown(top)
        if any(one.text for one in shown):
            columns[free_name("text", columns)] = [one.text or None for one in shown]
        names = {name: None for one in shown for name, _ in one.values}
        rows = [dict(one.values) for one in shown]
        for name in names:
            column = free_name(_column(name), columns)
            columns[column] = [row.get(name) for row in rows]
        return {name: _of_one_type(values) for name, values in columns.items()}

    def cells(self, top: InfluenceScores) -> dict[str, list[str]]:
        """Make short columns of text, for loggers whose tables are only looked at.

        Args:
            top: one of the `sides`.

        Returns:
            ``text`` and ``data``, each only where a sample has such.
        """
        shown = self.shown(top)
        found = {
            "text": [_cut(one.text) for one in shown],
            "data": [_cut(_in_a_line(one)) for one in shown],
        }
        return {name: column for name, column in found.items() if any(column)}


def as_picture(image: np.ndarray) -> Any:
    """Make a picture of pillow's, whose values no logger stretches.

    Args:
        image: ``[H, W, C]`` uint8.

    Returns:
        A `PIL.Image.Image`.
    """
    from PIL import Image

    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """Find a name for a column.

    Returns:
        ``name``, with a ``_`` for as long as it is taken.
    """
    while name in taken:
        name += "_"
    return name


def _column(name: str) -> str:
    if not name:
        return "data"
    return f"data{name}" if name.startswith("[") else f"data.{name}"


def _of_one_type(values: list[Any]) -> list[Any]:
    # W&B refuses a column that mixes texts, numbers and booleans, as a user's may.
    kinds = {{int: float}.get(type(value), type(value)) for value in values if value is not None}
    return values if len(kinds) < 2 else [None if v is None else str(v) for v in values]


def _in_a_line(shown: Rendered) -> str:
    values = [(name, as_text(value)) for name, value in shown.values]
    return "; ".join(f"{name}: {value}" if name else value for name, value in values)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CELL else f"{line[: _LONGEST_CELL - 1]}…"
