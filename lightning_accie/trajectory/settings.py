"""Optimiser settings, one set a step, as tensors and JSON that grow only with what changes.

A step's settings are taken apart into a *form* and *numbers*. The form is the nested structure with
the numbers left out; the numbers are a float64 row. Steps of the same form share it (two optimisers
in turn make two forms), and of their numbers only those that change, such as ``lr`` under a
schedule, are stored step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.trajectory.records import GroupSettings
from lightning_accie.trajectory.tensors import smallest

Form = Any
"""None, a bool, a str, or a tuple (kind, …) of kind float, int, list, tuple or dict."""

_EXACT = 2**53
"""Up to here float64 holds every integer; larger ones stay in the form."""


def encode_settings(
    settings: Sequence[tuple[GroupSettings, ...]],
) -> tuple[dict[str, Tensor], list[Any]]:
    """Take the settings of consecutive steps apart.

    Args:
        settings: one entry a step: mappings with text keys, lists, tuples and JSON scalars.

    Returns:
        The tensors by name, and the forms as JSON.

    Raises:
        TypeError: for a value of another type.
    """
    rows: dict[Form, list[list[float]]] = {}
    forms = []
    last: tuple[GroupSettings, ...] | None = None
    numbers: list[float] = []
    for groups in settings:
        if groups is not last:  # steps with the same settings often share them
            numbers, last = [], groups
            form = _take_apart(groups, numbers)
        forms.append(form)
        rows.setdefault(form, []).append(numbers)
    position = {form: index for index, form in enumerate(rows)}
    tensors = {"settings/form": smallest([position[form] for form in forms])}
    meta = []
    for form, index in position.items():
        matrix = np.array(rows[form], dtype=np.float64)  # [steps of this form, numbers]
        bits = matrix.view(np.int64)  # tells 0.0 from −0.0, and finds NaN equal to itself
        varies = (bits != bits[0]).any(axis=0)
        tensors[f"settings/{index}/constant"] = torch.from_numpy(matrix[0, ~varies])
        tensors[f"settings/{index}/varying"] = torch.from_numpy(matrix[:, varies])
        meta.append({"form": form, "varies": varies.tolist()})
    return tensors, meta


class SettingsTable:
    """The settings that `encode_settings` took apart, put together again one step at a time.

    Args:
        tensors: the tensors by name; others may stand among them.
        meta: the forms.

    Raises:
        ValueError: where the two do not belong together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], meta: Sequence[Any]) -> None:
        self._form = tensors["settings/form"].numpy().astype(np.int64)
        self._row = np.empty_like(self._form)
        self._forms = [entry["form"] for entry in meta]
        self._parts = []
        if len(self._form) and not 0 <= self._form.min() <= self._form.max() < len(meta):
            raise ValueError("a step has settings of a form that is not there")
        for index, entry in enumerate(meta):
            steps = np.flatnonzero(self._form == index)
            self._row[steps] = np.arange(len(steps))
            varies = np.array(entry["varies"], dtype=bool)
            constant = tensors[f"settings/{index}/constant"].numpy()
            varying = tensors[f"settings/{index}/varying"].numpy()
            rows, columns = len(steps), int(varies.sum())
            if constant.shape != (len(varies) - columns,) or varying.shape != (rows, columns):
                raise ValueError("the settings of the step log do not fit their forms")
            _check_form(entry["form"], len(varies))
            self._parts.append((varies, constant, varying))

    def __len__(self) -> int:
        return len(self._form)

    def __getitem__(self, step: int) -> tuple[GroupSettings, ...]:
        form = self._form[step]
        varies, constant, varying = self._parts[form]
        # Put together a step at a time: all steps at once could be far larger than the file is.
        numbers = np.empty(len(varies))
        numbers[varies] = varying[self._row[step]]
        numbers[~varies] = constant
        return _put_together(self._forms[form], iter(numbers.tolist()))


def _check_form(form: Any, count: int) -> None:
    # Nesting beyond Python's depth, or other than `_take_apart` makes, comes from no writer.
    numbers = iter([0.0] * count)
    try:
        _put_together(form, numbers)
    except (StopIteration, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the settings' form makes no sense: {error!r}") from error
    if next(numbers, None) is not None:
        raise ValueError("the settings' form has fewer numbers than are stored")


def _take_apart(value: Any, numbers: list[float]) -> Form:
    # bool before int, whose subclass it is
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        numbers.append(value)
        return ("float",)
    if isinstance(value, int):
        if abs(value) > _EXACT:
            return ("integer", value)
        numbers.append(float(value))
        return ("int",)
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return (kind, *[_take_apart(item, numbers) for item in value])
    if isinstance(value, Mapping):
        return ("dict", *[(_text(key), _take_apart(value[key], numbers)) for key in value])
    raise TypeError(f"an optimiser setting of type {type(value).__name__} cannot be stored")


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"an optimiser setting is called {key!r}; only texts can be names")
    return key


def _put_together(form: Any, numbers: Iterator[float]) -> Any:
    if not isinstance(form, (list, tuple)):
        return form
    kind, *parts = form
    if kind == "float":
        return next(numbers)
    if kind == "int":
        return int(next(numbers))
    if kind == "integer":
        return parts[0]
    if kind == "dict":
        return {key: _put_together(part, numbers) for key, part in parts}
    items = [_put_together(part, numbers) for part in parts]
    return items if kind == "list" else tuple(items)
