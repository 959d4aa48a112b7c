"""Short measurements that choose between ways to get the same or a similar result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lightning_accie.errors import first_line
from lightning_accie.estimators.acc_sgd_ie import AccSgdIE
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.estimators.layers import Layers, followed
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.sgd_ie import SgdIE, walker_of
from lightning_accie.replay.part import part_of
from lightning_accie.replay.state import Params, stack, zeros_like
from lightning_accie.replay.step import TANGENTS
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


@dataclass
class Ladder:
    """Which ways to the run's derivatives its module allows, and why not the ones above them.

    Attributes:
        walker: the run; its settings are those chosen.
        reasons: per way that was refused, what torch said.
    """

    walker: Walker
    reasons: dict[str, str] = field(default_factory=dict)

    def tries(self, way: str, action: Callable[[], object]) -> bool:
        """Try a way; where torch refuses, keep its words.

        Returns:
            Whether it went.
        """
        try:
            action()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            self.reasons[way] = first_line(error)
            return False
        return True

    def sentence(self) -> str:
        """Say what was chosen and why, for the log.

        Returns:
            One sentence.
        """
        walker = self.walker
        side = "side by side" if walker.vectorize else "one by one"
        text = (
            f"samples are replayed {side}, Hessian products by {walker.product}, those of tangents "
            f"{_IN_WORDS[walker.tangents]}"
        )
        reasons = "".join(f" {way}: {reason}" for way, reason in self.reasons.items())
        # It looks like trouble in the log, and is none.
        return text + (
            f". That takes longer and changes no figure; not used:{reasons}" if reasons else "."
        )


_IN_WORDS = {
    "vectorized": "side by side",
    "one-by-one": "one by one",
    "double-backward": "by double-backward",
}


def choose_ways(replay: Replay) -> Ladder:
    """Climb down until an operator's derivatives exist, at the run's first step.

    torch.func side by side -> one by one -> plain autograd, for exact replays and for tangents each;
    and the cheaper way to a single Hessian product.

    Args:
        replay: the run; its walker and query are set to the choice.

    Returns:
        What was chosen, with the reasons.
    """
    walker = replay.walker
    ladder = Ladder(walker)
    refused = walker.program.untransformed
    if refused is not None:
        ladder.reasons["torch.func"] = refused
    choose_product(ladder)
    walker.vectorize = replay.query.vectorize = refused is None and _maps(ladder, replay)
    _choose_tangents(ladder, replay)
    return ladder


def choose_product(ladder: Ladder) -> None:
    """Choose the cheaper way to a Hessian product; some operators have no forward mode, or a wrong one.

    Differentiating the forward-mode derivative of batch normalisation gives another result than
    differentiating its gradient (seen in torch 2.13), which is the right one.

    Args:
        ladder: whose walker is set to the choice.
    """
    walker = ladder.walker
    visit = walker.first_loss()
    still = {name: torch.zeros_like(visit.state.params[name]) for name in visit.map.used}
    cotangent = visit.map.update(visit.state, still).map(torch.ones_like)
    along = _direction(still)
    times: dict[str, float] = {}
    first: Params = {}
    for product in ("double-backward", "reverse-over-forward"):
        if product != "double-backward" and not visit.map.transforms:
            continue
        step = replace(visit.map, product=product)
        pull = partial(step.vjp, visit.state, cotangent)
        if not ladder.tries(product, pull):
            continue
        found = step.hessian_product(visit.state, along)
        if first and not _agree(found, first, walker.program.analysis.tolerances.gradient):
            ladder.reasons[product] = "torch gets it wrong for this module"
            continue
        first = first or found
        times[product] = _best_of(pull)
    walker.product = min(times, key=lambda name: times[name], default="double-backward")


def _direction(like: Params) -> Params:
    """A direction at random, always the same: one of ones may be flat."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator).to(p) for n, p in like.items()}


def _agree(one: Params, other: Params, tolerance: float) -> bool:
    """Whether two Hessian products are the same to rounding (norms)."""
    apart = sum(float((one[name] - b).double().square().sum()) for name, b in other.items())
    size = sum(float(b.double().square().sum()) for b in other.values())
    return apart <= tolerance**2 * size


def _maps(ladder: Ladder, replay: Replay) -> bool:
    """Whether `torch.func.vmap` takes the module's training and validation steps."""
    visit = replay.walker.first_loss()
    one = stack(visit.state, 1)

    def side_by_side() -> None:
        replace(visit.map, vectorize=True).advance_many(one, replay.samples[:1])
        replay.query.vectorize = True
        replay.query.values(one.visible)

    return ladder.tries("side by side", side_by_side)


