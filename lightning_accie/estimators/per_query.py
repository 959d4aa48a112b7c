"""The influence of every sample on each of many queries.

Forward estimators carry what leaving out j does to the weights, which no query enters: every further
query costs its own evaluation alone. Adjoint ones carry λ of each query back along the run, in blocks
that share the run's forward passes and the graphs of its gradients.

| symbol | name |
|---|---|
| Q | ``len(queries)`` |
| λ^q_t | ``cotangents`` |
| influence of i on q | ``[Q, n]`` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators.base import Estimator, Query, Replay
from lightning_accie.estimators.chunks import ChunkedEstimator, choose
from lightning_accie.estimators.layers import followed, with_names
from lightning_accie.estimators.sgd_ie import SgdIE, at_the_end, no_larger_than_the_run
from lightning_accie.replay.many import may_batch, vjp_many
from lightning_accie.replay.part import part_of
from lightning_accie.replay.state import State
from lightning_accie.replay.walker import Visit

LARGEST_BLOCK = 64
"""Queries whose cotangents go back together at most."""


@dataclass(frozen=True)
class PerQuery:
    """What an estimator found for Q queries.

    Attributes:
        samples: ``[n]`` int64, sample numbers, ascending.
        influence: ``[Q, n]`` float64 (method: section 2).
        trusted: ``[Q, n]`` bool, False where the figure is not to be relied on.
        noise: of each query, the size of the rounding error; NaN where it does not matter.
    """

    samples: Tensor
    influence: Tensor
    trusted: Tensor
    noise: tuple[float, ...]


def per_query(estimator: Estimator, replay: Replay, queries: Sequence[Query]) -> PerQuery:
    """Estimate the influence of samples on each of several queries.

    Args:
        estimator: `SgdIE`, `TracIn`, `AccSgdIE` or `LeaveOneOut`.
        replay: the run; its own query does not matter.
        queries: Q of them.

    Returns:
        The influences, marked as `Estimate` marks them.

    Raises:
        UnsupportedError: for another estimator, by its name.
    """
    check_per_query(estimator)
    if isinstance(estimator, SgdIE):
        return _backwards(with_names(estimator, replay.trainable), replay, queries)
    assert isinstance(estimator, ChunkedEstimator)
    estimator = with_names(estimator, replay.trainable)
    samples = choose(replay, estimator.candidates, estimator.layers)
    return _forwards(estimator, replay, queries, samples)


def check_per_query(estimator: Estimator) -> None:
    """Refuse estimators that answer one query at a time.

    Args:
        estimator: any.

    Raises:
        UnsupportedError: naming it.
    """
    if not isinstance(estimator, (SgdIE, ChunkedEstimator)):
        raise UnsupportedError(
            f'`explain` does not go with the estimator "{estimator.name}", whose walks are made for '
            'one query. Use "sgd-ie", "tracin", "acc-sgd-ie" or "leave-one-out".'
        )


def _forwards(
    estimator: ChunkedEstimator, replay: Replay, queries: Sequence[Query], samples: Tensor
) -> PerQuery:
    """One walk for every chunk of samples, whatever the number of queries."""
    influence = torch.zeros(len(queries), len(samples), dtype=torch.float64)
    trusted = torch.ones_like(influence, dtype=torch.bool)
    noise = [float("nan")] * len(queries)
    if not len(samples):
        return PerQuery(samples, influence, trusted, tuple(noise))
    parts = estimator.split(replay, samples)
    title = f"{estimator.title.format(len(samples))}, {len(queries)} queries"
    with replay.progress.task(title, len(parts) * len(replay.walker)) as advance:
        for part in parts:
            first = replay.first[replay.positions(part)]
            carried = estimator.carry(replay, part, first, advance)
            columns = torch.searchsorted(samples, part)
            for row, query in enumerate(queries):
                asked = replace(replay, query=query)
                found = estimator.found(asked, part, estimator.measure(asked, carried))
                influence[row, columns], trusted[row, columns] = found.influence, found.trusted
                noise[row] = max(found.noise, noise[row])  # NaN in the second place loses
    return PerQuery(samples, influence, trusted, tuple(noise))


def _backwards(estimator: SgdIE, replay: Replay, queries: Sequence[Query]) -> PerQuery:
    """One walk for every block of queries, whatever the number of samples."""
    names = followed(estimator.layers, replay.trainable)
    size = _block(replay, replay.final.state.only(names))
    walker = replay.walker.within(replay.memory_budget // 2)  # the block has the other half
    blocks = [queries[begin : begin + size] for begin in range(0, len(queries), size)]
    title = f"{estimator.name}: every sample, {len(queries)} queries"
    found = []
    batched: bool | None = None if len(queries) > 1 and estimator.curvature else False
    with replay.progress.task(title, len(blocks) * len(replay.walker)) as advance:
        for block in blocks:
            cotangents = [at_the_end(replace(replay, query=query), names) for query in block]
            influence = torch.zeros(len(block), replay.span, dtype=torch.float64)
            for visit in walker.backwards():
                part = part_of(visit, names)
                if batched is None and len(block) > 1 and part.map.used:
                    batched = may_batch(part.map, part.state, cotangents[:2])
                cotangents, by_weight = _pull(estimator, part, cotangents, batched=bool(batched))
                influence.index_add_(1, part.map.samples, -by_weight.double().cpu())
                advance(1)
            found.append(influence[:, replay.samples])
    influence = torch.cat(found)
    trusted = influence.isfinite()
    if estimator.curvature:
        for row, query in enumerate(queries):
            trusted[row] &= no_larger_than_the_run(replace(replay, query=query), influence[row])
    return PerQuery(replay.samples, influence, trusted, (float("nan"),) * len(queries))


def _pull(
    estimator: SgdIE, visit: Visit, cotangents: list[State], *, batched: bool
) -> tuple[list[State], Tensor]:
    if estimator.curvature:
        return vjp_many(visit.map, visit.state, cotangents, batched=batched)
    states, gammas = zip(*(estimator.pull(visit, one) for one in cotangents), strict=True)
    return list(states), torch.stack(gammas)


def _block(replay: Replay, carried: State) -> int:
    """How many queries fit the memory budget."""
    per_query = 4 * carried.nbytes() + replay.walker.graph_bytes()
    return max(1, min(LARGEST_BLOCK, replay.memory_budget // (2 * max(1, per_query))))
