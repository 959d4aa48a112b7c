"""Which training samples made single predictions: the influence of each sample on each of Q queries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_accie.agreement import Agreement, measure
from lightning_accie.errors import QueryError, UnsupportedError
from lightning_accie.estimators.base import Estimator, Query, Replay
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.per_query import per_query
from lightning_accie.scores import InfluenceScores
from lightning_accie.trajectory.batch_building import Form
from lightning_accie.trajectory.batch_forms import take_apart


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """The influence of training samples on each of Q queries, usually one prediction's loss each.

    Influence is q(without the sample) − q, where lower is better. **Positive: without the sample this
    prediction would be worse, so it supports it. Negative: it speaks against it.**

    Attributes:
        index: ``[n]`` int64, the dataset indices of the training samples.
        influence: ``[Q, n]`` float64, the exact figure where the sample was replayed, else the
            estimate.
        estimate: ``[Q, n]`` float64, what the estimator said.
        exact: ``[Q, n]`` float64, by exact replay; NaN where there was none. One replay without a
            sample answers all queries.
        value: ``[Q]`` float64, q itself: the loss of each prediction.
        trusted: ``[Q, n]`` bool, False where the estimator said that its figure is not to be relied on
            and no exact replay replaced it, or the run without the sample is no longer finite.
        visits: ``[n]`` int64, how often training drew the sample.
        estimator: whose estimate it is.
        query: the query's name.
        agreement: for each query, how far the estimate agrees with the exact replays.
        columns: the user's own columns of the training samples.

    Examples:
        >>> explanation = engine.explain(batch)  # doctest: +SKIP
        >>> explanation.scores(0).top_helpful(5).index  # doctest: +SKIP
    """

    index: Tensor
    influence: Tensor
    estimate: Tensor
    exact: Tensor
    value: Tensor
    trusted: Tensor
    visits: Tensor
    estimator: str
    query: str
    agreement: tuple[Agreement, ...] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.influence)

    def __repr__(self) -> str:
        taus = [found.kendall_tau for found in self.agreement]
        taus = [tau for tau in taus if tau == tau]
        trust = f"; Kendall τ {sum(taus) / len(taus):.2f} in the mean" if taus else ""
        replayed = int((~self.exact[:1].isnan()).sum())
        return (
            f"Explanation({len(self)} queries on {self.query}, {len(self.index)} training samples by "
            f"{self.estimator}, {replayed} replayed exactly{trust})"
        )

    def scores(self, query: int) -> InfluenceScores:
        """What is known of one query, with everything that a ranking can do.

        Args:
            query: its place in the batch, from 0; negative ones count from the end.

        Returns:
            The scores of all training samples.

        Raises:
            IndexError: if there is no such query.
        """
        if not -len(self) <= query < len(self):
            raise IndexError(f"There are {len(self)} queries; {query} is none of them.")
        exact = self.exact[query]
        replayed = (~exact.isnan()).tolist()
        return InfluenceScores(
            index=self.index,
            influence=self.influence[query],
            estimate=self.estimate[query],
            visits=self.visits,
            exact=exact,
            estimator=tuple(LeaveOneOut.name if known else self.estimator for known in replayed),
            trusted=self.trusted[query],
            agreement=self.agreement[query : query + 1 or None],
            columns=self.columns,
            info={"query": self.query, "query_value": float(self.value[query])},
        )


def explain(
    replay: Replay, queries: Sequence[Query], estimator: Estimator, *, verify: int, seed: int
) -> Explanation:
    """Estimate, and verify by exact replay.

    Args:
        replay: the run.
        queries: Q of them.
        estimator: one that `per_query` takes.
        verify: how many samples to replay exactly, half of them the strongest over all queries, half
            at random.
        seed: of those at random.

    Returns:
        The explanation, without columns.
    """
    first = per_query(estimator, replay, queries)
    estimate, trusted = first.influence, first.trusted.clone()
    exact = torch.full_like(estimate, float("nan"))
    truth = first if estimator.name == LeaveOneOut.name else None
    if truth is not None:
        exact = estimate.clone()
    elif verify:
        chosen = _to_verify(estimate, verify, seed)
        truth = per_query(LeaveOneOut(first.samples[chosen]), replay, queries)
        exact[:, chosen], trusted[:, chosen] = truth.influence, truth.trusted
    exact[~exact.isfinite()] = float("nan")
    at = replay.final.state.visible
    return Explanation(
        index=first.samples,
        influence=torch.where(exact.isnan(), estimate, exact),
        estimate=estimate,
        exact=exact,
        value=torch.tensor([query.value(at) for query in queries], dtype=torch.float64),
        trusted=trusted,
        visits=replay.visits[replay.positions(first.samples)],
        estimator=estimator.name,
        query=queries[0].name,
        agreement=tuple(
            measure(one, known, estimator=estimator.name, noise_floor=noise)
            for one, known, noise in zip(estimate, exact, truth.noise, strict=True)
        )
        if truth is not None and truth is not first
        else (),
    )


def _to_verify(estimate: Tensor, count: int, seed: int) -> Tensor:
    """Positions of the strongest over all queries, and of as many at random, ascending."""
    largest = estimate.nan_to_num(nan=torch.inf).abs().amax(0)
    high = torch.argsort(largest, descending=True, stable=True)[: count // 2]
    rest = torch.ones(len(largest), dtype=torch.bool)
    rest[high] = False
    others = rest.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(others), generator=generator)[: count - len(high)]
    return torch.sort(torch.cat([high, others[order]])).values


def one_by_one(batch: Any) -> DataLoader[Any]:
    """Make a batch of each sample of a batch.

    Args:
        batch: as ``validation_step`` takes it; or a DataLoader, whose batches are taken as they are.

    Returns:
        What gives the batches, one a query.

    Raises:
        QueryError: if the batch cannot be taken apart by sample.
    """
    if isinstance(batch, DataLoader):
        return batch
    try:
        with warnings.catch_warnings():  # texts beside tensors are no reason to doubt
            warnings.simplefilter("ignore")
            size = extract_batch_size(batch)
        # Two queries of two fields are not a list of two samples: a list here is a batch's fields.
        named = type(batch) in (list, tuple) and len(batch) == size
        parts = take_apart(dict(enumerate(batch)) if named else batch, [size])
    except (RuntimeError, UnsupportedError, ValueError) as error:
        raise QueryError(f"{_NO_SAMPLES} ({error})") from error
    form = Form(parts.form)
    if not form.has_samples or form.lists_samples or not any(form.split):
        raise QueryError(_NO_SAMPLES)
    batches = [
        form.build(
            [
                [records[place]] if split else records
                for split, records in zip(form.split, parts.groups, strict=True)
            ],
            torch.device("cpu"),
        )
        for place in range(size)
    ]
    if named:
        batches = [type(batch)(one.values()) for one in batches]
    return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]


def _as_it_is(batch: Any) -> Any:
    return batch


_NO_SAMPLES = (
    "The batch given to `explain` cannot be taken apart by sample: no tensor has the batch as its "
    "leading dimension. A single sample `dataset[i]` becomes a batch by "
    "`torch.utils.data.default_collate([dataset[i]])`; or pass a DataLoader with `batch_size=1`, whose "
    "batches are the queries."
)
