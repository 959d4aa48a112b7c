"""Which training examples help and which harm your PyTorch Lightning model, with measured trust.

Names are imported when they are first used: `lightning-accie --help` waits for neither torch nor
Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_accie.agreement import Agreement
    from lightning_accie.callback import InfluenceCallback
    from lightning_accie.embeddings import EmbeddingStore
    from lightning_accie.engine import InfluenceEngine
    from lightning_accie.errors import (
        DescribeError,
        InfluenceError,
        QueryError,
        RenderError,
        ReplayMismatchError,
        TrajectoryError,
        UnsupportedError,
    )
    from lightning_accie.estimators import (
        AccDataValueEmbedding,
        AccSgdIE,
        DataValueEmbedding,
        Estimator,
        LeaveOneOut,
        LowRankAccSgdIE,
        SgdIE,
        TracIn,
    )
    from lightning_accie.explanation import Explanation
    from lightning_accie.groups import GroupScores
    from lightning_accie.replay.update_rules import UpdateRule, register_update_rule
    from lightning_accie.reports.html.page import write_report
    from lightning_accie.scores import InfluenceScores
    from lightning_accie.trajectory.reader import Trajectory
else:
    _HOMES = {
        "agreement": ("Agreement",),
        "callback": ("InfluenceCallback",),
        "embeddings": ("EmbeddingStore",),
        "engine": ("InfluenceEngine",),
        "errors": (
            *("DescribeError", "InfluenceError", "QueryError", "RenderError"),
            *("ReplayMismatchError", "TrajectoryError", "UnsupportedError"),
        ),
        "estimators": (
            *("AccDataValueEmbedding", "AccSgdIE", "DataValueEmbedding", "Estimator"),
            *("LeaveOneOut", "LowRankAccSgdIE", "SgdIE", "TracIn"),
        ),
        "explanation": ("Explanation",),
        "groups": ("GroupScores",),
        "replay.update_rules": ("UpdateRule", "register_update_rule"),
        "reports.html.page": ("write_report",),
        "scores": ("InfluenceScores",),
        "trajectory.reader": ("Trajectory",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = found  # the next time it is there
        return found

    def __dir__():
        return sorted({*globals(), *_HOME})


__version__ = "0.1.0"

__all__ = [
    "AccDataValueEmbedding",
    "AccSgdIE",
    "Agreement",
    "DataValueEmbedding",
    "DescribeError",
    "EmbeddingStore",
    "Estimator",
    "Explanation",
    "GroupScores",
    "InfluenceCallback",
    "InfluenceEngine",
    "InfluenceError",
    "InfluenceScores",
    "LeaveOneOut",
    "LowRankAccSgdIE",
    "QueryError",
    "RenderError",
    "ReplayMismatchError",
    "SgdIE",
    "TracIn",
    "Trajectory",
    "TrajectoryError",
    "UnsupportedError",
    "UpdateRule",
    "__version__",
    "register_update_rule",
    "write_report",
]
