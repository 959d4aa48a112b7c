"""Going on with a trajectory from one of its steps, in its place or in another one.

The files of a trajectory never change once they are written. So another trajectory can have them
too, as hard links where the file system allows that, and the old one stays as it was. In place, all
that is written before the new manifest stands under names that the old one does not use: whenever
the process is killed, the manifest on disk is one of the two, and its files are whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightning_accie.trajectory.chunks import Chunk, encode_chunk
from lightning_accie.trajectory.files import (
    BATCHES_NAME,
    adopt,
    chunk_name,
    prepare,
    read,
    used_numbers,
    write,
)
from lightning_accie.trajectory.manifest import (
    Manifest,
    StoredChunk,
    package_version,
    read_manifest,
)


@dataclass(frozen=True)
class After:
    """Where a trajectory takes up an earlier one.

    Attributes:
        directory: the earlier trajectory's.
        steps: how many of its steps are kept.
        last_checkpoint: checkpoints up to this step are kept.
        pinned: the steps of those that the schedule never thins.
    """

    directory: Path
    steps: int
    last_checkpoint: int
    pinned: frozenset[int] = frozenset()


def splice(after: After, target: Path, *, overwrite: bool) -> tuple[Manifest, int]:
    """Bring the first steps of a trajectory into a directory, all but the manifest.

    Args:
        after: what to bring.
        target: where to; it may be the same directory.
        overwrite: whether a trajectory that is in another directory may be deleted.

    Returns:
        The manifest to write, with the earlier header, and the number of the next chunk.

    Raises:
        TrajectoryError: where the earlier trajectory is missing or damaged, or ``target`` holds
            something else.
        OSError: where the file system refuses.
    """
    manifest = read_manifest(after.directory)
    whole = tuple(c for c in manifest.chunks if c.first + c.count <= after.steps)
    checkpoints = tuple(c for c in manifest.checkpoints if c.step <= after.last_checkpoint)
    if not same_place(after.directory, target):
        prepare(target, overwrite=overwrite)
        # All batches: those behind the last kept step are not referred to, and do no harm.
        files = (*whole, *checkpoints, *(manifest.batches or ()))
        adopt(after.directory, target, [stored.file for stored in files])
    number = _next_number(target, manifest)
    rest = _part(after, manifest.chunks[len(whole) :], target, number)
    kept = replace(
        manifest,
        chunks=(*whole, *rest),
        checkpoints=checkpoints,
        status="running",
        reason="",
        writer=package_version(),
    )
    return kept, number + len(rest)


def same_place(one: Path, other: Path) -> bool:
    """Tell whether two paths are the same directory, by whatever name.

    Returns:
        False where one of them is not there.
    """
    return one.exists() and other.exists() and one.samefile(other)


def _part(
    after: After, chunks: tuple[StoredChunk, ...], target: Path, number: int
) -> tuple[StoredChunk, ...]:
    """The chunk that the last kept step lies within, cut behind it and written under a new name."""
    if not chunks or chunks[0].first >= after.steps:
        return ()
    old = chunks[0]
    chunk = Chunk(read(after.directory, old))
    steps = [chunk.step(t) for t in range(old.first, after.steps)]
    stored = write(target, chunk_name(number), encode_chunk(steps))
    return (StoredChunk(**asdict(stored), first=old.first, count=len(steps)),)


def next_batches(target: Path, manifest: Manifest) -> int:
    """Find a number for the next file of batches.

    Args:
        target: the trajectory's directory.
        manifest: what it consists of.

    Returns:
        One that no file there has.
    """
    named = (stored.file for stored in manifest.batches or ())
    return 1 + max([-1, *used_numbers(target, named, BATCHES_NAME)])


def _next_number(target: Path, manifest: Manifest) -> int:
    named: Iterable[str] = (stored.file for stored in manifest.chunks)
    return 1 + max([-1, *used_numbers(target, named)])
