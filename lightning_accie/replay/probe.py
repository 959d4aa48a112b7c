"""Finding how a module's returned loss splits into per-sample parts.

The loss of a recorded step is Σ_i w_i ℓ_i/|m| + R: sample weights go into its reductions over the
batch, and what is left at w = 0 is R. Which reductions are the samples' own is found by evaluating the
step once more with other samples: a reduction that does not notice is a penalty on the weights, and a
remainder that does notice is a loss whose samples were not found.

Which elements of a reduction are whose is found by replacing one sample (`ownership`).

All of it happens at slightly moved parameters. Where training starts, a penalty on biases that are
zero, or a last layer of zeros, would hide what depends on what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from lightning_accie.errors import UnsupportedError, first_line
from lightning_accie.replay import plain_autograd
from lightning_accie.replay.advice import sample_losses_advice
from lightning_accie.replay.loss_form import BY_HAND, Layout, LossForm
from lightning_accie.replay.module import RecordedLoss, TrainingProgram
from lightning_accie.replay.ownership import Ownership
from lightning_accie.replay.per_sample import Met, ReductionScout
from lightning_accie.replay.state import Params, dot
from lightning_accie.replay.walker import Visit

_AFFINE_TOLERANCE = 1e-3
"""Of a value against the same sum put together otherwise; the reductions sum in 32 bits at least."""
_MOVE = 1e-2
"""How far parameters are moved, relative to their root mean square (or 1 where that is 0)."""


_TRIED = {
    "no": "",
    "whole": "With sums and means by hand: ",
    "partial": "With those along a dimension too: ",
}
"""What was tried, before the reason why it does not fit."""


def find_loss_form(program: TrainingProgram, loss: RecordedLoss) -> LossForm:
    """Find how the step's loss splits; leaves ``program.form`` set to the result.

    Args:
        program: the module's training step, bound to the state before the step.
        loss: a micro-batch of the step.

    Returns:
        The form in which every check passes.

    Raises:
        UnsupportedError: if none does, with the reasons and the way out.
    """
    probe = _Probe(program, loss)
    with _moved(program):
        probe.watch_buffers()
        if program.sample_losses is not None:
            program.form = probe.with_sample_losses()
        else:
            program.form = probe.found()
        probe.check_transforms()
        probe.check_statistics()
    return program.form


def check_derivatives(probe: Callable[[Visit], None], visit: Visit) -> None:
    """Refuse a module with an operator that lacks a derivative which an estimator needs.

    Args:
        probe: the estimator's `Estimator.probe`.
        visit: a step of the run.

    Raises:
        UnsupportedError: with torch's own words, and what to do instead; or what the probe itself
            refuses.
    """
    try:
        probe(visit)
    except UnsupportedError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            "An operator of the module lacks a derivative that the estimator needs: "
            f'{first_line(error)} Use `estimator="leave-one-out"`, which needs first '
            "derivatives only, or replace the operator (EmbeddingBag by Embedding and a mean, say)."
        ) from error


@contextmanager
def _moved(program: TrainingProgram) -> Iterator[None]:
    """Bind parameters a little away from the present ones."""
    before = {name: value.detach() for name, value in program.parameters.items()}
    generator = torch.Generator().manual_seed(0)

    def move(value: Tensor) -> Tensor:
        size = value.square().mean().sqrt()
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return value + noise * _MOVE * torch.where(size > 0, size, 1.0)

    program.bind({name: move(value) for name, value in before.items()})
    try:
        yield
    finally:
        program.bind(before)


@dataclass(frozen=True)
class _Seen:
    """What a reduction gave, with the gradient in the parameters (None: it has none)."""

    met: Met
    gradient: tuple[Tensor, ...] | None

    @property
    def flat(self) -> bool:
        """Whether the gradient is zero, which says nothing about what it depends on."""
        return self.gradient is None or not any(bool(part.any()) for part in self.gradient)

    def same(self, other: _Seen) -> bool:
        """Whether other samples changed neither value nor gradient."""
        if self.gradient is None or other.gradient is None:
            return False
        pairs = [(self.met.value, other.met.value)]
        pairs += zip(self.gradient, other.gradient, strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def made_of(self, earlier: _Seen) -> bool:
        """Whether an earlier reduction went into this one."""
        if not (self.met.value.requires_grad and earlier.met.value.requires_grad):
            return False
        value = self.met.value.sum()
        (found,) = torch.autograd.grad(
            value, [earlier.met.value], retain_graph=True, allow_unused=True
        )
        return found is not None

    def over_samples(self, layout: Layout | None) -> bool:
        """Whether it reduces the dimension that tells samples apart."""
        dims = self.met.reduction.dims
        return layout is not None and (dims is None or layout.axis in dims)


class _Probe:
    """The questions that are asked of one micro-batch."""

    def __init__(self, program: TrainingProgram, loss: RecordedLoss) -> None:
        self.program = program
        self.loss = loss
        self.size = len(loss.samples)
        self.ownership = Ownership(program, loss)
        self.tolerances = program.analysis.tolerances

    # ------------------------------------------------------------------ the ways to split

    def watch_buffers(self) -> None:
        """Find out whether the step writes to buffers: then every evaluation puts them back."""
        self.program.writes_buffers = False
        with self.program.held():
            before = self.program.buffer_versions()
            self.program.plain(self.loss.micro, self.loss.random)
            self.program.writes_buffers = self.program.buffer_versions() != before

    def found(self) -> LossForm:
        """Put the weights where they fit."""
        reasons: dict[str, str] = {}
        for hand_written in BY_HAND:
            try:
                return self.form(hand_written)
            except UnsupportedError as error:
                reasons.setdefault(str(error), hand_written)
        name = type(self.program.module).__name__
        raise UnsupportedError(
            f"The per-sample losses of `{name}.training_step` could not be found: "
            + " ".join(_TRIED[level] + reason for reason, level in reasons.items())
            + "\n"
            + sample_losses_advice(self.program, self.loss)
        )

    def form(self, hand_written: str) -> LossForm:
        """Put the weights into the loss functions, or into sums and means by hand too."""
        others = self._others()
        excluded, layouts, note = self._places(hand_written, others)
        self.program.form = LossForm(hand_written, excluded, layouts)
        self._check_affine()
        rest = self._rest()
        if others is not None and not self._close(rest, self._rest(others)):
            raise UnsupportedError(
                f"a part of the loss depends on the data but on no sample's own term{note}."
            )
        return replace(self.program.form, penalty=_length(rest) > 0)

    def with_sample_losses(self) -> LossForm:
        """`sample_losses` must give the training loss, up to a part that is no sample's."""
        self.program.form = LossForm(penalty=True)
        whole, rest = _length(self._gradient()), self._rest()
        if _length(rest) <= self.tolerances.parts * whole:
            return LossForm()
        others = self._others()
        if others is None or not self._close(rest, self._rest(others)):
            raise UnsupportedError(
                "`sample_losses` does not fit `training_step`: the gradient of their mean differs "
                f"from that of the returned loss ({_length(rest):.2g} beside {whole:.2g}), and the "
                "difference depends on the data. `sample_losses` must return the very losses, with "
                "their graph, whose mean `training_step` returns."
            )
        return LossForm(penalty=True)

    def check_transforms(self) -> None:
        """As estimators run it, the weighted loss must have the gradient that training has.

        They run it under `torch.func`, or by plain autograd where an operator does not go there.

        Raises:
            UnsupportedError: if it has another.
        """
        program = self.program
        params = {name: value.detach() for name, value in program.parameters.items()}
        program.untransformed = None
        try:
            found = grad(self._at_ones)(params)
        except (RuntimeError, NotImplementedError) as error:
            program.untransformed = first_line(error)
            found, _ = plain_autograd.gradient(
                lambda p, b: (self._at_ones(p), b), params, {}, program.trainable, program.held
            )
        plain = self._gradient()
        difference = {name: found[name] - value for name, value in plain.items()}
        if not _length(difference) <= self.tolerances.gradient * _length(plain):
            raise UnsupportedError(
                f"The per-sample form of the loss ({program.form}) has another gradient than the "
                f"loss that `training_step` returns: they differ by {_length(difference):.2g}, "
                f"beside {_length(plain):.2g}. Something in `training_step` runs otherwise when it "
                "is differentiated on its own, as under torch.func."
            )

    def check_statistics(self) -> None:
        """Leave running statistics as recorded where they do not follow what enters their layers.

        Activation checkpointing does it: the backward pass runs the layers, and updates the
        statistics, once more.
        """
        program = self.program
        if not program.statistics.names:
            return
        before = {name: buffer.clone() for name, buffer in program.buffers.items()}
        value = program.run(self.loss.micro, self.loss.random)
        if value is not None:
            parameters = [program.parameters[name] for name in program.trainable]
            torch.autograd.grad(value, parameters, allow_unused=True)
        after = {n: b.clone() for n, b in program.statistics.of(program.buffers).items()}
        program.load_buffers(before)
        with torch.no_grad():
            bound = self.loss.bound(self.loss.ones(), program.statistics.of(before))
            found = bound.statistics
        for name, value in after.items():
            scale = value.abs().max().clamp_min(1e-12)
            if not (found[name] - value).abs().max() <= self.tolerances.state * scale:
                program.statistics.leave_out()
                return

    def _at_ones(self, params: Params) -> Tensor:
        return self._weighted(self.loss.ones(), params)

    # ------------------------------------------------------------------ the parts

    def _places(
        self, hand_written: str, others: Any
    ) -> tuple[frozenset[int], dict[int, Layout], str]:
        """The reductions that get no weights, how the others are laid out, and what is remarkable."""
        here, scalars = self._scout(hand_written)
        there = here if others is None else self._scout(hand_written, others)[0]
        layouts = self.ownership.layouts(hand_written)
        if not len(here) == len(there) == len(layouts):
            raise UnsupportedError("the number of its reductions depends on the data.")
        excluded, note = [], ""
        weighted: dict[int, Layout] = {}
        for place, (seen, again, layout) in enumerate(zip(here, there, layouts, strict=True)):
            constant = seen.gradient is None  # a count, the sum of a mask
            penalty = others is not None and seen.same(again) and not seen.flat
            inner = seen.met.reduction.dims is not None and not seen.over_samples(layout)
            nested = any(seen.made_of(here[earlier]) for earlier in weighted)
            if layout is not None and not (constant or penalty or inner or nested):
                weighted[place] = layout
                continue
            excluded.append(place)
            if not (constant or penalty or inner or nested):
                note = f" ({self._unclear(seen)})"
        if not weighted:
            if scalars and not note:
                names = ", ".join(f"`{name}`" for name in scalars)
                note = f" (it reduces by {names}, which is no sum over samples)"
            raise UnsupportedError(f"no reduction over the batch was found in it{note}.")
        return frozenset(excluded), weighted, note

    def _unclear(self, seen: _Seen) -> str:
        """Say what cannot be told apart; refuse where it might be the samples' and shows nothing."""
        shape = seen.met.shape
        said = (
            f"`{seen.met.reduction.name}` reduces a tensor of shape {shape}, but the batch has "
            f"{self.size} samples: its rows cannot be told apart by sample"
        )
        if seen.flat and any(length and length % self.size == 0 for length in shape):
            raise UnsupportedError(f"{said}, since all of it is constant at the first step.")
        return said

    def _check_affine(self) -> None:
        """The loss must be what it is at w = 1, plus each sample's share of the change in w."""
        ones = self.loss.ones().requires_grad_()
        with self.program.held(), torch.enable_grad():
            whole = self._weighted(ones)
            (shares,) = torch.autograd.grad(whole, [ones], materialize_grads=True)
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(self.size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            value = float(self._weighted(weights.to(ones)))
        shares = shares.double().cpu()
        expected = float(whole.detach()) + float((weights - 1.0) @ shares)
        scale = max(abs(float(whole.detach())), float(shares.abs().sum()), 1e-6)
        if not abs(value - expected) <= _AFFINE_TOLERANCE * scale:
            raise UnsupportedError("it is not a weighted sum of terms of the samples.")

    def _rest(self, others: Any = None) -> Params:
        """∇R: what is left of the gradient at w = 0."""
        with self._instead(others), self.program.held(), torch.enable_grad():
            return self._differentiated(self._weighted(torch.zeros_like(self.loss.ones())))

    def _gradient(self, others: Any = None) -> Params:
        """The gradient of the loss as `training_step` returns it."""
        with self._instead(others), torch.enable_grad():
            value = self.program.plain(self.loss.micro, self.loss.random)
        return {} if value is None else self._differentiated(value)

    def _scout(self, hand_written: str, others: Any = None) -> tuple[list[_Seen], list[str]]:
        """Every reduction with its gradient, and the functions that reduce in other ways."""
        scout = ReductionScout(hand_written)
        with self._instead(others), torch.enable_grad(), scout:
            self.program.plain(self.loss.micro, self.loss.random)
        inputs = [self.program.parameters[name] for name in self.program.trainable]
        found = []
        for met in scout.found:
            gradient = None
            if met.value.requires_grad:
                gradient = torch.autograd.grad(
                    met.value.sum(), inputs, retain_graph=True, materialize_grads=True
                )
            found.append(_Seen(met, gradient))
        return found, list(scout.scalars)

    def _weighted(self, weights: Tensor, params: Params | None = None) -> Tensor:
        # Not `around` w = 1: at w = 0 the samples' part is to be zero, not a rounding error.
        micro, random = self.loss.micro, self.loss.random
        return self.program.weighted(micro, random, weights, params, around=False)

    def _differentiated(self, value: Tensor) -> Params:
        names = self.program.trainable
        if not value.requires_grad:
            return {name: torch.zeros_like(self.program.parameters[name]) for name in names}
        inputs = [self.program.parameters[name] for name in names]
        grads = torch.autograd.grad(value, inputs, materialize_grads=True)
        return dict(zip(names, grads, strict=True))

    # ------------------------------------------------------------------ other samples

    def _others(self) -> Any:
        """A batch of other samples that gives another gradient; None where the data have none."""
        here = self._gradient()
        for others in self.program.batches.others(self.loss.micro):
            if others is None:  # a collate function may drop a batch: the step never sees those
                continue
            there = self._gradient(others)
            if math.isfinite(_length(there)) and not self._close(here, there):
                return others
        return None

    def _close(self, left: Params, right: Params) -> bool:
        """Whether two gradients are the same up to rounding."""
        difference = {name: value - right[name] for name, value in left.items()}
        longer = max(_length(left), _length(right))
        return _length(difference) <= self.tolerances.parts * longer

    @contextmanager
    def _instead(self, others: Any) -> Iterator[None]:
        """Let the step see other samples."""
        if others is not None:
            batch = self.program.prepared(others)
            self.program.substitute = lambda _: batch
        try:
            yield
        finally:
            self.program.substitute = None


def _length(gradient: Params) -> float:
    return float(dot(gradient, gradient).sqrt())
