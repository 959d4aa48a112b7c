"""What scores tell about the run that they are of, and where it ends."""

from __future__ import annotations

from typing import Any

from lightning_accie.errors import QueryError
from lightning_accie.estimators.base import Replay
from lightning_accie.trajectory.reader import Trajectory

At = int | str
"""Where a run ends for a ranking: ``"last"``, ``"best"``, or a number of steps."""


def account_of(run: Replay) -> dict[str, Any]:
    """Describe a replayed run, and how well the replay followed it.

    Args:
        run: the run.

    Returns:
        JSON values, for `InfluenceScores.info`.
    """
    walker, program = run.walker, run.walker.program
    trajectory, header, fidelity = walker.trajectory, walker.trajectory.header, walker.fidelity
    return {
        "steps": len(walker),
        "samples": sum(loader["samples"] for loader in header["loaders"]) or None,
        "capture": header.get("capture", "indices"),
        "drawn": len(run.samples),
        "module": header["module"],
        "optimizer": header["optimizer"],
        "precision": header["precision"],
        "analysis_precision": program.analysis.name,
        "bit_exact_replay": fidelity.bit_exact,
        "largest_loss_difference": fidelity.largest_loss_difference,
        "largest_state_difference": fidelity.largest_state_difference,
        "trajectory": str(trajectory.directory),
        "trajectory_status": trajectory.status,
    }


def end_of(trajectory: Trajectory, at: At) -> int:
    """The number of steps after which the query is measured.

    Args:
        trajectory: the recorded run.
        at: where it ends for the ranking.

    Returns:
        The number.

    Raises:
        QueryError: if there is no best checkpoint, or it lies behind the end of the record.
        ValueError: if ``at`` is none of what it may be.
    """
    steps = len(trajectory)
    if at == "last":
        return steps
    if at == "best":
        best = trajectory.header.get("best")
        if best is None or best["step"] == 0:
            raise QueryError(
                f"The trajectory {trajectory.directory} knows no best checkpoint: no "
                "ModelCheckpoint with a `monitor=` had saved one when the run ended, or the "
                'best one was saved before the recording began. Use `at="last"`, or the number '
                "of a step."
            )
        if best["step"] > steps:
            raise QueryError(
                f"The best checkpoint was saved after {best['step']} steps, but the trajectory "
                f"{trajectory.directory} ends after {steps}"
                + (f" ({trajectory.reason})" if trajectory.reason else "")
                + '. Use `at="last"`, or the number of a step.'
            )
        return int(best["step"])
    if isinstance(at, bool) or not isinstance(at, int) or not 1 <= at <= steps:
        raise ValueError(
            f'`at` must be "last", "best" or a number of steps from 1 to {steps}, got {at!r}.'
        )
    return at
