"""U in the coordinates of V: how an SGD step carries Δ_j ≈ Vc_j, its momentum buffers being Vb_j.

SGD's rule is linear and the same for every entry of a parameter, so it acts on coordinates as it acts
on parameters:

    U(Vc, Vb, Vk) = V U(c, b, k)

for a change k of the gradient. Parameters that a step treats differently (by the settings of their
groups, by having no gradient, or no buffer yet) are blocks, and what comes of each is projected again:

    c' = Σ_blocks (VᵀPV) U_block(c, b, k),      P keeps the block's own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add

from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.basis import Basis
from lightning_accie.replay.update import Update
from lightning_accie.replay.update_rules import SGD, optimizer_of
from lightning_accie.replay.walker import Visit

_Names = tuple[str, ...]


def check_update(update: Update) -> None:
    """Refuse what does not act on coordinates as it acts on parameters.

    Args:
        update: a step's U.

    Raises:
        UnsupportedError: if it is not SGD, or clips gradients.
    """
    instead = 'Use `AccSgdIE(candidates=...)` for chosen samples, or `estimator="sgd-ie"` for all.'
    if not isinstance(update.rule, SGD):
        raise UnsupportedError(
            f"LowRankAccSgdIE follows runs of `SGD` (with momentum, Nesterov, dampening, weight "
            f"decay), and this run's optimiser is `{optimizer_of(update.rule)}`, which scales every "
            f"weight by itself. {instead}"
        )
    if update.clip is not None:
        raise UnsupportedError(
            "LowRankAccSgdIE does not follow gradient clipping "
            f'(`gradient_clip_algorithm="{update.clip.algorithm}"`), which this run has. {instead}'
        )


class ReducedUpdate:
    """Carries coordinates through the updates of a run.

    Args:
        basis: V.
    """

    def __init__(self, basis: Basis) -> None:
        self._basis = basis
        self._overlaps: dict[_Names, Tensor] = {}

    def __call__(
        self, visit: Visit, c: Tensor, slots: Mapping[str, Tensor], change: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step.

        Args:
            visit: the step.
            c: ``[n, r]``.
            slots: the coordinates of what the optimiser keeps, ``[n, r]`` each.
            change: ``[n, r]``, the coordinates of the gradient's change.

        Returns:
            The next c and slots.
        """
        blocks = self._blocks(visit)
        parts = []
        for names in blocks:
            update, name = visit.map.update, names[0]
            have = {key: slots[key] for key in visit.state.slots.get(name, {})}
            if name in visit.map.used:
                settings, count = update.settings[name], update.counts[name]
                moved, kept = update.rule.update(c, change, have, count, settings)
            else:
                moved, kept = c, have
            parts.append({"": moved, **kept})
        if len(blocks) > 1:
            parts = [
                {key: value @ self._overlap(names) for key, value in part.items()}
                for names, part in zip(blocks, parts, strict=True)
            ]
        keys = dict.fromkeys(key for part in parts for key in part)
        after = {key: reduce(add, [part[key] for part in parts if key in part]) for key in keys}
        return after.pop(""), after

    def _blocks(self, visit: Visit) -> list[_Names]:
        """The parameters that the step treats alike."""
        blocks: dict[tuple[int, bool, _Names], list[str]] = {}
        for name in self._basis.names:
            settings = visit.map.update.settings[name]
            have = tuple(visit.state.slots.get(name, {}))
            blocks.setdefault((id(settings), name in visit.map.used, have), []).append(name)
        return [tuple(names) for names in blocks.values()]

    def _overlap(self, names: _Names) -> Tensor:
        """VᵀPV, which is symmetric."""
        if names not in self._overlaps:
            self._overlaps[names] = self._basis.overlap(names)
        return self._overlaps[names]
