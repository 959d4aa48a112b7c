"""How a ranking shows in a notebook: a table of both ends, and how far to trust it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jinja2 import Environment

if TYPE_CHECKING:
    from lightning_accie.scores import InfluenceScores

_SHOWN = 5
_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<div>
<p>{{ headline }}</p>
{% for title, table in tables %}
<table>
<caption style="text-align: left; caption-side: top; font-weight: bold">{{ title }}</caption>
<thead><tr>
{% for name in table %}<th scope="col">{{ name }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in zip(*table.values()) %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endfor %}
{% for line in trust %}
<p>{{ line }}</p>
{% endfor %}
</div>
"""
)


def html_of(scores: InfluenceScores) -> str:
    """Write the ends of a ranking as an HTML fragment.

    Args:
        scores: the ranking, or a part of one.

    Returns:
        Tables of at most 5 samples each, with the user's columns; all of a ranking's rows where it
        has at most 10.
    """
    query = scores.info.get("query", "the query")
    parts = [
        (f"Most harmful: {query} would be lower without it", scores.top_harmful(_SHOWN)),
        (f"Most helpful: {query} would be higher without it", scores.top_helpful(_SHOWN)),
    ]
    if scores.rank is not None and len(scores) <= 2 * _SHOWN:
        parts = [("", scores)]
    tables = [(title, _cells(top)) for title, top in parts if len(top)]
    trust = [
        f"{found.estimator} against exact replay of {found.count} samples ({found.sample}): Kendall τ "
        f"{found.kendall_tau:.2f}, relative RMSE {found.relative_rmse:.2f}."
        for found in scores.agreement
        if found.sample in ("verified", "random")
    ] or ["No estimate was compared with an exact replay: how far to trust this is not known."]
    return _PAGE.render(headline=repr(scores), tables=tables, trust=trust, zip=zip)


def _cells(top: InfluenceScores) -> dict[str, list[str]]:
    table = top.to_dict()
    shown = ["rank", "index", "influence", "visits", "estimator", *top.columns]
    cells = {name: [_text(value) for value in table[name]] for name in shown}
    cells["note"] = [
        "not to be relied on" if not fine else "" if math.isnan(exact) else "exact"
        for fine, exact in zip(table["trusted"], table["exact_influence"], strict=True)
    ]
    return cells


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
