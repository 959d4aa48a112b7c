"""The files of a trajectory's directory: their names, and how they are written and read.

Nothing is written but through `write`, and nothing a manifest names is read but through `read`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lightning_accie.errors import TrajectoryError

MANIFEST = "manifest.json"
FOLDER = "trajectory"
"""Where the callback's directory has the trajectory."""
CHECKPOINTS = "checkpoints"
CHUNK_NAME = re.compile(r"steps-([0-9]{6,})\.safetensors")
BATCHES_NAME = re.compile(r"batches-([0-9]{6,})\.safetensors")
CHECKPOINT_NAME = re.compile(rf"{CHECKPOINTS}/step-[0-9]{{9,}}\.safetensors")
RANK_NAME = re.compile(r"rank-[0-9]{3,}")
_TEMPORARY = ".tmp"

DAMAGED = "Copy the trajectory again from where it was recorded, or record the run again."
"""What to do about a file that is not as it was written."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written.

    Attributes:
        file: its name relative to the trajectory's directory, with ``/``.
        bytes: its size.
        sha256: of its content, in hexadecimal.
    """

    file: str
    bytes: int
    sha256: str


def chunk_name(number: int) -> str:
    """The name of a chunk of the step log.

    Args:
        number: chunks are counted from 0 as they are written.

    Returns:
        The name relative to the trajectory's directory.
    """
    return f"steps-{number:06d}.safetensors"


def batches_name(number: int) -> str:
    """The name of a file of batches.

    Args:
        number: files are counted from 0 as they are written.

    Returns:
        The name relative to the trajectory's directory.
    """
    return f"batches-{number:06d}.safetensors"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's file.

    Args:
        step: t, the step before which the state was kept.

    Returns:
        The name relative to the trajectory's directory.
    """
    return f"{CHECKPOINTS}/step-{step:09d}.safetensors"


def rank_name(rank: int) -> str:
    """The name of the directory that holds another rank's step log.

    Args:
        rank: the process's number, from 1; rank 0 writes to the trajectory's directory itself.

    Returns:
        The name relative to the trajectory's directory.
    """
    return f"rank-{rank:03d}"


def write(directory: Path, name: str, content: bytes) -> StoredFile:
    """Write a file so that it is there either whole or not at all, even if the process is killed.

    Args:
        directory: the trajectory's directory.
        name: the file's name in it.
        content: all of the file.

    Returns:
        The file's entry for the manifest.

    Raises:
        OSError: where the file system refuses; nothing is left behind then.
    """
    write_with(directory, name, lambda path: _write_through(path, content))
    return StoredFile(name, len(content), sha256(content).hexdigest())


def write_with(directory: Path, name: str, action: Callable[[Path], object]) -> None:
    """Let something else write a file, so that it is there either whole or not at all.

    Args:
        directory: the directory.
        name: the file's name in it.
        action: what writes all of the file, under the name that it is given.

    Raises:
        OSError: where the file system refuses; nothing is left behind then.
    """
    path = directory / name
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        action(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def read(directory: Path, stored: StoredFile) -> bytes:
    """Read a file that must be as it was written.

    Args:
        directory: the trajectory's directory.
        stored: the file's entry in the manifest.

    Returns:
        The content.

    Raises:
        TrajectoryError: where the file is missing or not as it was written.
    """
    check_size(directory, stored)
    path = directory / stored.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    if sha256(content).hexdigest() != stored.sha256:
        raise TrajectoryError(f"{path} is damaged: its checksum is not the recorded one. {DAMAGED}")
    return content


def read_regular(path: Path) -> bytes:
    """Read a file whole, unless it is a pipe or a device, which may have no end.

    Args:
        path: the file.

    Returns:
        The content.

    Raises:
        OSError: where it cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


def check_size(directory: Path, stored: StoredFile) -> None:
    """Look whether a file is there and as large as it was, without reading it.

    Args:
        directory: the trajectory's directory.
        stored: the file's entry in the manifest.

    Raises:
        TrajectoryError: where it is missing, or of another size.
    """
    path = directory / stored.file
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror}.") from error
    if size is None:
        raise TrajectoryError(f"{path} is missing. {DAMAGED}")
    if size != stored.bytes:
        raise TrajectoryError(
            f"{path} is damaged: it has {size} bytes where {stored.bytes} were written. {DAMAGED}"
        )


