"""The training batches themselves, where a run keeps them: each distinct sample once.

Records (`batch_forms`) are numbered in the order in which they first appear, and so are batches. A
file holds a stretch of both:

| tensor | content |
|---|---|
| ``data`` | the bytes of the records that are new in this file, one behind the other |
| ``lengths`` | how many bytes each has |
| ``forms`` | per batch: which of the file's forms it has |
| ``counts`` | per batch and group of its form: how many records the group has |
| ``refs`` | the numbers of these records; most are in this file, some in earlier ones |

Its JSON holds the forms' texts, and the names of samples (``ids``) that are new in this file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.batch_building import Form
from lightning_accie.trajectory.batch_forms import Parts
from lightning_accie.trajectory.files import DAMAGED, StoredFile, check_size, read
from lightning_accie.trajectory.tensors import dump, load, smallest

_REMEMBERED = 2**20
"""How many distinct records are recognised when they come again; about 150 MB of memory."""

SampleId = int | str
Groups = list[list[bytes]]


@dataclass(frozen=True)
class StoredBatches(StoredFile):
    """A file of batches: ``count`` of them from batch ``first``, and ``records`` new records."""

    first: int
    count: int
    records: int


class BatchLog:
    """Gathers batches until they are written.

    Args:
        batches: how many there are already, in a run that goes on.
        records: how many records they have.
    """

    def __init__(self, batches: int = 0, records: int = 0) -> None:
        self.waiting = 0
        """Bytes of the records that wait to be written."""
        self._numbers: dict[bytes, int] = {}
        self._records = records
        self._batches = batches
        self._clear()

    def _clear(self) -> None:
        self.waiting = 0
        self._new: list[bytes] = []
        self._ids: list[SampleId] = []
        self._forms: dict[str, int] = {}
        self._form_of: list[int] = []
        self._counts: list[int] = []
        self._refs: list[int] = []

    @property
    def pending(self) -> int:
        """How many batches wait to be written."""
        return len(self._form_of)

    def new_bytes(self, parts: Parts, keys: Sequence[Sequence[bytes]]) -> int:
        """How many bytes a batch would add, an upper bound.

        Args:
            parts: the batch, taken apart.
            keys: `keys_of` it.

        Returns:
            The size of its records that are not known yet, and of what refers to them.
        """
        records = [pair for group in zip(keys, parts.groups, strict=True) for pair in zip(*group)]  # noqa: B905
        fresh = sum(len(record) for key, record in records if key not in self._numbers)
        form = 0 if parts.form in self._forms else len(parts.form)
        return fresh + form + 12 * len(records)

    def add(self, parts: Parts, keys: Sequence[Sequence[bytes]]) -> int:
        """Take the next batch.

        Args:
            parts: the batch, taken apart.
            keys: `keys_of` it.

        Returns:
            Its number.
        """
        self._form_of.append(self._forms.setdefault(parts.form, len(self._forms)))
        for group, names in zip(parts.groups, keys, strict=True):
            self._counts.append(len(group))
            self._refs.extend(map(self._number, group, names))
        self._batches += 1
        return self._batches - 1

    def name(self, ids: Sequence[SampleId]) -> None:
        """Keep the names of samples that appear for the first time.

        Args:
            ids: in the order of the samples' numbers.
        """
        self._ids.extend(ids)

    def _number(self, record: bytes, key: bytes) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._records
            self._records += 1
            self._new.append(record)
            self.waiting += len(record)
            if len(self._numbers) < _REMEMBERED:
                self._numbers[key] = number
        return number

    def take(self) -> tuple[bytes, dict[str, Any]]:
        """Give what waits as the content of a file, and forget it.

        Returns:
            The content, and the entries of `StoredBatches`.
        """
        tensors = {
            "data": torch.frombuffer(
                bytearray(b"".join(self._new)) or bytearray(1), dtype=torch.uint8
            ),
            "lengths": smallest([len(record) for record in self._new]),
            "forms": smallest(self._form_of),
            "counts": smallest(self._counts),
            "refs": smallest(self._refs),
        }
        entries = {
            "first": self._batches - self.pending,
            "count": self.pending,
            "records": len(self._new),
        }
        meta = {
            "first": entries["first"],
            "first_record": self._records - len(self._new),
            "forms": list(self._forms),
            "ids": self._ids,
        }
        self._clear()
        return dump(tensors, meta), entries


def keys_of(parts: Parts) -> list[list[bytes]]:
    """Give the keys by which records are recognised.

    Args:
        parts: a batch, taken apart.

    Returns:
        One a record.
    """
    return [
        [blake2b(record, digest_size=16).digest() for record in group] for group in parts.groups
    ]


class _File:
    """One file of batches, checked, with its records left on disk."""

    def __init__(self, directory: Path, stored: StoredBatches) -> None:
        path = directory / stored.file
        content = read(directory, stored)
        try:
            tensors, meta = load(content)
            lengths = tensors["lengths"].tolist()
            self.offsets = [0, *accumulate(lengths)]
            self.forms = [Form(text) for text in meta["forms"]]
            self.form_of: list[int] = tensors["forms"].tolist()
            self.ids: list[SampleId] = meta["ids"]
            groups = [len(self.forms[form].split) for form in self.form_of]
            self.groups = [0, *accumulate(groups)]
            self.counts: list[int] = tensors["counts"].tolist()
            self.starts = [0, *accumulate(self.counts)]
            self.refs = tensors["refs"].numpy()
            found = (meta["first"], len(self.form_of), len(lengths))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TrajectoryError(f"{path} holds no batches: {error!r}. {DAMAGED}") from error
        sizes = (self.groups[-1], self.starts[-1], max(self.offsets[-1], 1))
        if found != (stored.first, stored.count, stored.records) or sizes != (
            len(self.counts),
            len(self.refs),
            len(tensors["data"]),
        ):
            raise TrajectoryError(f"{path} does not hold what the manifest says. {DAMAGED}")
        # The content was compared with its checksum just now; its pages are read when needed.
        self._data = np.memmap(path, np.uint8, "r", offset=_place_of_data(content))

    def record(self, at: int) -> bytes:
        return bytes(self._data[self.offsets[at] : self.offsets[at + 1]])

    def batch(self, at: int) -> tuple[Form, list[np.ndarray]]:
        groups = range(self.groups[at], self.groups[at + 1])
        refs = [self.refs[self.starts[group] : self.starts[group + 1]] for group in groups]
        return self.forms[self.form_of[at]], refs


def _place_of_data(content: bytes) -> int:
    size = int.from_bytes(content[:8], "little")
    return 8 + size + int(json.loads(content[8 : 8 + size])["data"]["data_offsets"][0])


class Batches:
    """The stored batches of a trajectory.

    Args:
        directory: the trajectory's directory.
        stored: the manifest's entries, in order.

    Raises:
        TrajectoryError: where a file is missing, or not of its size.
    """

    def __init__(self, directory: Path, stored: Sequence[StoredBatches]) -> None:
        self._directory = directory
        self._stored = tuple(stored)
        self._firsts = [entry.first for entry in stored]
        self._records = [0, *accumulate(entry.records for entry in stored)]
        self._files: dict[int, _File] = {}
        for entry in stored:
            check_size(directory, entry)

    def __len__(self) -> int:
        return self._stored[-1].first + self._stored[-1].count if self._stored else 0

    def ids(self) -> list[SampleId]:
        """List the names of the samples, by their numbers.

        Returns:
            The names; empty where samples have numbers of their own.

        Raises:
            TrajectoryError: where a file is missing or damaged.
        """
        return [name for at in range(len(self._stored)) for name in self._file(at).ids]

    def batch(self, number: int, device: torch.device) -> Any:
        """Read a batch.

        Args:
            number: its number.
            device: where tensors go that were not on the CPU.

        Returns:
            The batch as ``training_step`` received it.

        Raises:
            TrajectoryError: where a file is missing or damaged, or a class is not imported.
        """
        form, refs = self._look_up(number)
        return self._built(number, lambda: form.build(self._groups(refs), device))

    def changed(
        self,
        number: int,
        size: int | None,
        change: Callable[[np.ndarray], np.ndarray],
        device: torch.device,
    ) -> Any:
        """Read a batch with other samples of its own in its places.

        Args:
            number: its number.
            size: change only what has as many samples, or None for all that is split by sample.
            change: records of its samples ``[b]`` -> others ``[b]``.
            device: where tensors go that were not on the CPU.

        Returns:
            The batch, or None where nothing in it is split by sample.

        Raises:
            TrajectoryError: where a file is missing or damaged, or a class is not imported.
        """
        form, refs = self._look_up(number)
        pairs = list(zip(refs, form.split, strict=True))
        chosen = [split and size in (None, len(part)) for part, split in pairs]
        if not any(chosen):
            return None
        refs = [change(part) if c else part for part, c in zip(refs, chosen, strict=True)]
        return self._built(number, lambda: form.build(self._groups(refs), device))

    def sample(self, number: int, place: int) -> tuple[Any] | None:
        """Read one sample of a batch.

        Args:
            number: the batch's number.
            place: the sample's place in it.

        Returns:
            The batch's structure with this sample's parts alone, in a tuple; None where the batch
            cannot be taken apart by sample.

        Raises:
            TrajectoryError: where a file is missing or damaged, or a class is not imported.
        """
        form, refs = self._look_up(number)
        if not form.has_samples:
            return None
        pairs = zip(refs, form.split, strict=True)
        refs = [part[place : place + 1] if split else part for part, split in pairs]
        return (self._built(number, lambda: form.sample(self._groups(refs), place)),)

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            TrajectoryError: for the first that is missing or damaged.
        """
        for entry in self._stored:
            _File(self._directory, entry)

    def _built(self, number: int, build: Any) -> Any:
        try:
            return build()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, TrajectoryError):
                raise
            raise TrajectoryError(
                f"Batch {number} in {self._directory} cannot be put together: {error!r}. {DAMAGED}"
            ) from error

    def _look_up(self, number: int) -> tuple[Form, list[np.ndarray]]:
        if not 0 <= number < len(self):
            raise TrajectoryError(
                f"{self._directory} has no batch {number}, but {len(self)} of them. {DAMAGED}"
            )
        at = bisect_right(self._firsts, number) - 1
        return self._file(at).batch(number - self._firsts[at])

    def _groups(self, refs: Sequence[np.ndarray]) -> Groups:
        return [[self._record(int(number)) for number in part] for part in refs]

    def _record(self, number: int) -> bytes:
        at = bisect_right(self._records, number) - 1
        if not 0 <= at < len(self._stored):
            raise IndexError(f"there is no record {number}")
        return self._file(at).record(number - self._records[at])

    def _file(self, at: int) -> _File:
        if at not in self._files:
            self._files[at] = _File(self._directory, self._stored[at])
        return self._files[at]
