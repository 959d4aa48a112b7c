"""Estimators of the influence of training samples; one a file, each written with F_t alone."""

from __future__ import annotations

from inspect import signature

from lightning_accie.estimators.acc_dvemb import AccDataValueEmbedding
from lightning_accie.estimators.acc_sgd_ie import AccSgdIE
from lightning_accie.estimators.base import Estimate, Estimator
from lightning_accie.estimators.dvemb import DataValueEmbedding
from lightning_accie.estimators.layers import Layers
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.low_rank import LowRankAccSgdIE
from lightning_accie.estimators.sgd_ie import SgdIE
from lightning_accie.estimators.tracin import TracIn

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (
        SgdIE,
        AccSgdIE,
        LowRankAccSgdIE,
        DataValueEmbedding,
        AccDataValueEmbedding,
        LeaveOneOut,
        TracIn,
    )
}


def takes_layers(estimator: str | Estimator) -> bool:
    """Tell whether ``layers=`` can be given beside ``estimator=``.

    Args:
        estimator: ``"auto"``, a name, or an instance.

    Returns:
        Whether it is ``"auto"``, or the name of an estimator that follows some layers only.
    """
    return isinstance(estimator, str) and (
        estimator == "auto" or "layers" in signature(ESTIMATORS[estimator]).parameters
    )


def resolve_estimator(estimator: str | Estimator, layers: Layers = None) -> Estimator | None:
    """Turn an ``estimator=`` argument into an estimator.

    Args:
        estimator: ``"auto"``, a name, or an instance.
        layers: for an estimator that `takes_layers`.

    Returns:
        The estimator; None for ``"auto"``.

    Raises:
        ValueError: if there is no estimator of that name.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator == "auto":
        return None
    if estimator not in ESTIMATORS:
        names = ", ".join(f'"{name}"' for name in ["auto", *ESTIMATORS])
        raise ValueError(f"`estimator` must be one of {names} or an Estimator, got {estimator!r}.")
    return ESTIMATORS[estimator](**({} if layers is None else {"layers": layers}))


__all__ = [
    "ESTIMATORS",
    "AccDataValueEmbedding",
    "AccSgdIE",
    "DataValueEmbedding",
    "Estimate",
    "Estimator",
    "LeaveOneOut",
    "LowRankAccSgdIE",
    "SgdIE",
    "TracIn",
    "resolve_estimator",
    "takes_layers",
]
