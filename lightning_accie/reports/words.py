"""What every report says, in the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_accie.agreement import Agreement
from lightning_accie.rendered import clean
from lightning_accie.scores import InfluenceScores

COLUMNS = ("#", "sample", "influence", "exact", "visits")
"""Of the tables of strongest samples; the user's own columns follow."""

LEGEND = "exact: ✓ = replayed without it, blank = an estimate, ? = one not to rely on"

_LONGEST_CELL = 28
_IN_A_LINE = 5
_ENOUGH = 8
"""Samples that it takes to tell an order from chance."""
_ENDS = 5
"""Samples at an end below which one more or less in common says nothing."""


def headline(scores: InfluenceScores) -> str:
    """Say what was measured.

    Returns:
        A sentence.
    """
    info = scores.info
    value = f" = {info['query_value']:.4g}" if "query_value" in info else ""
    steps = f" over {info['steps']} training steps" if "steps" in info else ""
    best = ", up to the best checkpoint" if info.get("at") == "best" else ""
    return f"Influence of {len(scores)} training samples on {query(scores)}{value}{steps}{best}"


def query(scores: InfluenceScores) -> str:
    """Name what influence is measured on.

    Returns:
        The query's name.
    """
    return clean(scores.info.get("query", "the query"))


def harmful_title(scores: InfluenceScores) -> str:
    """Say what a negative influence means.

    Returns:
        A table's title.
    """
    return f"Most harmful: {query(scores)} would be lower without it"


def helpful_title(scores: InfluenceScores) -> str:
    """Say what a positive influence means.

    Returns:
        A table's title.
    """
    return f"Most helpful: {query(scores)} would be higher without it"


def live_title(scores: InfluenceScores) -> str:
    """Say what a ranking of the latest steps alone means.

    Args:
        scores: of `LiveView`.

    Returns:
        A table's title.
    """
    first, last = scores.info["window"]
    return (
        f"Most harmful in steps {first} to {last}: without it in these steps {query(scores)}, now "
        f"{scores.info['query_value']:.4g}, would be lower"
    )


def live_line(scores: InfluenceScores) -> str:
    """Name the most harmful samples of the latest steps, for the log.

    Args:
        scores: of `LiveView`.

    Returns:
        A line.
    """
    first, last = scores.info["window"]
    top = scores.top_harmful(_IN_A_LINE)
    rows = zip(top.index.tolist(), top.influence.tolist(), strict=True)
    told = ", ".join(f"{index} ({influence:+.2e})" for index, influence in rows)
    return (
        f"Influence in steps {first} to {last} on {query(scores)} = "
        f"{scores.info['query_value']:.4g}: most harmful {told or 'none'}"
    )


def cells(scores: InfluenceScores) -> list[list[str]]:
    """The rows of a table of strongest samples, as texts.

    Args:
        scores: `InfluenceScores.top_harmful` or `InfluenceScores.top_helpful`.

    Returns:
        For each sample one text a column: those of `COLUMNS`, then the user's.
    """
    rows = []
    for place in range(len(scores)):
        exact = "" if scores.exact[place].isnan() else "✓"
        own = [_cell(column[place]) for column in scores.columns.values()]
        rows.append(
            [
                str(place + 1),
                str(int(scores.index[place])),
                f"{scores.influence[place].item():+.2e}",
                exact if scores.trusted[place] else "?",
                str(int(scores.visits[place])),
                *own,
            ]
        )
    return rows


def reserves(scores: InfluenceScores) -> list[str]:
    """Say plainly where the ranking is not to be relied on.

    Returns:
        Sentences to be read before the ranking; none where nothing speaks against it.
    """
    return [line for line in (_lost_in_rounding(scores), *_by_chance(scores)) if line]


