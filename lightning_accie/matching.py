"""Whether a trajectory, a module and data belong together, and whether the run can be ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_accie.capture.snapshot import same_names
from lightning_accie.errors import TrajectoryError
from lightning_accie.estimators.base import Replay
from lightning_accie.replay.header import check_header
from lightning_accie.trajectory.reader import Trajectory


def check_module(trajectory: Trajectory, module: Any) -> None:
    """Compare the module with the one that was recorded.

    Args:
        trajectory: the recorded run.
        module: the LightningModule.

    Raises:
        TrajectoryError: if nothing was recorded, or with another module.
    """
    header = trajectory.header
    if not len(trajectory):
        raise TrajectoryError(
            f"The trajectory {trajectory.directory} holds no complete training step "
            f"({trajectory.reason or trajectory.status}), so there is nothing to replay. Train again."
        )
    check_header(header, trajectory.directory)
    parts = {name for name, _ in module.named_modules()}
    differences = same_names(module, header) or _other_buffers(trajectory, module)
    differences += [f"`{name}` is missing" for name in header["eval_modules"] if name not in parts]
    if differences:
        shown = "; ".join(differences[:5]) + ("; …" if len(differences) > 5 else "")
        double = header["precision"] == "64-true"
        advice = ' and in double precision (`module.double()`), as `precision="64-true"` has it'
        raise TrajectoryError(
            f"The trajectory {trajectory.directory} was recorded with another module "
            f"(`{header['module']}`): {shown}. Pass the module that was trained, built with the "
            f"same hyper-parameters{advice if double else ''}."
        )


def _other_buffers(trajectory: Trajectory, module: Any) -> list[str]:
    """How the module's buffers differ from those recorded, in words."""
    tensors = trajectory.checkpoint(0).tensors.items()
    kept = {name.partition("/")[2]: t for name, t in tensors if name.startswith("buffers/")}
    recorded = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    present = {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    return [
        f"the buffer `{name}` has shape {present.get(name, 'missing')}, recorded "
        f"{recorded.get(name, 'missing')}"
        for name in sorted(recorded.keys() | present.keys())
        if recorded.get(name) != present.get(name)
    ]


def check_sizes(trajectory: Trajectory, sizes: Sequence[int]) -> None:
    """Compare the numbers of training samples with those recorded.

    Args:
        trajectory: the recorded run.
        sizes: of each loader's dataset.

    Raises:
        TrajectoryError: if they differ.
    """
    recorded = [loader["samples"] for loader in trajectory.header["loaders"]]
    if list(sizes) != recorded:
        raise TrajectoryError(
            f"The training data hold {list(sizes)} samples, but the trajectory was recorded with "
            f"{recorded}. Pass the dataset that the model was trained on, not a cleaned or "
            "changed one."
        )


def why_not_finite(trajectory: Trajectory, replay: Replay) -> str:
    """Explain a query that has no finite value at the end of the run.

    Args:
        trajectory: the recorded run.
        replay: the part of it that is ranked.

    Returns:
        Where it comes from, and what to do.
    """
    advice = "Train again with a smaller learning rate, or with `gradient_clip_val`."
    for step in trajectory.steps(0, len(replay.walker)):
        for micro in step.micro_batches:
            if micro.loss is not None and not np.isfinite(micro.loss):
                return (
                    f"the training diverged. The first loss that is not finite is that of step "
                    f"{step.number} (epoch {micro.epoch}, batch {micro.batch_idx}): "
                    f"{micro.loss}. {advice} `at={step.number}` ranks the run as it was before."
                )
    if not all(bool(leaf.isfinite().all()) for leaf in replay.final.state.params.values()):
        return f"the training diverged, in its very last steps. {advice}"
    return (
        "weights and losses are finite, so it is the query itself. Either the weights have grown "
        "so large that it overflows, or it is computed with a torchmetrics metric, which cannot "
        "be differentiated. Log the loss tensor itself, or pass a callable."
    )
