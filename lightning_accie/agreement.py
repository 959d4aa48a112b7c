"""How well estimated influences agree with exact ones.

Rank correlations say whether the order is right, `relative_rmse` whether the sizes are, and
`jaccard_at_k` whether the same samples stand at the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

NAN = float("nan")


@dataclass(frozen=True)
class Agreement:
    """Estimated influences against those by exact replay, over the samples that have both.

    Samples whose estimate or exact figure is not finite are left out; ``count`` says how many were
    compared. With fewer than two, every figure is NaN.

    Attributes:
        estimator: whose estimates are compared.
        sample: which of the replayed samples: ``"verified"`` (all of them), ``"strongest"`` (chosen
            because they ranked high) or ``"random"`` (drawn at random: the unbiased look).
        count: how many samples were compared.
        kendall_tau: Kendall's τ_b, from −1 to 1.
        spearman: Spearman's rank correlation, from −1 to 1.
        relative_rmse: ‖estimate − exact‖ / ‖exact‖; 0 is perfect, 1 is no better than estimating 0.
        jaccard: see `jaccard_at_k`; from 0 to 1.
        jaccard_k: its k.
        sign_agreement: the fraction of samples whose two figures have the same sign.
        noise_floor: the size of the rounding error in the exact figures, in units of the query; NaN
            if unknown. Where influences are no larger, disagreement means nothing.
    """

    estimator: str
    sample: str
    count: int
    kendall_tau: float
    spearman: float
    relative_rmse: float
    jaccard: float
    jaccard_k: int
    sign_agreement: float
    noise_floor: float


def measure(
    estimate: Tensor,
    exact: Tensor,
    *,
    estimator: str,
    sample: str = "verified",
    noise_floor: float = NAN,
    jaccard_k: int | None = None,
) -> Agreement:
    """Compare estimates with exact figures.

    Args:
        estimate: ``[n]`` estimated influences.
        exact: ``[n]`` the same samples' exact influences.
        estimator: whose estimates they are.
        sample: how the samples were chosen, see `Agreement`.
        noise_floor: the size of the rounding error in ``exact``.
        jaccard_k: k of `jaccard_at_k`; default a tenth of the compared samples, at least 1.

    Returns:
        Every measure of this module, over the samples whose two figures are finite.

    Raises:
        ValueError: if the two are not vectors of one length, or ``jaccard_k`` is below 1.

    Examples:
        >>> exact = torch.tensor([-2.0, 1.0, 3.0])
        >>> found = measure(exact * 1.1, exact, estimator="sgd-ie")
        >>> found.count, found.kendall_tau, round(found.relative_rmse, 3)
        (3, 1.0, 0.1)
    """
    estimate, exact = _vectors(estimate, exact)
    comparable = estimate.isfinite() & exact.isfinite()
    estimate, exact = estimate[comparable], exact[comparable]
    k = max(1, len(exact) // 10) if jaccard_k is None else jaccard_k
    return Agreement(
        estimator=estimator,
        sample=sample,
        count=len(exact),
        kendall_tau=kendall_tau(estimate, exact),
        spearman=spearman(estimate, exact),
        relative_rmse=relative_rmse(estimate, exact),
        jaccard=jaccard_at_k(estimate, exact, k),
        jaccard_k=k,
        sign_agreement=sign_agreement(estimate, exact),
        noise_floor=noise_floor,
    )


def kendall_tau(estimate: Tensor, exact: Tensor) -> float:
    """Kendall's τ_b, which allows for ties.

    Args:
        estimate: ``[n]``.
        exact: ``[n]``.

    Returns:
        From −1 to 1; NaN with fewer than two samples, a NaN, or only one distinct value.
    """
    estimate, exact = _vectors(estimate, exact)
    if not (_comparable(estimate, exact) and _varies(estimate) and _varies(exact)):
        return NAN
    tau = kendall_rank_corrcoef(estimate, exact, variant="b")
    assert isinstance(tau, Tensor)  # a pair only where the p-value is asked for
    return float(tau)


def spearman(estimate: Tensor, exact: Tensor) -> float:
    """Spearman's rank correlation; tied samples share their mean rank.

    Args:
        estimate: ``[n]``.
        exact: ``[n]``.

    Returns:
        From −1 to 1; NaN with fewer than two samples, a NaN, or only one distinct value.
    """
    estimate, exact = _vectors(estimate, exact)
    if not (_comparable(estimate, exact) and _varies(estimate) and _varies(exact)):
        return NAN
    return float(spearman_corrcoef(estimate, exact))


def linear_datamodelling_score(influence: Tensor, sets: Tensor, effects: Tensor) -> float:
    """Rank correlation between what sets of samples do and what their influences add up to.

    The linear datamodelling score (Park et al. 2023, arXiv 2303.14186, section 3), with the sets that
    are left out rather than kept: the sums differ in a constant and the sign, and so do the effects.

    Args:
        influence: ``[n]``, of single samples.
        sets: ``[K, n]`` bool, the samples that are left out at once.
        effects: ``[K]``, q without each set, or its difference to q.

    Returns:
        Spearman's correlation over the K sets, from −1 to 1; NaN where fewer than two sets have a
        finite effect, or all have the same.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> influence = torch.tensor([1.0, 2.0, -4.0])
        >>> sets = torch.tensor([[True, True, False], [False, True, True], [True, False, False]])
        >>> round(linear_datamodelling_score(influence, sets, torch.tensor([2.5, -1.0, 0.9])), 3)
        1.0
    """
    if sets.dim() != 2 or sets.shape != (len(effects), len(influence)) or effects.dim() != 1:
        raise ValueError(
            f"`sets` must be [K, n] for [n] influences and [K] effects, got {list(sets.shape)}, "
            f"{list(influence.shape)} and {list(effects.shape)}."
        )
    sums = sets.double() @ influence.double().cpu()
    finite = sums.isfinite() & effects.isfinite()
    return spearman(sums[finite], effects[finite])


def relative_rmse(estimate: Tensor, exact: Tensor) -> float:
    """‖estimate − exact‖ / ‖exact‖.

    Args:
        estimate: ``[n]``.
        exact: ``[n]``.

    Returns:
        0 where they are equal; infinite where only ``exact`` is zero throughout; NaN where both
        are, with fewer than two samples, or a NaN.
    """
    estimate, exact = _vectors(estimate, exact)
    if not _comparable(estimate, exact):
        return NAN
    return float(torch.linalg.vector_norm(estimate - exact) / torch.linalg.vector_norm(exact))


def jaccard_at_k(estimate: Tensor, exact: Tensor, k: int) -> float:
    """The overlap of the two ends of the rankings.

    J(A, B) = |A ∩ B| / |A ∪ B|, once for the k most harmful (lowest) samples by estimate and by
    exact figure, once for the k most helpful (highest) ones; the mean of the two. Ties at the edge
    go to the sample that stands first.

    Args:
        estimate: ``[n]``.
        exact: ``[n]``.
        k: samples at each end; more than n count as n.

    Returns:
        From 0 to 1; NaN with fewer than two samples, or a NaN.

    Raises:
        ValueError: if ``k`` is below 1.
    """
    estimate, exact = _vectors(estimate, exact)
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if not _comparable(estimate, exact):
        return NAN
    harmful = _jaccard(_lowest(estimate, k), _lowest(exact, k))
    helpful = _jaccard(_lowest(-estimate, k), _lowest(-exact, k))
    return (harmful + helpful) / 2


def sign_agreement(estimate: Tensor, exact: Tensor) -> float:
    """The fraction of samples on which the two say the same of harm and help.

    Args:
        estimate: ``[n]``.
        exact: ``[n]``.

    Returns:
        From 0 to 1 (zero is a sign of its own); NaN with fewer than two samples, or a NaN.
    """
    estimate, exact = _vectors(estimate, exact)
    if not _comparable(estimate, exact):
        return NAN
    return float((estimate.sign() == exact.sign()).double().mean())


def _vectors(estimate: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    if estimate.ndim != 1 or estimate.shape != exact.shape:
        raise ValueError(
            "Estimates and exact figures must be vectors of one length, got shapes "
            f"{tuple(estimate.shape)} and {tuple(exact.shape)}."
        )
    return estimate.detach().cpu().double(), exact.detach().cpu().double()


def _comparable(estimate: Tensor, exact: Tensor) -> bool:
    return len(exact) >= 2 and not bool((estimate.isnan() | exact.isnan()).any())


def _varies(values: Tensor) -> bool:
    # Without variation a rank correlation is 0/0, of which torchmetrics makes 0 for Spearman.
    return len(values.unique()) > 1


def _lowest(values: Tensor, k: int) -> set[int]:
    return set(torch.argsort(values, stable=True)[:k].tolist())


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
