"""The recording of one `fit`: from the dataloaders' set-up to the closed trajectory."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie.capture import resume
from lightning_accie.capture.batches import SampleIdOf
from lightning_accie.capture.directory import choose
from lightning_accie.capture.generators import kept as kept_generators
from lightning_accie.capture.opening import open_recording
from lightning_accie.capture.recorder import Recorder, describe
from lightning_accie.capture.saved import SavedSteps, check_saver
from lightning_accie.capture.self_check import CACHE, QueryCheck, RoomCheck, check_first_step
from lightning_accie.capture.sink import FirstStepWatch, FurtherRankSink, GuardedSink
from lightning_accie.capture.stretch import Stretch, Window
from lightning_accie.capture.support import check_trainer
from lightning_accie.capture.training_data import DataCapture
from lightning_accie.data import validation_loaders
from lightning_accie.described import Describe
from lightning_accie.errors import InfluenceError, TrajectoryError, UnsupportedError
from lightning_accie.processes import Processes
from lightning_accie.query import QueryFunction, check_query
from lightning_accie.rendered import Render
from lightning_accie.replay.batches import Batches
from lightning_accie.replay.module import SampleLosses, TrainingProgram
from lightning_accie.replay.walker import Snapshot, Visit
from lightning_accie.scores_files import remove_scores
from lightning_accie.trajectory.files import FOLDER
from lightning_accie.trajectory.ranks import merged_step
from lightning_accie.trajectory.records import Piece
from lightning_accie.trajectory.writer import TrajectoryWriter
from lightning_accie.unfinished import remove_unfinished

_EARLY = 2
"""What cannot be replayed is refused in as many steps."""


@dataclass(frozen=True)
class RecordingSettings:
    """What the callback's arguments say of recording; see there.

    Attributes:
        monitor_name: the query's name.
        state_key: tells several callbacks of one Trainer apart.
        analyses: whether the run is ranked when `fit` ends.
        probe: what the estimator computes at a step (`Estimator.probe`).
        check_room: refuses a memory budget that is too small for the analysis.
        live: whether the steps between validations are kept at hand (`Recording.cut`).
    """

    monitor: QueryFunction | str
    monitor_name: str
    state_key: str
    at: str
    analyses: bool
    capture: str
    sample_id: SampleIdOf | None
    probe: Callable[[Visit], None]
    check_room: RoomCheck
    dirpath: Path | None
    overwrite: bool
    disk_budget: int
    sample_losses: SampleLosses | None
    query_dataloader: Any
    describe: Describe | None
    render: Render | None
    full_precision: bool
    live: bool


class Recording:
    """Records one `fit`; made in the callback's ``setup``, and told of every hook.

    Args:
        settings: the callback's.
        trainer: the Trainer that is about to fit.
        module: the LightningModule.

    Attributes:
        directory: where to; None before the first step.
        complete: whether the whole run is on disk.
        combined: the training data, as the Trainer combined them.
        processes: those that train together.

    Raises:
        UnsupportedError: if the Trainer's settings rule a recording out.
    """

    def __init__(self, settings: RecordingSettings, trainer: Any, module: Any) -> None:
        self._settings = settings
        self._trainer = trainer
        self._module = module
        self.directory: Path | None = None
        self.complete = False
        self.combined: Any = None
        self.processes = Processes()
        self._data = DataCapture(settings.capture, settings.sample_id)
        self._owner: object = None
        self._recorder: Recorder | None = None
        self._writer: TrajectoryWriter | None = None
        self._first: FirstStepWatch | None = None
        self._sink: GuardedSink
        self._window: Window | None = None
        self._saved: SavedSteps | None = None
        self._temporary: Path | None = None
        self._resumed_from: resume.Bookmark | None = None
        self._identity = ""
        self._fresh = False
        """Whether the trajectory is this `fit`'s alone, and was begun by it."""
        self._lacking = ""

    # ------------------------------------------------------------------ before the first step

    def attach(self, owner: object) -> None:
        """Watch the dataloaders from the start.

        Args:
            owner: the callback; events count while the Trainer has it.
        """
        check_trainer(self._trainer)
        if self._settings.at == "best":
            check_saver(self._trainer, self._settings.monitor_name)
        self._owner = owner
        self._data.attach(self._trainer)

    def resume_from(self, checkpoint: dict[str, Any]) -> None:
        """Find the bookmark of the run that is resumed, in a checkpoint of Lightning's."""
        states = checkpoint.get("callbacks", {})
        key, monitor = self._settings.state_key, self._settings.monitor_name
        self._resumed_from = resume.find_bookmark(states, key, monitor) or self._resumed_from

    def bookmark(self) -> dict[str, Any]:
        """What a later `fit` needs to go on from here.

        Returns:
            Texts and integers; nothing before the first step.
        """
        if self._recorder is None or not self._identity:
            return self._resumed_from.to_state() if self._resumed_from else {}
        self._settled_steps()
        if self._writer is not None and not self.complete:
            try:
                self._writer.flush()  # the log reaches every checkpoint that names it
            except TrajectoryError as error:
                self._stop(error)
        place = self._identity, str(self.directory and (self.directory / FOLDER).absolute())
        name = self._settings.monitor_name
        return resume.bookmark(place, name, self._recorder, self._lacking).to_state()

    def start(self) -> None:
        """Watch the training steps; called in ``on_train_start``."""
        trainer = self._trainer
        self._data.on_train_start(trainer)
        self.combined = trainer.fit_loop._combined_loader
        self._recorder = Recorder(trainer, self._module, self._data.claiming(trainer), self._owner)
        self._recorder.on_first_call = self._begin
        self._recorder.on_written = self._warn_of_written_weights
        self._recorder.attach()
        self._saved = SavedSteps(
            trainer, self._settings.monitor_name, self._settled_steps, self._update_header
        )

    def _begin(self, pieces: tuple[Piece, ...]) -> None:
        """Open the trajectory with the state as the first ``training_step`` finds it.

        Args:
            pieces: the samples of its batch, where their indices are known.
        """
        trainer, module, recorder, data = self._trainer, self._module, self._recorder, self._data
        assert recorder is not None
        assert self._saved is not None
        self.processes = Processes(trainer.global_rank, trainer.world_size)
        self.processes.on_first(lambda: data.choose(pieces, self.combined, module, trainer))
        header = describe(trainer, module, data.sources, self._settings.monitor_name, data.kind)
        header |= {"id": resume.new_identity(), "resumed": []}
        initial, start = recorder.initial(), trainer.global_step
        late = start > 0 or self._resumed_from is not None
        going_on: resume.Continuation | None = None
        if late:
            going_on = self.processes.on_first(
                lambda: resume.go_on(self._resumed_from, header, initial, trainer.world_size, start)
            )
        after = going_on.after if going_on else None
        if going_on:
            header |= {"resumed": going_on.resumed}
            self._saved.begin(going_on.after.steps, going_on.saved)
            recorder.go_on(going_on.after.steps)
        self.directory = self._choose_directory(begins_late=late and going_on is None)
        self._writer = open_recording(
            self.directory / FOLDER,
            header | self._saved.header(),
            recorder.take(after.steps) if after else initial,
            self.processes,
            disk_budget=self._settings.disk_budget,
            keeps_batches=data.kind == "batches",
            overwrite=self._settings.overwrite,
            after=after,
        )
        if self._settings.overwrite and self.processes.first:
            # The scores of the run that was there are not this one's.
            remove_scores(self.directory)
            remove_unfinished(self.directory)
        self._identity = header["id"]
        self._fresh = after is None
        self._first = FirstStepWatch({**header, "resumed": []}, initial)
        guarded = (self._writer, self._first, self._stop)
        recorder.sink = self._sink = (
            GuardedSink(*guarded)
            if self.processes.first
            else FurtherRankSink(*guarded, recorder.forget_random)
        )
        if self._settings.live:
            recorder.sink = self._window = Window(header, initial, recorder.sink)
        if data.kind == "batches":
            data.keep_in(self._writer)
            recorder.keep = self._keep

    def _choose_directory(self, *, begins_late: bool) -> Path:
        if self._settings.dirpath is None and self._trainer.fast_dev_run:
            temporary = Path(self.processes.on_first(lambda: mkdtemp(prefix="influence-")))
            self._temporary = temporary if self.processes.first else None
            return temporary / "influence"
        # A run that goes on unattended must not fail for what it cannot go on with.
        beside = begins_late and not self._settings.overwrite
        return choose(self._trainer, self._settings.dirpath, self.processes, beside=beside)

    # ------------------------------------------------------------------ steps

    def _keep(self, batch: Any, pieces: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], int] | None:
        """Keep a batch; one that cannot be kept is refused at first, and stops recording later."""
        assert self._recorder is not None
        try:
            return self._data.keep(batch, pieces, self._trainer)
        except (TrajectoryError, UnsupportedError) as error:
            if not self._recorder.steps:
                raise
            self._recorder.settle()
            if self._writer is not None:
                self._stop(error)
            return None

    def _warn_of_written_weights(self) -> None:
        """Nobody knows yet whether they are other weights now: the replay will."""
        assert self._recorder is not None
        watch = self._recorder.weights
        self._update_header({"written": watch.written}, at_once=False)
        rank_zero_warn(
            f"Something besides the optimiser wrote to the weights before step {watch.written}: "
            f"{watch.suspects()}. If it put back what was there, as a swap for validation does, all is "
            "well. If not, the replay of this run will stop there with a ReplayMismatchError."
        )

    def batch_ended(self) -> bool:
        """After the first optimiser step: replay it, and refuse what does not come out the same.

        Returns:
            Whether this is done, so that the ends of later batches do not matter.

        Raises:
            UnsupportedError: if it cannot be replayed.
            QueryError: if the monitor cannot be measured.
            DescribeError: if ``describe`` fails.
            RenderError: if ``render`` fails.
        """
        first = self._first
        if first is None or self._recorder is None:
            return False
        if first.late:
            self._recorder.settle()
        if first.step is None:
            return False
        trainer = self._trainer
        after = self._recorder.take(1, copy=True)
        step = merged_step(self.processes.share(first.step))
        if all(micro.loss is None for micro in step.micro_batches):
            first.wait(after)  # `training_step` returned None
            return False
        device = trainer.strategy.root_device
        try:
            source = self._data.first_source(self.combined, device, CACHE)
        except TrajectoryError as error:  # batches are kept: there is one process
            self._stop(error)
            self._first = None
            return True
        with kept_generators([source, trainer.datamodule]):
            form = self.processes.on_first(
                lambda: check_first_step(
                    Stretch(first.header, [step], first.before, after, "the first step"),
                    self._module,
                    source,
                    live=trainer,
                    datamodule=trainer.datamodule,
                    sample_losses=self._settings.sample_losses,
                    probe=self._settings.probe,
                    check_query=self._query_check(),
                    check_room=self._settings.check_room if self._settings.analyses else None,
                    describe=self._settings.describe if self._settings.analyses else None,
                    render=self._settings.render if self._settings.analyses else None,
                    device=device,
                    full_precision=self._settings.full_precision,
                )
            )
        self._first = None
        self._sink.checked()
        self._update_header({"loss_form": form.to_json()}, at_once=False)
        return True

    def _query_check(self) -> QueryCheck | None:
        """What finds out in the first seconds whether the monitor can be measured at the end."""
        if not self._settings.analyses:
            return None
        data, trainer = self._settings.query_dataloader, self._trainer
        if data is None:
            data = trainer.fit_loop.epoch_loop.val_loop._combined_loader
            if data is None and trainer.enable_validation:  # Lightning makes them when they are due
                return None
        loaders = validation_loaders(data)

        def check(program: TrainingProgram, snapshot: Snapshot) -> None:
            check_query(program, self._module, self._settings.monitor, loaders, snapshot)

        return check

    def interrupted(self) -> None:
        """A validation is about to run."""
        if self._recorder is not None:
            self._recorder.interrupted()

    def _settled_steps(self) -> int:
        """How many steps were taken; the record of the last one is complete then."""
        assert self._recorder is not None
        self._recorder.settle()
        return self._recorder.steps

    def _update_header(self, values: dict[str, Any], *, at_once: bool = True) -> None:
        if self._writer is None or self.complete or not self.processes.first:
            return
        try:
            self._writer.update_header(values, at_once=at_once)
        except TrajectoryError as error:
            self._stop(error)

    # ------------------------------------------------------------------ while the run goes on

    @property
    def running(self) -> bool:
        """Whether steps are being recorded."""
        return self._writer is not None and not self.complete

    def mid_window(self) -> bool:
        """Whether micro-batches have run whose optimiser step has not."""
        if self._recorder is None:
            return False
        self._recorder.settle()
        return self._recorder.mid_window

    def cut(self) -> tuple[Stretch, Batches] | None:
        """Take the steps since the last call out of the run, which goes on.

        To be called between two optimiser steps, with ``live`` among the settings.

        Returns:
            The steps, and where their batches come from; None where there are none.

        Raises:
            TrajectoryError: if batches are kept, and cannot be written to disk.
        """
        if self._recorder is None or self._window is None:
            return None
        steps = self._settled_steps()
        if not self.running or not len(self._window):
            return None
        device = self._trainer.strategy.root_device
        source = self._data.first_source(self.combined, device, CACHE)
        return self._window.cut(self._recorder.take(steps, copy=True)), source

    def cut_no_more(self) -> None:
        """Keep no steps at hand from here on."""
        if self._window is not None:
            self._window.stop()

    def epoch_ended(self) -> None:
        """Every sample of an epoch was summed up once."""
        self._data.stop_summing()

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Keep the final state and close the trajectory."""
        if self._recorder is None or self._writer is None:
            return
        self._recorder.settle()
        if self._writer is None:  # the disk failed just there
            return
        try:
            if self.processes.first:
                self._writer.checkpoint(self._recorder.take(self._recorder.steps))
            self._writer.close("finished")
            self.complete = True
        except TrajectoryError as error:
            self._stop(error)
        self._recorder.detach()

    def abort(self, exception: BaseException) -> None:
        """Close the trajectory with what ran."""
        self.detach()
        if self._recorder is not None:
            self._recorder.settle()
            steps = self._recorder.steps
            refused = isinstance(exception, InfluenceError) and not self.complete
            self._close(exception, steps, refused=refused)
            if refused and (self._first is not None or steps <= _EARLY):
                self._discard()
        self.clean_up()

    def _discard(self) -> None:
        """Leave nothing of a run that was refused as it began: the next `fit` may go there."""
        if self.directory is None or not self._fresh or self.processes.count > 1:
            return  # other processes may still be writing theirs
        shutil.rmtree(self.directory / FOLDER, ignore_errors=True)
        with suppress(OSError):  # it is the user's, and holds something else
            self.directory.rmdir()
        self.directory = None

    def _close(self, exception: BaseException, steps: int, *, refused: bool) -> None:
        if self._writer is None:
            return
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        try:
            self._writer.close(status, f"{type(exception).__name__}: {exception}".strip(": "))
        except TrajectoryError as error:  # must not hide the exception that ended the run
            self._stop(error)
        if self._writer is not None and steps and not refused:
            rank_zero_info(
                f"InfluenceCallback kept the {steps} steps that ran in "
                f"{self._writer.directory}; analyse them with InfluenceEngine."
            )
        self._writer = None

    def _stop(self, error: InfluenceError) -> None:
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
        if self.processes.first:
            rank_zero_warn(message)
        else:
            warnings.warn(f"Rank {self.processes.rank}: {message}", stacklevel=2)

    def detach(self) -> None:
        """Leave strategy, loaders and optimiser as they were found; may be called twice."""
        if self._recorder is not None:
            self._recorder.detach()
        if self._saved is not None:
            self._saved.detach()
        self.detach_data()

    def detach_data(self) -> None:
        """Leave the loaders alone as they were found: an analysis reads them."""
        self._data.detach()

    def clean_up(self) -> None:
        """Delete what `fast_dev_run` left."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
            rank_zero_info(
                "`fast_dev_run` leaves nothing behind: what InfluenceCallback wrote is deleted again. "
                "Name a `dirpath=` to keep it."
            )
