"""A batch as plain bytes and a form; `batch_building` makes it a batch again.

A batch is taken apart into *records*, which are bytes, and a *form*, a JSON text that says how to put
them together. What belongs to one sample goes into one record (row i of every tensor whose leading
dimension is the batch), so that a sample seen again is a record seen again. Everything else is a
record of its own.

Tensors, NumPy arrays, numbers, texts, None, lists, tuples and dicts are stored as such. So are named
tuples, dataclasses, and subclasses of `dict` and `UserDict` (the tokenisers' batches), by the name of
their class.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_accie.errors import UnsupportedError

_SCALARS = (str, int, float)
_KEYS = (str, int, float, bool, type(None))
_PRIMITIVE = (bool, type(None))


@dataclass(frozen=True)
class Parts:
    """A batch taken apart.

    Attributes:
        form: the JSON text.
        groups: the records: one a sample in a group that is split by sample, else a single one.
    """

    form: str
    groups: tuple[tuple[bytes, ...], ...]


def take_apart(batch: Any, sizes: Sequence[int]) -> Parts:
    """Turn a batch into bytes.

    Args:
        batch: as ``training_step`` receives it.
        sizes: how many samples each dataloader contributed.

    Returns:
        The form and the records.

    Raises:
        UnsupportedError: if the batch holds what cannot be stored, naming it.
    """
    return _Dismantling(sizes).parts(batch)


class _Group:
    """Leaves that share their records."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.leaves: list[Any] = []
        self.columns: list[np.ndarray | list[bytes]] = []

    def records(self) -> tuple[bytes, ...]:
        texts = [column for column in self.columns if isinstance(column, list)]
        tables = [column for column in self.columns if not isinstance(column, list)]
        rows = [b""] * (self.count or 1)
        if tables:
            rows = [row.tobytes() for row in np.concatenate(tables, axis=1)]
        # Numbers first, each of a known size; then texts, each behind its length.
        for column in texts:
            pairs = zip(rows, column, strict=True)
            rows = [row + len(text).to_bytes(4, "little") + text for row, text in pairs]
        return tuple(rows)


