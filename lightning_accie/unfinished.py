"""What an analysis has finished, kept on disk until it is complete.

    <directory of the trajectory>/../analysis/<which analysis>/<checksum>.safetensors

Which analysis it is says a checksum of all that its figures depend on: the trajectory, where the run
ends, the query with its value and slope, the precision, and the version of this package. Another
analysis finds nothing of it. Every file is written whole or not at all; one that is not as it was
written is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from lightning_accie.trajectory.files import read_regular, write
from lightning_accie.trajectory.manifest import package_version
from lightning_accie.trajectory.tensors import dump, load

FOLDER = "analysis"
WRITE_EVERY = 10.0
"""Seconds of work that a kill may cost; a shorter analysis writes nothing."""


class Unfinished:
    """An `estimators.kept.Kept` on disk.

    Args:
        directory: where the files are, see `directory_of`.
        resume: whether what an earlier analysis has left is used, or deleted.
        warn: what takes a sentence about what could not be written or read.
    """

    def __init__(self, directory: Path, *, resume: bool, warn: Callable[[str], None]) -> None:
        self.directory = directory
        self._warn = warn
        self._waiting: list[tuple[str, Mapping[str, Tensor]]] = []
        self._states: dict[str, Mapping[str, Tensor]] = {}
        self._state_files: dict[str, list[Path]] = {}
        self._written = monotonic()
        self._parts: dict[str, list[dict[str, Tensor]]] = {}
        if not resume:
            self.remove()
        for path in sorted(self.directory.glob("*.safetensors")):
            self._read(path)

    @property
    def found(self) -> bool:
        """Whether an earlier analysis has left something."""
        return bool(self._parts)

    def _read(self, path: Path) -> None:
        try:
            content = read_regular(path)
            if _checksum(content) != path.stem:
                raise ValueError("its checksum is not the one in its name")
            tensors, meta = load(content)
            key, is_state = meta["key"], meta["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn(f"{path}, of an earlier analysis, is left out: {error}.")
            return
        self._parts.setdefault(key, []).append(tensors)
        if is_state:
            self._state_files.setdefault(key, []).append(path)

    def parts(self, key: str) -> Sequence[dict[str, Tensor]]:
        """Give the parts that an earlier analysis has finished.

        Args:
            key: the estimator's `Estimator.key`.

        Returns:
            Tensors by name, on the CPU.
        """
        return self._parts.get(key, ())

    def add(self, key: str, part: Mapping[str, Tensor]) -> None:
        """Keep another finished part.

        Args:
            key: the estimator's `Estimator.key`.
            part: tensors by name.
        """
        self._waiting.append((key, part))
        self._write_in_time()

    def replace(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Keep the state of work that has no parts, instead of the one before.

        Args:
            key: the estimator's `Estimator.key`.
            state: tensors by name.
        """
        self._states[key] = state
        self._write_in_time()

    def _write_in_time(self) -> None:
        if monotonic() - self._written >= WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write what waits to be written; where the disk refuses, say so and go on without."""
        self._written = monotonic()
        try:
            for key, part in self._waiting:
                self._write(key, part, state=False)
            for key, state in self._states.items():
                path = self._write(key, state, state=True)
                old = self._state_files.get(key, [])
                self._state_files[key] = [path]
                for former in old:
                    if former != path:
                        former.unlink(missing_ok=True)
        except OSError as error:
            self._written = float("inf")  # it would only fail again
            self._warn(
                f"What the analysis has finished cannot be kept in {self.directory} "
                f"({error.strerror}). It goes on, but if it is killed it will begin anew."
            )
        self._waiting, self._states = [], {}

    def _write(self, key: str, tensors: Mapping[str, Tensor], *, state: bool) -> Path:
        content = dump(tensors, {"key": key, "state": state})
        path = self.directory / f"{_checksum(content)}.safetensors"
        self.directory.mkdir(parents=True, exist_ok=True)
        write(self.directory, path.name, content)
        return path

    def remove(self) -> None:
        """Delete everything, once the analysis is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            self.directory.parent.rmdir()
        except OSError:  # another analysis is there, or nothing is
            return


def directory_of(parent: Path, what: Mapping[str, Any]) -> Path:
    """Where an analysis keeps what it has finished.

    Args:
        parent: the directory that the trajectory's directory stands in.
        what: all that its figures depend on, as JSON values.

    Returns:
        The directory; it may not be there yet.
    """
    text = json.dumps({**what, "writer": package_version()}, sort_keys=True)
    return parent / FOLDER / _checksum(text.encode())[:16]


def remove_unfinished(parent: Path) -> None:
    """Delete what all analyses of a trajectory have left.

    Args:
        parent: the directory that the trajectory's directory stands in.

    Raises:
        OSError: where the file system refuses.
    """
    if (parent / FOLDER).is_dir():
        shutil.rmtree(parent / FOLDER)


def _checksum(content: bytes) -> str:
    return sha256(content).hexdigest()[:32]
