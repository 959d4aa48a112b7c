"""`EmbeddingStore`: data value embeddings on disk, which answer any query of their run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from lightning_accie.accounts import account_of
from lightning_accie.embeddings_files import (
    EmbeddingsError,
    check_free,
    read_embeddings,
    write_embeddings,
)
from lightning_accie.errors import QueryError
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.dvemb import EmbeddingEstimator
from lightning_accie.estimators.embeddings import Embeddings
from lightning_accie.estimators.projection import Projection
from lightning_accie.estimators.sgd_ie import no_larger_than_the_run
from lightning_accie.explanation import Explanation, one_by_one
from lightning_accie.query import ModuleQuery, QueryFunction
from lightning_accie.scores import InfluenceScores
from lightning_accie.trajectory.files import MANIFEST

Ask = Callable[[str | QueryFunction | None, Any], ModuleQuery]
"""What makes a query of a name or function, and of dataloaders; None for the run's own."""


class EmbeddingStore:
    """Data value embeddings of a run's samples, which answer queries without walking the run again.

    Made by `InfluenceEngine.embed`, opened by `InfluenceEngine.embeddings`, also in another process:
    the embeddings are mapped from their file. A query costs its own gradient at the end of the run,
    and one product with them.

    Wang et al. 2024, arXiv 2412.09538: influence ≈ ⟨∇q(θ_T), DVEmb(i)⟩, in a projection.

    Args:
        directory: where it is.
        embeddings: what it holds.
        settings: which estimator made them, with its settings, as JSON values.
        run: the run.
        ask: what makes its queries.

    Attributes:
        directory: where it is.
        embeddings: the embeddings themselves, ``[n, k]`` in ``embeddings.values``.
        settings: which estimator made them, with its settings.
    """

    def __init__(
        self,
        directory: Path,
        embeddings: Embeddings,
        settings: dict[str, Any],
        run: Replay,
        ask: Ask,
    ) -> None:
        self.directory = directory
        self.embeddings = embeddings
        self.settings = settings
        self._run = run
        self._ask = ask

    def __len__(self) -> int:
        return len(self.embeddings.samples)

    def __repr__(self) -> str:
        size = self.embeddings.projection.size
        return f"{type(self).__name__}({len(self)} samples, {size} coordinates: {self.directory})"

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def make(
        cls,
        directory: Path,
        estimator: EmbeddingEstimator,
        run: Replay,
        ask: Ask,
        *,
        overwrite: bool,
    ) -> EmbeddingStore:
        """Embed every sample of a run, and keep the embeddings.

        Args:
            directory: where to.
            estimator: what embeds.
            run: the run; its query does not matter.
            ask: what makes queries of it.
            overwrite: whether embeddings that are there are replaced.

        Returns:
            The store, mapped from its file.

        Raises:
            EmbeddingsError: where something is there that must not be replaced.
            OSError: where the file system refuses.
        """
        check_free(directory, overwrite=overwrite)
        start = time.perf_counter()
        found = estimator.embed(run)
        content = {
            "estimator": estimator.name,
            "settings": estimator.settings(),
            "projection": found.projection.to_json(),
            "module": run.walker.program.header["module"],
            "trajectory": _fingerprint(run),
            "steps": len(run.walker),
            "seconds": time.perf_counter() - start,
        }
        tensors = {"values": found.values, "samples": found.samples, **found.projection.tensors()}
        write_embeddings(directory, tensors, content)
        return cls.open(directory, run, ask)

    @classmethod
    def open(cls, directory: Path, run: Replay, ask: Ask) -> EmbeddingStore:
        """Open embeddings of a run.

        Args:
            directory: where they are.
            run: the run that they must have been made of.
            ask: what makes queries of it.

        Returns:
            The store.

        Raises:
            EmbeddingsError: where they are missing, damaged, half-written or too new, or belong to
                another run or module.
        """
        tensors, content = read_embeddings(directory)
        try:
            values, samples = tensors.pop("values"), tensors.pop("samples")
            projection = Projection.of(content["projection"], tensors)
            _check_run(directory, content, projection, run)
        except (KeyError, TypeError, ValueError) as error:
            raise EmbeddingsError(f"{directory} does not hold embeddings: {error!r}.") from error
        fits = values.shape == (len(samples), projection.size)
        if not fits or not torch.equal(samples, run.samples):
            raise EmbeddingsError(
                f"{directory} holds embeddings that do not fit their projection, or the samples that "
                "the run drew: another program wrote them."
            )
        settings = {"estimator": content["estimator"], **content["settings"]}
        return cls(directory, Embeddings(samples, values, projection), settings, run, ask)

    # ------------------------------------------------------------------ queries

    def scores(
        self, query: str | QueryFunction | None = None, query_dataloader: Any = None
    ) -> InfluenceScores:
        """The influence of every sample on a query.

        Args:
            query: see `InfluenceEngine.estimate`.
            query_dataloader: see there.

        Returns:
            The scores, without exact replays: ``engine.estimate(estimator=...)`` makes some, and
            measures how far the estimates agree with them.

        Raises:
            QueryError: if the query is not found or cannot be differentiated.
        """
        start = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):
            run = replace(self._run, query=self._ask(query, query_dataloader))
            params = run.final.state.visible
            influence = self.embeddings.influence_on(run.query.gradient(params))
            trusted = influence.isfinite() & no_larger_than_the_run(run, influence)
            value = run.query.value(params)
        name = str(self.settings["estimator"])
        return InfluenceScores(
            index=self.embeddings.samples.clone(),
            influence=influence,
            estimate=influence.clone(),
            visits=run.visits,
            exact=torch.full_like(influence, float("nan")),
            estimator=(name,) * len(influence),
            trusted=trusted,
            info={
                "query": run.query.name,
                "query_value": value,
                "estimator": name,
                "settings": {k: v for k, v in self.settings.items() if k != "estimator"},
                **account_of(run),
                "embeddings": str(self.directory),
                "seconds": {name: time.perf_counter() - start},
            },
        )

    def explain(self, batch: Any, query: str | QueryFunction | None = None) -> Explanation:
        """The influence of every training sample on each prediction of a batch.

        Args:
            batch: see `InfluenceEngine.explain`; a DataLoader's batches are the queries.
            query: see there.

        Returns:
            ``[queries, samples]`` influences, without exact replays.

        Raises:
            QueryError: if the query is not found or cannot be differentiated, or ``batch`` cannot be
                taken apart or is empty.
        """
        with torch.compiler.set_stance("force_eager"):
            queries = self._ask(query, one_by_one(batch)).each()
            if not queries:
                raise QueryError("The DataLoader given to `explain` has no batch.")
            project, params = self.embeddings.projection, self._run.final.state.visible
            slopes = [one.gradient(params) for one in queries]
            rows = [project.whole({n: one[n][None] for n in project.names}) for one in slopes]
            influence = self.embeddings.products(torch.cat(rows))
            runs = (replace(self._run, query=one) for one in queries)
            fine = [no_larger_than_the_run(*pair) for pair in zip(runs, influence, strict=True)]
            value = [one.value(params) for one in queries]
        return Explanation(
            index=self.embeddings.samples.clone(),
            influence=influence,
            estimate=influence.clone(),
            exact=torch.full_like(influence, float("nan")),
            value=torch.tensor(value, dtype=torch.float64),
            trusted=influence.isfinite() & torch.stack(fine),
            visits=self._run.visits,
            estimator=str(self.settings["estimator"]),
            query=queries[0].name,
        )


def _fingerprint(run: Replay) -> str:
    directory = run.walker.trajectory.directory
    return sha256((directory / MANIFEST).read_bytes()).hexdigest()


def _check_run(
    directory: Path, content: dict[str, Any], projection: Projection, run: Replay
) -> None:
    """Refuse embeddings of another module or run."""
    params = run.final.state.params
    for name, part in projection.parts.items():
        shape = tuple(params[name].shape) if name in params else "missing"
        if shape != part.shape:
            raise EmbeddingsError(
                f"{directory} holds embeddings of another module (`{content['module']}`), whose "
                f"parameter `{name}` has shape {part.shape}; here it is {shape}."
            )
    trajectory = run.walker.trajectory.directory
    if content["trajectory"] != _fingerprint(run):
        raise EmbeddingsError(
            f"{directory} holds embeddings of another run than {trajectory}, or of a part of it "
            "before it was resumed. Open them with the engine of their run, or make them anew with "
            "`InfluenceEngine.embed(..., overwrite=True)`."
        )
    if content["steps"] != len(run.walker):
        raise EmbeddingsError(
            f"{directory} holds embeddings of the run after {content['steps']} steps, not after "
            f"{len(run.walker)}. Pass `at={content['steps']}`."
        )
