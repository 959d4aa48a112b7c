"""What is shown of a training sample: its picture, its text, its values.

One notion for report.html and for every logger. Where the user gives no ``render=``, the first image
in a sample is its picture, the first text its text, and all that is left its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_accie.errors import RenderError
from lightning_accie.images import ReadSample, as_image
from lightning_accie.replay import random_state

Render = Callable[[Any], Any]
"""``render(sample)``: a picture, a text, or a dict of named values."""
Plain = str | int | float | bool

_LONGEST_TEXT = 2000
_MOST_VALUES = 24
_MOST_NUMBERS = 16


@dataclass(frozen=True)
class Rendered:
    """What is shown of a sample.

    Attributes:
        image: ``[H, W, C]`` uint8, of 1, 3 or 4 channels; None where there is none.
        text: empty where there is none.
        values: names and values of everything else.
    """

    image: np.ndarray | None = None
    text: str = ""
    values: tuple[tuple[str, Plain], ...] = ()


def render_samples(
    sample: ReadSample, indices: Iterable[int], render: Render | None = None
) -> dict[int, Rendered]:
    """Read samples and make them fit to be shown.

    Args:
        sample: reads a sample by its index.
        indices: of the samples.
        render: the user's own way to show one.

    Returns:
        What is shown of each, by index. The random generators are left as they were. Without pillow
        there are no pictures, and a warning says so.

    Raises:
        RenderError: if ``render`` fails, or returns something else than it should.
    """
    with random_state.isolated():
        found = {
            index: _found(sample(index)) if render is None else _asked(render, index, sample(index))
            for index in indices
        }
    if find_spec("PIL") is None and any(shown.image is not None for shown in found.values()):
        rank_zero_warn(
            "The influence reports show no pictures: that needs pillow "
            "(`pip install 'lightning_accie[report]'`)."
        )
        found = {index: Rendered(None, one.text, one.values) for index, one in found.items()}
    return found


def as_text(value: Plain) -> str:
    """Write a value down.

    Returns:
        A float with four digits, anything else as it is.
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clean(text: Any) -> str:
    """Make a text fit for one line of a terminal or a table.

    Args:
        text: whatever the user's column holds.

    Returns:
        The text on one line, with ``�`` for control characters and undecodable bytes.
    """
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


# ---------------------------------------------------------------------- by the user's own function


def _asked(render: Render, index: int, sample: Any) -> Rendered:
    try:
        found = render(sample)
    except Exception as error:
        raise RenderError(
            f"`render` failed on sample {index}: {type(error).__name__}: {error}. It is called with "
            "what the dataset gives for each sample."
        ) from error
    if isinstance(found, str):
        return Rendered(text=_shortened(found))
    if isinstance(found, Mapping):
        return Rendered(values=_values((name, part) for name, part in _parts(found)))
    image = None if isinstance(found, Sequence) else as_image(found)
    if image is None:
        shape = f" of shape {list(found.shape)}" if hasattr(found, "shape") else ""
        dtype = f" and {found.dtype}" if hasattr(found, "dtype") else ""
        raise RenderError(
            "`render` must return a picture (a PIL image, or a tensor or array of floats or uint8 of "
            "shape [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels and sides of at least 4), a "
            f"text (str), or a dict of named values, but returned a {type(found).__name__}{shape}"
            f"{dtype} for sample {index}."
        )
    return Rendered(image)


# ---------------------------------------------------------------------- by what is there


def _found(sample: Any) -> Rendered:
    image, text, rest = None, "", []
    for name, part in _parts(sample):
        if image is None and (picture := as_image(part)) is not None:
            image = picture
        elif isinstance(part, str) and not text:
            text = part
        else:
            rest.append((name, part))
    return Rendered(image, _shortened(text), _values(rest))


def _parts(sample: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(sample, Mapping):
        for key, part in sample.items():
            yield from _parts(part, f"{name}.{clean(key)}" if name else clean(key))
    elif isinstance(sample, Sequence) and not isinstance(sample, (str, bytes)):
        if _numbers(sample) is not None and len(sample) > 3:
            yield name, sample
            return
        fields = getattr(sample, "_fields", None) or [f"[{n}]" for n in range(len(sample))]
        for key, part in zip(fields, sample, strict=True):
            joint = "." if name and not key.startswith("[") else ""
            yield from _parts(part, f"{name}{joint}{key}")
    else:
        yield name, sample


def _values(parts: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Plain], ...]:
    values = [(name, _value(part)) for name, part in parts]
    left_out = len(values) - _MOST_VALUES
    return (*values[:_MOST_VALUES], *([("…", f"{left_out} more")] if left_out > 0 else []))


def _value(part: Any) -> Plain:
    if isinstance(part, (Tensor, np.ndarray, np.generic)) and not part.shape:
        part = part.item()
    numbers = _numbers(part)
    if numbers is not None:
        rest = f", … ({len(numbers)} numbers)" if len(numbers) > _MOST_NUMBERS else ""
        return ", ".join(map(as_text, numbers[:_MOST_NUMBERS])) + rest
    if isinstance(part, (bool, int, float)):
        return part
    if isinstance(part, (Tensor, np.ndarray)):
        dtype = str(part.dtype).removeprefix("torch.")
        return f"{type(part).__name__} [{', '.join(map(str, part.shape))}] {dtype}"
    if part is None or isinstance(part, str):
        return _shortened(clean(part))
    return type(part).__name__


def _numbers(part: Any) -> list[Any] | None:
    """The numbers of a vector; None where it is none."""
    if isinstance(part, (Tensor, np.ndarray)) and len(part.shape) == 1:
        part = part.tolist()
    if not isinstance(part, (list, tuple)) or not part:
        return None
    return list(part) if all(isinstance(value, (int, float)) for value in part) else None


def _shortened(text: str) -> str:
    # Line ends may matter in a text; what cannot be printed does not.
    lines = "\n".join(clean(line) for line in text.splitlines())
    return lines if len(lines) <= _LONGEST_TEXT else f"{lines[:_LONGEST_TEXT]}…"
