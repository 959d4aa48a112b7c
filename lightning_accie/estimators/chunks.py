"""Work that is done chunk by chunk: so many counterfactuals are carried at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_accie.estimators.base import (
    Advance,
    Candidates,
    Estimate,
    Interrupted,
    Replay,
    strongest,
)
from lightning_accie.estimators.kept import Collected
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


Work = Callable[[Tensor, Advance], Mapping[str, Tensor]]
"""``work(samples, advance)`` -> ``[c]`` figures of the chunk's samples, by name."""
Found = Callable[[Tensor, dict[str, Tensor]], Estimate]
"""``found(samples, figures)`` -> the estimate, from ``[k]`` of each."""


def in_chunks(
    replay: Replay, samples: Tensor, work: Work, found: Found, *, key: str, copies: int, title: str
) -> Estimate:
    """Find the figures of samples chunk by chunk, but for those that an earlier analysis has found.

    Args:
        replay: the run.
        samples: ``[k]`` sample numbers, ascending.
        work: what is done for a chunk; calls ``advance(1)`` at each step of the run.
        found: makes the estimate.
        key: what finished chunks are kept under, see `Kept`.
        copies: how many states' worth of memory one sample takes while it is worked on.
        title: of the progress bar.

    Returns:
        The estimate of all samples.

    Raises:
        Interrupted: at Ctrl-C, with the chunks that were finished.
    """
    collected = Collected(replay.span)
    for earlier in replay.kept.parts(key):
        collected.add(earlier["samples"], {n: v for n, v in earlier.items() if n != "samples"})
    missing = samples[~collected.known[samples]]
    parts = _chunks(replay, missing, copies) if len(missing) else ()
    with replay.progress.task(title, len(parts) * len(replay.walker)) as advance:
        for part in parts:
            try:
                figures = dict(work(part, advance))
            except KeyboardInterrupt:
                done = samples[collected.known[samples]]
                raise Interrupted(found(done, collected.of(done))) from None
            collected.add(part, figures)
            replay.kept.add(key, {"samples": part, **figures})
    return found(samples, collected.of(samples))


def _chunks(replay: Replay, samples: Tensor, copies: int) -> tuple[Tensor, ...]:
    """Split samples into chunks that fit the memory budget, by the step that first drew them."""
    order = torch.argsort(replay.first[replay.positions(samples)], stable=True)
    return samples[order].split(chunk_size(replay, copies))


def chunk_size(replay: Replay, copies: int) -> int:
    """Bound a chunk by the memory budget, and by what vectorising gains.

    Returns:
        The number of samples to carry at once, at least 1.
    """
    state = replay.final.state
    numbers = sum(value.numel() for value in state.params.values())
    per_sample = copies * state.nbytes() + 2 * _activation_bytes(replay)
    fits = replay.memory_budget // max(1, per_sample)
    return max(1, min(fits, _CACHE_FRIENDLY // max(1, numbers), _LARGEST))


def _activation_bytes(replay: Replay) -> int:
    """What one step's graph holds, measured at the first step."""
    visit: Visit = next(replay.walker.forwards())
    return sum(saved_bytes(partial(loss.bound, loss.ones(), {})) for loss in visit.map.losses)
