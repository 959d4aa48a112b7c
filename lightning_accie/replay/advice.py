"""The lines to write where a step's per-sample losses are not found, in terms of that step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accie.replay.module import RecordedLoss, TrainingProgram
from lightning_accie.replay.per_sample import ReductionScout


def sample_losses_advice(program: TrainingProgram, loss: RecordedLoss) -> str:
    """Write a `sample_losses` that takes the batch apart as it is, and uses the loss that was seen.

    Args:
        program: the module's training step.
        loss: a micro-batch.

    Returns:
        The text that ends an error message.
    """
    scout = ReductionScout("no")
    with torch.enable_grad(), scout:
        program.plain(loss.micro, loss.random)
    size = len(loss.samples)
    batch = program.batch(loss.micro)
    losses = [met for met in scout.found if met.value.requires_grad]
    name = losses[0].reduction.name if losses else "cross_entropy"
    shape = losses[0].shape if losses else (size,)
    lines = [
        *_unpack(batch),
        f'losses = F.{name}({_network(program.module)}(x), y, reduction="none")',
    ]
    picks = bool(losses) and shape != (size,) and shape[:1] != (size,)
    if picks:
        lines[-1] += f"   # shape {list(shape)} in the step: bring it to [{size}, …]"
    if losses and shape == (size,):
        lines.append(f"return losses   # one a sample: [{size}] here")
    else:
        lines.append(f"return losses.reshape(len(y), -1).mean(1)   # one a sample: [{size}] here")
    body = "\n".join(f"        {line}" for line in lines)
    return (
        "Pass the per-sample losses yourself, one a sample, whose mean is the loss that "
        "`training_step` returns:\n\n"
        f"    def sample_losses(module, batch):\n{body}\n\n"
        "    InfluenceCallback(..., sample_losses=sample_losses)" + (_PICKED if picks else "")
    )


_PICKED = (
    "\n\nIf the step picks elements by a mask (`output[mask]`), its mean is over elements, and no mean "
    "over samples. Keep all of them instead, and nothing need be passed: "
    "`(losses * mask).sum() / mask.sum()`, or targets of `-100`, which `F.cross_entropy` ignores."
)


def _network(module: Any) -> str:
    """How the module is called, or what stands for it where it has no ``forward`` of its own."""
    own = not type(module).forward.__module__.startswith(
        ("lightning.", "pytorch_lightning.", "torch.")
    )
    children = [name for name, _ in module.named_children()]
    return "module" if own or not children else f"module.{children[0]}"


def _unpack(batch: Any) -> list[str]:
    """Lines that take an input and a target out of a batch like this one."""
    if isinstance(batch, Tensor):
        return ["x = y = batch"]
    if isinstance(batch, Mapping):
        names = [f"batch[{key!r}]" for key in batch]
    elif dataclasses.is_dataclass(batch):
        names = [f"batch.{field.name}" for field in dataclasses.fields(batch)]
    elif isinstance(batch, Sequence) and len(batch) == 2:
        return ["x, y = batch"]
    elif isinstance(batch, Sequence):
        names = [f"batch[{place}]" for place in range(len(batch))]
    else:
        return [f"x, y = ...   # out of a `{type(batch).__name__}`"]
    if len(names) < 2:
        return [f"x = y = {''.join(names) or '...'}"]
    chosen = f"x, y = {names[0]}, {names[-1]}"
    return [chosen + ("   # or others of " + ", ".join(names) if len(names) > 2 else "")]
