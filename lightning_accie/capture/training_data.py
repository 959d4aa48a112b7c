"""What is kept of the training data: the indices of the samples drawn, or the batches themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie.capture.augmentation import find_randomness
from lightning_accie.capture.batches import BatchKeeper, SampleIdOf, forecast
from lightning_accie.capture.indices import IndexRecorder
from lightning_accie.capture.recorder import Claim
from lightning_accie.data import training_loaders
from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.batches import Batches, BatchSource
from lightning_accie.replay.stored import StoredSource
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Piece
from lightning_accie.trajectory.writer import TrajectoryWriter

_MOST_SUMS = 2**20
"""How many samples' checksums are taken at most."""


class DataCapture:
    """Finds out which samples make a batch, and keeps what gives the batch back.

    Args:
        capture: ``"auto"``, ``"indices"`` or ``"batches"``, as given to the callback.
        sample_id: what names a batch's samples, or None to take their indices from the dataloaders.
    """

    def __init__(self, capture: str, sample_id: SampleIdOf | None) -> None:
        self._asked = capture
        self._sample_id = sample_id
        self._indices = IndexRecorder()
        self._keeper: BatchKeeper | None = None
        self._writer: TrajectoryWriter | None = None
        self._reason = ""
        self.kind = "indices"
        """``"indices"`` or ``"batches"``: what is kept of this run."""

    # ------------------------------------------------------------------ which samples

    def attach(self, trainer: Any) -> None:
        """Start to watch the dataloaders, where indices are to come from them.

        Raises:
            UnsupportedError: if batches are to be kept of a run of several processes.
        """
        if trainer.world_size > 1 and (self._asked == "batches" or self._sample_id is not None):
            raise UnsupportedError(
                f"Batches are kept of runs of one process only, and this Trainer runs "
                f"{trainer.world_size}. Train with `devices=1`, or leave `capture=` and "
                "`sample_id=` out: indices are recorded on every process."
            )
        self._keeper = self._writer = None
        self.kind, self._indices.prints_left = "indices", _MOST_SUMS
        if self._sample_id is None:
            self._indices.attach(trainer)

    def on_train_start(self, trainer: Any) -> None:
        """Make sure that the loaders in use are watched."""
        if self._sample_id is None:
            self._indices.on_train_start(trainer)

    def claiming(self, trainer: Any) -> Claim:
        """Give what gives the samples of the batch that was just delivered.

        Returns:
            `IndexRecorder.claim`; where ids come out of the batch, something that knows of none.
        """
        if self._sample_id is not None:
            return lambda: ((), None)
        return partial(self._indices.claim, trainer)

    def stop_summing(self) -> None:
        """Take no more checksums: the first epoch is over."""
        self._indices.prints_left = 0

    def detach(self) -> None:
        """Leave the loaders as they were found."""
        self._indices.detach()

    @property
    def sources(self) -> list[Any]:
        """The training loaders whose indices are known."""
        return self._indices.sources if self._sample_id is None else []

    # ------------------------------------------------------------------ what is kept

    def choose(self, pieces: tuple[Piece, ...], combined: Any, module: Any, trainer: Any) -> None:
        """Choose what to keep, with the first batch at hand.

        Args:
            pieces: the batch's samples.
            combined: the training data, as the Trainer combined it.
            module: the LightningModule.
            trainer: the Trainer.

        Raises:
            UnsupportedError: if indices were asked for and do not give the batches back.
        """
        self._reason, self.kind = "", "batches"
        self._choose(pieces, combined, module, trainer)
        if self.kind == "batches":
            self.stop_summing()  # these files have checksums of their own

    def _choose(self, pieces: tuple[Piece, ...], combined: Any, module: Any, trainer: Any) -> None:
        if self._asked == "batches" or self._sample_id is not None:
            return
        self._reason = find_randomness(pieces, combined, module, trainer)
        if not self._reason:
            self.kind = "indices"
        elif self._asked == "indices" or trainer.world_size > 1:
            several = "" if trainer.world_size == 1 else " (in a run of one process)"
            raise UnsupportedError(
                f"The training data are made at random {self._reason}: the first batch, made twice, "
                "came out different, so its indices do not give it back. Use "
                f'`capture="batches"`{several}, which keeps the batches as they were, or draw the '
                "augmentation once per sample, or move it into `training_step`."
            )

    def keep_in(self, writer: TrajectoryWriter) -> None:
        """Keep batches in a trajectory, where batches are kept.

        Args:
            writer: the trajectory's.
        """
        self._writer = writer
        self._keeper = BatchKeeper(writer, self._sample_id)

    def keep(
        self, batch: Any, pieces: tuple[Piece, ...], trainer: Any
    ) -> tuple[tuple[Piece, ...], int]:
        """Keep a batch.

        Args:
            batch: as ``training_step`` is about to receive it.
            pieces: its samples, where their indices are watched.
            trainer: the Trainer.

        Returns:
            The batch's samples, and its number.

        Raises:
            UnsupportedError: if it cannot be stored, or its samples are not named as they should be.
            TrajectoryError: if it cannot be written, or the budget is used up.
        """
        assert self._keeper is not None
        assert self._writer is not None
        kept = self._keeper.keep(batch, pieces)
        if self._reason and kept[1] == 0:
            words, tight = forecast(trainer, self._writer.batch_bytes, self._writer.batch_room)
            text = (
                "InfluenceCallback keeps the training batches, since they are made at random "
                f"{self._reason}: {words}."
            )
            if tight:
                rank_zero_warn(
                    f"{text} Recording stops where that is used up: raise `disk_budget`."
                )
            else:
                rank_zero_info(text)
        return kept

    def first_source(self, combined: Any, device: torch.device, cache_bytes: int) -> Batches:
        """Give the batches of the first step again.

        Args:
            combined: the training data, as the Trainer combined it.
            device: where to.
            cache_bytes: how many bytes of batches to keep in memory.

        Returns:
            Where they come from: the datasets, or what was just written.

        Raises:
            TrajectoryError: if the disk fails just there.
        """
        if self._writer is None:
            loaders, assemble = training_loaders(combined)
            return BatchSource(loaders, assemble, cache_bytes=cache_bytes)
        self._writer.flush()
        trajectory = Trajectory.open(self._writer.directory)
        return StoredSource(trajectory, device=device, cache_bytes=cache_bytes)
