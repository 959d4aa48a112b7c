"""From estimates to one ranking with its measured trust.

Every drawn sample gets the best figure known of it: the exact influence where it was replayed, else
the refined estimate, else the first one. What the estimators said is kept beside it, so that their
agreement with exact replay can be measured, over the strongest samples and over samples drawn at
random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_accie.agreement import Agreement, measure
from lightning_accie.estimators.acc_sgd_ie import AccSgdIE
from lightning_accie.estimators.base import Estimate, Estimator, Interrupted, Replay, strongest
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.estimators.layers import Layers
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.measure import (
    Chunks,
    Prices,
    Walk,
    measure_chunks,
    measure_prices,
    measure_walk,
)
from lightning_accie.estimators.sgd_ie import SgdIE

EXACT = LeaveOneOut.name
_ROUNDS = 4


def plan(count: int, first: str, prices: Prices, refined: int, verify: int) -> str:
    """Say what a ranking will take, before it begins.

    Args:
        count: how many samples there are.
        first: whose ranking it is.
        prices: of a better figure of one sample.
        refined: how many of the strongest samples get one.
        verify: how many samples are replayed exactly, half of them the strongest.

    Returns:
        A sentence.
    """
    refined, at_random = min(refined, count), verify - verify // 2
    if prices.exact_is_cheaper or not refined:  # those to verify are among those refined
        strongest, by_acc = max(refined, min(verify // 2, count)), 0
    else:
        strongest, by_acc = min(verify // 2, count), min(refined + at_random, count)
    at_random = min(at_random, count - strongest)
    steps = [f"ACC-SGD-IE of {by_acc} samples"] if by_acc else []
    which = ((strongest, "of the strongest"), (at_random, "at random"))
    steps.append("exact replay of " + " and ".join(f"{n} {how}" for n, how in which if n))
    seconds = by_acc * prices.acc if by_acc else 0.0
    seconds += (strongest + at_random) * prices.exact
    return (
        f"Influence analysis: {first}, then {', then '.join(steps)}, which takes about "
        f"{_duration(seconds)}. `top_k=` and `verify=` set how many; Ctrl-C keeps the ranking as far "
        "as it has come."
    )


def walk_plan(count: int, first: str, walk: Walk) -> str:
    """Say what the ranking of all samples will take, before it begins.

    Args:
        count: how many samples there are.
        first: whose ranking it is.
        walk: what the walk back over the run takes.

    Returns:
        A sentence.
    """
    passes = "1 pass" if walk.passes == 1 else f"{walk.passes:.2g} passes"
    return (
        f"Influence analysis: {first} of {count} samples, {passes} forwards and 1 backwards over "
        f"{walk.steps} steps, up to {_size(walk.nbytes)} of states, about {_duration(walk.seconds)}."
    )


def chunks_plan(first: str, chunks: Chunks) -> str:
    """Say what an estimator that works sample by sample will take, before it begins.

    Args:
        first: its name.
        chunks: what it takes.

    Returns:
        A sentence.
    """
    many = "1 chunk, a pass" if chunks.chunks == 1 else f"{chunks.chunks} chunks, each a pass"
    return (
        f"Influence analysis: {first} of {chunks.samples} samples in {many} over {chunks.steps} steps, "
        f"about {_duration(chunks.seconds)}."
    )


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


class Ranking:
    """What is known of every sample that was estimated.

    Args:
        replay: the run.
        seed: of the random choice of samples to verify.
        tell: what takes a sentence about what will be done.
        layers: those that the automatic ranking follows; see `AccSgdIE`.
    """

    def __init__(
        self,
        replay: Replay,
        seed: int,
        tell: Callable[[str], None] = lambda text: None,
        layers: Layers = None,
    ) -> None:
        self.replay = replay
        self.seed = seed
        self.tell = tell
        self.layers = layers
        self.samples = torch.zeros(0, dtype=torch.int64)
        self.estimate = torch.zeros(0, dtype=torch.float64)
        self.exact = torch.zeros(0, dtype=torch.float64)
        self.trusted = torch.zeros(0, dtype=torch.bool)
        self.estimator: list[str] = []
        self.by_estimator: dict[str, Tensor] = {}
        self.at_random = torch.zeros(0, dtype=torch.bool)
        self.diverged = torch.zeros(0, dtype=torch.bool)
        """Samples without which the replayed run is no longer finite: no exact figure."""
        self.noise = float("nan")
        self.seconds: dict[str, float] = {}
        self.interrupted = False

    @property
    def influence(self) -> Tensor:
        """``[n]`` the best figure of every sample."""
        return torch.where(self.exact.isnan(), self.estimate, self.exact)

    # ------------------------------------------------------------------ the ways to a ranking

    def run(self, estimator: Estimator | None, *, top_k: int, verify: int) -> None:
        """Estimate, refine and verify.

        Args:
            estimator: whose ranking; None for the automatic one.
            top_k: how many of the strongest on each side the automatic ranking refines.
            verify: how many samples to replay exactly, half of them the strongest, half at random.
        """
        first = SgdIE(self.layers) if estimator is None else estimator
        prices = None
        if isinstance(first, SgdIE):
            walk = measure_walk(self.replay, first)
            self.tell(walk_plan(len(self.replay.samples), first.name, walk))
        if isinstance(first, ChunkedEstimator):
            self.tell(chunks_plan(first.name, measure_chunks(self.replay, first)))
        if first.name != EXACT and (verify or estimator is None):
            prices = measure_prices(self.replay, self.layers)
            refined = 2 * top_k if estimator is None else 0
            self.tell(plan(len(self.replay.samples), first.name, prices, refined, verify))
        self._begin(first)
        if self.interrupted:
            return
        chosen = self._draw(verify - verify // 2)
        with self._until_interrupted():
            if estimator is None and prices is not None:
                self._refine(top_k, chosen, prices)
            self._replay_exactly(torch.cat([self._unverified(verify // 2), chosen]))
            for _ in range(_ROUNDS if estimator is None else 0):  # others rank high then
                self._replay_exactly(self._doubtful(top_k))

    def _begin(self, estimator: Estimator) -> None:
        try:
            with self._timed(estimator.name):
                first = estimator.estimate(self.replay)
        except Interrupted as stop:
            if not len(stop.partial.samples):
                raise
            first, self.interrupted = stop.partial, True
        count = len(first.samples)
        self.samples = first.samples
        self.estimate = first.influence.clone()
        self.trusted = first.trusted.clone()
        self.estimator = [first.estimator] * count
        self.exact = torch.full((count,), float("nan"), dtype=torch.float64)
        self.at_random = torch.zeros(count, dtype=torch.bool)
        self.diverged = torch.zeros(count, dtype=torch.bool)
        if first.estimator == EXACT:
            self.exact, self.noise = first.influence.clone(), first.noise
        else:
            self.by_estimator[first.estimator] = first.influence.clone()

    def _draw(self, count: int) -> Tensor:
        """Samples at random among those not replayed yet, for an unbiased look."""
        generator = torch.Generator().manual_seed(self.seed)
        unknown = self.exact.isnan().nonzero()[:, 0]
        order = torch.randperm(len(unknown), generator=generator)[:count]
        picked = torch.sort(unknown[order]).values
        self.at_random[picked] = True
        return self.samples[picked]

    def _refine(self, top_k: int, also: Tensor, prices: Prices) -> None:
        """Give the strongest on both sides a better figure, by whichever way is cheaper."""
        candidates = self.samples[strongest(self.estimate, 2 * top_k)]
        if prices.exact_is_cheaper:
            self._replay_exactly(candidates)
            return
        wanted = torch.unique(torch.cat([candidates, also]))
        refined = AccSgdIE(wanted, layers=self.layers)
        self._add(lambda: refined.estimate(self.replay), AccSgdIE.name)

    def _unverified(self, count: int) -> Tensor:
        """The strongest samples, as many as are to be verified."""
        return self.samples[strongest(self.influence, count)]

    def _doubtful(self, top_k: int) -> Tensor:
        """Samples that rank high on an estimate that is not to be trusted."""
        high = torch.zeros(len(self.samples), dtype=torch.bool)
        high[strongest(self.influence, 2 * top_k)] = True
        return self.samples[high & ~self.trusted & self.exact.isnan()]

    # ------------------------------------------------------------------ putting figures in

    def _replay_exactly(self, samples: Tensor) -> None:
        wanted = torch.unique(samples)
        spots = self._spots(wanted)
        wanted = wanted[self.exact[spots].isnan() & ~self.diverged[spots]]
        if len(wanted):
            self._add(lambda: LeaveOneOut(wanted).estimate(self.replay), EXACT)

    def _add(self, compute: Callable[[], Estimate], name: str) -> None:
        try:
            with self._timed(name):
                found = compute()
        except Interrupted as stop:
            self._put(stop.partial)
            raise
        self._put(found)

    def _put(self, found: Estimate) -> None:
        spots = self._spots(found.samples)
        if found.estimator == EXACT:
            self.noise = found.noise
            finite = found.influence.isfinite()  # a counterfactual run can diverge
            self.diverged[spots[~finite]] = True
            self.trusted[spots[~finite]] = False
            spots = spots[finite]
            self.exact[spots] = found.influence[finite]
            self.trusted[spots] = True
        for spot in spots.tolist():
            self.estimator[spot] = found.estimator
        if found.estimator == EXACT:
            return
        everyone = torch.full((len(self.samples),), float("nan"), dtype=torch.float64)
        everyone[spots] = found.influence
        self.by_estimator[found.estimator] = everyone
        self.estimate[spots] = found.influence
        self.trusted[spots] = found.trusted

    def _spots(self, samples: Tensor) -> Tensor:
        return torch.searchsorted(self.samples, samples)

    @contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:  # what was found so far stands
            self.interrupted = True

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    # ------------------------------------------------------------------ trust

    def agreement(self) -> tuple[Agreement, ...]:
        """Compare every estimator with the exact replays.

        Returns:
            For each estimator, the last used first: over all samples that were replayed, over the
            strongest, and over those drawn at random.
        """
        replayed = ~self.exact.isnan()
        found = []
        for name in reversed(self.by_estimator):
            known = replayed & ~self.by_estimator[name].isnan()
            subsets = {
                "verified": known,
                "strongest": known & ~self.at_random,
                "random": known & self.at_random,
            }
            found += [
                measure(
                    self.by_estimator[name][rows],
                    self.exact[rows],
                    estimator=name,
                    sample=subset,
                    noise_floor=self.noise,
                )
                for subset, rows in subsets.items()
                if bool(rows.any())
            ]
        return tuple(found)
