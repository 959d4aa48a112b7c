"""The table of all samples, as the page's script reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_accie.rendered import clean
from lightning_accie.scores import InfluenceScores

MOST_GROUPS = 60
"""Distinct values up to which a column sorts samples into groups, to choose from and to sum up."""
_EXACT_INTEGERS = 2**53
"""Integers beyond it are no numbers in a browser."""
_DIGITS = 3
"""Of influences, as they are shown: rounded twice they could come out otherwise."""
_LONGEST_CELL = 200


def table(ranked: InfluenceScores) -> dict[str, Any]:
    """The table as JSON values, column by column.

    Args:
        ranked: `InfluenceScores.ranked`.

    Returns:
        ``rows``, and ``columns``: for each its ``name``, its ``kind`` (``"number"`` or ``"text"``),
        whether it is ``own`` to the user, and ``values``; or, where values repeat, ``levels`` and the
        ``codes`` of the rows in them. ``groups`` says that there are few enough to choose from. What
        is unknown is None. Influences have the digits that are shown: rows stand in their exact order.
    """
    columns = [
        _numbers("rank", range(1, len(ranked) + 1)),
        _numbers("sample", ranked.index.tolist()),
        _numbers("influence", _rounded(ranked.influence.tolist(), _DIGITS)),
        _numbers("exact", _rounded(ranked.exact.tolist(), _DIGITS)),
        _numbers("drawn", ranked.visits.tolist()),
        _texts("by", ranked.estimator),
        _texts("trust", ["" if trusted else "?" for trusted in ranked.trusted.tolist()]),
        *(own_column(clean(name), values) for name, values in ranked.columns.items()),
    ]
    return {"rows": len(ranked), "columns": columns}


def own_column(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One of the user's columns.

    Args:
        name: its name.
        values: None, bool, int, float or str.

    Returns:
        The column, as in `table`.
    """
    known = [value for value in values if value is not None]
    if known and all(_is_number(value) for value in known):
        column = _numbers(name, _rounded(values, 6))
        levels = sorted(set(known), key=float)
        few = all(isinstance(value, int) for value in known) and len(levels) <= MOST_GROUPS
        return column | {"own": True} | ({"groups": True} if few else {})
    texts = [None if value is None else _cell(value) for value in values]
    column = _texts(name, texts)
    return column | {"own": True, "groups": len(column["levels"]) <= MOST_GROUPS}


def _numbers(name: str, values: Any) -> dict[str, Any]:
    return {"name": name, "kind": "number", "values": list(values)}


def _texts(name: str, values: Sequence[str | None]) -> dict[str, Any]:
    levels = sorted({value for value in values if value is not None})
    codes = {value: code for code, value in enumerate(levels)}
    return {
        "name": name,
        "kind": "text",
        "levels": levels,
        "codes": [-1 if value is None else codes[value] for value in values],
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _EXACT_INTEGERS)


def _rounded(values: Sequence[Any], digits: int) -> list[Any]:
    return [_round(value, digits) for value in values]


def _round(value: Any, digits: int) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None  # JSON has no NaN


def _cell(value: Any) -> str:
    text = clean(value)
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}…"
