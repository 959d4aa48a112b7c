"""Scores with a bit of everything, for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

import torch

from lightning_accie.agreement import measure
from lightning_accie.scores import InfluenceScores

NAN = float("nan")
INF = float("inf")


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small_scores(**changes: Any) -> InfluenceScores:
    """Seven samples of a dataset of ten: two replayed, one untrusted, one without a figure, a tie.

    Strongest harm first: 4 (-3), 2 and 9 (-1), 0 (0), 7 (0.5), 1 (2); then 5 (NaN).
    """
    fields: dict[str, Any] = {
        "index": torch.tensor([0, 1, 2, 4, 5, 7, 9]),
        "influence": doubles(0.0, 2.0, -1.0, -3.0, NAN, 0.5, -1.0),
        "estimate": doubles(0.0, 2.0, -1.0, -2.5, NAN, 0.25, -1.0),
        "visits": torch.tensor([3, 3, 3, 2, 1, 3, 3]),
        "exact": doubles(NAN, NAN, NAN, -3.0, NAN, 0.5, NAN),
        "estimator": (
            *("sgd-ie", "sgd-ie", "acc-sgd-ie", "leave-one-out"),
            *("sgd-ie", "leave-one-out", "sgd-ie"),
        ),
        "trusted": torch.tensor([True, False, True, True, True, True, True]),
        "agreement": (
            measure(doubles(-2.5, 0.25), doubles(-3.0, 0.5), estimator="acc-sgd-ie"),
            measure(doubles(-2.0, -0.25), doubles(-3.0, 0.5), estimator="sgd-ie"),
        ),
        "columns": {"label": ["a", "b", "c", "d", "e", "f", "g"]},
        "info": {"query": "val_loss", "query_value": 0.75, "steps": 12, "samples": 10},
    }
    return InfluenceScores(**(fields | changes))
