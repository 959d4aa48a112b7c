"""What every estimator reads and gives back."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_accie.estimators.kept import Figures, Kept, NothingKept
from lightning_accie.replay.state import Params
from lightning_accie.replay.walker import Snapshot, Visit, Walker


class Query(Protocol):
    """q(θ): what influence is measured on; a scalar where lower is better, usually a loss."""

    name: str
    vectorize: bool

    def value(self, params: Params) -> float:
        """q(θ)."""
        ...

    def gradient(self, params: Params) -> Params:
        """∇q(θ), by parameter name."""
        ...

    def values(self, params: Params, rest: Params | None = None) -> Tensor:
        """Q at K parameter sets stacked along a leading dimension: ``[K]`` float64.

        ``rest`` has those that all sets have in common, where ``params`` are some only.
        """
        ...

    def hessian_products(self, params: Params, directions: Params) -> Params:
        """∇²q(θ) times K directions stacked along a leading dimension, by parameter name."""
        ...


class Unasked:
    """No query: for work that concerns none."""

    name = ""
    vectorize = True

    def value(self, params: Params) -> float:
        """Give 0.

        Returns:
            0.
        """
        return 0.0

    def gradient(self, params: Params) -> Params:
        """Give 0.

        Returns:
            Zeros by name.
        """
        return {name: torch.zeros_like(value) for name, value in params.items()}

    def values(self, params: Params, rest: Params | None = None) -> Tensor:
        """Give 0.

        Returns:
            Zeros, one for each of the stacked parameter sets.
        """
        return torch.zeros(len(next(iter(params.values()))), dtype=torch.float64)

    def hessian_products(self, params: Params, directions: Params) -> Params:
        """Give 0.

        Returns:
            Zeros by name.
        """
        return {name: torch.zeros_like(value) for name, value in directions.items()}


Advance = Callable[[int], None]


class Progress(Protocol):
    """Where long work tells how far it is."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a bar of ``total`` units; call what it gives with the units done."""
        ...


class NoProgress:
    """Tells nobody."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Ignore the task.

        Returns:
            A context whose value ignores its calls.
        """
        return nullcontext(lambda units: None)


