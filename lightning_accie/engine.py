"""Trajectory + module + data + query + estimator -> `InfluenceScores`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_accie.accounts import At, account_of, end_of
from lightning_accie.arguments import check_engine_arguments
from lightning_accie.crew import Crew, Order, serve
from lightning_accie.data import set_up, training_loaders, validation_loaders
from lightning_accie.described import Describe, described
from lightning_accie.embeddings import Ask, EmbeddingStore
from lightning_accie.errors import QueryError, TrajectoryError
from lightning_accie.estimators import (
    AccSgdIE,
    Estimator,
    LeaveOneOut,
    SgdIE,
    resolve_estimator,
)
from lightning_accie.estimators.base import Alone, NoProgress, Progress, Replay, Unasked
from lightning_accie.estimators.dvemb import EmbeddingEstimator
from lightning_accie.estimators.layers import Layers, layers_to_json
from lightning_accie.estimators.losses import training_losses
from lightning_accie.estimators.measure import Ladder, choose_ways
from lightning_accie.estimators.per_query import check_per_query
from lightning_accie.estimators.room import MemoryBudget, divided, used_by
from lightning_accie.explanation import Explanation, explain, one_by_one
from lightning_accie.groups import Groups, GroupScores, group_scores, members_of
from lightning_accie.launch import launch
from lightning_accie.matching import check_module, check_sizes, why_not_finite
from lightning_accie.processes import Processes
from lightning_accie.progress import RichProgress
from lightning_accie.query import ModuleQuery, QueryFunction
from lightning_accie.ranking import Ranking
from lightning_accie.replay import random_state
from lightning_accie.replay.batches import Batches, BatchSource
from lightning_accie.replay.data_check import compare_data
from lightning_accie.replay.drawn import drawn
from lightning_accie.replay.module import SampleLosses, TrainingProgram
from lightning_accie.replay.probe import check_derivatives, find_loss_form
from lightning_accie.replay.stored import StoredSource
from lightning_accie.replay.walker import Walker
from lightning_accie.scores import InfluenceScores
from lightning_accie.trajectory.files import MANIFEST
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.unfinished import Unfinished, directory_of


class InfluenceEngine:
    """Analyses a recorded run: at the end of `fit`, later, on another machine, or with another query.

    Args:
        trajectory: the trajectory's directory, the callback's with it, or an open `Trajectory`.
        module: the LightningModule that was trained, with any weights: the recorded ones are used.
            It is copied, not changed.
        data: the training data: a LightningDataModule, a DataLoader, a CombinedLoader, or a
            collection of DataLoaders, over the same datasets as in training. A trajectory that
            keeps its batches needs none.
        val_dataloaders: the validation data, where ``data`` is not a datamodule that has them.
        sample_losses: ``callable(module, batch) -> [B]``, as given to the callback.
        memory_budget: bytes for replayed states, batches and vectorised work, as a number or a text
            such as ``"4GB"``; ``"auto"``: 1 GB, or the least that does where that is more.
        device: where to compute; the CPU by default.
        check_data: whether the training data are compared with the checksums of the recorded ones
            before anything is computed. Losses are compared in any case.
        progress: whether to show progress bars, or where to tell how far long work is.
        full_precision: after mixed precision, whether estimates, exact replays and the query are
            computed in the parameters' own precision rather than under the run's autocast. Their
            rounding is far smaller then, and the influence is that of the run without it. The
            recorded run itself is replayed as it was. Always so after ``"16-mixed"``.
        devices: how many processes share the work, on this machine, each on a device of its own.
            ACC-SGD-IE and exact replays are dealt out sample by sample; what walks the run once for
            all samples (SGD-IE, TracIn) is computed by one of them.
        accelerator: of these processes, as Lightning's Fabric takes it; ``"auto"`` is that of
            ``device``.
        strategy: how they are started: ``"ddp_fork"``, ``"ddp_notebook"`` or ``"ddp_spawn"``;
            ``"auto"`` forks on the CPU and spawns elsewhere. To be spawned, ``module`` and ``data``
            must be picklable, and the script guarded by ``if __name__ == "__main__":``.
        live: the Trainer, when called from inside it.
        datamodule: whose transfer hooks apply, where ``data`` is not itself the datamodule.
        val_limits: batches to take from each validation loader.
        processes: those that this process leads, and that `serve`.

    Raises:
        TrajectoryError: if the trajectory cannot be read, is empty, or belongs to another module.
        UnsupportedError: if the data or the optimiser cannot be replayed.
        ValueError: if an argument has a wrong type or value.

    Examples:
        >>> engine = InfluenceEngine("logs/influence/trajectory", model, datamodule)  # doctest: +SKIP
        >>> scores = engine.estimate(query="val_loss")  # doctest: +SKIP
        >>> scores.top_harmful(10).to_csv("harmful.csv")  # doctest: +SKIP
    """

    def __init__(
        self,
        trajectory: str | Path | Trajectory,
        module: Any,
        data: Any = None,
        *,
        val_dataloaders: Any = None,
        sample_losses: SampleLosses | None = None,
        memory_budget: int | str = "auto",
        device: str | torch.device = "cpu",
        check_data: bool = True,
        progress: bool | Progress = True,
        full_precision: bool = False,
        devices: int = 1,
        accelerator: str = "auto",
        strategy: str = "auto",
        live: Any = None,
        datamodule: Any = None,
        val_limits: list[int | float] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name != "self"}
        check_engine_arguments(
            trajectory=trajectory,
            module=module,
            data=data,
            val_dataloaders=val_dataloaders,
            sample_losses=sample_losses,
            memory_budget=memory_budget,
            device=device,
            check_data=check_data,
            progress=progress,
            full_precision=full_precision,
            devices=devices,
            accelerator=accelerator,
            strategy=strategy,
        )
        if not isinstance(trajectory, Trajectory):
            trajectory = Trajectory.open(trajectory)
        self.trajectory = trajectory
        module = getattr(module, "_orig_mod", module)  # what `torch.compile` was given
        self.module = module
        self._budget = MemoryBudget.of(memory_budget)
        self.memory_budget = self._budget.size
        if isinstance(progress, bool):
            progress = RichProgress() if progress else NoProgress()
        self._progress: Progress = progress
        self._processes = Processes() if processes is None else processes
        self._val_limits = val_limits
        check_module(trajectory, module)
        set_up(data)
        device = torch.device(device)
        given = val_dataloaders if val_dataloaders is not None else data
        has_own = val_dataloaders is not None or hasattr(data, "val_dataloader")
        self._val_loaders = validation_loaders(given) if has_own else []
        self._program = TrainingProgram(
            module,
            trajectory.header,
            self._source(data, device),
            live=live,
            datamodule=data if hasattr(data, "train_dataloader") else datamodule,
            sample_losses=sample_losses,
            device=device,
            full_precision=full_precision,
        )
        self._unchecked = check_data
        self._cuda = self._program.device if self._program.device.type == "cuda" else None
        self._walker = Walker(trajectory, self._program, memory_budget=self.memory_budget // 2)

    def _source(self, data: Any, device: torch.device) -> Batches:
        """Where the recorded batches come from."""
        cache = self.memory_budget // 4
        if self.trajectory.batches is not None:
            return StoredSource(self.trajectory, device=device, cache_bytes=cache)
        if data is None:
            raise TrajectoryError(
                f"The trajectory {self.trajectory.directory} keeps the indices of the training "
                "samples, not the samples. Pass the training data as `data`."
            )
        loaders, assemble = training_loaders(data)
        check_sizes(self.trajectory, [len(loader.dataset) for loader in loaders])  # type: ignore[arg-type]
        return BatchSource(loaders, assemble, cache_bytes=cache)

    # ------------------------------------------------------------------ the work

    def sample(self, number: int) -> Any:
        """Read a training sample.

        Args:
            number: its number, as in `InfluenceScores.index`.

        Returns:
            What its dataset gives for it; of a trajectory that keeps its batches, the sample's part of
            one.
        """
        return self._program.batches.sample(number)

    def replay(
        self,
        query: str | QueryFunction | None = None,
        query_dataloader: Any = None,
        *,
        at: At = "last",
    ) -> Replay:
        """Make the run ready for an estimator: for those who call estimators themselves.

        Args:
            query: see `estimate`.
            query_dataloader: see `estimate`.
            at: see `estimate`.

        Returns:
            The run with its query, set to the fastest ways to its derivatives that the module allows.
        """
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            replay = self._replay(query, query_dataloader, at)
            choose_ways(replay)
        return replay

    def _replay(self, query: str | QueryFunction | None, query_dataloader: Any, at: At) -> Replay:
        """The run with its query, before the ways are chosen."""
        run = self._run(at)
        return replace(run, query=self._query(query, query_dataloader, run.final.buffers))

    def _run(self, at: At) -> Replay:
        """The run without a query."""
        walker = self._walker_until(end_of(self.trajectory, at))
        self._check_data()
        self._find_losses(walker)
        final = walker.final()
        samples, visits, first, last = drawn(walker.trajectory, self._program.batches)
        return Replay(
            walker=walker,
            query=Unasked(),
            samples=samples,
            visits=visits,
            first=first,
            last=last,
            final=final,
            memory_budget=self.memory_budget // 2,
            progress=self._progress,
        )

    def _check_data(self) -> None:
        """Compare the data with the recorded checksums, once."""
        if self._unchecked:
            micros = (micro for step in self.trajectory.steps() for micro in step.micro_batches)
            compare_data(micros, self._program.batches)
            self._unchecked = False

    def _walker_until(self, steps: int) -> Walker:
        if steps == len(self.trajectory):
            return self._walker
        memory = self._walker.memory_budget
        return Walker(self.trajectory.until(steps), self._program, memory_budget=memory)

    def _find_losses(self, walker: Walker) -> None:
        """Find the samples' own losses anew.

        The recording found them too, but perhaps for other `sample_losses`, or it broke off before.
        """
        find_loss_form(self._program, walker.first_loss().map.losses[0])  # type: ignore[arg-type]

    def estimate(
        self,
        query: str | QueryFunction | None = None,
        estimator: str | Estimator = "auto",
        *,
        layers: Layers = None,
        query_dataloader: Any = None,
        at: At = "last",
        verify: int = 20,
        top_k: int = 25,
        seed: int = 0,
        describe: Describe | None = None,
        loss_column: bool = False,
        resume: bool = True,
    ) -> InfluenceScores:
        """Rank training samples by their influence on the query.

        What is finished of a long analysis is kept on disk, beside the trajectory, until it is
        complete: one that was killed or interrupted goes on from there.

        Args:
            query: a name that ``validation_step`` logs, or ``callable(module, batch) -> scalar``;
                lower must be better. Default: what the trajectory was recorded for.
            estimator: ``"auto"``, an estimator's name, or an estimator.
            layers: whose change the estimates follow; see `InfluenceCallback`.
            query_dataloader: the batches for the query, where they are not the validation data.
            at: where the run ends for this ranking: ``"last"``, after its last step; ``"best"``, at
                the checkpoint that a ModelCheckpoint of the run found best; or after so many steps.
                What was drawn only later has no influence, and is left out.
            verify: how many samples to replay exactly, half of them the strongest, half at random;
                0 for none.
            top_k: how many samples on each side ``"auto"`` refines.
            seed: of the random choice of samples to verify.
            describe: ``callable(sample) -> dict``: the user's own columns, from what `sample` gives.
            loss_column: whether to add each sample's training loss as the column ``loss``.
            resume: whether to go on with what an earlier analysis of the same has finished, or to begin
                anew.

        Returns:
            The scores of every sample that the estimator covered.

        Raises:
            DescribeError: if ``describe`` fails, before any work is done.
            QueryError: if the query is not found or cannot be differentiated.
            ReplayMismatchError: if the replay departs from the recorded run.
            UnsupportedError: if ``layers`` names no parameter.
            ValueError: if an argument has a wrong type or value.
        """
        check_engine_arguments(
            query=query,
            estimator=estimator,
            layers=layers,
            query_dataloader=query_dataloader,
            verify=verify,
            top_k=top_k,
            seed=seed,
            describe=describe,
            loss_column=loss_column,
            resume=resume,
        )
        asked = {name: value for name, value in locals().items() if name in _ASKED}
        if self._given["devices"] > 1:
            return launch(InfluenceEngine, self._given, asked)
        chosen = resolve_estimator(estimator, layers)
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            replay = self._replay(query, query_dataloader, at)
            value = self._finite(replay)
            used = used_by(chosen, layers, verify=verify)
            replay = divided(replay, self._budget, used, rank_zero_info)
            ladder = choose_ways(replay)
            tell = rank_zero_info if ladder.reasons else rank_zero_debug
            tell(f"Influence analysis: {ladder.sentence()}")
            if chosen is not None:
                check_derivatives(chosen.probe, replay.walker.first_loss())
            # First of all: an error in the user's function comes at once, and none loses a ranking.
            columns = self._columns(replay, describe, loss_column)
            with self._unfinished(replay, value, resume=resume) as kept:
                shared = self._shared(replay, kept)
                ranking = Ranking(shared, seed, tell=rank_zero_info, layers=layers)
                ranking.run(chosen, top_k=top_k, verify=verify)
                kept.write() if ranking.interrupted else kept.remove()
        scores = self._scores(replay, ranking, columns, value, estimator, layers, at, ladder)
        return replace(scores, info={**scores.info, "top_k": top_k, "verify": verify, "seed": seed})

    def explain(
        self,
        batch: Any,
        query: str | QueryFunction | None = None,
        estimator: str | Estimator = "sgd-ie",
        *,
        layers: Layers = None,
        at: At = "last",
        verify: int = 20,
        seed: int = 0,
        describe: Describe | None = None,
    ) -> Explanation:
        """Find the training samples that made single predictions.

        Every sample of ``batch`` is a query of its own. SGD-IE and TracIn walk the run once for a block
        of queries; ACC-SGD-IE and exact replay carry each training sample once, whatever the number of
        queries. It is computed by this process alone, and begins anew when it was interrupted.

        Args:
            batch: as ``validation_step`` takes it; or a DataLoader, whose batches are the queries.
            query: a name that ``validation_step`` logs, or ``callable(module, batch) -> scalar``, of a
                batch of one sample; lower must be better. Default: what the trajectory was recorded
                for.
            estimator: ``"sgd-ie"``, ``"tracin"``, ``"acc-sgd-ie"``, ``"leave-one-out"``, or one of
                these with settings.
            layers: whose change the estimates follow; see `InfluenceCallback`.
            at: where the run ends; see `estimate`.
            verify: how many samples to replay exactly, half of them the strongest, half at random;
                every replay answers all queries. 0 for none.
            seed: of the random choice of samples to verify.
            describe: ``callable(sample) -> dict``: the user's own columns of training samples.

        Returns:
            ``[queries, samples]`` influences.

        Raises:
            DescribeError: if ``describe`` fails.
            QueryError: if the query is not found or cannot be differentiated, or ``batch`` cannot be
                taken apart.
            ReplayMismatchError: if the replay departs from the recorded run.
            UnsupportedError: if the estimator answers one query at a time, or ``layers`` names no
                parameter.
            ValueError: if an argument has a wrong type or value.
        """
        check_engine_arguments(
            query=query,
            estimator=estimator,
            layers=layers,
            verify=verify,
            seed=seed,
            describe=describe,
        )
        chosen = resolve_estimator(estimator, layers)
        if chosen is None:
            raise ValueError(
                '`explain` has no estimator="auto": "sgd-ie" with `verify=` is nearest to it.'
            )
        check_per_query(chosen)
        batches = one_by_one(batch)
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            replay = self._replay(query, batches, at)
            assert isinstance(replay.query, ModuleQuery)
            queries = replay.query.each()
            if not queries:
                raise QueryError("The DataLoader given to `explain` has no batch.")
            self._finite(replay)
            used = [chosen, *([LeaveOneOut()] if verify else [])]
            replay = divided(replay, self._budget, used, rank_zero_info)
            replay.query.gradient(
                replay.final.state.visible
            )  # one sample may have no slope, not all
            choose_ways(replay)
            check_derivatives(chosen.probe, replay.walker.first_loss())
            columns = self._columns(replay, describe, loss_column=False)
            found = explain(replay, queries, chosen, verify=verify, seed=seed)
        places = replay.positions(found.index).tolist()
        own = {name: [column[i] for i in places] for name, column in columns.items()}
        return replace(found, columns=own)

    def groups(
        self,
        groups: Groups,
        query: str | QueryFunction | None = None,
        *,
        query_dataloader: Any = None,
        at: At = "last",
        exact: bool = True,
        acc: bool = True,
    ) -> GroupScores:
        """Find what leaving out each group of training samples at once would do.

        It is computed by this process alone, and begins anew when it was interrupted.

        Args:
            groups: a mapping from names to sample indices, in which groups may overlap; a name for
                every sample of the training data; or ``callable(sample) -> name``.
            query: see `estimate`.
            query_dataloader: see `estimate`.
            at: see `estimate`.
            exact: whether to replay the run without each group, which costs what one sample's exact
                replay costs.
            acc: whether to estimate each group by ACC-SGD-IE.

        Returns:
            The exact influence of each group, ACC-SGD-IE's figure, and the sum of its members' single
            influences, which a group's influence is not.

        Raises:
            QueryError: if the query is not found or cannot be differentiated.
            ReplayMismatchError: if the replay departs from the recorded run.
            ValueError: if an argument has a wrong type or value, or a group has no sample that was
                drawn.
        """
        check_engine_arguments(query=query, query_dataloader=query_dataloader, exact=exact, acc=acc)
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            replay = self._replay(query, query_dataloader, at)
            sizes = [loader["samples"] for loader in self.trajectory.header["loaders"]]
            length = sum(sizes) if sizes and all(sizes) else None
            names, sets = members_of(groups, replay, self.sample, length)
            self._finite(replay)
            used = [SgdIE(), *([AccSgdIE()] if acc else []), *([LeaveOneOut()] if exact else [])]
            replay = divided(replay, self._budget, used, rank_zero_info)
            choose_ways(replay)
            for estimator in (SgdIE(), *([AccSgdIE()] if acc else [])):
                check_derivatives(estimator.probe, replay.walker.first_loss())
            return group_scores(replay, names, sets, exact=exact, acc=acc)

    def _finite(self, replay: Replay) -> float:
        """The query's value, which must be a number to rank anything by."""
        value = replay.query.value(replay.final.state.visible)
        if not np.isfinite(value):
            raise QueryError(
                f"`{replay.query.name}` is {value} at the end of the run, so nothing can be "
                f"ranked by it: {why_not_finite(self.trajectory, replay)}"
            )
        return value

    # ------------------------------------------------------------------ embeddings

    def embed(
        self,
        directory: str | Path,
        estimator: str | EmbeddingEstimator = "dvemb",
        *,
        at: At = "last",
        overwrite: bool = False,
    ) -> EmbeddingStore:
        """Embed every training sample once, for many queries later.

        Args:
            directory: where to keep the embeddings, n × k numbers.
            estimator: ``"dvemb"``, ``"acc-dvemb"``, or a `DataValueEmbedding` or
                `AccDataValueEmbedding`.
            at: where the run ends; see `estimate`.
            overwrite: whether embeddings that are there are replaced.

        Returns:
            The store, which answers queries.

        Raises:
            EmbeddingsError: where something is there that must not be replaced.
            ReplayMismatchError: if the replay departs from the recorded run.
            UnsupportedError: if the run is none that embeddings are derived for, or they do not fit
                ``memory_budget``.
            ValueError: if an argument has a wrong type or value.
        """
        check_engine_arguments(dirpath=directory, overwrite=overwrite)
        chosen = resolve_estimator(estimator)
        if not isinstance(chosen, EmbeddingEstimator):
            raise ValueError(
                '`estimator` must be "dvemb", "acc-dvemb", a DataValueEmbedding or an '
                f"AccDataValueEmbedding, got {estimator!r}."
            )
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            run = self._run(at)
            choose_ways(run)
            return EmbeddingStore.make(
                Path(directory), chosen, run, self._asker(run), overwrite=overwrite
            )

    def embeddings(self, directory: str | Path, *, at: At = "last") -> EmbeddingStore:
        """Open embeddings that `embed` has made of this run, in this process or another.

        Args:
            directory: where they are.
            at: where the run ends, as it was given to `embed`.

        Returns:
            The store, which answers queries.

        Raises:
            EmbeddingsError: where they are missing, damaged, half-written or too new, or belong to
                another run or module.
            ReplayMismatchError: if the replay departs from the recorded run.
        """
        with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
            run = self._run(at)
        return EmbeddingStore.open(Path(directory), run, self._asker(run))

    def _asker(self, run: Replay) -> Ask:
        return lambda query, dataloader: self._query(query, dataloader, run.final.buffers)

    # ------------------------------------------------------------------ several processes

    def _shared(self, replay: Replay, kept: Unfinished) -> Replay:
        """The run, with whoever takes a share of the work."""
        alone = self._processes.count == 1
        team = Alone() if alone else Crew(self._processes, kept.directory)
        return replace(replay, kept=kept, team=team)

    def helper(
        self,
        query: str | QueryFunction | None = None,
        query_dataloader: Any = None,
        at: At = "last",
    ) -> Callable[[Order], Any]:
        """What a process does that another one leads.

        Args:
            query: see `estimate`.
            query_dataloader: see `estimate`.
            at: see `estimate`.

        Returns:
            What takes rank 0's orders, for `Processes.lead`.
        """
        made: list[Replay] = []

        def serve_order(order: Order) -> Any:
            with random_state.isolated(self._cuda), torch.compiler.set_stance("force_eager"):
                if not made:
                    made.append(self._replay(query, query_dataloader, at))
                return serve(order, self._processes.rank, made[0])

        return serve_order

    # ------------------------------------------------------------------ parts of the work

    @contextmanager
    def _unfinished(self, replay: Replay, value: float, *, resume: bool) -> Iterator[Unfinished]:
        """What an analysis that is killed leaves, and finds again."""
        trajectory = self.trajectory.directory
        slope = replay.query.gradient(replay.final.state.visible)
        size = sum(float(part.double().square().sum()) for part in slope.values()) ** 0.5
        what = {
            "trajectory": sha256((trajectory / MANIFEST).read_bytes()).hexdigest(),
            "steps": len(replay.walker),
            "query": [replay.query.name, f"{value:.4e}", f"{size:.4e}"],
            "precision": self._program.analysis.name,
        }
        directory = directory_of(trajectory.parent, what)
        kept = Unfinished(directory, resume=resume, warn=rank_zero_warn)
        if kept.found:
            rank_zero_info(
                "Influence analysis: goes on with what an earlier one has finished "
                f"({kept.directory}). `resume=False` begins anew."
            )
        try:
            yield kept
        except BaseException:
            kept.write()
            raise

    def _query(
        self, query: str | QueryFunction | None, dataloader: Any, buffers: Mapping[str, Tensor]
    ) -> ModuleQuery:
        monitor = query if query is not None else self.trajectory.header["monitor"]
        loaders = self._val_loaders if dataloader is None else validation_loaders(dataloader)
        if not loaders:
            raise QueryError(
                "There is no validation data to measure the query on. Pass `val_dataloaders=` or "
                "`query_dataloader=`."
            )
        return ModuleQuery(
            self._program,
            self.module,
            monitor,
            loaders,
            limits=self._val_limits if dataloader is None else None,
            buffers=buffers,
            memory_budget=self.memory_budget // 4,
        )

    def _columns(
        self, replay: Replay, describe: Describe | None, loss_column: bool
    ) -> dict[str, list[Any]]:
        """The loss and the user's own columns, for every drawn sample."""
        columns: dict[str, list[Any]] = {}
        stored = self.trajectory.batches
        if ids := stored.ids() if stored is not None else []:
            columns["sample_id"] = [ids[n] for n in replay.samples.tolist()]
        # First the user's function: if it fails, nothing was done in vain.
        own = described(describe, replay.samples.tolist(), self.sample) if describe else {}
        if loss_column:
            columns["loss"] = training_losses(replay).tolist()
        return columns | own

    def _scores(
        self,
        replay: Replay,
        ranking: Ranking,
        columns: dict[str, list[Any]],
        value: float,
        estimator: str | Estimator,
        layers: Layers,
        at: At,
        ladder: Ladder,
    ) -> InfluenceScores:
        settings = layers_to_json(layers) if isinstance(estimator, str) else estimator.settings()
        info = {
            "query": replay.query.name,
            "query_value": value,
            "estimator": estimator if isinstance(estimator, str) else estimator.name,
            "settings": settings,
            "at": at,
            "recorded_steps": len(self.trajectory),
            **account_of(replay),
            "noise_floor": ranking.noise,
            "hessian_product": replay.walker.product,
            "tangent_product": replay.walker.tangents,
            "vectorized": replay.walker.vectorize,
            "refused": ladder.reasons,
            "seconds": ranking.seconds,
            "interrupted": ranking.interrupted,
        }
        places = replay.positions(ranking.samples)
        return InfluenceScores(
            index=ranking.samples,
            influence=ranking.influence,
            estimate=ranking.estimate,
            visits=replay.visits[places],
            exact=ranking.exact,
            estimator=tuple(ranking.estimator),
            trusted=ranking.trusted,
            agreement=ranking.agreement(),
            columns={name: [column[i] for i in places] for name, column in columns.items()},
            info=info,
        )


_ASKED = set(inspect.signature(InfluenceEngine.estimate).parameters) - {"self"}
