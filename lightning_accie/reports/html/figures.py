"""The figures of the page: a histogram, a scatter, and what samples of one group have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_accie.rendered import clean
from lightning_accie.reports.html.table import own_column
from lightning_accie.scores import InfluenceScores

_BARS_A_SIDE = 25
_MOST_POINTS = 4000
_LABELS = ("label", "labels", "target", "targets", "class", "classes", "y", "category")
_HARMFUL_SHARE = 0.05


@dataclass(frozen=True)
class Group:
    """Samples with one value in a column.

    Attributes:
        value: the value, as a text.
        count: how many samples.
        harmful: the fraction of negative influence.
        mean: mean influence of those that have a finite one; NaN where none has.
        strongest: how many of them are among the most harmful, see `Groups.strongest`.
        loss: mean training loss; NaN where it is unknown.
    """

    value: str
    count: int
    harmful: float
    mean: float
    strongest: int
    loss: float


@dataclass(frozen=True)
class Groups:
    """The groups of a column.

    Attributes:
        column: its name.
        strongest: how many samples count as the most harmful: a twentieth of all, of negative
            influence.
        groups: those with most of the most harmful samples first.
    """

    column: str
    strongest: int
    groups: tuple[Group, ...]


def histogram(scores: InfluenceScores) -> dict[str, Any] | None:
    """Count the samples by their influence.

    Args:
        scores: what was found.

    Returns:
        ``edges`` (one more than there are bars; 0 is one of them) and ``counts``; None where no
        influence is finite, or all are 0.
    """
    known = scores.influence.numpy()
    known = known[np.isfinite(known)]
    largest = float(np.abs(known).max()) if len(known) else 0.0
    if not largest:
        return None
    # Bars stand on one side of 0 each.
    edges = np.linspace(-1.0, 1.0, 2 * _BARS_A_SIDE + 1) * largest
    counts, _ = np.histogram(known, edges)
    some = np.flatnonzero(counts)
    first, last = min(int(some[0]), _BARS_A_SIDE), max(int(some[-1]) + 1, _BARS_A_SIDE)
    return {
        "edges": [float(f"{edge:.4g}") for edge in edges[first : last + 1]],
        "counts": counts[first:last].tolist(),
    }


def scatter(scores: InfluenceScores) -> dict[str, Any] | None:
    """The samples that have both an estimate and an exact figure.

    Args:
        scores: what was found.

    Returns:
        ``points`` (estimate, exact influence and index each; evenly taken by rank where there are too
        many) and ``count``, how many there are; None where no estimate was compared.
    """
    if not any(found.count for found in scores.agreement):
        return None
    ranked = scores.ranked()
    both = (ranked.exact.isfinite() & ranked.estimate.isfinite()).nonzero().flatten()
    if not len(both):
        return None
    shown = both[:: math.ceil(len(both) / _MOST_POINTS)]
    parts = (ranked.estimate[shown], ranked.exact[shown], ranked.index[shown])
    return {
        "points": list(zip(*(part.tolist() for part in parts), strict=True)),
        "count": len(both),
    }


def groups(scores: InfluenceScores) -> list[Groups]:
    """Sum up the samples by every column that has few distinct values.

    Args:
        scores: what was found.

    Returns:
        The groups of each such column, a label's first.
    """
    names = [name for name in scores.columns if name != "sample_id"]
    names.sort(key=lambda name: name.lower() not in _LABELS)
    found = [_groups(scores, name) for name in names]
    return [summary for summary in found if summary is not None]


def _groups(scores: InfluenceScores, name: str) -> Groups | None:
    values = scores.columns[name]
    if not own_column(name, values).get("groups"):
        return None
    order = {value: place for place, value in enumerate(_ordered(values))}
    if not 2 <= len(order) < max(3, len(scores)):
        return None
    codes = np.array([order[value] for value in values])
    influence = scores.influence.numpy()
    most = scores.top_harmful(math.ceil(_HARMFUL_SHARE * len(scores))).index
    strongest = np.isin(scores.index.numpy(), most.numpy())
    losses = _losses(scores)
    made = [
        _group(value, codes == code, influence, strongest, losses) for value, code in order.items()
    ]
    made.sort(key=lambda group: -group.strongest)
    return Groups(clean(name), int(strongest.sum()), tuple(made))


def _group(
    value: Any, inside: np.ndarray, influence: np.ndarray, strongest: np.ndarray, losses: np.ndarray
) -> Group:
    own = influence[inside]
    return Group(
        value="(none)" if value is None else clean(value),
        count=int(inside.sum()),
        harmful=float((own < 0).mean()),
        mean=_mean(own),
        strongest=int(strongest[inside].sum()),
        loss=_mean(losses[inside]),
    )


def _ordered(values: Sequence[Any]) -> list[Any]:
    # Numbers by size, texts by letters, nothing last.
    def key(value: Any) -> tuple[bool, bool, Any]:
        text = not isinstance(value, (int, float))
        return value is None, text, str(value) if text else value

    return sorted(set(values), key=key)


def _losses(scores: InfluenceScores) -> np.ndarray:
    values = scores.columns.get("loss", ())
    if len(values) and all(isinstance(value, (int, float)) for value in values):
        return np.array(values, dtype=np.float64)
    return np.full(len(scores), math.nan)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
