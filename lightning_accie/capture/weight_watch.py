"""Whether anything but the optimiser writes to the weights.

A replay moves the weights by the optimiser's steps alone. Weight clipping in a hook, a moving average
that is copied into a module, ``nn.Embedding(max_norm=)``: all of them write to parameters in between.
Two things tell, both nearly free:

- torch counts the writes to every tensor, a swap of the weights for validation and back among them, but
  none that goes by way of ``.data``. The counts after an optimiser step and before the next training
  step must be the same.
- The values after an optimiser step must be those with which the next begins, and parameters that the
  optimiser does not have must not change. That is looked at in the first two steps; whatever acts in
  every step shows there. (In the second too: a moving average that starts as a copy is still one
  after the first.)
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accie.errors import UnsupportedError

_LOOKS = 2
_version_of = attrgetter("_version")
_OURS = ("lightning.", "pytorch_lightning.", "lightning_accie.")


class WeightWatch:
    """Notices writes to a module's parameters that are not the optimiser's.

    Args:
        trainer: the Trainer, whose callbacks a message names.
        module: the LightningModule.
        hooks: the hooks that the module overrides and a replay does not run.

    Attributes:
        written: the number of the step before which a write was first noticed; None before.
    """

    def __init__(self, trainer: Any, module: nn.Module, hooks: list[str]) -> None:
        self._trainer = trainer
        self._hooks = hooks
        named = dict(module.named_parameters())
        self._names, self._parameters = list(named), list(named.values())
        groups = trainer.optimizers[0].param_groups
        moved = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        self._frozen = [id(p) not in moved for p in self._parameters]
        self._versions: list[int] = []
        self._values: list[Tensor] = []
        self._looks = _LOOKS
        self._due = False
        self.written: int | None = None

    def begin(self) -> None:
        """Take the weights as they are: training is about to start."""
        self._versions, self._values = self._now(), self._summed()

    def stepped(self) -> None:
        """Take the weights as the optimiser left them.

        Raises:
            UnsupportedError: if weights changed in an early step that are not the optimiser's.
        """
        self._versions = self._now()
        if not self._looks:
            return
        self._looks, self._due = self._looks - 1, True
        values = self._summed()
        frozen = dict(zip(self._names, self._frozen, strict=True))
        if changed := [name for name in self._changed(values) if frozen[name]]:
            raise UnsupportedError(
                f"Something changed {_listed(changed)} in the first steps, which the optimiser does "
                f"not{self._advice()}"
            )
        self._values = values

    def before(self, step: int) -> bool:
        """Look at the weights before a training step.

        Args:
            step: the optimiser step that it is part of.

        Returns:
            Whether they were written to since the last look, for the first time.

        Raises:
            UnsupportedError: if they are not those that an early optimiser step left.
        """
        if self._due:
            self._due = False
            if changed := self._changed(self._summed()):
                raise UnsupportedError(
                    f"Something besides the optimiser changed {_listed(changed)} between the first "
                    f"optimiser steps{self._advice()}"
                )
            self._versions = self._now()  # written to, perhaps, but put back
            return False
        now = self._now()
        if now == self._versions:
            return False
        self._versions = now
        first = self.written is None
        self.written = step if first else self.written
        return first

    def within(self) -> None:
        """Look at the weights after a training step, before its gradient is used.

        Raises:
            UnsupportedError: if it wrote to them.
        """
        pairs = zip(self._names, self._now(), self._versions, strict=True)
        changed = [name for name, now, then in pairs if now != then]
        if changed:
            raise UnsupportedError(
                f"`training_step` writes to {_listed(changed)} itself. A replay moves the weights by "
                "the optimiser's steps alone, so the run cannot be replayed. Constrain weights by a "
                "parametrisation (`torch.nn.utils.parametrize`), which belongs to the forward pass, "
                "or hold what training_step updates in buffers."
            )

    def suspects(self) -> str:
        """Say who may have done it.

        Returns:
            A part of a sentence: callbacks of the user's own, and hooks of the module.
        """
        kinds = [type(other) for other in self._trainer.callbacks]
        own = [f"`{kind.__name__}`" for kind in kinds if not kind.__module__.startswith(_OURS)]
        hooks = [f"`{hook}`" for hook in self._hooks]
        who = [f"a callback ({', '.join(own)})"] if own else []
        who += [f"what the module overrides ({', '.join(hooks)})"] if hooks else []
        return " or ".join(who) or "a callback or a hook"

    def _advice(self) -> str:
        return (
            f": {self.suspects()}. A replay runs none of it. Constrain weights by a parametrisation "
            "(`torch.nn.utils.parametrize`), which belongs to the forward pass; hold a moving average "
            "of them in a callback, or in buffers that `training_step` updates; or leave "
            "InfluenceCallback out."
        )

    def _now(self) -> list[int]:
        return list(map(_version_of, self._parameters))

    def _summed(self) -> list[Tensor]:
        """Two sums of each parameter, which tell other values without keeping a copy."""
        return [
            torch.stack([p.sum(dtype=torch.float64), p.square().sum(dtype=torch.float64)])
            for p in (parameter.detach() for parameter in self._parameters)
        ]

    def _changed(self, values: list[Tensor]) -> list[str]:
        pairs = zip(self._names, values, self._values, strict=True)
        return [name for name, now, then in pairs if not _same(now, then)]


def _same(now: Tensor, then: Tensor) -> bool:
    """Equality in which NaN is itself: a run may diverge."""
    return bool(((now == then) | (now.isnan() & then.isnan())).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more parameters" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more
