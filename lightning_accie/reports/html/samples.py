"""What is shown of a training sample in a page: its picture, its text, or its values.

``examples.json`` keeps this of the strongest samples, so that a report can be made again without the
data. It is JSON:

    {"format": "lightning_accie examples", "version": 1,
     "examples": {"724": {"picture": "data:image/png;base64,…", "text": "", "values": [["[1]", "8"]]}}}
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_accie.errors import InfluenceError
from lightning_accie.images import ReadSample, as_image
from lightning_accie.replay import random_state
from lightning_accie.reports.words import clean
from lightning_accie.scores_files import EXAMPLES_FILE
from lightning_accie.trajectory.files import read_regular, write

_FORMAT = "lightning_accie examples"
_VERSION = 1
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
_LARGEST_SIDE = 192
_LARGEST_PNG = 20_000
"""Bytes beyond which a picture in colour is kept as JPEG."""
_LONGEST_TEXT = 2000
_MOST_VALUES = 24
_MOST_NUMBERS = 16


class ExamplesError(InfluenceError):
    """``examples.json`` is damaged, too new, or something else."""


@dataclass(frozen=True)
class Shown:
    """What is shown of a sample.

    Attributes:
        picture: a ``data:`` address of a PNG or JPEG; empty where there is no image.
        text: the first text in the sample; empty where there is none.
        values: names and values of everything else in it, as texts.
    """

    picture: str = ""
    text: str = ""
    values: tuple[tuple[str, str], ...] = ()


def show_samples(sample: ReadSample, indices: Iterable[int]) -> dict[int, Shown]:
    """Read samples and make them fit to be shown.

    Args:
        sample: reads a sample by its index.
        indices: of the samples.

    Returns:
        What is shown of each, by index. The random generators are left as they were. Without pillow
        there are no pictures, and a warning says so.
    """
    with random_state.isolated():
        found = {index: sample(index) for index in indices}
        images = {index: _first_image(content) for index, content in found.items()}
    if find_spec("PIL") is None and any(image is not None for image in images.values()):
        rank_zero_warn(
            "The report shows no pictures: that needs pillow "
            "(`pip install 'lightning_accie[report]'`)."
        )
        images = dict.fromkeys(images)
    return {index: _shown(content, images[index]) for index, content in found.items()}


def write_examples(directory: Path, shown: Mapping[int, Shown]) -> None:
    """Write ``examples.json``.

    Args:
        directory: where to.
        shown: what is shown of each sample, by index.

    Raises:
        OSError: where the file system refuses.
    """
    examples = {str(index): asdict(content) for index, content in shown.items()}
    document = {"format": _FORMAT, "version": _VERSION, "examples": examples}
    write(directory, EXAMPLES_FILE, (json.dumps(document, indent=1) + "\n").encode("ascii"))


def read_examples(directory: Path) -> dict[int, Shown]:
    """Read what `write_examples` wrote.

    Args:
        directory: where it is.

    Returns:
        What is shown of each sample, by index; empty where there is no such file.

    Raises:
        ExamplesError: where the file is damaged, too new, or something else; nothing but a picture's
            own bytes passes for a picture.
    """
    path = directory / EXAMPLES_FILE
    try:
        return _decoded(path, json.loads(read_regular(path)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ExamplesError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExamplesError(
            f"{path} is damaged: {error!r}. Delete it: the report is then made without pictures and "
            "texts."
        ) from error


def _decoded(path: Path, document: Any) -> dict[int, Shown]:
    if document["format"] != _FORMAT:
        raise ValueError("it holds something else")
    if document["version"] != _VERSION:
        raise ExamplesError(
            f"{path} has format version {document['version']}, and this version of lightning_accie "
            f"reads {_VERSION}. Upgrade lightning_accie, or delete the file: the report is then made "
            "without pictures and texts."
        )
    return {int(index): _parsed(entry) for index, entry in document["examples"].items()}


def _parsed(entry: Any) -> Shown:
    picture, text, values = entry["picture"], entry["text"], entry["values"]
    if not isinstance(text, str) or (picture and not _PICTURE.fullmatch(picture)):
        raise ValueError("an example is not as it was written")
    if not all(isinstance(part, str) for name, value in values for part in (name, value)):
        raise ValueError("an example's values are not texts")
    return Shown(picture, text, tuple((name, value) for name, value in values))


# ---------------------------------------------------------------------- from samples


def _shown(sample: Any, image: np.ndarray | None) -> Shown:
    text, values = "", []
    pictured = image is None
    for name, part in _parts(sample):
        if not pictured and as_image(part) is not None:
            pictured = True  # it stands there as a picture
        elif isinstance(part, str) and not text:
            text = part
        else:
            values.append((name, _value(part)))
    left_out = len(values) - _MOST_VALUES
    if left_out > 0:
        values = [*values[:_MOST_VALUES], ("…", f"{left_out} more")]
    return Shown("" if image is None else _address(image), _shortened(text), tuple(values))


def _first_image(sample: Any) -> np.ndarray | None:
    images = (as_image(part) for _, part in _parts(sample))
    return next((image for image in images if image is not None), None)


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


def _numbers(part: Any) -> list[Any] | None:
    """The numbers of a vector; None where it is none."""
    if isinstance(part, (Tensor, np.ndarray)) and len(part.shape) == 1:
        part = part.tolist()
    if not isinstance(part, (list, tuple)) or not part:
        return None
    return list(part) if all(isinstance(value, (int, float)) for value in part) else None


def _value(part: Any) -> str:
    if isinstance(part, (Tensor, np.ndarray, np.generic)) and not part.shape:
        part = part.item()
    numbers = _numbers(part)
    if numbers is not None:
        rest = f", … ({len(numbers)} numbers)" if len(numbers) > _MOST_NUMBERS else ""
        return ", ".join(map(_number, numbers[:_MOST_NUMBERS])) + rest
    if isinstance(part, (bool, int, float)):
        return _number(part)
    if isinstance(part, (Tensor, np.ndarray)):
        dtype = str(part.dtype).removeprefix("torch.")
        return f"{type(part).__name__} [{', '.join(map(str, part.shape))}] {dtype}"
    if part is None or isinstance(part, str):
        return _shortened(clean(part))
    return type(part).__name__


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(text: str) -> str:
    # Line ends may matter in a text; what cannot be printed does not.
    lines = "\n".join(clean(line) for line in text.splitlines())
    return lines if len(lines) <= _LONGEST_TEXT else f"{lines[:_LONGEST_TEXT]}…"


def _address(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    if max(picture.size) > _LARGEST_SIDE:
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    kind, content = "png", _encoded(picture, "PNG", optimize=True)
    if len(content) > _LARGEST_PNG and picture.mode in {"L", "RGB"}:
        kind, content = "jpeg", _encoded(picture, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(picture: Any, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()
