"""Figures of a ranking, for notebooks and papers; by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from lightning_accie.rendered import Render, Rendered, as_text, render_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_accie.images import ReadSample
    from lightning_accie.scores import InfluenceScores

KINDS = ("histogram", "agreement", "examples")
_HARM, _HELP = "#b3261e", "#1b6e3c"
_COLUMNS = 5
_LETTERS, _LINES = 23, 12
"""Of a text in the place of a picture."""


def plot(
    scores: InfluenceScores, kind: str, sample: ReadSample | None, k: int, render: Render | None
) -> Figure:
    """Draw a figure; see `InfluenceScores.plot`.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        RenderError: if ``render`` fails, or returns something else than it should.
        ValueError: if there is no such kind, or nothing to draw.
    """
    try:
        from lightning_accie.notebook_figure import NotebookFigure
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib. Install it with `pip install 'lightning_accie[plot]'`."
        ) from error
    if kind == "examples":
        return _examples(scores, sample, k, render, NotebookFigure)
    size = (5.5, 3.6) if kind == "histogram" else (4.4, 4.2)
    figure = NotebookFigure(figsize=size, layout="constrained")
    if kind == "histogram":
        _histogram(scores, figure.subplots())
    elif kind == "agreement":
        _agreement(scores, figure.subplots())
    else:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"`kind` must be one of {known}, got {kind!r}.")
    return figure


def _unit(scores: InfluenceScores) -> str:
    return str(scores.info.get("query", "the query"))


def _histogram(scores: InfluenceScores, axes: Axes) -> None:
    values = scores.influence[scores.influence.isfinite()].numpy()
    edges = np.histogram_bin_edges(values, bins=60).tolist()
    axes.hist(values[values < 0], edges, color=_HARM, label=f"harms ({(values < 0).sum()})")
    axes.hist(values[values >= 0], edges, color=_HELP, label=f"helps ({(values > 0).sum()})")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel=f"influence on {_unit(scores)}", ylabel="training samples")
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.legend(frameon=False)


def _agreement(scores: InfluenceScores, axes: Axes) -> None:
    both = (scores.exact.isfinite() & scores.estimate.isfinite()).numpy()
    if not both.any():
        raise ValueError(
            "No sample was replayed exactly, so there is nothing to compare the estimates with: use "
            "`verify=` above 0."
        )
    estimate, exact = scores.estimate.numpy()[both], scores.exact.numpy()[both]
    axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle="--")
    axes.scatter(estimate, exact, s=16, c=np.where(exact < 0, _HARM, _HELP))
    axes.set(xlabel="estimated influence", ylabel="by exact replay")
    main = scores.main_agreement
    if main is not None:
        axes.set_title(
            f"{main.estimator}, {main.count} samples: τ {main.kendall_tau:.2f}, "
            f"relative RMSE {main.relative_rmse:.2f}",
            fontsize="medium",
        )


def _examples(
    scores: InfluenceScores,
    sample: ReadSample | None,
    k: int,
    render: Render | None,
    make: Callable[..., Figure],
) -> Figure:
    if sample is None:
        raise ValueError(
            '`plot("examples")` needs the samples: pass `sample=dataset.__getitem__`, or an engine\'s '
            "`sample`."
        )
    sides = [("harmful", scores.top_harmful(k)), ("helpful", scores.top_helpful(k))]
    sides = [(name, top) for name, top in sides if len(top)]
    numbers = [index for _, top in sides for index in top.index.tolist()]
    shown = render_samples(sample, numbers, render)
    if not any(one.image is not None or one.text or one.values for one in shown.values()):
        raise ValueError(
            "The samples hold nothing to show. Pass `render=`, which makes a picture, a text or a dict "
            "of one; `to_pandas()` shows their columns."
        )
    lines = [-(-len(top) // _COLUMNS) for _, top in sides]
    size = (1.5 * _COLUMNS, 1.9 * sum(lines) + 0.5 * len(lines))
    figure = make(figsize=size, layout="constrained")
    parts = figure.subfigures(len(sides), 1, height_ratios=lines, squeeze=False)[:, 0]
    for part, (name, top), count in zip(parts, sides, lines, strict=True):
        part.suptitle(f"Most {name}", fontsize="medium")
        grid = part.subplots(count, _COLUMNS, squeeze=False).ravel()
        for place, axes in enumerate(grid):
            axes.axis("off")
            if place < len(top):
                _example(axes, top, place, shown[int(top.index[place])])
    return figure


def _example(axes: Axes, top: InfluenceScores, place: int, shown: Rendered) -> None:
    if shown.image is not None:
        grey = shown.image.shape[-1] == 1
        axes.imshow(shown.image.squeeze(), cmap="gray" if grey else None)
    else:
        values = [f"{name}: {as_text(value)}" for name, value in shown.values]
        words = [*shown.text.splitlines(), *values]
        lines = "\n".join(fill(line, _LETTERS) for line in words).splitlines()
        cut = lines[:_LINES] if len(lines) <= _LINES else [*lines[: _LINES - 1], "…"]
        # As it is: a dollar sign is no formula.
        axes.text(0, 1, "\n".join(cut), fontsize=6, va="top", parse_math=False)
    label = top.columns.get("label")
    text = f"{int(top.index[place])}" + ("" if label is None else f" · {label[place]}")
    axes.set_title(f"{text}\n{float(top.influence[place]):+.2g}", fontsize="small")