def prepare(directory: Path, *, overwrite: bool) -> None:
    """Make an empty directory for a new trajectory.

    Args:
        directory: where to; made if it is not there.
        overwrite: whether a trajectory that is there may be deleted, the logs of all ranks with it.

    Raises:
        TrajectoryError: where something is there that must not be deleted.
        OSError: where the file system refuses.
    """
    if directory.exists() and not directory.is_dir():
        raise TrajectoryError(f"{directory} is a file. Choose a directory for the trajectory.")
    directory.mkdir(parents=True, exist_ok=True)
    present = _present(directory)
    finished = [name for name in present if not name.endswith(_TEMPORARY)]
    if finished and not overwrite:
        raise TrajectoryError(
            f"{directory} already holds a trajectory. Choose another directory, or pass "
            "overwrite=True to delete it."
        )
    # The manifest goes first: no moment has one that names deleted files.
    for name in sorted(present, key=lambda name: name != MANIFEST):
        remove(directory, name)
    for rank in filter(_is_rank, list(directory.iterdir())):
        for path in [*rank.iterdir(), rank]:
            path.rmdir()
    (directory / CHECKPOINTS).mkdir(exist_ok=True)


def adopt(source: Path, target: Path, names: Iterable[str]) -> None:
    """Give a trajectory files of another one, which stays as it is.

    Args:
        source: the other trajectory's directory.
        target: the trajectory's directory, without files of these names.
        names: of the files.

    Raises:
        OSError: where the file system refuses.
    """
    for name in names:
        try:
            os.link(source / name, target / name)
        except OSError:  # another file system, or one without hard links
            write(target, name, (source / name).read_bytes())
    _sync_directory(target)
    _sync_directory(target / CHECKPOINTS)


def used_numbers(
    directory: Path, named: Iterable[str], pattern: re.Pattern[str] = CHUNK_NAME
) -> list[int]:
    """The numbers that numbered files of one kind have.

    Args:
        directory: the trajectory's directory, whose files count even if nothing names them.
        named: names of further files.
        pattern: of the names, with the number as its group.

    Returns:
        The numbers.
    """
    present = [path.name.removesuffix(_TEMPORARY) for path in directory.iterdir()]
    matches = [pattern.fullmatch(name) for name in (*present, *named)]
    return [int(match[1]) for match in matches if match is not None]


def tidy(directory: Path, named: Iterable[str]) -> None:
    """Delete what a trajectory's manifest does not name; only files that a trajectory may have.

    Args:
        directory: the trajectory's directory.
        named: the files that its manifest names.

    Raises:
        OSError: where the file system refuses.
    """
    kept = {MANIFEST, *named}
    for path in [*directory.iterdir(), *directory.glob(f"{CHECKPOINTS}/*")]:
        name = path.relative_to(directory).as_posix()
        if name not in kept and _is_ours(name.removesuffix(_TEMPORARY)) and not path.is_dir():
            remove(directory, name)


def remove(directory: Path, name: str) -> None:
    """Delete a file of the trajectory; it may be gone already.

    Args:
        directory: the trajectory's directory.
        name: the file's name in it.

    Raises:
        OSError: where the file system refuses.
    """
    (directory / name).unlink(missing_ok=True)


def _present(directory: Path) -> list[str]:
    # The trajectory's files that are there, half-written ones with them.
    names = []
    for path in sorted([*directory.iterdir(), *directory.glob(f"{CHECKPOINTS}/*")]):
        name = path.relative_to(directory).as_posix()
        if name == CHECKPOINTS and path.is_dir() and not path.is_symlink():
            continue
        if _is_rank(path):
            names += [f"{name}/{inside}" for inside in _present(path)]
            continue
        if not _is_ours(name.removesuffix(_TEMPORARY)) or path.is_dir():
            raise TrajectoryError(
                f"{directory} holds something else than a trajectory: {name}. Move it away, or "
                "choose another directory."
            )
        names.append(name)
    return names


def _is_rank(path: Path) -> bool:
    return bool(RANK_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def _is_ours(name: str) -> bool:
    patterns = (CHUNK_NAME, BATCHES_NAME, CHECKPOINT_NAME)
    return name == MANIFEST or any(pattern.fullmatch(name) for pattern in patterns)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    # Makes the new name durable. Windows cannot open directories, and has no need to.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
