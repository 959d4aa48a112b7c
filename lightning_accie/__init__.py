"""Which training examples help and which harm your PyTorch Lightning model, with measured trust."""

from __future__ import annotations

from lightning_accie.agreement import Agreement
from lightning_accie.callback import InfluenceCallback
from lightning_accie.engine import InfluenceEngine
from lightning_accie.errors import (
    DescribeError,
    InfluenceError,
    QueryError,
    ReplayMismatchError,
    TrajectoryError,
    UnsupportedError,
)
from lightning_accie.estimators import (
    AccSgdIE,
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

__version__ = "0.1.0"

__all__ = [
    "AccSgdIE",
    "Agreement",
    "DescribeError",
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
