"""The processes of one run share the work of an analysis, led by rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.processes import Processes
from lightning_accie.unfinished import Unfinished

_Found = list[tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Order:
    """What rank 0 asks of another rank.

    Attributes:
        estimator: whose work it is.
        parts: the chunks of every rank.
        product: `Walker.product`, `Walker.tangents`, `Walker.vectorize` and the query's ``vectorize``,
            as rank 0 has chosen them.
        folder: where finished chunks are kept.
    """

    estimator: ChunkedEstimator
    parts: Sequence[Sequence[Tensor]]
    product: str
    tangents: str
    vectorize: bool
    vectorize_query: bool
    folder: Path


class Crew:
    """An `estimators.base.Team` of several processes, as rank 0 has it.

    Args:
        processes: those of the run; rank 0 leads (`Processes.lead`), the others `serve`.
        folder: where finished chunks are kept; the others keep theirs there too.
    """

    def __init__(self, processes: Processes, folder: Path) -> None:
        self.size = processes.count
        self._processes = processes
        self._folder = folder

    def begin(
        self, replay: Replay, estimator: ChunkedEstimator, parts: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Deal the chunks in turn.

        Args:
            replay: the run.
            estimator: whose work it is.
            parts: the chunks.

        Returns:
            Rank 0's own.
        """
        dealt = [parts[rank :: self.size] for rank in range(self.size)]
        walker = replay.walker
        ways = (walker.product, walker.tangents, walker.vectorize, replay.query.vectorize)
        self._processes.call(Order(estimator, dealt, *ways, self._folder))
        return dealt[0]

    def end(self) -> tuple[_Found, bool]:
        """Collect what the others found.

        Returns:
            The samples and figures of each chunk, and False where a Ctrl-C has stopped one of them.

        Raises:
            BaseException: the error of the first that failed.
        """
        found: _Found = []
        complete = True
        for answer, failure in self._processes.answers():
            if failure is not None:
                raise failure
            chunks, finished = answer
            found += chunks
            complete = complete and finished
        return found, complete


def serve(order: Order, rank: int, replay: Replay) -> tuple[_Found, bool]:
    """Do one's share of the work.

    Args:
        order: what rank 0 asks for.
        rank: of this process.
        replay: the run, as this process has it.

    Returns:
        The samples and figures of each chunk, and whether these are all.
    """
    walker = replay.walker
    walker.product, walker.tangents, walker.vectorize = (
        order.product,
        order.tangents,
        order.vectorize,
    )
    replay.query.vectorize = order.vectorize_query
    kept = Unfinished(order.folder, resume=True, warn=rank_zero_warn)
    replay = replace(replay, kept=kept)
    found: _Found = []
    finished = True
    try:
        for part in order.parts[rank]:
            found.append((part, order.estimator.finish(replay, part, lambda steps: None)))
    except KeyboardInterrupt:
        finished = False
    finally:
        kept.write()
    return found, finished
