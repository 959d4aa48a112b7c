"""Which elements of a reduction belong to which sample, found by replacing one sample at a time.

The step is evaluated with sample i's place in the batch given to another sample, everything else and
all random numbers staying as they are. What changes in a reduction's elements is sample i's. The
layout is one under which no other sample's elements changed, for all i that were tried; shapes alone
prove nothing, since ``[B·T]`` and ``[T·B]`` have the same.

Normalisation layers use their running statistics meanwhile. Where samples still see one another (a
contrastive loss, examples that are mixed), every layout is refuted; then a reduction counts row by row
if it has as many rows as the batch has samples, and else not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_accie.replay.loss_form import ROWS, Layout
from lightning_accie.replay.module import RecordedLoss, TrainingProgram
from lightning_accie.replay.per_sample import ReductionScout

_FEW, _MANY = 4, 16
"""Places of a loader's samples that are tried at first, and where that leaves a doubt."""


@dataclass
class _Elements:
    """What is known of one reduction."""

    before: Tensor
    possible: list[Layout]
    changed: bool = False

    def changes(self, after: Tensor) -> Tensor:
        """Where the elements differ by more than rounding."""
        tolerance = torch.finfo(self.before.dtype).eps ** 0.75
        scale = self.before.nan_to_num().abs().max()
        both = self.before.isnan() & after.isnan()
        return ~((self.before - after).abs() <= tolerance * scale) & ~both


class Ownership:
    """Finds the layout of every reduction that a scout meets in a step.

    Args:
        program: the module's training step, bound to the state before the step.
        loss: a micro-batch of the step.
    """

    def __init__(self, program: TrainingProgram, loss: RecordedLoss) -> None:
        self.program = program
        self.loss = loss
        self.spans = program.batches.spans(loss.micro)
        self.size = len(loss.samples)

    def layouts(self, hand_written: str) -> list[Layout | None]:
        """Find the layouts.

        Args:
            hand_written: which reductions by hand to look at.

        Returns:
            One a reduction, in order; None where its elements cannot be told apart by sample.
        """
        with self.program.fixed_statistics():
            known = [
                _Elements(elements, self._possible(elements.shape))
                for elements in self._elements(hand_written)
            ]
            if self.size > 1:
                for count in (_FEW, _MANY):
                    self._narrow(known, hand_written, count)
                    if not any(self._open(each) for each in known):
                        break
        return [self._decide(each) for each in known]

    def _elements(self, hand_written: str) -> list[Tensor]:
        scout = ReductionScout(hand_written)
        with torch.enable_grad(), scout:  # a step may differentiate by itself
            self.program.plain(self.loss.micro, self.loss.random)
        return [met.reduction.elements.detach() for met in scout.found]

    def _possible(self, shape: Sequence[int]) -> list[Layout]:
        """Every layout that the shape allows."""
        sizes: dict[int | None, int] = {None: self.size}
        if len(self.spans) > 1:
            sizes |= {source: span.stop - span.start for source, span in self.spans.items()}
        found = []
        for source, size in sizes.items():
            for axis, length in enumerate(shape):
                orders = ["single"] if length == size else ["blocked", "interleaved"]
                each = [Layout(axis, order, source) for order in orders]
                found += [layout for layout in each if length and length % size == 0]
        return found

    # ------------------------------------------------------------------ replacing samples

    def _narrow(self, known: list[_Elements], hand_written: str, count: int) -> None:
        """Rule out the layouts under which another sample's elements change."""
        for source, span in self.spans.items():
            for place in _spread(span, count):
                batches = self.program.batches.with_another(
                    self.loss.micro, source, place - span.start
                )
                for raw in batches:
                    if raw is None:  # a collate function may drop a batch
                        continue
                    batch = self.program.prepared(raw)
                    self.program.substitute = lambda _, batch=batch: batch
                    try:
                        after = self._elements(hand_written)
                    finally:
                        self.program.substitute = None
                    if self._compare(known, after, place):
                        break

    def _compare(self, known: list[_Elements], after: list[Tensor], place: int) -> bool:
        """Take in one replaced sample; whether it told anything."""
        shapes = [each.before.shape for each in known]
        if shapes != [elements.shape for elements in after]:
            return False
        told = False
        for each, elements in zip(known, after, strict=True):
            changes = each.changes(elements)
            if not bool(changes.any()):
                continue
            told = each.changed = True
            each.possible = [
                layout
                for layout in each.possible
                if not bool((changes & (self._owners(layout, changes.shape) != place)).any())
            ]
        return told

    def _owners(self, layout: Layout, shape: Sequence[int]) -> Tensor:
        """The place in the batch of every element's sample, in a shape that broadcasts."""
        span = slice(0, self.size) if layout.source is None else self.spans[layout.source]
        places = torch.arange(span.start, span.stop, device=self.program.device)
        return layout.spread(places, shape)

    # ------------------------------------------------------------------ concluding

    def _distinct(self, each: _Elements) -> list[Layout]:
        """The layouts that are left, those that come to the same thing once."""
        found: list[Layout] = []
        shape = each.before.shape
        for layout in each.possible:
            owners = self._owners(layout, shape).expand(shape)
            if not any(torch.equal(owners, self._owners(o, shape).expand(shape)) for o in found):
                found.append(layout)
        return found

    def _open(self, each: _Elements) -> bool:
        return each.changed and len(self._distinct(each)) > 1

    def _decide(self, each: _Elements) -> Layout | None:
        left = self._distinct(each)
        if each.changed and len(left) == 1:
            return left[0]
        return ROWS if ROWS.fits(each.before.shape, self.size) else None


def _spread(span: slice, count: int) -> list[int]:
    """Up to ``count`` places of a span, its ends among them."""
    return sorted({int(i) for i in torch.linspace(span.start, span.stop - 1, count).round()})
