"""How many counterfactuals are carried at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_accie.estimators.base import Candidates, Replay, strongest
from lightning_accie.estimators.sgd_ie import SgdIE
from lightning_accie.replay.tape import saved_bytes
from lightning_accie.replay.walker import Visit

_CACHE_FRIENDLY = 2**22
"""Beyond this many numbers in a chunk's parameters, a larger chunk only misses the caches."""
_LARGEST = 512


def choose(replay: Replay, candidates: Candidates) -> Tensor:
    """Turn a ``candidates=`` argument into sample numbers.

    Args:
        replay: the run.
        candidates: None (all), a count (the strongest by SGD-IE) or sample numbers.

    Returns:
        ``[k]`` sample numbers, ascending.
    """
    if candidates is None:
        return replay.samples
    if isinstance(candidates, int):
        ranked = SgdIE().estimate(replay)
        return ranked.samples[strongest(ranked.influence, candidates)]
    numbers = torch.as_tensor(candidates)
    replay.positions(numbers)
    return numbers


def chunks(replay: Replay, samples: Tensor, *, copies: int) -> Iterator[Tensor]:
    """Split samples into chunks that fit the memory budget, earliest drawn first.

    Args:
        replay: the run.
        samples: ``[k]`` sample numbers.
        copies: how many states' worth of memory one sample takes while it is worked on.

    Yields:
        ``[c]`` sample numbers of one chunk, by the step that first drew them.
    """
    order = torch.argsort(replay.first[replay.positions(samples)], stable=True)
    size = chunk_size(replay, copies)
    yield from samples[order].split(size)


def chunk_size(replay: Replay, copies: int) -> int:
    """Bound a chunk by the memory budget, and by what vectorising gains.

    Returns:
        The number of samples to carry at once, at least 1.
    """
    state = replay.final.state
    numbers = sum(value.numel() for value in state.params.values())
    per_sample = copies * state.nbytes() + 2 * activation_bytes(replay)
    fits = replay.memory_budget // max(1, per_sample)
    return max(1, min(fits, _CACHE_FRIENDLY // max(1, numbers), _LARGEST))


def activation_bytes(replay: Replay) -> int:
    """Measure what one step's graph holds, at the first step.

    Args:
        replay: the run.

    Returns:
        The bytes.
    """
    visit: Visit = next(replay.walker.forwards())
    return sum(saved_bytes(partial(loss.bound, loss.ones(), {})) for loss in visit.map.losses)
