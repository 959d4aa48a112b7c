"""Batches put together again from the bytes and the form that `batch_forms` made of them.

A class that a form names is only ever looked up among those that this process has imported already,
must be a named tuple, a dataclass, or a subclass of `dict` or `UserDict`, and none of its code runs
while its instances are put together: replaying a trajectory imports and runs nothing of its choice.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import is_dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.errors import TrajectoryError
from lightning_accie.trajectory.batch_forms import imported, kind_of


class Form:
    """How to put a batch together.

    Args:
        text: the form of `Parts`.

    Raises:
        ValueError: where it is something else.
    """

    def __init__(self, text: str) -> None:
        try:
            form = json.loads(text)
            self._tree: Any = form["tree"]
            self.split = tuple(bool(split) for split, _ in form["groups"])
            self._leaves: list[list[Any]] = [leaves for _, leaves in form["groups"]]
            self.unclear = bool(form["unclear"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a batch has no form: {error!r}") from error

    @property
    def has_samples(self) -> bool:
        """Whether the parts of a single sample are known."""
        single = sum(self.split) <= 1
        return single and not self.unclear and (any(self.split) or self.lists_samples)

    @property
    def lists_samples(self) -> bool:
        """Whether the batch has a list with an entry for each sample."""
        return _lists_samples(self._tree)

    def build(self, groups: Sequence[Sequence[bytes]], device: torch.device) -> Any:
        """Put a batch together.

        Args:
            groups: the records, as in `Parts`.
            device: where tensors go that were not on the CPU.

        Returns:
            The batch.

        Raises:
            TrajectoryError: where a class that the batch is made of is not imported.
            ValueError: where form and records do not fit.
        """
        return _Assembly(self._leaves, self.split, groups, device, None).node(self._tree)

    def sample(self, groups: Sequence[Sequence[bytes]], place: int) -> Any:
        """Put one sample together, where `has_samples`.

        Args:
            groups: the records; those that are split by sample hold the one sample only.
            place: which of the batch's samples it is.

        Returns:
            The batch's structure with this sample's rows, on the CPU.

        Raises:
            TrajectoryError: where a class that the batch is made of is not imported.
            ValueError: where form and records do not fit.
        """
        device = torch.device("cpu")
        return _Assembly(self._leaves, self.split, groups, device, place).node(self._tree)


def _lists_samples(node: Any) -> bool:
    return isinstance(node, list) and (
        node[:1] == ["samples"] or any(_lists_samples(child) for child in node)
    )


class _Assembly:
    def __init__(
        self,
        leaves: list[list[Any]],
        split: Sequence[bool],
        groups: Sequence[Sequence[bytes]],
        device: torch.device,
        place: int | None,
    ) -> None:
        self.leaves = leaves
        self.split = split
        self.device = device
        self.place = place
        self.columns = [
            _columns(specs, records) for specs, records in zip(leaves, groups, strict=True)
        ]

    def node(self, node: Any) -> Any:
        kind, *rest = node
        if kind == "value":
            return rest[0]
        if kind in ("sequence", "samples"):
            name, children = rest
            if kind == "samples" and self.place is not None:
                return self.node(children[self.place])
            items = [self.node(child) for child in children]
            return tuple(items) if name == "tuple" else items
        if kind == "dict":
            return {key: self.node(child) for key, child in rest[0]}
        if kind == "instance":
            return self.instance(*rest)
        if kind == "texts":
            items = self.texts(*rest[1:])
            if self.place is not None:
                return items[0]
            return tuple(items) if rest[0] == "tuple" else items
        if kind == "scalar":
            return self.texts(*rest)[0]
        if kind == "tensor":
            return self.tensor(*rest)
        array = self.array(*rest)
        return array[()] if kind == "number" else array

    def instance(self, kind: str, path: str, items: Any, attributes: Any) -> Any:
        cls = imported(path)
        if not isinstance(cls, type) or kind_of(cls) != kind:
            raise TrajectoryError(
                f"The stored batches are made of `{path}`, which is no class of that kind that this "
                "process has imported. Import it before the trajectory is replayed: a trajectory "
                "imports nothing by itself."
            )
        # By the base classes' own constructors: no code of the class runs.
        if kind == "named tuple":
            return tuple.__new__(cls, [self.node(child) for child in items])
        pairs = [(key, self.node(child)) for key, child in items]
        if kind == "ordered dict":
            made: Any = OrderedDict.__new__(cls)
            for key, value in pairs:
                OrderedDict.__setitem__(made, key, value)
        elif kind == "dict":
            made = dict.__new__(cls)
            dict.update(made, pairs)
        else:
            made = object.__new__(cls)
        if kind == "user dict":
            object.__setattr__(made, "data", dict(pairs))
        for name, child in attributes:
            object.__setattr__(made, name, self.node(child))
        if is_dataclass(cls) and kind != "dataclass":
            for key, value in pairs:
                object.__setattr__(made, key, value)
        return made

    def texts(self, group: int, place: int) -> list[Any]:
        return [json.loads(text) for text in self.columns[group][place]]

    def array(self, group: int, place: int) -> np.ndarray:
        dtype, split, tail = self.leaves[group][place]
        table = self.columns[group][place]
        shape = [len(table), *tail] if split and self.place is None else tail
        return np.frombuffer(bytearray(table.tobytes()), dtype=np.dtype(dtype)).reshape(shape)

    def tensor(self, group: int, place: int) -> Tensor:
        dtype, split, tail, order, on_cpu = self.leaves[group][place]
        table = np.ascontiguousarray(self.columns[group][place]).reshape(-1)
        one = split and self.place is not None
        shape = [len(self.columns[group][place]), *tail] if split and not one else tail
        kind = getattr(torch, dtype)
        flat = torch.from_numpy(table).view(kind) if table.size else torch.zeros(0, dtype=kind)
        made = flat.reshape(shape)
        if order is not None and not one:
            made = torch.empty_permuted(shape, order, dtype=kind).copy_(made)
        return made if on_cpu else made.to(self.device)


def _columns(specs: list[Any], records: Sequence[bytes]) -> list[Any]:
    """The leaves' parts of a group's records: a table of bytes each, or a list of texts."""
    widths = [None if spec[0] == "text" else _width(spec) for spec in specs]
    total = sum(width or 0 for width in widths)
    if any(len(record) < total for record in records):
        raise ValueError("a record of a batch is too short")
    whole = np.frombuffer(b"".join(record[:total] for record in records), dtype=np.uint8)
    table = whole.reshape(len(records), total).copy()
    rest = [record[total:] for record in records]
    columns: list[Any] = []
    start = 0
    for width in widths:
        if width is not None:
            columns.append(table[:, start : start + width])
            start += width
        else:
            pairs = [_cut(text) for text in rest]
            columns.append([text for text, _ in pairs])
            rest = [after for _, after in pairs]
    if any(rest):
        raise ValueError("a record of a batch is too long")
    return columns


def _cut(rest: bytes) -> tuple[bytes, bytes]:
    end = 4 + int.from_bytes(rest[:4], "little")
    if len(rest) < end or end < 4:
        raise ValueError("a text of a batch is cut")
    return rest[4:end], rest[end:]


def _width(spec: list[Any]) -> int:
    try:
        size = getattr(torch, spec[0]).itemsize
    except AttributeError:
        size = np.dtype(spec[0]).itemsize
    return size * prod(spec[2])
