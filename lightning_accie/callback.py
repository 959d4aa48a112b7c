"""`InfluenceCallback`: Lightning's hooks, each a line or two into the rooms behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie._compat import CallbackBase
from lightning_accie.arguments import check_arguments
from lightning_accie.capture import hooks
from lightning_accie.capture.batches import SampleIdOf
from lightning_accie.capture.recording import Recording, RecordingSettings
from lightning_accie.capture.support import check_module
from lightning_accie.data import fitted_validation
from lightning_accie.described import Describe
from lightning_accie.engine import InfluenceEngine
from lightning_accie.errors import DescribeError, InfluenceError
from lightning_accie.estimators import Estimator, SgdIE, resolve_estimator
from lightning_accie.estimators.layers import Layers
from lightning_accie.estimators.room import MemoryBudget, check_room, used_by
from lightning_accie.live import LiveView, check_live
from lightning_accie.progress import close_bar, progress_like
from lightning_accie.query import QueryFunction
from lightning_accie.rendered import Render
from lightning_accie.replay.module import SampleLosses
from lightning_accie.replay.walker import Visit, Walker
from lightning_accie.reports import render_strongest, report_all
from lightning_accie.reports.html.beside import write_beside
from lightning_accie.reports.report import Report
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import CSV_FILE, REPORT_FILE
from lightning_accie.trajectory.files import FOLDER, MANIFEST
from lightning_accie.trajectory.sizes import parse_bytes


class InfluenceCallback(CallbackBase):
    """Records a `fit` and ranks its training samples by their influence on a validation metric.

    Training itself is untouched: with the callback it is bit for bit what it is without. The first
    optimiser step is replayed at once, so that whatever cannot be replayed is refused within the
    first seconds of `fit`, with the reason and the way out.

    Args:
        monitor: what influence is measured on: the name of a scalar that the module logs in
            ``validation_step``, or ``callable(module, batch) -> scalar tensor``. Lower must be
            better.
        estimator: ``"auto"`` (rank all by SGD-IE, refine the strongest, verify some exactly), an
            estimator's name (``"sgd-ie"``, ``"acc-sgd-ie"``, ``"low-rank-acc-sgd-ie"``,
            ``"dvemb"``, ``"acc-dvemb"``, ``"leave-one-out"``, ``"tracin"``), or an instance such
            as ``AccSgdIE(candidates=500)``.
        layers: whose change the estimates follow: globs of module or parameter names such as
            ``"head"``, or a predicate on a parameter's name; the other parameters stay those of the
            recorded run. Exact replays always leave a sample out of everything. None for all.
        at: where the run ends for the ranking: ``"last"``, after its last step, or ``"best"``, at the
            best checkpoint of a ModelCheckpoint that has a ``monitor=``.
        top_k: how many harmful and how many helpful samples to report, and to refine.
        verify: how many samples to replay exactly, half of them the strongest and half drawn at
            random; the agreement of estimate and exact replay is reported. 0 for none.
        run: ``"fit_end"`` to analyse when `fit` ends, or ``"manual"`` to capture only (analyse
            later with `InfluenceEngine`).
        capture: what is kept of the training data: ``"indices"`` (which samples were drawn) or
            ``"batches"`` (the batches as ``training_step`` received them, each distinct sample once).
            ``"auto"``: indices, unless the data are augmented at random.
        sample_id: what names the samples in a batch, for data without indices (streams): a key or
            field of the batch, or ``callable(batch) -> ids``, one integer or text a sample. Keeps
            the batches.
        dirpath: where results go; default ``<log_dir>/influence``, numbered where that is taken.
        overwrite: whether a trajectory that is in ``dirpath`` already is replaced, and its scores
            deleted; else it is kept, and `fit` refuses to start.
        disk_budget: bytes that checkpoints and stored batches may take, as a number or a text such as
            ``"2GB"``.
        memory_budget: bytes that the analysis may take beyond the module and its data. Too few for
            any of it are refused when `fit` starts, with the least that would do. ``"auto"``: 1 GB, or
            that least where it is more.
        sample_losses: ``callable(module, batch) -> [B] tensor``, for a ``training_step`` whose
            per-sample losses cannot be found by themselves.
        query_dataloader: batches for the query; default the Trainer's validation data.
        describe: ``callable(sample) -> dict``, given ``dataset[i]`` (where batches are kept: the
            sample's part of one): columns of your own in every table (label, path, …). Tried on one
            sample when `fit` starts.
        render: ``callable(sample)``, given the same: how the reports show a sample. It returns a
            picture (a PIL image, or a tensor or array ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` of
            floats or uint8, with 1, 3 or 4 channels), a text, or a dict of named values. None: the
            first image in the sample, the first text, and all other values. Tried on one sample when
            `fit` starts.
        loss_column: whether to add each sample's training loss as the column ``loss``, which finds
            flipped labels better than any influence.
        report: what ``report.html`` beside the scores shows: ``"full"``, with the pictures, texts and
            values of the ``top_k`` strongest samples on each side (``examples.json`` keeps them too);
            ``"figures"``, nothing of the samples but their numbers and the columns of ``describe=``,
            and the loggers get no more either; or ``"none"`` to write neither file.
        console: whether to print the ranking when `fit` ends.
        live: whether to show which samples harm while the run goes on: at the end of each validation,
            SGD-IE over the steps since the last one. That takes about as long as these steps did, or
            up to four times that, and changes nothing in the training. In one process only.
        full_precision: after mixed precision, whether the analysis runs without autocast; see
            `InfluenceEngine`.
        seed: of the random choice of samples to verify.

    Attributes:
        scores: the `InfluenceScores`, once `fit` has ended; None before, and with ``run="manual"``.
        live_scores: with ``live=True`` the `InfluenceScores` of the steps up to the latest validation,
            for the samples that these drew; None before.

    Raises:
        MisconfigurationException: if an argument has a wrong type or value.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> influence = InfluenceCallback(monitor="val_loss", verify=10)
        >>> trainer = Trainer(callbacks=[influence], logger=False, enable_checkpointing=False)
        >>> influence.scores is None
        True
    """

    def __init__(
        self,
        monitor: QueryFunction | str = "val_loss",  # LightningCLI tries an import path first
        *,
        estimator: str | Estimator = "auto",
        layers: Layers = None,
        at: str = "last",
        top_k: int = 25,
        verify: int = 20,
        run: str = "fit_end",
        capture: str = "auto",
        sample_id: SampleIdOf | None = None,
        dirpath: str | Path | None = None,
        overwrite: bool = False,
        disk_budget: int | str = "2GB",
        memory_budget: int | str = "auto",
        sample_losses: SampleLosses | None = None,
        query_dataloader: Any = None,
        describe: Describe | None = None,
        render: Render | None = None,
        loss_column: bool = False,
        report: str = "full",
        console: bool = True,
        live: bool = False,
        full_precision: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(
            monitor=monitor,
            estimator=estimator,
            layers=layers,
            at=at,
            top_k=top_k,
            verify=verify,
            run=run,
            capture=capture,
            sample_id=sample_id,
            dirpath=dirpath,
            overwrite=overwrite,
            disk_budget=disk_budget,
            memory_budget=memory_budget,
            sample_losses=sample_losses,
            query_dataloader=query_dataloader,
            describe=describe,
            render=render,
            loss_column=loss_column,
            report=report,
            console=console,
            live=live,
            full_precision=full_precision,
            seed=seed,
        )
        self._disk_budget = parse_bytes(disk_budget)
        self._memory_budget = MemoryBudget.of(memory_budget)
        self.memory_budget = memory_budget
        self.monitor = monitor
        self.estimator = estimator
        self.layers = layers
        self.at = at
        self.top_k = top_k
        self.verify = verify
        self.run = run
        self.capture = capture
        self.sample_id = sample_id
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.overwrite = overwrite
        self.sample_losses = sample_losses
        self.query_dataloader = query_dataloader
        self.describe = describe
        self.render = render
        self.loss_column = loss_column
        self.report = report
        self.console = console
        self.live = live
        self.full_precision = full_precision
        self.seed = seed
        self.scores: InfluenceScores | None = None
        self.live_scores: InfluenceScores | None = None
        # Lightning asks for the key at every hook of every batch.
        self._state_key = self._generate_state_key(
            monitor=self._monitor_name, dirpath=str(self.dirpath)
        )
        self._recording: Recording | None = None
        self._view: LiveView | None = None

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one Trainer apart."""
        return self._state_key

    @property
    def directory(self) -> Path | None:
        """Where the last `fit` was recorded; None before its first step."""
        return None if self._recording is None else self._recording.directory

    @property
    def _monitor_name(self) -> str:
        if isinstance(self.monitor, str):
            return self.monitor
        return str(getattr(self.monitor, "__name__", type(self.monitor).__name__))

    # ------------------------------------------------------------------ capture

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be recorded, and watch the dataloaders from the start."""
        if stage != "fit":
            return
        if self._recording is not None:
            self._recording.detach()
        hooks.unskip(self)
        self.scores = self.live_scores = None
        self._view = self._live_view() if self.live else None
        self._recording = Recording(self._recording_settings(), trainer, pl_module)
        self._recording.attach(owner=self)
        hooks.skip(self, InfluenceCallback, hooks.UNUSED)

    def _recording_settings(self) -> RecordingSettings:
        return RecordingSettings(
            monitor=self.monitor,
            monitor_name=self._monitor_name,
            state_key=self.state_key,
            at=self.at,
            analyses=self.run == "fit_end" or self.live,
            capture=self.capture,
            sample_id=self.sample_id,
            probe=self._probe(),
            check_room=self._check_room,
            dirpath=self.dirpath,
            overwrite=self.overwrite,
            disk_budget=self._disk_budget,
            sample_losses=self.sample_losses,
            query_dataloader=self.query_dataloader,
            describe=self.describe,
            render=self.render,
            full_precision=self.full_precision,
            live=self.live,
        )

    def _probe(self) -> Callable[[Visit], None]:
        chosen = resolve_estimator(self.estimator, self.layers)
        estimators = [
            *([chosen] if chosen else []),
            *([SgdIE(self.layers)] if self.live or not chosen else []),
        ]

        def probe(visit: Visit) -> None:
            for estimator in estimators:
                estimator.probe(visit)

        return probe

    def _check_room(self, walker: Walker) -> None:
        chosen = resolve_estimator(self.estimator, self.layers)
        check_room(walker, self._memory_budget, used_by(chosen, self.layers, verify=self.verify))

    def _live_view(self) -> LiveView:
        return LiveView(
            monitor=self.monitor,
            estimator=SgdIE(self.layers),
            top_k=self.top_k,
            memory_budget=self._memory_budget.size,
            sample_losses=self.sample_losses,
            query_dataloader=self.query_dataloader,
            describe=self.describe,
            full_precision=self.full_precision,
        )

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the bookmark of the run that is resumed; this comes after ``setup``."""
        if self._recording is not None:
            self._recording.resume_from(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """A bookmark, for a `fit` that is resumed from the checkpoint about to be saved.

        Returns:
            Texts and integers; nothing before the first step.
        """
        return {} if self._recording is None else self._recording.bookmark()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse modules and optimisers that cannot be replayed."""
        check_module(trainer, pl_module)
        if self.live:
            check_live(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start recording."""
        if self._recording is not None:
            self._recording.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first optimiser step: replay it, and refuse what does not come out the same."""
        if self._recording is not None and self._recording.batch_ended():
            hooks.skip(self, InfluenceCallback, ("on_train_batch_end",))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation may draw random numbers: whatever drew before it was the training."""
        if self._recording is not None:
            self._recording.interrupted()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Show which samples harm, if that was asked for."""
        if self._view is None or self._recording is None or trainer.sanity_checking:
            return
        scores = self._view.look(self._recording, pl_module, trainer)
        if scores is not None:
            self.live_scores = scores

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Every sample of an epoch was summed up once."""
        if self._recording is not None:
            self._recording.epoch_ended()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the final state and close the trajectory."""
        if self._recording is not None:
            self._recording.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the trajectory with what ran; it can be analysed with `InfluenceEngine`."""
        hooks.unskip(self)
        if self._recording is not None:
            self._recording.abort(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave strategy, loaders and optimiser as they were found."""
        hooks.unskip(self)
        if self._recording is not None:
            self._recording.detach()
            self._recording.clean_up()
            if stage == "fit":
                self._recording.processes.close()

    # ------------------------------------------------------------------ analysis

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Rank the samples, and report where the Trainer's loggers look."""
        recording = self._recording
        if self.run != "fit_end" or recording is None or recording.directory is None:
            return
        trajectory = recording.directory / FOLDER
        complete = recording.processes.share(recording.complete)
        if not all(complete):
            if recording.complete and recording.processes.first:
                rank_zero_warn(
                    f"No ranking is made: rank {complete.index(False)} stopped recording. "
                    f"The steps until there are in {trajectory}; rank by them "
                    "with `InfluenceEngine(trajectory, module, data).estimate()`."
                )
            return
        recording.detach_data()
        try:
            self.scores = self._analysed(trainer, pl_module, recording, recording.directory)
        except KeyboardInterrupt:  # the training is done: a Ctrl-C here must not undo it
            why = "the analysis was interrupted."
        except InfluenceError as error:  # nor must an analysis that cannot be done
            why = str(error)
        else:
            return
        rank_zero_warn(
            f"InfluenceCallback made no ranking: {why} Training is complete, and its record is in "
            f"{trajectory}: analyse it with "
            "`InfluenceEngine(trajectory, module, data).estimate()`."
        )

    def _analysed(
        self, trainer: Any, pl_module: Any, recording: Recording, directory: Path
    ) -> InfluenceScores:
        """Let rank 0 analyse the run, and the others take their shares where they can read it."""
        loaders, limits = None, None
        if self.query_dataloader is None:  # on every rank: it may be a collective call
            loaders, limits = fitted_validation(trainer)

        def engine() -> InfluenceEngine:
            return self._engine(trainer, pl_module, recording, directory, loaders, limits)

        def lead() -> InfluenceScores:
            return self._analyse(engine(), trainer, directory)

        if not all(recording.processes.share((directory / FOLDER / MANIFEST).is_file())):
            return recording.processes.on_first(
                lead
            )  # they are on other machines, without its disk
        asked = (self.monitor, self.query_dataloader, self._at(trainer))
        return recording.processes.lead(lead, lambda: engine().helper(*asked))

    def _engine(
        self,
        trainer: Any,
        pl_module: Any,
        recording: Recording,
        directory: Path,
        loaders: Any,
        limits: Any,
    ) -> InfluenceEngine:
        return InfluenceEngine(
            directory / FOLDER,
            pl_module,
            recording.combined,
            val_dataloaders=loaders,
            sample_losses=self.sample_losses,
            memory_budget=self.memory_budget,
            progress=progress_like(trainer),
            full_precision=self.full_precision,
            check_data=recording.processes.first,
            device=trainer.strategy.root_device,
            live=trainer,
            datamodule=trainer.datamodule,
            val_limits=limits,
            processes=recording.processes,
        )

    def _analyse(self, engine: InfluenceEngine, trainer: Any, directory: Path) -> InfluenceScores:
        close_bar(trainer)
        try:
            scores = self._estimated(engine, trainer, self.describe)
        except DescribeError as error:  # hours of training must not end with it
            rank_zero_warn(
                f"InfluenceCallback ranks the samples without the columns of `describe=`. {error}"
            )
            scores = self._estimated(engine, trainer, None)
        if scores.info["interrupted"]:
            rank_zero_warn(
                "The influence analysis was interrupted: the ranking stands as far as it had come, "
                "with fewer samples replayed exactly."
            )
        self.scores = scores  # before what may yet fail
        self._save(scores, directory)
        self._tell(scores, engine, trainer, directory)
        return scores

    def _tell(
        self, scores: InfluenceScores, engine: InfluenceEngine, trainer: Any, directory: Path
    ) -> None:
        """Write the report, and tell the loggers and the terminal."""
        rendered = {}
        if self.report == "full" or (self.report == "none" and trainer.loggers):
            rendered = render_strongest(scores, self.top_k, engine.sample, self.render)
        if self.report != "none":
            write_beside(scores, directory, top_k=self.top_k, rendered=rendered)
        names = [CSV_FILE, *([REPORT_FILE] if self.report != "none" else [])]
        files = [directory / name for name in names]
        report = Report(
            scores,
            step=trainer.global_step,
            top_k=self.top_k,
            rendered=rendered,
            files=[file for file in files if file.is_file()],
        )
        report_all(trainer.loggers, report, run=self._recording, console=self.console)

    def _at(self, trainer: Any) -> str:
        return "last" if trainer.fast_dev_run else self.at

    def _estimated(
        self, engine: InfluenceEngine, trainer: Any, describe: Describe | None
    ) -> InfluenceScores:
        return engine.estimate(
            self.monitor,
            self.estimator,
            layers=self.layers,
            query_dataloader=self.query_dataloader,
            at=self._at(trainer),
            verify=self.verify,
            top_k=self.top_k,
            seed=self.seed,
            describe=describe,
            loss_column=self.loss_column,
        )

    def _save(self, scores: InfluenceScores, directory: Path) -> None:
        try:
            scores.save(directory)
            rank_zero_info(f"Influence scores: {directory / 'scores.csv'}")
        except OSError as error:  # a full disk: the training is done, and the ranking is there
            rank_zero_warn(
                f"The scores could not be saved in {directory}: {error}. They are in the "
                "callback's `scores`: free space and call `scores.save(directory)`, or rank again "
                "with InfluenceEngine."
            )
