"""The manifest: what a trajectory consists of.

A trajectory is a directory:

    manifest.json                           what is here, with the checksum of every file
    steps-000000.safetensors, …             the step log, in chunks
    checkpoints/step-000000000.safetensors, …   full states
    rank-001/manifest.json, …               where several processes trained: the step log of each
                                            further one, a manifest and chunks of its own
    batches-000000.safetensors, …           the training batches, in a run that keeps them

Every file is written under a temporary name, synced and renamed, and the manifest is written after
the files that it names. So at any moment the manifest on disk names complete files only; whatever
it does not name is left over from a writer that was stopped, and counts for nothing.

The manifest is JSON: ``format``, ``version`` (of the format), ``writer`` (the package's version),
``status`` and ``reason``, the caller's ``header``, the lists ``chunks`` and ``checkpoints``, and
``checksum``, the SHA-256 of the same text without it. Where several processes trained there is
``rank`` too, and the version is 2: a reader that knows 1 alone would take rank 0's log for the whole.
Where a run keeps its batches there is a list ``batches``, and the version is 3.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.batches import StoredBatches
from lightning_accie.trajectory.files import (
    BATCHES_NAME,
    CHUNK_NAME,
    DAMAGED,
    MANIFEST,
    StoredFile,
    checkpoint_name,
    read_regular,
)

FORMAT = "lightning_accie trajectory"
VERSION = 3
"""The latest; a trajectory of a single process has 1, or 3 where it keeps its batches."""
STATUSES = ("running", "finished", "interrupted", "failed", "stopped")

_TYPES = {
    "format": str,
    "writer": str,
    "status": str,
    "reason": str,
    "header": dict,
    "chunks": list,
    "checkpoints": list,
    "checksum": str,
}
_EntryT = TypeVar("_EntryT")


@dataclass(frozen=True)
class StoredChunk(StoredFile):
    """A chunk of the step log: ``count`` steps from step ``first``."""

    first: int
    count: int


@dataclass(frozen=True)
class StoredCheckpoint(StoredFile):
    """A checkpoint: the state before step ``step``."""

    step: int


def package_version() -> str:
    """The version of this package, for the manifest.

    Returns:
        The installed version, or ``"source"`` where the package runs without being installed.
    """
    try:
        return version("lightning_accie")
    except PackageNotFoundError:
        return "source"


@dataclass(frozen=True)
class Rank:
    """Which of a run's processes wrote a log.

    Attributes:
        number: its rank, from 0.
        of: how many processes there are, at least 2.
        run: tells the run from every other; all its processes have the same.
    """

    number: int
    of: int
    run: str


@dataclass(frozen=True)
class Manifest:
    """What a trajectory consists of.

    Attributes:
        header: the caller's own JSON values.
        chunks: the step log, in order.
        checkpoints: in order of their steps.
        status: ``"running"`` while it is being written (or its writer was killed), then
            ``"finished"``, ``"interrupted"`` (by the user), ``"failed"`` (training did) or
            ``"stopped"`` (writing did).
        reason: why, in words; may be empty.
        writer: version of the package that wrote it.
        rank: which process wrote it; None where there was one alone.
        batches: the files of batches, in order; None where the run keeps no batches.
    """

    header: dict[str, Any]
    chunks: tuple[StoredChunk, ...] = ()
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    status: str = "running"
    reason: str = ""
    writer: str = ""
    rank: Rank | None = None
    batches: tuple[StoredBatches, ...] | None = None

    @property
    def version(self) -> int:
        """Of the format: the oldest that can hold it."""
        if self.batches is not None:
            return 3
        return 1 if self.rank is None else 2

    @property
    def steps(self) -> int:
        """The number of steps in the log."""
        return self.chunks[-1].first + self.chunks[-1].count if self.chunks else 0

    def encode(self) -> bytes:
        """The content of the manifest's file.

        Returns:
            JSON text, with its checksum.
        """
        document = {
            "format": FORMAT,
            "version": self.version,
            "writer": self.writer,
            "status": self.status,
            "reason": self.reason,
            "header": self.header,
            **({} if self.rank is None else {"rank": asdict(self.rank)}),
            "chunks": [asdict(chunk) for chunk in self.chunks],
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
        }
        if self.batches is not None:
            document["batches"] = [asdict(batches) for batches in self.batches]
        document["checksum"] = sha256(_text(document)).hexdigest()
        return _text(document)


def read_manifest(directory: Path) -> Manifest:
    """Read and check a trajectory's manifest.

    Args:
        directory: the trajectory's directory.

    Returns:
        What the trajectory consists of. The files it names have not been looked at.

    Raises:
        TrajectoryError: where there is none, or it is damaged or too new.
    """
    path = directory / MANIFEST
    try:
        content = read_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TrajectoryError(
            f"{directory} holds no trajectory: there is no {MANIFEST}. Give the directory that a "
            "training run with InfluenceCallback has written."
        ) from error
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _parse(path, content)
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"{path} is damaged: {error}. {DAMAGED}") from error


def _parse(path: Path, content: bytes) -> Manifest:
    document = json.loads(content)
    if type(document) is not dict or document.get("format") != FORMAT:
        raise ValueError("it is not the manifest of a trajectory")
    written = document.pop("version", None)
    if type(written) is int and written > VERSION:
        raise TrajectoryError(
            f"{path} has format version {written}, and this version of lightning_accie "
            f"({package_version()}) reads up to {VERSION}. Upgrade lightning_accie."
        )
    manifest = _manifest(document)
    # Compared as a whole, which has the version and the checksum in it: a changed blank counts too.
    if content != manifest.encode():
        raise ValueError("it is not as it was written")
    return manifest


def _manifest(document: dict[str, Any]) -> Manifest:
    further = {"rank": dict, "batches": list}
    further = {key: kind for key, kind in further.items() if key in document}
    if {key: type(value) for key, value in document.items()} != {**_TYPES, **further}:
        raise ValueError("its entries are not those of a manifest")
    if document["status"] not in STATUSES:
        raise ValueError(f"its status is {document['status']!r}")
    chunks = tuple(_entry(record, StoredChunk) for record in document["chunks"])
    checkpoints = tuple(_entry(record, StoredCheckpoint) for record in document["checkpoints"])
    batches = None
    if "batches" in document:
        batches = tuple(_entry(record, StoredBatches) for record in document["batches"])
        _check_batches(batches)
    manifest = Manifest(
        header=document["header"],
        chunks=chunks,
        checkpoints=checkpoints,
        batches=batches,
        **{key: document[key] for key in ("status", "reason", "writer")},
        rank=_rank(document["rank"]) if "rank" in document else None,
    )
    _check_chunks(chunks)
    _check_checkpoints(checkpoints, manifest.steps)
    return manifest


def _rank(record: Any) -> Rank:
    rank = _entry(record, Rank)
    if not 0 <= rank.number < rank.of or rank.of < 2:
        raise ValueError(f"it is that of rank {rank.number} of {rank.of}")
    return rank


def _entry(record: Any, kind: type[_EntryT]) -> _EntryT:
    # The names of the fields' types serve as they are: annotations are texts here.
    expected = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if type(record) is not dict or expected != {
        key: type(value).__name__ for key, value in record.items()
    }:
        raise ValueError(f"an entry for a {kind.__name__} has other fields than {list(expected)}")
    return kind(**record)


def _check_chunks(chunks: tuple[StoredChunk, ...]) -> None:
    first = 0
    for chunk in chunks:
        # A step takes at least a byte.
        sensible = chunk.first == first and 0 < chunk.count <= chunk.bytes
        if not sensible or not CHUNK_NAME.fullmatch(chunk.file):
            raise ValueError(f"its entry for {chunk.file!r} does not continue the step log")
        first += chunk.count


def _check_batches(batches: tuple[StoredBatches, ...]) -> None:
    first = 0
    for stored in batches:
        sensible = stored.first == first and 0 < stored.count <= stored.bytes
        sensible = sensible and 0 <= stored.records <= stored.bytes
        if not sensible or not BATCHES_NAME.fullmatch(stored.file):
            raise ValueError(f"its entry for {stored.file!r} does not continue the batches")
        first += stored.count


def _check_checkpoints(checkpoints: tuple[StoredCheckpoint, ...], steps: int) -> None:
    last = -1
    for checkpoint in checkpoints:
        sensible = last < checkpoint.step <= steps
        if not sensible or checkpoint.file != checkpoint_name(checkpoint.step):
            raise ValueError(f"its entry for {checkpoint.file!r} is not that of a checkpoint")
        last = checkpoint.step


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode("ascii")
