"""Writing a trajectory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.batch_forms import Parts
from lightning_accie.trajectory.batches import Batches, BatchLog, SampleId, StoredBatches, keys_of
from lightning_accie.trajectory.checkpoints import is_candidate, is_kept, kept
from lightning_accie.trajectory.chunks import encode_chunk
from lightning_accie.trajectory.files import (
    MANIFEST,
    batches_name,
    checkpoint_name,
    chunk_name,
    prepare,
    rank_name,
    remove,
    tidy,
    write,
)
from lightning_accie.trajectory.manifest import (
    STATUSES,
    Manifest,
    Rank,
    StoredCheckpoint,
    StoredChunk,
    package_version,
)
from lightning_accie.trajectory.records import Checkpoint, Step
from lightning_accie.trajectory.sizes import format_bytes
from lightning_accie.trajectory.splice import After, next_batches, splice
from lightning_accie.trajectory.tensors import dump

_LONGEST_INTERVAL = 60.0
"""Seconds; the most that a killed process may lose."""

_LONGEST_CHUNK = 4096
"""Steps; bounds what waits in memory."""

_LARGEST_FILE = 2**25
"""Bytes of batches that may wait in memory."""

_SLOTS = 2
"""Copies of the parameters that an optimiser may yet add to the state; room is left for them."""


class TrajectoryWriter:
    """Writes a training run to disk while it runs.

    Steps are gathered in memory and flushed as chunks. The stretch between two flushes grows with
    the run, so that the manifest, written anew each time, stays short: a flush comes after
    ``flush_seconds`` or 2 % of the time since the start (at most 60 s), or after ``flush_steps`` or
    1/64 of the steps so far (at most 4096), whichever is first. Whenever the process ends, and
    however, what was flushed can be opened.

    Args:
        directory: where to; made if it is not there.
        header: JSON values to keep along. Tuples become lists and keys texts, as JSON has it.
        disk_budget: bytes that checkpoints and batches may take; the step log comes besides.
        keeps_batches: whether the run's batches are kept too (`keep_batch`).
        flush_steps: see above.
        flush_seconds: see above.
        overwrite: whether to delete a trajectory that is there.
        after: go on with an earlier trajectory, which may be in the same directory: its first steps
            and their checkpoints become this one's; in another directory it stays as it is.
        rank: which of several processes writes this log, or None where there is one alone. Rank 0
            writes the trajectory; the others write their steps, and no checkpoints, to
            ``directory / rank_name(number)`` once rank 0 has made ``directory``.

    Raises:
        TrajectoryError: where the directory holds something already, or cannot be written.
        TypeError: where ``header`` is not made of JSON values.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from lightning_accie.trajectory.reader import Trajectory
        >>> with TemporaryDirectory() as directory:
        ...     writer = TrajectoryWriter(Path(directory), {"seed": 7}, disk_budget=10**9)
        ...     writer.checkpoint(Checkpoint(0, {"param/weight": torch.zeros(3)}))
        ...     writer.append(Step(0, micro_batches=(), settings=({"lr": 0.1},)))
        ...     writer.close()
        ...     trajectory = Trajectory.open(directory)
        ...     trajectory.step(0).settings, trajectory.checkpoint_steps, trajectory.header
        (({'lr': 0.1},), (0,), {'seed': 7})
    """

    def __init__(
        self,
        directory: Path,
        header: Mapping[str, Any],
        *,
        disk_budget: int,
        keeps_batches: bool = False,
        flush_steps: int = 2048,
        flush_seconds: float = 5.0,
        overwrite: bool = False,
        after: After | None = None,
        rank: Rank | None = None,
    ) -> None:
        number = 0 if rank is None else rank.number
        directory = Path(directory).absolute()
        self.directory = directory / rank_name(number) if number else directory
        self._disk_budget = disk_budget
        self._flush_steps = flush_steps
        self._flush_seconds = flush_seconds
        self._manifest = Manifest(
            json.loads(json.dumps(dict(header))),
            writer=package_version(),
            rank=rank,
            batches=() if keeps_batches else None,
        )
        self._batches = BatchLog() if keeps_batches else None
        self._waiting_bytes = 0
        self._buffer: list[Step] = []
        self._appended = 0
        self._chunks_begun = 0
        self._files_begun = 0
        self._largest_checkpoint = 0
        self._pinned: frozenset[int] = frozenset()
        self._failure = ""
        self._closed = False
        self._started = time.monotonic()
        with self._writing():
            if after is None:
                prepare(self.directory, overwrite=overwrite)
                self._commit(self._manifest)
            else:
                self._take_up(after, overwrite=overwrite)

    def _take_up(self, after: After, *, overwrite: bool) -> None:
        kept, self._chunks_begun = splice(after, self.directory, overwrite=overwrite)
        self._appended = after.steps
        self._pinned = after.pinned
        self._largest_checkpoint = max((stored.bytes for stored in kept.checkpoints), default=0)
        own = self._manifest
        self._commit(replace(kept, header=own.header, rank=own.rank))
        files = (*kept.chunks, *kept.checkpoints, *(kept.batches or ()))
        tidy(self.directory, [stored.file for stored in files])
        if self._batches is not None:
            stored = kept.batches or ()
            batches = stored[-1].first + stored[-1].count if stored else 0
            self._batches = BatchLog(batches, sum(entry.records for entry in stored))
            self._files_begun = next_batches(self.directory, kept)

    def update_header(self, values: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Add to the header what was found out since.

        Args:
            values: JSON values by key; they replace those that are there.
            at_once: whether to write it now, and not only with the next flush.

        Raises:
            TrajectoryError: where it cannot be written.
        """
        merged = {**self._manifest.header, **json.loads(json.dumps(dict(values)))}
        self._manifest = replace(self._manifest, header=merged)
        if at_once:
            self._check_open()
            with self._writing():
                self._commit(self._with_buffered_steps())

    def append(self, step: Step) -> None:
        """Add a step to the log. It may wait in memory until the next flush: do not change it.

        Args:
            step: the step whose number is that of the last one plus one, from 0.

        Raises:
            ValueError: where the step is not the next one.
            TrajectoryError: where the log cannot be written.
        """
        self.extend([step])

    def extend(self, steps: Sequence[Step]) -> None:
        """Add steps to the log, as `append` does one by one.

        Args:
            steps: the next ones.

        Raises:
            ValueError: where they are not the next ones.
            TrajectoryError: where the log cannot be written.
        """
        self._check_open()
        for number, step in enumerate(steps, self._appended):
            if step.number != number:
                raise ValueError(f"step {step.number} cannot follow {number} steps")
        self._buffer += steps
        self._appended += len(steps)
        if len(self._buffer) >= self._flush_at_steps or time.monotonic() >= self._flush_at_time:
            self.flush()

    def known_ids(self) -> tuple[list[SampleId], bool]:
        """Tell how samples are named in the part of the run that is taken up.

        Returns:
            Their names by their numbers, and whether there are batches at all.
        """
        stored = self._manifest.batches or ()
        return Batches(self.directory, stored).ids(), bool(stored)

    def keep_batch(self, parts: Parts, ids: Sequence[SampleId] = ()) -> int:
        """Keep a batch that a step to come will refer to.

        Args:
            parts: the batch, taken apart.
            ids: names of samples that appear in it for the first time, in the order of their numbers.

        Returns:
            The batch's number, for `MicroBatch.batch`.

        Raises:
            TrajectoryError: where it cannot be written, or exceeds the disk budget; the batch is not
                kept then.
        """
        self._check_open()
        log = self._batches
        assert log is not None
        keys = keys_of(parts)
        more = log.new_bytes(parts, keys) + sum(len(str(name)) + 4 for name in ids)
        self._check_budget(more)
        number = log.add(parts, keys)
        log.name(ids)
        self._waiting_bytes += more
        if log.waiting >= _LARGEST_FILE:
            with self._writing():
                self._commit(self._with_batches(self._manifest), keep_buffer=True)
        return number

    @property
    def batch_bytes(self) -> int:
        """What the batches kept so far take on disk, or will."""
        written = sum(stored.bytes for stored in self._manifest.batches or ())
        return written + self._waiting_bytes

    @property
    def batch_room(self) -> int:
        """What batches may take on disk: the budget without the first and the last state."""
        stored = self._manifest.checkpoints
        first = stored[0].bytes if stored else 0
        return self._disk_budget - first - max(self._largest_checkpoint, (1 + _SLOTS) * first)

    def _check_budget(self, more: int) -> None:
        if self.batch_bytes + more > self.batch_room:
            raise TrajectoryError(
                f"The run's batches take more than {format_bytes(self.batch_bytes)}, which with the "
                f"first and the last state is all that disk_budget allows "
                f"({format_bytes(self._disk_budget)}). Raise disk_budget."
            )

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the state before ``step`` is to be kept: the schedule of `checkpoints`.

        Args:
            step: t, the step about to be taken.

        Returns:
            Whether `checkpoint` should be called. The final state is kept besides.
        """
        if not self._manifest.checkpoints:
            return is_candidate(step)
        return is_kept(step, max(1, self._room(self._largest_checkpoint) - 1))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep a full state, and delete those that the schedule no longer keeps.

        The initial state comes first. The last state is kept even where the schedule has no place
        for it, until the next one comes. A state of the same step as the last one is the same
        state, and is not written again.

        Args:
            checkpoint: the state before a step up to the next one to be appended.

        Raises:
            ValueError: where it is out of order.
            TrajectoryError: where it cannot be written, or two of them exceed the disk budget.
        """
        self._check_open()
        steps = [stored.step for stored in self._manifest.checkpoints]
        if checkpoint.step in steps[-1:]:
            return
        first, last = (steps[-1] + 1, self._appended) if steps else (0, 0)
        if not first <= checkpoint.step <= last:
            raise ValueError(
                f"a checkpoint of step {checkpoint.step} cannot come here: {self._appended} steps "
                f"were appended, and there are checkpoints of {steps}"
            )
        self.flush()  # the log reaches every checkpoint that the manifest names
        with self._writing():
            content = dump(checkpoint.tensors, dict(checkpoint.meta))
            keep = self._kept_besides(checkpoint.step, len(content))
            stored = write(self.directory, checkpoint_name(checkpoint.step), content)
            new = StoredCheckpoint(**asdict(stored), step=checkpoint.step)
            self._replace_checkpoints(keep, new)

    def flush(self) -> None:
        """Write the steps that wait in memory.

        Raises:
            TrajectoryError: where they cannot be written.
        """
        self._check_open()
        if self._buffer:
            with self._writing():
                self._commit(self._with_buffered_steps())

    def close(self, status: str = "finished", reason: str = "") -> None:
        """Flush, and record how the run ended. Closing twice does nothing.

        After a failed write nothing more is tried but to record the status ``"stopped"``.

        Args:
            status: ``"finished"``, ``"interrupted"``, ``"failed"`` or ``"stopped"``.
            reason: why, in words.

        Raises:
            ValueError: for another status.
            TrajectoryError: where this very flush fails.
        """
        if status not in STATUSES or status == "running":
            raise ValueError(f"status must be one of {STATUSES[1:]}, not {status!r}")
        if self._closed:
            return
        try:
            if not self._failure:
                with self._writing():
                    manifest = self._with_buffered_steps()
                    self._commit(replace(manifest, status=status, reason=reason))
        finally:
            if self._failure:
                self._record_failure()
        self._closed = True

    def _check_open(self) -> None:
        if self._failure or self._closed:
            raise TrajectoryError(self._failure or f"the trajectory in {self.directory} is closed.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = (
                f"The trajectory in {self.directory} cannot be written: {error}. Free space there, "
                f"or choose another directory. Its first {self._manifest.steps} steps are kept."
            )
            raise TrajectoryError(self._failure) from error
        except (TypeError, ValueError, OverflowError) as error:
            self._failure = f"The run cannot be recorded in {self.directory}: {error}."
            raise TrajectoryError(self._failure) from error

    def _commit(self, manifest: Manifest, *, keep_buffer: bool = False) -> None:
        # All that the manifest names is on disk by now.
        write(self.directory, MANIFEST, manifest.encode())
        self._manifest = manifest
        if keep_buffer:
            return
        self._buffer = []
        now = time.monotonic()
        grown = min(0.02 * (now - self._started), _LONGEST_INTERVAL)
        self._flush_at_time = now + max(self._flush_seconds, grown)
        self._flush_at_steps = max(self._flush_steps, min(self._appended // 64, _LONGEST_CHUNK))

    def _with_buffered_steps(self) -> Manifest:
        # Batches first: the log refers to no batch that is not there.
        manifest = self._with_batches(self._manifest)
        if not self._buffer:
            return manifest
        # A name is used once: a flush that was broken off leaves no other content under it.
        name = chunk_name(self._chunks_begun)
        self._chunks_begun += 1
        stored = write(self.directory, name, encode_chunk(self._buffer))
        chunk = StoredChunk(**asdict(stored), first=manifest.steps, count=len(self._buffer))
        return replace(manifest, chunks=(*manifest.chunks, chunk))

    def _with_batches(self, manifest: Manifest) -> Manifest:
        log = self._batches
        if log is None or not log.pending:
            return manifest
        name = batches_name(self._files_begun)
        self._files_begun += 1
        content, entries = log.take()
        stored = StoredBatches(**asdict(write(self.directory, name, content)), **entries)
        self._waiting_bytes = 0
        return replace(manifest, batches=(*(manifest.batches or ()), stored))

    def _room(self, size: int) -> int:
        # How many checkpoints of this size fit. The first counts with its own: an optimiser may
        # have no slots yet then, and all later states are larger.
        stored = self._manifest.checkpoints
        first = stored[0].bytes if stored else size
        room = self._disk_budget - self.batch_bytes - first
        return 1 + room // size - len(self._pinned)

    def _kept_besides(self, step: int, size: int) -> frozenset[int]:
        largest = max(self._largest_checkpoint, size)
        room = self._room(largest)
        if room < 2:
            stored = self._manifest.checkpoints
            needed = largest + (stored[0].bytes if stored else largest)
            needed += largest * len(self._pinned)
            resumed = f", and those of {len(self._pinned)} resumptions," if self._pinned else ""
            raise TrajectoryError(
                f"The initial and the last state of the run{resumed} take {needed} bytes "
                f"({format_bytes(needed)}), but disk_budget is {self._disk_budget} bytes "
                f"({format_bytes(self._disk_budget)}). Raise disk_budget."
            )
        self._largest_checkpoint = largest
        return self._pinned | kept(step, room - 1)  # one place is for the last state

    def _replace_checkpoints(self, keep: frozenset[int], new: StoredCheckpoint) -> None:
        old = self._manifest.checkpoints
        listed = (*[stored for stored in old if stored.step in keep], new)
        self._commit(replace(self._manifest, checkpoints=listed))
        for stored in old:
            if stored.step not in keep:
                remove(self.directory, stored.file)

    def _record_failure(self) -> None:
        manifest = replace(self._manifest, status="stopped", reason=self._failure)
        with suppress(OSError):  # the best that can be done; "running" is what stands there else
            write(self.directory, MANIFEST, manifest.encode())
