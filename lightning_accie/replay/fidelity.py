"""How well a replay follows the record: every loss and every stored state is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_accie.errors import ReplayMismatchError
from lightning_accie.replay.precision import Precision
from lightning_accie.replay.state import State
from lightning_accie.trajectory.records import MicroBatch, Step


class Fidelity:
    """Compares a replay with the record, and keeps how far apart the two were.

    Args:
        header: the trajectory's header.
        precision: that of the recorded run, with the tolerances that go with it.

    Attributes:
        losses: losses compared.
        checkpoints: checkpoints compared.
        largest_loss_difference: the largest relative difference of a loss.
        largest_state_difference: the largest difference of a checkpoint's tensor, relative to its
            largest entry.
        seen: the steps whose checkpoints were compared.
    """

    def __init__(self, header: Mapping[str, Any], precision: Precision) -> None:
        self._header = header
        self._precision = precision
        self.losses = 0
        self.checkpoints = 0
        self.largest_loss_difference = 0.0
        self.largest_state_difference = 0.0
        self.seen: set[int] = set()

    @property
    def bit_exact(self) -> bool:
        """Whether every compared number was equal bit for bit."""
        return self.largest_loss_difference == 0.0 and self.largest_state_difference == 0.0

    def check_loss(self, step: Step, micro: MicroBatch, loss: Tensor | None) -> None:
        """Compare what ``training_step`` returned with what it had returned.

        Args:
            step: the step, for the message.
            micro: the record.
            loss: the replayed loss, or None.

        Raises:
            ReplayMismatchError: if they differ by more than the precision allows.
        """
        if (loss is None) != (micro.loss is None):
            raise self._mismatch(step, micro, "training_step returned None in only one of the two")
        if loss is None or micro.loss is None:
            return
        replayed, recorded = float(loss.detach()), micro.loss
        self.losses += 1
        if replayed == recorded or (math.isnan(replayed) and math.isnan(recorded)):
            return
        difference = abs(replayed - recorded) / max(abs(recorded), 1e-3)
        if not difference <= self._precision.tolerances.loss:
            raise self._mismatch(
                step, micro, f"the recorded loss is {recorded:.9g}, the replayed one {replayed:.9g}"
            )
        self.largest_loss_difference = max(self.largest_loss_difference, difference)

    def check_state(self, step: int, replayed: State, recorded: State) -> None:
        """Compare a state with its checkpoint.

        Args:
            step: how many steps lead to it.
            replayed: the state as it came out.
            recorded: the state as it was stored.

        Raises:
            ReplayMismatchError: if they differ by more than the precision allows.
        """
        self.seen.add(step)
        self.checkpoints += 1
        names = [f"parameter `{name}`" for name in recorded.params]
        slots = recorded.slots.items()
        names += [f"`{slot}` of `{name}`" for name, group in slots for slot in group]
        names += [f"running statistic `{name}`" for name in recorded.statistics]
        pairs = zip(names, replayed.leaves(), recorded.leaves(), strict=True)
        for name, value, stored in pairs:
            if torch.equal(value, stored):
                continue
            difference = _difference(value, stored)
            if not difference <= self._precision.tolerances.state:
                raise ReplayMismatchError(
                    f"After {step} steps the replayed {name} differs from the checkpoint by "
                    f"{difference:.2g} of its largest entry. {self._causes()}"
                )
            self.largest_state_difference = max(self.largest_state_difference, difference)

    def _mismatch(self, step: Step, micro: MicroBatch, what: str) -> ReplayMismatchError:
        return ReplayMismatchError(
            f"The replay departs from the recorded run at step {step.number} (epoch {micro.epoch}, "
            f"batch {micro.batch_idx}{self._whose(micro)}): {what}. {self._causes()}"
        )

    def _whose(self, micro: MicroBatch) -> str:
        return f", rank {micro.rank}" if micro.world_size > 1 else ""

    def _causes(self) -> str:
        hooks: list[Any] = list(self._header.get("overridden_hooks", []))
        text = (
            "Usual causes: the module is not the one that was trained (its code, or a hyper-parameter "
            "not seen in the weights: activation, dropout, loss), the dataset or its order "
            "changed since training, the dataset augments at random, training_step reads something "
            "outside the batch and the module's state, or something besides the optimiser changed the "
            "weights."
        )
        if self._precision.autocast is not None:
            text += (
                f" Or it is the rounding of `{self._precision.name}`, which differs between "
                "devices and numbers of threads, and adds up: replay where the run was recorded."
            )
        if (written := self._header.get("written")) is not None:
            text += (
                " In this run something besides the optimiser did write to the weights, for the "
                f"first time before step {written}."
            )
        if self._header["trainer"].get("world_size", 1) > 1:
            text += (
                " Several processes trained: a value that they exchange in training_step "
                "(`all_gather`, `torch.distributed`) is not in the record either."
            )
        if hooks:
            names = ", ".join(f"`{hook}`" for hook in hooks)
            text += f" The module overrides {names}, which a replay does not run."
        return text


def _difference(replayed: Tensor, stored: Tensor) -> float:
    """The largest difference, relative to the largest entry; NaN where only one of two is finite."""
    same = (replayed == stored) | (replayed.isnan() & stored.isnan())  # a run may diverge
    apart = torch.where(same, 0.0, replayed - stored).abs().max()
    largest = torch.where(stored.isfinite(), stored, 0.0).abs().max()
    return float(apart / largest.clamp_min(1e-12))
