"""F_t for some of the parameters: the others follow the recorded run.

Influence-critical layers (arXiv 2510.26185): what leaving a sample out does to the chosen parameters
θ_c is followed; the others θ_r are constants, those of the recorded run at each step.

    F_t restricted: (θ_c, slots_c, b) -> the same after the step, with θ_r = θ_r,t

Nothing is differentiated for θ_r: a forward pass through layers that come before the chosen ones is
shared by all samples, and no backward pass goes there.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_accie.replay.state import Params
from lightning_accie.replay.step import MicroLoss, StepMap
from lightning_accie.replay.tape import Bound, Tape
from lightning_accie.replay.walker import Visit


@dataclass
class PartLoss:
    """A micro-batch's loss as a function of some parameters (see `MicroLoss`).

    Attributes:
        whole: the loss as a function of all.
        rest: the other parameters.
        tape: the gradient with its graph, of the chosen parameters alone.
    """

    whole: MicroLoss
    rest: Params
    tape: Tape | None = None

    def __post_init__(self) -> None:
        if self.whole.tape is not None:
            self.tape = self.whole.tape.without(self.rest)

    @property
    def samples(self) -> Tensor:
        """``[B]`` int64."""
        return self.whole.samples

    @property
    def rank(self) -> int:
        """The process that ran it."""
        return self.whole.rank

    def functional(
        self, params: Params, weights: Tensor, statistics: Params
    ) -> tuple[Tensor, Params]:
        """The loss, and the running statistics after it."""
        return self.whole.functional({**self.rest, **params}, weights, statistics)

    def bound(self, weights: Tensor, statistics: Params) -> Bound:
        """The same from the module's bound parameters."""
        return self.whole.bound(weights, statistics)

    def held(self, params: Params | None = None) -> AbstractContextManager[None]:
        """Where a backward pass over it belongs."""
        return self.whole.held(None if params is None else {**self.rest, **params})

    def ones(self) -> Tensor:
        """``[B]`` ones."""
        return self.whole.ones()


def part_of(visit: Visit, names: Collection[str] | None) -> Visit:
    """Restrict F_t and its state to some parameters; the module must be bound to the visit's state.

    Args:
        visit: a stop of a walk.
        names: the parameters to follow; None for all.

    Returns:
        The visit, with a map and a state of those parameters (and of all running statistics).
    """
    if names is None:
        return visit
    whole, state = visit.map, visit.state
    chosen = state.only(names)
    rest = {name: value for name, value in state.params.items() if name not in chosen.params}
    used = tuple(name for name in whole.used if name in chosen.params)
    losses = whole.losses if used or state.statistics else ()  # else nothing changes at this step
    update = whole.update
    if update.clip is not None and update.clip.algorithm == "norm":  # the norm is that of all
        gradient = whole.plain_gradient()
        clip = replace(update.clip, rest={n: g for n, g in gradient.items() if n in rest})
        update = replace(update, clip=clip)
    step: StepMap = replace(
        whole,
        losses=[PartLoss(loss, rest) for loss in losses],
        update=update,
        used=used,
    )
    return replace(visit, map=step, snapshot=replace(visit.snapshot, state=chosen))
