"""`InfluenceCallback`: Lightning's hooks, each a line or two into the rooms behind."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie._compat import CallbackBase
from lightning_accie.arguments import check_arguments
from lightning_accie.capture import resume
from lightning_accie.capture.batches import SampleIdOf
from lightning_accie.capture.directory import choose
from lightning_accie.capture.generators import kept as kept_generators
from lightning_accie.capture.opening import open_recording
from lightning_accie.capture.processes import Processes
from lightning_accie.capture.recorder import Recorder, describe
from lightning_accie.capture.saved import SavedSteps, check_saver
from lightning_accie.capture.self_check import CACHE, FirstStep, QueryCheck, check_first_step
from lightning_accie.capture.sink import FirstStepWatch, FurtherRankSink, GuardedSink
from lightning_accie.capture.support import check_module, check_trainer
from lightning_accie.capture.training_data import DataCapture
from lightning_accie.data import fitted_validation, validation_loaders
from lightning_accie.engine import Describe, InfluenceEngine
from lightning_accie.errors import InfluenceError, TrajectoryError, UnsupportedError
from lightning_accie.estimators import Estimator, SgdIE, resolve_estimator
from lightning_accie.progress import progress_like
from lightning_accie.query import QueryFunction, check_query
from lightning_accie.replay.module import SampleLosses, TrainingProgram
from lightning_accie.replay.walker import Snapshot
from lightning_accie.reports import report_all
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import remove_scores
from lightning_accie.trajectory.ranks import merged_step
from lightning_accie.trajectory.records import Piece
from lightning_accie.trajectory.sizes import parse_bytes
from lightning_accie.trajectory.writer import TrajectoryWriter


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
            estimator's name (``"sgd-ie"``, ``"acc-sgd-ie"``, ``"leave-one-out"``, ``"tracin"``), or
            an instance such as ``AccSgdIE(candidates=500)``.
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
        memory_budget: bytes that the analysis may take beyond the module and its data.
        sample_losses: ``callable(module, batch) -> [B] tensor``, for a ``training_step`` whose
            per-sample losses cannot be found by themselves.
        query_dataloader: batches for the query; default the Trainer's validation data.
        describe: ``callable(sample) -> dict``, given ``dataset[i]`` (where batches are kept: the
            sample's part of one): columns of your own in every table (label, path, …).
        loss_column: whether to add each sample's training loss as the column ``loss``, which finds
            flipped labels better than any influence.
        console: whether to print the ranking when `fit` ends.
        full_precision: after mixed precision, whether the analysis runs without autocast; see
            `InfluenceEngine`.
        seed: of the random choice of samples to verify.

    Attributes:
        scores: the `InfluenceScores`, once `fit` has ended; None before, and with ``run="manual"``.
        directory: where the last `fit` was recorded.

    Raises:
        MisconfigurationException: if an argument has a wrong type or value.

    Example:
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
        at: str = "last",
        top_k: int = 25,
        verify: int = 20,
        run: str = "fit_end",
        capture: str = "auto",
        sample_id: SampleIdOf | None = None,
        dirpath: str | Path | None = None,
        overwrite: bool = False,
        disk_budget: int | str = "2GB",
        memory_budget: int | str = "1GB",
        sample_losses: SampleLosses | None = None,
        query_dataloader: Any = None,
        describe: Describe | None = None,
        loss_column: bool = False,
        console: bool = True,
        full_precision: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(
            monitor=monitor,
            estimator=estimator,
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
            loss_column=loss_column,
            console=console,
            full_precision=full_precision,
            seed=seed,
        )
        self._disk_budget = parse_bytes(disk_budget)
        self._memory_budget = parse_bytes(memory_budget)
        self.monitor = monitor
        self.estimator = estimator
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
        self.loss_column = loss_column
        self.console = console
        self.full_precision = full_precision
        self.seed = seed
        self.scores: InfluenceScores | None = None
        self.directory: Path | None = None
        # Lightning asks for the key at every hook of every batch.
        self._state_key = self._generate_state_key(
            monitor=self._monitor_name, dirpath=str(self.dirpath)
        )
        self._data = DataCapture(capture, sample_id)
        self._recorder: Recorder | None = None
        self._writer: TrajectoryWriter | None = None
        self._first: FirstStepWatch | None = None
        self._saved: SavedSteps | None = None
        self._combined: Any = None
        self._temporary: Path | None = None
        self._complete = False
        self._resumed_from: resume.Bookmark | None = None
        self._identity = ""
        self._lacking = ""
        self._processes = Processes()

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one Trainer apart."""
        return self._state_key

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
        self.scores, self.directory, self._complete = None, None, False
        self._recorder, self._writer, self._first = None, None, None
        self._resumed_from, self._identity, self._lacking = None, "", ""
        check_trainer(trainer, self)
        if self.at == "best":
            check_saver(trainer, self._monitor_name)
        self._data.attach(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the bookmark of the run that is resumed; this comes after ``setup``."""
        states = checkpoint.get("callbacks", {})
        found = resume.find_bookmark(states, self.state_key, self._monitor_name)
        self._resumed_from = found or self._resumed_from

    def state_dict(self) -> dict[str, Any]:
        """A bookmark, for a `fit` that is resumed from the checkpoint about to be saved.

        Returns:
            Texts and integers; nothing before the first step.
        """
        if self._recorder is None or not self._identity:
            return self._resumed_from.to_state() if self._resumed_from else {}
        self._settled_steps()
        if self._writer is not None and not self._complete:
            try:
                self._writer.flush()  # the log reaches every checkpoint that names it
            except TrajectoryError as error:
                self._stop_recording(error)
        place = self._identity, str(self.directory and (self.directory / "trajectory").absolute())
        return resume.bookmark(place, self._monitor_name, self._recorder, self._lacking).to_state()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse modules and optimisers that cannot be replayed."""
        check_module(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start recording."""
        self._data.on_train_start(trainer)
        self._combined = trainer.fit_loop._combined_loader
        self._recorder = Recorder(
            trainer,
            pl_module,
            claim=lambda: self._data.claim(trainer),
            enabled=lambda: self in trainer.callbacks,
        )
        self._recorder.on_first_call = lambda: self._begin(trainer, pl_module)
        self._recorder.attach()
        self._saved = SavedSteps(
            trainer, self._monitor_name, self._settled_steps, self._update_header
        )

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """Open the trajectory with the state as the first ``training_step`` finds it."""
        recorder = self._recorder
        assert recorder is not None
        assert self._saved is not None
        self._processes = Processes(trainer.global_rank, trainer.world_size)
        data = self._data
        self._processes.on_first(
            lambda: data.choose(recorder.pieces, self._combined, pl_module, trainer)
        )
        header = describe(trainer, pl_module, data.sources, self._monitor_name, data.kind)
        header |= {"id": resume.new_identity(), "resumed": []}
        initial, start = recorder.initial(), trainer.global_step
        late = start > 0 or self._resumed_from is not None
        going_on: resume.Continuation | None = None
        if late:
            going_on = self._processes.on_first(
                lambda: resume.go_on(self._resumed_from, header, initial, trainer.world_size, start)
            )
        after = going_on.after if going_on else None
        if going_on:
            header |= {"resumed": going_on.resumed}
            self._saved.begin(going_on.after.steps, going_on.saved)
            recorder.steps = going_on.after.steps
        self.directory = self._choose_directory(trainer, begins_late=late and going_on is None)
        self._writer = open_recording(
            self.directory / "trajectory",
            header | self._saved.header(),
            recorder.take(after.steps) if after else initial,
            self._processes,
            disk_budget=self._disk_budget,
            keeps_batches=self._data.kind == "batches",
            overwrite=self.overwrite,
            after=after,
        )
        if self.overwrite and self._processes.first:
            # The scores of the run that was there are not this one's.
            remove_scores(self.directory)
        self._identity = header["id"]
        self._first = FirstStepWatch({**header, "resumed": []}, initial)
        guarded = (self._writer, self._first, self._stop_recording)
        recorder.sink = (
            GuardedSink(*guarded)
            if self._processes.first
            else FurtherRankSink(*guarded, recorder.forget_random)
        )
        if data.kind == "batches":
            data.keep_in(self._writer)
            recorder.keep = lambda *args: self._keep(trainer, *args)

    def _keep(
        self, trainer: Any, batch: Any, pieces: tuple[Piece, ...]
    ) -> tuple[tuple[Piece, ...], int] | None:
        """Keep a batch; one that cannot be kept is refused at first, and stops recording later."""
        assert self._recorder is not None
        try:
            return self._data.keep(batch, pieces, trainer)
        except (TrajectoryError, UnsupportedError) as error:
            if not self._recorder.steps:
                raise
            self._stop_recording(error)
            return None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """From here until it has stepped, the weights may be those of no step."""
        if self._recorder is not None:
            self._recorder.stepping = True

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which samples the batch holds."""
        if self._recorder is not None:
            self._recorder.batch_started(batch_idx)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first optimiser step: replay it, and refuse what does not come out the same."""
        if self._recorder is not None:
            self._recorder.stepping = False  # also where a scaler skipped the step
        first = self._first
        if first is None or first.step is None or self._recorder is None:
            return
        self._first = None
        after = self._recorder.take(1, copy=True)
        device = trainer.strategy.root_device
        try:
            source = self._data.first_source(self._combined, device, CACHE)
        except TrajectoryError as error:  # batches are kept: there is one process
            self._stop_recording(error)
            return
        steps = self._processes.share(first.step)
        with kept_generators([source, trainer.datamodule]):
            form = self._processes.on_first(
                lambda: check_first_step(
                    FirstStep(first.header, merged_step(steps), first.before, after),
                    pl_module,
                    source,
                    live=trainer,
                    datamodule=trainer.datamodule,
                    sample_losses=self.sample_losses,
                    probe=(resolve_estimator(self.estimator) or SgdIE()).probe,
                    check_query=self._query_check(trainer, pl_module),
                    device=device,
                    full_precision=self.full_precision,
                )
            )
        self._update_header({"loss_form": form.to_json()}, at_once=False)

    def _settled_steps(self) -> int:
        """How many steps were taken; the record of the last one is complete then."""
        assert self._recorder is not None
        self._recorder.settle()
        return self._recorder.steps

    def _update_header(self, values: dict[str, Any], *, at_once: bool = True) -> None:
        if self._writer is None or self._complete or not self._processes.first:
            return
        try:
            self._writer.update_header(values, at_once=at_once)
        except TrajectoryError as error:
            self._stop_recording(error)

    def _query_check(self, trainer: Any, pl_module: Any) -> QueryCheck | None:
        """What finds out in the first seconds whether the monitor can be measured at the end."""
        if self.run != "fit_end":
            return None
        data = self.query_dataloader
        if data is None:
            data = trainer.fit_loop.epoch_loop.val_loop._combined_loader
            if data is None and trainer.enable_validation:  # Lightning makes them when they are due
                return None
        loaders = validation_loaders(data)

        def check(program: TrainingProgram, snapshot: Snapshot) -> None:
            check_query(program, pl_module, self.monitor, loaders, snapshot)

        return check

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Every sample of an epoch was summed up once."""
        self._data.stop_summing()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the final state and close the trajectory."""
        if self._recorder is None or self._writer is None:
            return
        self._recorder.settle()
        if self._writer is None:  # the disk failed just there
            return
        try:
            if self._processes.first:
                self._writer.checkpoint(self._recorder.take(self._recorder.steps))
            self._writer.close("finished")
            self._complete = True
        except TrajectoryError as error:
            self._stop_recording(error)
        self._recorder.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the trajectory with what ran; it can be analysed with `InfluenceEngine`."""
        self._detach()
        if self._recorder is not None:
            self._recorder.settle()
            self._close(exception, self._recorder.steps)
        self._clean_up()

    def _close(self, exception: BaseException, steps: int) -> None:
        if self._writer is None:
            return
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        try:
            self._writer.close(status, f"{type(exception).__name__}: {exception}".strip(": "))
        except TrajectoryError as error:  # must not hide the exception that ended the run
            self._stop_recording(error)
        refused = isinstance(exception, InfluenceError) and not self._complete
        if self._writer is not None and steps and not refused:
            rank_zero_info(
                f"InfluenceCallback kept the {steps} steps that ran in "
                f"{self.directory}; analyse them with InfluenceEngine."
            )
        self._writer = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave strategy, loaders and optimiser as they were found."""
        self._detach()
        self._clean_up()
        if stage == "fit":
            self._processes.close()

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.detach()
        if self._saved is not None:
            self._saved.detach()
        self._data.detach()

    def _clean_up(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _stop_recording(self, error: InfluenceError) -> None:
        """The disk failed: let training go on without the callback."""
        if self._recorder is not None:
            self._recorder.detach()
        if self._writer is not None:
            self._writer.close("stopped", str(error))
            self._writer = None
        self._lacking = "The recording had stopped before the checkpoint was saved."
        message = (
            f"InfluenceCallback stopped recording, training goes on: {error} The steps recorded "
            f"until here stay in {self.directory}; no ranking will be made at the end of `fit`."
        )
        if self._processes.first:
            rank_zero_warn(message)
        else:
            warnings.warn(f"Rank {self._processes.rank}: {message}", stacklevel=2)

    def _choose_directory(self, trainer: Any, *, begins_late: bool) -> Path:
        if self.dirpath is None and trainer.fast_dev_run:
            temporary = Path(self._processes.on_first(lambda: mkdtemp(prefix="influence-")))
            self._temporary = temporary if self._processes.first else None
            return temporary / "influence"
        # A run that goes on unattended must not fail for what it cannot go on with.
        beside = begins_late and not self.overwrite
        return choose(trainer, self.dirpath, self._processes, beside=beside)

    # ------------------------------------------------------------------ analysis

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Rank the samples, and report where the Trainer's loggers look."""
        if self.run != "fit_end" or self.directory is None:
            return
        complete = self._processes.share(self._complete)
        if not all(complete):
            if self._complete and self._processes.first:
                rank_zero_warn(
                    f"No ranking is made: rank {complete.index(False)} stopped recording. "
                    f"The steps until there are in {self.directory / 'trajectory'}; rank by them "
                    "with `InfluenceEngine(trajectory, module, data).estimate()`."
                )
            return
        self._data.detach()
        try:
            self.scores = self._analysed(trainer, pl_module, self.directory)
        except KeyboardInterrupt:  # the training is done: a Ctrl-C here must not undo it
            why = "the analysis was interrupted."
        except InfluenceError as error:  # nor must an analysis that cannot be done
            why = str(error)
        else:
            return
        rank_zero_warn(
            f"InfluenceCallback made no ranking: {why} Training is complete, and its record is in "
            f"{self.directory / 'trajectory'}: analyse it with "
            "`InfluenceEngine(trajectory, module, data).estimate()`."
        )

    def _analysed(self, trainer: Any, pl_module: Any, directory: Path) -> InfluenceScores:
        """Let rank 0 analyse the run."""
        loaders, limits = None, None
        if self.query_dataloader is None:  # on every rank: it may be a collective call
            loaders, limits = fitted_validation(trainer)
        return self._processes.on_first(
            lambda: self._analyse(trainer, pl_module, directory, loaders, limits)
        )

    def _analyse(
        self, trainer: Any, pl_module: Any, directory: Path, loaders: Any, limits: Any
    ) -> InfluenceScores:
        engine = InfluenceEngine(
            directory / "trajectory",
            pl_module,
            self._combined,
            val_dataloaders=loaders,
            sample_losses=self.sample_losses,
            memory_budget=self._memory_budget,
            progress=progress_like(trainer),
            full_precision=self.full_precision,
            device=trainer.strategy.root_device,
            live=trainer,
            datamodule=trainer.datamodule,
            val_limits=limits,
        )
        scores = engine.estimate(
            self.monitor,
            self.estimator,
            query_dataloader=self.query_dataloader,
            at="last" if trainer.fast_dev_run else self.at,
            verify=self.verify,
            top_k=self.top_k,
            seed=self.seed,
            describe=self.describe,
            loss_column=self.loss_column,
        )
        if scores.info["interrupted"]:
            rank_zero_warn(
                "The influence analysis was interrupted: the ranking stands as far as it had come, "
                "with fewer samples replayed exactly."
            )
        self.scores = scores  # before what may yet fail
        self._save(scores, directory)
        report_all(
            trainer.loggers,
            scores,
            step=trainer.global_step,
            top_k=self.top_k,
            sample=engine.sample,
            console=self.console,
        )
        return scores

    def _save(self, scores: InfluenceScores, directory: Path) -> None:
        try:
            scores.save(directory)
        except OSError as error:  # a full disk: the training is done, and the ranking is there
            rank_zero_warn(
                f"The scores could not be saved in {directory}: {error}. They are in the "
                "callback's `scores`: free space and call `scores.save(directory)`, or rank again "
                "with InfluenceEngine."
            )