class Team(Protocol):
    """The processes that share the work of an estimator that works chunk by chunk."""

    size: int

    def begin(self, replay: Replay, estimator: Any, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Give the others their shares of the chunks, and return one's own."""
        ...

    def end(self) -> tuple[list[tuple[Tensor, Figures]], bool]:
        """Wait for what the others found of their chunks, and whether that is all of it."""
        ...


class Alone:
    """One process does everything."""

    size = 1

    def begin(self, replay: Replay, estimator: Any, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Keep all chunks.

        Returns:
            The chunks.
        """
        return parts

    def end(self) -> tuple[list[tuple[Tensor, Figures]], bool]:
        """Wait for nobody.

        Returns:
            Nothing, which is all.
        """
        return [], True


@dataclass(frozen=True)
class Replay:
    """A recorded run made ready for estimators.

    Attributes:
        walker: stops at every step of the run.
        query: q.
        samples: ``[n]`` int64, the sample numbers that the run drew, ascending.
        visits: ``[n]`` int64, how often it drew each.
        first: ``[n]`` int64, the step that first drew each.
        last: ``[n]`` int64, the step that last drew each.
        final: s_T.
        memory_budget: bytes that the vectorised part of an estimator may take.
        progress: where to tell how far the work is.
        kept: where finished parts are kept, for an analysis that is killed.
        team: who shares the work.
    """

    walker: Walker
    query: Query
    samples: Tensor
    visits: Tensor
    first: Tensor
    last: Tensor
    final: Snapshot
    memory_budget: int
    progress: Progress = field(default_factory=NoProgress)
    kept: Kept = field(default_factory=NothingKept)
    team: Team = field(default_factory=Alone)

    @property
    def span(self) -> int:
        """One more than the largest sample number."""
        return int(self.samples[-1]) + 1 if len(self.samples) else 0

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the parameters that the run trained."""
        return self.walker.program.trainable

    def positions(self, samples: Tensor) -> Tensor:
        """Find samples among those drawn.

        Args:
            samples: ``[k]`` sample numbers.

        Returns:
            ``[k]`` positions in ``self.samples``.

        Raises:
            ValueError: naming those that the run never drew.
        """
        spots = torch.searchsorted(self.samples, samples)
        found = spots < len(self.samples)
        found &= self.samples[spots.clamp_max(len(self.samples) - 1)] == samples
        if not bool(found.all()):
            missing = samples[~found].tolist()
            shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise ValueError(
                f"`candidates` names samples that the run never drew: {shown}. Their influence is "
                "exactly 0."
            )
        return spots


@dataclass(frozen=True)
class Estimate:
    """What an estimator found.

    Attributes:
        estimator: its name.
        samples: ``[k]`` int64, sample numbers, ascending.
        influence: ``[k]`` float64; positive where leaving the sample out raises the query (it
            helps), negative where it lowers it (it harms). Method: section 2.
        trusted: ``[k]`` bool, False where the figure is not to be relied on.
        noise: size of the rounding error in ``influence``; NaN where it does not matter.
        extras: more figures per sample, ``[k]`` each.
    """

    estimator: str
    samples: Tensor
    influence: Tensor
    trusted: Tensor
    noise: float = float("nan")
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an estimator that works sample by sample.

    Args:
        partial: what was finished before.
    """

    def __init__(self, partial: Estimate) -> None:
        super().__init__()
        self.partial = partial


Candidates = int | Sequence[int] | Tensor | None


class Estimator(ABC):
    """Base of the estimators: settings in ``__init__``, the work in `estimate`."""

    name: str

    @abstractmethod
    def estimate(self, replay: Replay) -> Estimate:
        """Estimate the influence of samples on the query.

        Returns:
            The influence of the samples that this estimator was asked for.
        """

    @abstractmethod
    def probe(self, visit: Visit) -> None:
        """Compute at one step what the estimator computes at every one.

        Called at fit start, so that a module with an operator that lacks a derivative is refused
        there; torch's own error (RuntimeError, NotImplementedError) says which.
        """

    def least_bytes(self, replay: Replay) -> int:
        """Count what the estimator cannot do without, of `Replay.memory_budget`.

        Args:
            replay: the run.

        Returns:
            The bytes; 0 for one that sees to that itself.
        """
        return 0

    def settings(self) -> dict[str, Any]:
        """Describe the settings for reports.

        Returns:
            JSON values.
        """
        return {}

    @property
    def key(self) -> str:
        """Tells apart what gives different figures for the same sample: name and settings."""
        settings = {n: v for n, v in self.settings().items() if n != "candidates"}
        return f"{self.name} {json.dumps(settings, sort_keys=True)}" if settings else self.name


def check_candidates(candidates: Candidates) -> Candidates:
    """Validate a ``candidates=`` argument.

    Returns:
        The argument, a sequence as a sorted int64 tensor without repetition.

    Raises:
        ValueError: if it is neither None, a positive count, nor sample numbers.
    """
    if candidates is None:
        return None
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        if candidates < 1:
            raise ValueError(f"`candidates` must be at least 1, got {candidates}.")
        return candidates
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, (Iterable, Tensor)):
        raise ValueError(
            "`candidates` must be None (every sample), a count (the strongest by SGD-IE) or sample "
            f"indices, got {candidates!r}."
        )
    given = candidates.tolist() if isinstance(candidates, Tensor) else list(candidates)
    given = given if isinstance(given, list) else [given]
    if not given or not all(_is_index(number) for number in given):
        raise ValueError(
            "`candidates` must hold at least one index, all of them integers from 0, got "
            f"{candidates!r}."
        )
    return torch.unique(torch.tensor([int(number) for number in given]))


def _is_index(number: Any) -> bool:
    """Whether it is an integer from 0, of Python or NumPy, or a tensor of one."""
    if isinstance(number, Tensor) and number.dim() == 0:
        number = number.item()
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0


def candidates_to_json(candidates: Candidates) -> Any:
    """Describe a ``candidates=`` argument for reports.

    Returns:
        None, a count, or a list.
    """
    return candidates.tolist() if isinstance(candidates, Tensor) else candidates


def strongest(influence: Tensor, count: int) -> Tensor:
    """Choose the strongest on both sides: half most negative, half most positive.

    Args:
        influence: ``[n]``; non-finite entries are taken first, since nothing is known of them.
        count: how many.

    Returns:
        ``[min(count, n)]`` positions, ascending.
    """
    count = min(count, len(influence))
    values = influence.nan_to_num(nan=-float("inf"))
    order = torch.argsort(values, stable=True)
    harmful = order[: (count + 1) // 2]
    helpful = order[len(order) - count // 2 :]
    return torch.sort(torch.cat([harmful, helpful])).values
