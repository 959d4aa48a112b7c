"""The scalars that every logger gets."""

from __future__ import annotations

import math
from typing import Any

from lightning_accie.scores import InfluenceScores

_AGREEMENT = ("count", "kendall_tau", "spearman", "relative_rmse", "jaccard", "sign_agreement")


def scalars(scores: InfluenceScores, namespace: str) -> dict[str, float]:
    """Name the figures worth comparing between runs.

    Args:
        scores: what was found.
        namespace: what names begin with.

    Returns:
        ``query`` (its value), ``most_harmful`` and ``most_helpful`` (the strongest influence on
        either side), ``replayed`` and ``untrusted`` (how many samples), and
        ``agreement/kendall_tau`` and so on (`InfluenceScores.main_agreement`), each after
        ``namespace/``. What is unknown is left out.
    """
    figures: dict[str, Any] = {
        **_ends(scores),
        "replayed": scores.replayed,
        "untrusted": int((~scores.trusted).sum()),
    }
    main = scores.main_agreement
    if main is not None:
        figures |= {f"agreement/{name}": getattr(main, name) for name in _AGREEMENT}
    return _named(figures, namespace)


def live_scalars(scores: InfluenceScores, namespace: str) -> dict[str, float]:
    """Name the figures to follow while a run goes on.

    Args:
        scores: of the samples that the latest steps drew.
        namespace: what names begin with.

    Returns:
        ``query``, ``most_harmful`` and ``most_helpful``, as `scalars` has them.
    """
    return _named(_ends(scores), namespace)


def _ends(scores: InfluenceScores) -> dict[str, Any]:
    return {
        "query": scores.info.get("query_value"),
        "most_harmful": next(iter(scores.top_harmful(1).influence.tolist()), None),
        "most_helpful": next(iter(scores.top_helpful(1).influence.tolist()), None),
    }


def _named(figures: dict[str, Any], namespace: str) -> dict[str, float]:
    return {
        f"{namespace}/{name}": float(value)
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    }
