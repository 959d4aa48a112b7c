"""One run out of the logs of several processes.

In distributed data-parallel training every process (rank) draws batches of its own, and every
optimiser step moves all of them alike, by the mean of their gradients. So step t of the run is step t
of every log: the micro-batches of all ranks, each with the share 1 / (accumulate · world_size) of the
step's loss. The ranks write at their own pace; the run reaches as far as the shortest log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.files import DAMAGED, MANIFEST, rank_name
from lightning_accie.trajectory.manifest import Manifest, read_manifest
from lightning_accie.trajectory.records import Step
from lightning_accie.trajectory.step_log import StepLog


def open_logs(directory: Path, manifest: Manifest) -> list[StepLog]:
    """Open the step logs of all ranks.

    Args:
        directory: the trajectory's directory.
        manifest: what is there: rank 0's.

    Returns:
        The logs in rank order; one where a single process trained.

    Raises:
        TrajectoryError: where a log is missing, damaged, or of another run.
    """
    logs = [StepLog(directory, manifest)]
    rank = manifest.rank
    if rank is None:
        return logs
    if rank.number != 0:
        raise TrajectoryError(
            f"{directory} holds the step log of rank {rank.number} of {rank.of} alone. Open the "
            f"trajectory that it is a part of: {directory.parent}."
        )
    for number in range(1, rank.of):
        there = directory / rank_name(number)
        if not (there / MANIFEST).is_file():
            raise TrajectoryError(
                f"The run had {rank.of} processes, and the step log of rank {number} is missing: "
                f"there is no {there / MANIFEST}. {DAMAGED}"
            )
        other = read_manifest(there)
        if other.rank != replace(rank, number=number):
            raise TrajectoryError(f"{there} is not rank {number}'s log of this run. {DAMAGED}")
        logs.append(StepLog(there, other))
    return logs


def merged_step(steps: Sequence[Step]) -> Step:
    """Put one step together from all ranks.

    Args:
        steps: the step as each rank recorded it, in rank order.

    Returns:
        The step with the micro-batches of all ranks.

    Raises:
        TrajectoryError: where the ranks stepped with different settings.
    """
    first = steps[0]
    if len(steps) == 1:
        return first
    for rank, step in enumerate(steps):
        if step.settings != first.settings:
            raise TrajectoryError(
                f"At step {first.number} the optimiser of rank {rank} had other settings than that "
                f"of rank 0 ({_difference(first, step)}), so their weights drifted apart, and there "
                "is no single run to replay. A scheduler that follows a logged value needs the "
                "same value on every rank: log it with `sync_dist=True`."
            )
    micros = [
        replace(micro, rank=rank, world_size=len(steps))
        for rank, step in enumerate(steps)
        for micro in step.micro_batches
    ]
    return replace(first, micro_batches=tuple(micros))


def ending(logs: Sequence[StepLog]) -> tuple[int, str, str]:
    """Find how far the run reaches, and how it ended.

    Args:
        logs: of all ranks.

    Returns:
        The number of steps that all of them have, and status and reason.
    """
    shortest = min(range(len(logs)), key=lambda rank: len(logs[rank]))
    length = len(logs[shortest])
    manifest = logs[shortest].manifest
    if length == len(logs[0]):
        return length, logs[0].manifest.status, logs[0].manifest.reason
    reason = (
        f"the log of rank {shortest} ends after {length} steps (its status is "
        f"{manifest.status!r}), that of rank 0 after {len(logs[0])}"
    )
    return length, manifest.status, f"{reason}: {manifest.reason}" if manifest.reason else reason


def _difference(left: Step, right: Step) -> str:
    for one, other in zip(left.settings, right.settings, strict=False):
        for name in one:
            if other.get(name) != one[name]:
                return f"`{name}` {other.get(name)} and {one[name]}"
    return "other groups"