def _choose_tangents(ladder: Ladder, replay: Replay) -> None:
    """The first way to push tangents that the module's operators allow."""
    walker = replay.walker
    visit = walker.first_loss()
    still = zeros_like(visit.state, batch=1)
    removed = replay.samples[:1]
    if not visit.map.transforms:
        walker.tangents = "double-backward"
        return
    for way in TANGENTS:
        if way == "vectorized" and not walker.vectorize:
            continue
        push = partial(replace(visit.map, tangents=way).push, visit.state, still, removed)
        if ladder.tries(f"tangents {_IN_WORDS[way]}", push):
            walker.tangents = way
            return


@dataclass(frozen=True)
class Prices:
    """What a better figure of one sample takes, in seconds over the whole run.

    Attributes:
        exact: by exact replay.
        acc: by ACC-SGD-IE; infinite where an operator of the module has no second derivative.
    """

    exact: float
    acc: float

    @property
    def exact_is_cheaper(self) -> bool:
        """Whether the exact figure costs no more than the estimate."""
        return self.exact <= self.acc


@dataclass(frozen=True)
class Walk:
    """What a walk back over the run takes.

    Attributes:
        steps: how many steps the run has.
        passes: how often each is run forwards for it; see `Walker.passes`.
        nbytes: what is held at most, of states and graphs.
        seconds: about how long it takes.
    """

    steps: int
    passes: float
    nbytes: int
    seconds: float


def measure_walk(replay: Replay, estimator: SgdIE) -> Walk:
    """Measure a backward walk, by the run's first step.

    Args:
        replay: the run.
        estimator: whose walk it is.

    Returns:
        What it takes.
    """
    walker = walker_of(replay)
    steps, passes = len(walker), walker.passes()
    visit = walker.first_loss()
    part = part_of(visit, followed(estimator.layers, visit.trainable))
    still = {name: torch.zeros_like(part.state.params[name]) for name in part.map.used}
    cotangent = zeros_like(part.map.update(part.state, still))
    back = _best_of(lambda: estimator.pull(part, cotangent))
    forward = _best_of(lambda: walker.again(visit))
    return Walk(steps, passes, walker.held_bytes(), steps * (passes * forward + back))


@dataclass(frozen=True)
class Chunks:
    """What an estimator takes that works sample by sample.

    Attributes:
        samples: how many.
        chunks: in how many chunks, each of which passes over the run once.
        steps: how many steps the run has.
        seconds: about how long it takes.
    """

    samples: int
    chunks: int
    steps: int
    seconds: float


def measure_chunks(replay: Replay, estimator: ChunkedEstimator) -> Chunks:
    """Measure a chunk's step, at the run's first.

    Args:
        replay: the run.
        estimator: whose chunks they are.

    Returns:
        What all of them take. Without those of SGD-IE, where it chooses the samples.
    """
    wanted, steps = estimator.candidates, len(replay.walker)
    numbers = wanted if isinstance(wanted, Tensor) else replay.samples[:wanted]
    count = len(numbers)
    size = max(1, min(count, estimator.at_once(replay)))
    visit = replay.walker.first_loss()
    step = _best_of(_step_of(estimator, visit, numbers[:size]), repeats=2)
    step += _best_of(lambda: replay.walker.again(visit), repeats=2)
    chunks = -(-count // size)
    ahead = 1.0 - float(replay.first.double().mean()) / steps  # nothing is carried before that
    return Chunks(count, chunks, steps, chunks * steps * ahead * step)


def _step_of(estimator: ChunkedEstimator, visit: Visit, removed: Tensor) -> Callable[[], object]:
    """What an estimator does at a step for samples side by side."""
    if isinstance(estimator, AccSgdIE):
        part = part_of(visit, followed(estimator.layers, visit.trainable))
        tangents = zeros_like(part.state, batch=len(removed))
        return partial(part.map.push, part.state, tangents, removed)
    states = stack(visit.state, len(removed)).map(torch.clone)
    return partial(visit.map.advance_many, states, removed)


def measure_prices(replay: Replay, layers: Layers = None) -> Prices:
    """Measure one step of each, for as many samples as are carried at once.

    Args:
        replay: the run.
        layers: those that ACC-SGD-IE would follow.

    Returns:
        The prices.
    """
    visit = replay.walker.first_loss()
    refined = AccSgdIE(layers=layers)
    removed = replay.samples[: min(_ROWS, refined.at_once(replay))]
    whole_run = len(replay.walker) / len(removed)
    exact = _best_of(_step_of(LeaveOneOut(), visit, removed))
    try:
        acc = _best_of(_step_of(refined, visit, removed))
    except (NotImplementedError, RuntimeError):
        acc = float("inf")
    return Prices(exact * whole_run, acc * whole_run)