def trust(scores: InfluenceScores) -> list[str]:
    """Say how far the figures can be trusted.

    Returns:
        Sentences: each estimator's agreement with the exact replays, and every reserve there is.
    """
    by_estimator: dict[str, dict[str, Agreement]] = {}
    for found in scores.agreement:
        by_estimator.setdefault(found.estimator, {})[found.sample] = found
    lines = [
        line for name, samples in by_estimator.items() for line in _agreement_lines(name, samples)
    ]
    if scores.replayed == len(scores):
        lines.append("Every figure comes from an exact replay.")
    elif not lines:
        lines.append(
            "No estimate was compared with an exact replay, so nothing is known of how far they "
            "can be trusted."
        )
    noise = scores.info.get("noise_floor")
    if noise is not None and math.isfinite(noise):
        lines.append(
            f"Exact replays are rounded to ±{noise:.0e}, and by more where a ReLU switches."
        )
    if layers := scores.info.get("settings", {}).get("layers"):
        chosen = layers if isinstance(layers, str) else ", ".join(layers)
        lines.append(
            f"The estimates follow `layers={clean(chosen)}` alone; exact replays leave a sample out of "
            "everything."
        )
    doubtful = int((~scores.trusted).sum())
    if doubtful:
        lines.append(f"Estimates not to be relied on, and not replayed either: {doubtful}.")
    if scores.info.get("interrupted"):
        lines.append("The analysis was interrupted: this is what it had found by then.")
    return lines


def _lost_in_rounding(scores: InfluenceScores) -> str:
    noise = scores.info.get("noise_floor")
    known = scores.influence[scores.influence.isfinite()].abs()
    if noise is None or not len(known) or not float(known.max()) <= noise:
        return ""
    return (
        f"Do not rely on this ranking: the strongest influence ({float(known.max()):.0e}) is no larger "
        f"than the rounding of exact replays (±{noise:.0e}). Train with "
        '`Trainer(precision="64-true")` to tell the examples apart.'
    )


def _by_chance(scores: InfluenceScores) -> list[str]:
    """One sentence for each estimator whose order says nothing of the exact one."""
    replayed = ~scores.exact.isnan()
    alone = {name for name, known in zip(scores.estimator, replayed, strict=True) if not known}
    return [
        f"Do not rely on the order of examples without ✓: {found.estimator} agrees with exact replay "
        f"of {found.count} samples no better than chance may (Kendall τ {found.kendall_tau:.2f}). "
        "Look at those with ✓ alone, or replay more of them (`verify=`, `top_k=`)."
        for found in scores.agreement
        if found.sample == "verified" and found.estimator in alone and _may_be_chance(found)
    ]


def _may_be_chance(found: Agreement) -> bool:
    """Whether τ is within two standard deviations of what independent rankings give."""
    n = found.count
    if n < _ENOUGH or math.isnan(found.kendall_tau):
        return False
    return found.kendall_tau < 2 * math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else clean(value)
    if len(text) <= _LONGEST_CELL:
        return text
    # The end of a path says more than its beginning.
    return f"{text[: _LONGEST_CELL // 3]}…{text[1 + _LONGEST_CELL // 3 - _LONGEST_CELL :]}"


def _agreement_lines(estimator: str, samples: Mapping[str, Agreement]) -> list[str]:
    verified = samples.get("verified")
    if verified is None or not verified.count:
        return []
    chosen = [
        f"{samples[sample].count} {words}"
        for sample, words in (("strongest", "strongest"), ("random", "at random"))
        if sample in samples and samples[sample].count
    ]
    how = f" ({', '.join(chosen)})" if chosen else ""
    plural = "" if verified.count == 1 else "s"
    lines = [
        f"{estimator} against exact replay of {verified.count} sample{plural}{how}: "
        f"{_figures(verified)}."
    ]
    if len(chosen) == 2 and samples["random"].count > 1:
        lines.append(f"  Those at random alone: {_figures(samples['random'])}.")
    return [*lines, *_in_plain_words(estimator, samples)]


def _in_plain_words(estimator: str, samples: Mapping[str, Agreement]) -> list[str]:
    """Kendall's τ as a share of pairs: of two samples (1 + τ) / 2 are in the right order."""
    for sample, words in (("random", "drawn at random"), ("verified", "of these")):
        found = samples.get(sample)
        if found and found.count >= _ENOUGH and not math.isnan(found.kendall_tau):
            share = (1 + found.kendall_tau) / 2
            return [f"  Of pairs {words}, {estimator} orders {share:.0%} as exact replay does."]
    return []


def _figures(found: Agreement) -> str:
    figures = {
        "Kendall τ": found.kendall_tau,
        "Spearman": found.spearman,
        "relative RMSE": found.relative_rmse,
        f"Jaccard@{found.jaccard_k}": found.jaccard if found.jaccard_k >= _ENDS else math.nan,
    }
    known = [f"{name} {value:.2f}" for name, value in figures.items() if not math.isnan(value)]
    if not math.isnan(found.sign_agreement):
        known.append(f"same sign {found.sign_agreement:.0%}")
    return ", ".join(known) if known else "too few to compare"
