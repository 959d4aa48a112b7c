"""Short measurements that choose between ways to get the same or a similar result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.chunks import chunk_size
from lightning_accie.replay.state import stack, zeros_like
from lightning_accie.replay.walker import Visit, Walker

_ROWS = 32


def _best_of(action: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def choose_product(walker: Walker) -> str:
    """Find the cheaper way to a Hessian product, at the run's first step.

    Some operators have no forward mode; then double backward it is.

    Args:
        walker: the run; its ``product`` is set to the choice.

    Returns:
        ``"double-backward"`` or ``"reverse-over-forward"``.
    """
    visit = next(walker.forwards())
    still = {name: torch.zeros_like(visit.state.params[name]) for name in visit.map.used}
    cotangent = visit.map.update(visit.state, still).map(torch.ones_like)
    times: dict[str, float] = {}
    for product in ("double-backward", "reverse-over-forward"):
        step = replace(visit.map, product=product)
        try:
            times[product] = _best_of(partial(step.vjp, visit.state, cotangent))
        except (NotImplementedError, RuntimeError):
            continue  # an operator of the module lacks this derivative
    walker.product = min(times, key=lambda name: times[name], default="double-backward")
    return walker.product


def choose_mapping(replay: Replay) -> bool:
    """Find out whether counterfactuals can run side by side, at the run's first step.

    Args:
        replay: the run; its walker and query are set to the choice.

    Returns:
        Whether `torch.func.vmap` takes the module's training and validation steps.
    """
    visit = next(replay.walker.forwards())
    both = stack(visit.state, 2)
    try:
        visit.map.advance_many(both, replay.samples[:1].repeat(2))
        replay.query.values(both.params)
    except (NotImplementedError, RuntimeError, ValueError):
        replay.walker.vectorize = replay.query.vectorize = False
    return replay.walker.vectorize


def exact_is_cheaper(replay: Replay) -> bool:
    """Compare the price of one sample: exact replay against ACC-SGD-IE.

    Where an operator of the module has no forward mode, only the exact replay is left.

    Args:
        replay: the run.

    Returns:
        Whether a step of exact replay costs no more than a step of ACC-SGD-IE.
    """
    visit: Visit = next(replay.walker.forwards())
    size = min(_ROWS, len(replay.samples), chunk_size(replay, 10))
    removed = replay.samples[:size]
    tangents = zeros_like(visit.state, batch=size)
    states = stack(visit.state, size).map(torch.clone)
    exact = _best_of(lambda: visit.map.advance_many(states, removed))
    try:
        acc = _best_of(lambda: visit.map.push(visit.state, tangents, removed))
    except (NotImplementedError, RuntimeError):
        return True
    return exact <= acc
