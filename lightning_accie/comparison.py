"""Two rankings of the same samples: how far they agree, and which samples moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accie.agreement import jaccard_at_k, kendall_tau, sign_agreement, spearman
from lightning_accie.errors import InfluenceError
from lightning_accie.ranking import EXACT
from lightning_accie.scores import InfluenceScores

MOST_PAIRS = 5000
"""Samples up to which Kendall's τ is computed, which takes every pair of them."""


@dataclass(frozen=True)
class Mover:
    """A sample whose place differs.

    Attributes:
        sample: its index, or its ``sample_id``.
        ranks: its rank in either ranking, among the samples that both have.
        influences: its influence in either.
        exact: whether that is an exact figure. Where one alone is, the sample may have moved by that.
    """

    sample: Any
    ranks: tuple[int, int]
    influences: tuple[float, float]
    exact: tuple[bool, bool]


@dataclass(frozen=True)
class RankCorrelation:
    """How far two orders agree.

    Attributes:
        spearman: Spearman's rank correlation; NaN with fewer than two samples.
        kendall_tau: Kendall's τ_b; None beyond `MOST_PAIRS` samples.
    """

    spearman: float
    kendall_tau: float | None


@dataclass(frozen=True)
class Comparison:
    """How far two rankings agree, over the samples that both have with a finite influence.

    Attributes:
        count: how many these are.
        only: how many samples each has beside them.
        order: the rank correlation of the influences.
        estimates: that of estimates with estimates, where the influences mix estimates with exact
            figures; None where they do not, or where a sample has no estimate.
        jaccard: the overlap of the ``k`` most harmful and most helpful ones, see `jaccard_at_k`.
        k: at most so many.
        sign_agreement: the fraction of samples whose influence has the same sign.
        movers: samples by how far their rank moved, furthest first.
        differences: in what else the two differ, in words.
    """

    count: int
    only: tuple[int, int]
    order: RankCorrelation
    estimates: RankCorrelation | None
    jaccard: float
    k: int
    sign_agreement: float
    movers: tuple[Mover, ...]
    differences: tuple[str, ...]


def compare(one: InfluenceScores, other: InfluenceScores, *, k: int = 25) -> Comparison:
    """Compare two rankings.

    Samples are matched by their ``sample_id`` where both have one, else by their index.

    Args:
        one: a ranking.
        other: another one, of the same samples or some of them.
        k: samples at either end to compare, and movers to name.

    Returns:
        What they have in common.

    Raises:
        InfluenceError: if they have no sample in common.
        ValueError: if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    places = [_places(scores, by_id=_have_ids(one, other)) for scores in (one, other)]
    common = [name for name in places[0] if name in places[1]]
    if not common:
        raise InfluenceError(
            "The two rankings have no sample in common: they are not of the same training data."
        )
    rows = [torch.tensor([known[name] for name in common]) for known in places]
    influences = [scores.influence[row] for scores, row in zip((one, other), rows, strict=True)]
    finite = influences[0].isfinite() & influences[1].isfinite()
    left, right = (values[finite] for values in influences)
    names = [name for name, known in zip(common, finite.tolist(), strict=True) if known]
    rows = [row[finite] for row in rows]
    exact = [~scores.exact[row].isnan() for scores, row in zip((one, other), rows, strict=True)]
    return Comparison(
        count=len(names),
        only=(len(one) - len(names), len(other) - len(names)),
        order=_correlation(left, right),
        estimates=_of_estimates((one, other), rows, exact),
        jaccard=jaccard_at_k(left, right, k),
        k=min(k, len(names)),
        sign_agreement=sign_agreement(left, right),
        movers=_movers(names, (left, right), exact, k),
        differences=(*_differences(one, other), *_replayed((one, other), exact)),
    )


def _correlation(left: Tensor, right: Tensor) -> RankCorrelation:
    few = len(left) <= MOST_PAIRS
    return RankCorrelation(spearman(left, right), kendall_tau(left, right) if few else None)


def _of_estimates(
    both: tuple[InfluenceScores, InfluenceScores], rows: list[Tensor], exact: list[Tensor]
) -> RankCorrelation | None:
    estimates = [scores.estimate[row] for scores, row in zip(both, rows, strict=True)]
    if not (exact[0].any() or exact[1].any()) or not torch.cat(estimates).isfinite().all():
        return None
    if EXACT in (scores.info.get("estimator") for scores in both):
        return None  # its "estimates" are the exact figures
    return _correlation(*estimates)


def _have_ids(one: InfluenceScores, other: InfluenceScores) -> bool:
    return "sample_id" in one.columns and "sample_id" in other.columns


def _places(scores: InfluenceScores, *, by_id: bool) -> dict[Any, int]:
    names = scores.columns["sample_id"] if by_id else scores.index.tolist()
    return {name: place for place, name in enumerate(names)}


def _movers(
    names: list[Any], influences: tuple[Tensor, Tensor], exact: list[Tensor], k: int
) -> tuple[Mover, ...]:
    ranks = [_ranks(values) for values in influences]
    moved = (ranks[0] - ranks[1]).abs()
    furthest = torch.argsort(moved, descending=True, stable=True)[:k].tolist()
    return tuple(
        Mover(
            names[place],
            (int(ranks[0][place]), int(ranks[1][place])),
            (float(influences[0][place]), float(influences[1][place])),
            (bool(exact[0][place]), bool(exact[1][place])),
        )
        for place in furthest
        if moved[place]
    )


def _ranks(values: Tensor) -> Tensor:
    ranks = torch.empty(len(values), dtype=torch.int64)
    ranks[torch.argsort(values, stable=True)] = torch.arange(1, len(values) + 1)
    return ranks


def _differences(one: InfluenceScores, other: InfluenceScores) -> tuple[str, ...]:
    asked = {
        "query": "the query",
        "samples": "the number of training samples",
        "module": "the module",
        "steps": "the number of steps",
        "estimator": "the estimator",
    }
    found = []
    for key, what in asked.items():
        values = one.info.get(key), other.info.get(key)
        if values[0] != values[1]:
            found.append(f"{what}: {values[0]} and {values[1]}")
    return tuple(found)


def _replayed(
    both: tuple[InfluenceScores, InfluenceScores], exact: list[Tensor]
) -> tuple[str, ...]:
    """Say so where other samples are exact in the one than in the other, of those in common."""
    if torch.equal(*exact):
        return ()
    counts = " and ".join(str(scores.replayed) for scores in both)
    return (f"samples replayed exactly: {counts} ({int((exact[0] & exact[1]).sum())} in both)",)
