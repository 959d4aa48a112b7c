"""The measures of agreement, against SciPy and NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_accie.agreement import (
    Agreement,
    jaccard_at_k,
    kendall_tau,
    measure,
    relative_rmse,
    sign_agreement,
    spearman,
)

NAN = float("nan")
INF = float("inf")
Measured = Callable[[Tensor, Tensor], float]
MEASURES: dict[str, Measured] = {
    "kendall_tau": kendall_tau,
    "spearman": spearman,
    "relative_rmse": relative_rmse,
    "jaccard": lambda estimate, exact: jaccard_at_k(estimate, exact, 1),
    "sign_agreement": sign_agreement,
}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair(count: int, ties: bool, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=count)
    estimate = exact + rng.normal(size=count)
    if ties:
        exact, estimate = np.round(exact), np.round(estimate)  # with 0.0 and -0.0
    return torch.from_numpy(estimate), torch.from_numpy(exact)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [10, 20, 300])
def test_rank_correlations_are_scipys(count: int, ties: bool, seed: int) -> None:
    estimate, exact = pair(count, ties, seed)
    if ties:
        assert len(estimate.unique()) < count
        assert len(exact.unique()) < count
    tau = scipy.stats.kendalltau(estimate, exact, variant="b").statistic
    rho = scipy.stats.spearmanr(estimate, exact).statistic
    assert kendall_tau(estimate, exact) == pytest.approx(tau, abs=2e-6)
    assert spearman(estimate, exact) == pytest.approx(rho, abs=2e-6)


@pytest.mark.parametrize("measured", [kendall_tau, spearman])
def test_rank_correlations_at_their_ends(measured: Measured) -> None:
    ascending = doubles(-3e-7, 1e-9, 2.0)
    assert measured(ascending, ascending**3) == pytest.approx(1, abs=1e-5)
    assert measured(ascending, -ascending) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_relative_rmse_is_numpys(seed: int) -> None:
    estimate, exact = pair(20, False, seed)
    rmse = np.sqrt(np.mean((estimate.numpy() - exact.numpy()) ** 2))
    expected = rmse / np.sqrt(np.mean(exact.numpy() ** 2))
    assert relative_rmse(estimate, exact) == pytest.approx(expected, rel=1e-12)


def test_relative_rmse_of_zeros() -> None:
    assert relative_rmse(doubles(1, 2), doubles(0, 0)) == INF
    assert np.isnan(relative_rmse(doubles(0, 0), doubles(0, 0)))


def test_jaccard_looks_at_both_ends() -> None:
    exact = doubles(-4, -3, -2, -1, 1, 2, 3, 4)
    estimate = doubles(-4, -1, -3, -2, 1, 4, 3, 2)
    # Harmful: {0, 1} against {0, 2}; helpful: {6, 7} against {5, 6}.
    assert jaccard_at_k(estimate, exact, 2) == pytest.approx(1 / 3)
    # Harmful: {0} against {0}; helpful: {7} against {5}.
    assert jaccard_at_k(estimate, exact, 1) == pytest.approx(1 / 2)
    assert jaccard_at_k(-exact, exact, 2) == 0
    assert jaccard_at_k(-exact, exact, 100) == 1


def test_sign_agreement_takes_zero_for_a_sign() -> None:
    assert sign_agreement(doubles(-1, 2, 0, 0), doubles(-5, -2, 0, 1)) == pytest.approx(0.5)


@pytest.mark.parametrize("measured", MEASURES.values(), ids=MEASURES)
def test_what_cannot_be_measured_is_nan(measured: Measured) -> None:
    for estimate, exact in [
        (doubles(), doubles()),
        (doubles(1), doubles(1)),
        (doubles(1, NAN, 2), doubles(1, 2, 3)),
        (doubles(1, 2, 3), doubles(1, NAN, 2)),
    ]:
        assert np.isnan(measured(estimate, exact))


@pytest.mark.parametrize("measured", [kendall_tau, spearman])
def test_equal_figures_have_no_order(measured: Measured) -> None:
    constant, other = doubles(2, 2, 2), doubles(1, 2, 3)
    assert np.isnan(measured(constant, other))
    assert np.isnan(measured(other, constant))


def test_measure_leaves_out_what_is_not_finite() -> None:
    estimate = doubles(1.0, NAN, INF, -INF, 4.0, -2.0, 3.0)
    exact = doubles(1.5, 1.0, 1.0, 1.0, NAN, -1.0, 2.0)
    found = measure(estimate, exact, estimator="sgd-ie", sample="random", noise_floor=1e-9)
    kept = measure(doubles(1.0, -2.0, 3.0), doubles(1.5, -1.0, 2.0), estimator="sgd-ie")
    assert found.count == kept.count == 3
    assert (found.estimator, found.sample, found.noise_floor) == ("sgd-ie", "random", 1e-9)
    assert found.kendall_tau == kept.kendall_tau == 1
    assert found.relative_rmse == kept.relative_rmse


@pytest.mark.parametrize(("count", "k"), [(0, 1), (2, 1), (19, 1), (20, 2), (35, 3)])
def test_a_tenth_of_the_samples_is_at_the_ends(count: int, k: int) -> None:
    values = torch.arange(count)
    assert measure(values, values, estimator="x").jaccard_k == k


def test_measure_is_each_measure() -> None:
    estimate, exact = pair(30, True, 7)
    found = measure(estimate.float(), exact, estimator="x", jaccard_k=4)
    assert found == Agreement(
        estimator="x",
        sample="verified",
        count=30,
        kendall_tau=kendall_tau(estimate, exact),
        spearman=spearman(estimate, exact),
        relative_rmse=relative_rmse(estimate, exact),
        jaccard=jaccard_at_k(estimate, exact, 4),
        jaccard_k=4,
        sign_agreement=sign_agreement(estimate, exact),
        noise_floor=found.noise_floor,
    )
    assert np.isnan(found.noise_floor)


def test_better_estimates_agree_better() -> None:
    exact = torch.from_numpy(np.random.default_rng(0).normal(size=50))
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=50))
    found = [measure(exact + size * noise, exact, estimator="x") for size in (0.0, 0.1, 1.0)]
    for better, worse in pairwise(found):
        assert better.kendall_tau > worse.kendall_tau
        assert better.spearman > worse.spearman
        assert better.relative_rmse < worse.relative_rmse
        assert better.sign_agreement >= worse.sign_agreement


def test_agreement_is_json() -> None:
    found = measure(doubles(1, 2), doubles(1, 3), estimator="x", noise_floor=0.5)
    assert Agreement(**json.loads(json.dumps(asdict(found)))) == found


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        measure(doubles(1, 2), doubles(1, 2, 3), estimator="x")
    with pytest.raises(ValueError, match="vectors"):
        kendall_tau(doubles(1, 2)[:, None], doubles(1, 2)[:, None])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure(doubles(1, 2), doubles(1, 2), estimator="x", jaccard_k=0)
