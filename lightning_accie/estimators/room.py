"""How a memory budget is divided, and the least that an analysis can do with.

| share | what |
|---|---|
| a quarter | batches of the recorded run, kept for when they come again |
| seven states, two steps' activations | what every analysis holds: s_0, s_T, and the step at hand |
| the rest | the estimator: states and graphs of a walk back, or samples carried side by side |

Where the estimator cannot do with the rest, fewer batches are kept. The query, whose batches and
parameter sets take a quarter at most, has it before and after the estimator's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.base import Estimator, Replay, Unasked
from lightning_accie.estimators.layers import Layers
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.sgd_ie import SgdIE
from lightning_accie.replay.walker import Walker
from lightning_accie.trajectory.sizes import format_bytes, parse_bytes

_AUTOMATIC = 10**9
_STATES, _GRAPHS = 7, 2
"""How many states and steps' activations every analysis holds; `benchmarks/scaling.py` measures it."""


@dataclass(frozen=True)
class MemoryBudget:
    """The bytes that an analysis may take.

    Attributes:
        size: how many.
        grows: whether it may be more where the analysis cannot do with that.
    """

    size: int
    grows: bool

    @classmethod
    def of(cls, given: int | str) -> MemoryBudget:
        """Read the argument ``memory_budget``.

        Returns:
            1 GB, which may grow, for ``"auto"``; else what was given.
        """
        automatic = given == "auto"
        return cls(_AUTOMATIC if automatic else parse_bytes(given), grows=automatic)


def divided(
    replay: Replay,
    budget: MemoryBudget,
    estimators: Sequence[Estimator],
    tell: Callable[[str], None],
) -> Replay:
    """Give the estimators their room, and the kept batches theirs.

    Args:
        replay: the run.
        budget: for all of the analysis.
        estimators: those that will be used.
        tell: is told where the budget has grown.

    Returns:
        The run with that room.

    Raises:
        UnsupportedError: if the budget is too small, with the least that would do.
    """
    state, graph = replay.final.state.nbytes(), replay.walker.graph_bytes()
    fixed = _STATES * state + _GRAPHS * graph
    needs = {estimator.name: estimator.least_bytes(replay) for estimator in estimators}
    name = max(needs, key=lambda one: needs[one])
    memory_budget, least = budget.size, fixed + needs[name]
    if least > memory_budget and not budget.grows:
        raise UnsupportedError(
            f"`memory_budget` is {memory_budget / 1e6:.0f} MB, which is too little for `{name}` on "
            f"this run. A state (weights, and what the optimiser keeps) takes {state / 1e6:.1f} MB, "
            f"the graph of a step {graph / 1e6:.1f} MB; the analysis holds several of each. Set "
            f'`memory_budget="{ceil(least / 1e6)}MB"` or more.'
        )
    if least > memory_budget:
        tell(
            f"Influence analysis: takes {format_bytes(least)} of memory, the least that `{name}` can "
            "do with on this run. With more (`memory_budget=`) it is faster."
        )
        memory_budget = least
    quarter = memory_budget // 4
    available = max(memory_budget - quarter - fixed, needs[name])
    replay.walker.program.batches.keep(min(quarter, memory_budget - fixed - available))
    return replace(replay, walker=replay.walker.within(available), memory_budget=available)


def used_by(chosen: Estimator | None, layers: Layers, *, verify: int) -> list[Estimator]:
    """The estimators that a ranking uses, as far as they need the most room.

    Args:
        chosen: whose ranking; None for the automatic one.
        layers: those that the automatic one follows.
        verify: how many samples are replayed exactly.

    Returns:
        The estimators.
    """
    exact: list[Estimator] = [LeaveOneOut()] if verify or chosen is None else []
    return [SgdIE(layers) if chosen is None else chosen, *exact]


def check_room(walker: Walker, budget: MemoryBudget, estimators: Sequence[Estimator]) -> None:
    """Refuse a budget that is too small for a run that has only begun.

    Args:
        walker: over its first step.
        budget: for all of the analysis.
        estimators: those that will be used.

    Raises:
        UnsupportedError: with the least that would do.
    """
    if budget.grows:
        return
    none = torch.zeros(0, dtype=torch.int64)
    run = Replay(walker, Unasked(), none, none, none, none, walker.final(), budget.size)
    divided(run, budget, estimators, lambda _: None)