class _Dismantling:
    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = frozenset(sizes)
        self.together = len(sizes) == 1
        self.groups: list[_Group] = []
        self.by_size: dict[int, int] = {}
        self.unclear = not self.together

    def parts(self, batch: Any) -> Parts:
        tree = self.node(batch, "batch", split=True)
        form = {
            "tree": tree,
            "groups": [[group.count is not None, group.leaves] for group in self.groups],
            "unclear": self.unclear,
        }
        groups = tuple(group.records() for group in self.groups)
        return Parts(json.dumps(form, separators=(",", ":")), groups)

    # ------------------------------------------------------------------ containers

    def node(self, value: Any, where: str, *, split: bool) -> list[Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            return self.tensor(value, where, split)
        if isinstance(value, (np.ndarray, np.generic)):
            return self.array(value, where, split)
        if kind in _PRIMITIVE:
            return ["value", value]
        if kind in _SCALARS:
            return ["scalar", *self.leaf(["text"], [_text(value)], None)]
        if kind is list or kind is tuple:
            return self.sequence(value, where, split)
        if kind is dict:
            return ["dict", self.items(value, where, split)]
        return self.instance(value, where, split)

    def sequence(self, value: Sequence[Any], where: str, split: bool) -> list[Any]:
        name = type(value).__name__
        per_sample = split and self.together and len(value) in self.sizes
        if per_sample and all(type(item) in (*_SCALARS, *_PRIMITIVE) for item in value):
            return ["texts", name, *self.leaf(["text"], [_text(v) for v in value], len(value))]
        if per_sample:
            # As many entries as samples: are they the samples, or happen there to be as many fields?
            per_sample = not all(_leads(item, len(value)) for item in value)
            self.unclear |= not per_sample
        split = split and not per_sample
        children = [
            self.node(item, f"{where}[{place}]", split=split) for place, item in enumerate(value)
        ]
        return ["samples" if per_sample else "sequence", name, children]

    def items(self, value: Any, where: str, split: bool) -> list[Any]:
        found = []
        for key, item in value.items():
            if type(key) not in _KEYS:
                raise _cannot(key, f"a key of {where}")
            found.append([key, self.node(item, f"{where}[{key!r}]", split=split)])
        return found

    def instance(self, value: Any, where: str, split: bool) -> list[Any]:
        cls = type(value)
        kind = kind_of(cls)
        if kind is None:
            raise _cannot(value, where)
        path = f"{cls.__module__}:{cls.__qualname__}"
        if imported(path) is not cls:
            raise UnsupportedError(
                f"The training batches cannot be stored: {where} is a `{path}`, a class that cannot "
                "be found again by this name. Define it at the top of a module, or let "
                "`collate_fn` return a dict."
            )
        if isinstance(value, PackedSequence):  # its leading dimensions are times
            split, self.unclear = False, True
        if kind == "named tuple":
            pairs = zip(value._fields, value, strict=True)
            nodes = [self.node(item, f"{where}.{name}", split=split) for name, item in pairs]
            return ["instance", kind, path, nodes, []]
        own = getattr(value, "__dict__", {})
        if kind == "dataclass":
            own = {f.name: getattr(value, f.name) for f in fields(value)} | own
            items = []
        else:
            items = self.items(value, where, split)
            # The items stand there again: as `data`, or as the fields of transformers' outputs.
            again = {"data"} if kind == "user dict" else set(value) if is_dataclass(cls) else set()
            own = {name: entry for name, entry in own.items() if name not in again}
        attributes = [
            [name, self.node(entry, f"{where}.{name}", split=split)] for name, entry in own.items()
        ]
        return ["instance", kind, path, items, attributes]

    # ------------------------------------------------------------------ leaves

    def leaf(self, spec: list[Any], column: Any, count: int | None) -> list[int]:
        """Put a leaf into its group; gives where it stands."""
        if count is None or not self.together:
            self.groups.append(_Group(count))
            place = len(self.groups) - 1
        else:
            if count not in self.by_size:
                self.by_size[count] = len(self.groups)
                self.groups.append(_Group(count))
            place = self.by_size[count]
        group = self.groups[place]
        group.leaves.append(spec)
        group.columns.append(column)
        return [place, len(group.leaves) - 1]

    def tensor(self, value: Tensor, where: str, split: bool) -> list[Any]:
        if type(value) is not Tensor or value.layout != torch.strided or _unusual(value):
            raise _cannot(value, where)
        if value.requires_grad:
            raise UnsupportedError(
                f"The training batches cannot be stored: {where} is a tensor that requires a "
                "gradient. Ask for the gradient in `training_step`."
            )
        dtype = str(value.dtype).removeprefix("torch.")
        dense = value.detach().cpu().resolve_conj().resolve_neg()
        rows, tail = self.shape(value, split)
        flat = dense.contiguous().reshape(-1)
        table = flat.view(torch.uint8).numpy() if flat.numel() else _NOTHING
        spec = [dtype, rows is not None, tail, _order(value), value.device.type == "cpu"]
        return ["tensor", *self.leaf(spec, _rows(table, rows), rows)]

    def array(self, value: Any, where: str, split: bool) -> list[Any]:
        single = isinstance(value, np.generic)
        array = np.asarray(value)
        if array.dtype.kind not in "biufc" or (not single and type(value) is not np.ndarray):
            raise _cannot(value, where)
        rows, tail = self.shape(array, split)
        flat = np.ascontiguousarray(array).reshape(-1)
        table = flat.view(np.uint8) if flat.size else _NOTHING
        spec = [array.dtype.str, rows is not None, tail]
        return ["number" if single else "array", *self.leaf(spec, _rows(table, rows), rows)]

    def shape(self, value: Any, split: bool) -> tuple[int | None, list[int]]:
        """How many rows a leaf is split into (None: not at all), and the shape of the rest."""
        shape = list(value.shape)
        if split and shape and shape[0] in self.sizes:
            return shape[0], shape[1:]
        return None, shape


def _cannot(value: Any, where: str) -> UnsupportedError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return UnsupportedError(
        f"The training batches cannot be stored: {where} is a `{kind}`. Batches may be made of plain "
        "tensors, NumPy arrays, numbers, texts, None, lists, tuples, dicts, dataclasses, named "
        "tuples, and subclasses of dict and UserDict. Let `collate_fn` return these."
    )


def _unusual(value: Tensor) -> bool:
    return value.is_quantized or value.is_nested or value.is_meta


def _text(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


_NOTHING = np.zeros(0, dtype=np.uint8)


def _rows(table: np.ndarray, rows: int | None) -> np.ndarray:
    rows = rows or 1
    return table.reshape(rows, len(table) // rows)


def _order(value: Tensor) -> list[int] | None:
    """The order of dimensions in memory, where it is not the usual one (channels last)."""
    if value.is_contiguous():
        return None
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))
    return order if value.permute(order).is_contiguous() else None


def _leads(value: Any, count: int) -> bool:
    """Whether the leading dimension of all that ``value`` holds may be the batch."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and value.shape[0] == count
    if isinstance(value, (dict, UserDict)):
        return all(_leads(item, count) for item in value.values())
    return isinstance(value, (list, tuple)) and len(value) == count


def kind_of(cls: type) -> str | None:
    """Tell how instances of a class are stored.

    Args:
        cls: a class other than list, tuple and dict.

    Returns:
        The name of the kind; None where they cannot be.
    """
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "named tuple"
    if issubclass(cls, OrderedDict):
        return "ordered dict"
    if issubclass(cls, dict):
        return "dict"
    if issubclass(cls, UserDict):
        return "user dict"
    return "dataclass" if is_dataclass(cls) else None


def imported(path: str) -> Any:
    """Look an object up without importing anything.

    Args:
        path: ``module:qualified.name``.

    Returns:
        The object, or None where this process has not imported it.
    """
    module, _, names = path.partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found


def leaves_of(value: Any) -> Iterator[Any]:
    """Walk through a batch.

    Args:
        value: any nested structure.

    Yields:
        Its tensors, arrays, numbers and texts in order; what is of no known kind is passed over.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic, str, bytes, int, float, complex)):
        yield value
    elif isinstance(value, (dict, UserDict)):
        for key, item in value.items():
            yield from leaves_of(key)
            yield from leaves_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from leaves_of(getattr(value, entry.name, None))


def tensors_of(value: Any) -> list[Any]:
    """List a batch's tensors and arrays.

    Args:
        value: any nested structure.

    Returns:
        The tensors and arrays in order.
    """
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, (Tensor, np.ndarray))]
