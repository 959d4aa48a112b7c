"""Estimators that work sample by sample: so many counterfactuals are carried at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_accie.estimators.base import (
    Advance,
    Candidates,
    Estimate,
    Estimator,
    Interrupted,
    Replay,
    candidates_to_json,
    check_candidates,
    strongest,
)
from lightning_accie.estimators.kept import Collected
from lightning_accie.estimators.layers import Layers
from lightning_accie.estimators.sgd_ie import SgdIE
from lightning_accie.replay.state import State

_CACHE_FRIENDLY = 2**22
"""Beyond this many numbers in a chunk's parameters, a larger chunk only misses the caches."""
_LARGEST = 512


def choose(replay: Replay, candidates: Candidates, layers: Layers = None) -> Tensor:
    """Turn a ``candidates=`` argument into sample numbers.

    Args:
        replay: the run.
        candidates: None (all), a count (the strongest by SGD-IE) or sample numbers.
        layers: those that SGD-IE then follows.

    Returns:
        ``[k]`` sample numbers, ascending.
    """
    if candidates is None:
        return replay.samples
    if isinstance(candidates, int):
        ranked = SgdIE(layers).estimate(replay)
        return ranked.samples[strongest(ranked.influence, candidates)]
    numbers = torch.as_tensor(candidates)
    replay.positions(numbers)
    return numbers


class ChunkedEstimator(Estimator):
    """Base of the estimators that find each sample's figures by themselves, chunk by chunk.

    What an earlier analysis has finished is not done again, and other processes take their share.

    Args:
        candidates: None for every sample, a count (the strongest by SGD-IE), or sample numbers.

    Raises:
        ValueError: if ``candidates`` is none of these.
    """

    copies: int
    """How many states' worth of memory one sample takes while it is worked on."""
    graphs: int
    """How many steps' activations it takes besides."""
    beside = 0
    """How many more are carried in every chunk."""
    layers: Layers = None
    """Those that are followed, where the estimator follows some only."""
    title: str
    """Of the progress bar, with ``{}`` for the number of samples."""

    def __init__(self, candidates: Candidates = None) -> None:
        self.candidates = check_candidates(candidates)

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return {"candidates": candidates_to_json(self.candidates)}

    @abstractmethod
    def carry(self, replay: Replay, removed: Tensor, first: Tensor, advance: Advance) -> State:
        """Carry counterfactuals along the run.

        Args:
            replay: the run; its query does not matter.
            removed: what each leaves out, ordered by the step that first draws of it: ``[c]`` sample
                numbers, or ``[c, n]`` bool over all sample numbers.
            first: ``[c]`` that step.
            advance: to be called with 1 at each step of the run.

        Returns:
            What there is of them at the end of the run, stacked.
        """

    @abstractmethod
    def measure(self, replay: Replay, carried: State) -> dict[str, Tensor]:
        """Measure the query of counterfactuals.

        Args:
            replay: the run and the query.
            carried: what `carry` gave.

        Returns:
            ``[c]`` float64 figures by name.
        """

    @abstractmethod
    def found(self, replay: Replay, samples: Tensor, figures: Mapping[str, Tensor]) -> Estimate:
        """Make the estimate.

        Args:
            replay: the run.
            samples: ``[k]`` sample numbers, ascending.
            figures: what `measure` found, ``[k]`` float64 by name; empty where k is 0.

        Returns:
            The estimate of these samples.
        """

    def estimate(self, replay: Replay) -> Estimate:
        """Find the figures of all candidates.

        Args:
            replay: the run and the query.

        Returns:
            What `found` makes of them.

        Raises:
            Interrupted: at Ctrl-C, with the chunks that were finished.
        """
        samples = choose(replay, self.candidates, self.layers)
        collected = Collected(replay.span)
        for earlier in replay.kept.parts(self.key):
            figures = {name: value for name, value in earlier.items() if name != "samples"}
            collected.add(earlier["samples"], figures)
        missing = samples[~collected.known[samples]]
        finished = not len(missing) or self._all_found(replay, missing, collected)
        done = samples[collected.known[samples]]
        estimate = self.found(replay, done, collected.of(done))
        if not finished:
            raise Interrupted(estimate) from None
        return estimate

    def _all_found(self, replay: Replay, samples: Tensor, collected: Collected) -> bool:
        """Find the figures of samples, unless Ctrl-C is pressed."""
        team = replay.team
        mine = team.begin(replay, self, self.split(replay, samples))
        title, total = self.title.format(len(samples)), len(mine) * len(replay.walker)
        finished = True
        try:
            with replay.progress.task(title, total) as advance:
                for part in mine:
                    collected.add(part, self.finish(replay, part, advance))
        except KeyboardInterrupt:
            finished = False
        finally:
            theirs, all_of_it = team.end()
        for part, figures in theirs:
            collected.add(part, figures)
        return finished and all_of_it

    def finish(self, replay: Replay, samples: Tensor, advance: Advance) -> dict[str, Tensor]:
        """Do the work of one chunk, and keep it.

        Args:
            replay: the run and the query.
            samples: ``[c]`` sample numbers, by the step that first drew them.
            advance: called with 1 at each step of the run.

        Returns:
            What `measure` gave.
        """
        first = replay.first[replay.positions(samples)]
        figures = self.measure(replay, self.carry(replay, samples, first, advance))
        replay.kept.add(self.key, {"samples": samples, **figures})
        return figures

    def carried(self, replay: Replay) -> State:
        """What is carried along the run for one sample.

        Args:
            replay: the run.

        Returns:
            A state of that size.
        """
        return replay.final.state

    def split(self, replay: Replay, samples: Tensor) -> tuple[Tensor, ...]:
        """Make chunks that fit the memory budget, one a process at least.

        Args:
            replay: the run.
            samples: ``[k]`` sample numbers.

        Returns:
            The chunks, by the step that first drew their samples.
        """
        order = torch.argsort(replay.first[replay.positions(samples)], stable=True)
        share = -(-len(samples) // replay.team.size)
        return samples[order].split(min(share, self.at_once(replay)))

    def at_once(self, replay: Replay) -> int:
        """Bound a chunk.

        Args:
            replay: the run.

        Returns:
            The number of samples, or sets of them, to carry at once, at least 1.
        """
        return chunk_size(replay, self.copies, self.carried(replay), self.graphs, self.beside)

    def least_bytes(self, replay: Replay) -> int:
        """What a chunk of one sample takes.

        Args:
            replay: the run.

        Returns:
            The bytes.
        """
        each = _bytes_of_one(replay, self.copies, self.carried(replay), self.graphs)
        return (1 + self.beside) * each


def chunk_size(
    replay: Replay, copies: int, carried: State | None = None, graphs: int = 2, beside: int = 0
) -> int:
    """Bound a chunk by the memory budget, and by what vectorising gains.

    Args:
        replay: the run.
        copies: how many states' worth of memory one sample takes while it is worked on.
        carried: what is carried for one sample; by default a state of the run.
        graphs: how many steps' activations it takes besides.
        beside: how many more are carried with them.

    Returns:
        The number of samples to carry at once, at least 1.
    """
    state = replay.final.state if carried is None else carried
    numbers = sum(value.numel() for value in state.params.values())
    fits = replay.memory_budget // _bytes_of_one(replay, copies, state, graphs) - beside
    return max(1, min(fits, _CACHE_FRIENDLY // max(1, numbers), _LARGEST))


def _bytes_of_one(replay: Replay, copies: int, carried: State, graphs: int) -> int:
    """What one sample of a chunk takes."""
    return max(1, copies * carried.nbytes() + graphs * replay.walker.graph_bytes())
