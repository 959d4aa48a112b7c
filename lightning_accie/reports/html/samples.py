"""What `rendered` shows of a training sample, in a page and in ``examples.json``.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accie.errors import InfluenceError
from lightning_accie.rendered import Rendered, as_text
from lightning_accie.reports.report import as_picture
from lightning_accie.scores_files import EXAMPLES_FILE
from lightning_accie.trajectory.files import read_regular, write

_FORMAT = "lightning_accie examples"
_VERSION = 1
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
_LARGEST_SIDE = 192
_LARGEST_PNG = 20_000
"""Bytes beyond which a picture in colour is kept as JPEG."""


class ExamplesError(InfluenceError):
    """``examples.json`` is damaged, too new, or something else."""


@dataclass(frozen=True)
class Shown:
    """What a page shows of a sample.

    Attributes:
        picture: a ``data:`` address of a PNG or JPEG; empty where there is no image.
        text: the first text in the sample; empty where there is none.
        values: names and values of everything else in it, as texts.
    """

    picture: str = ""
    text: str = ""
    values: tuple[tuple[str, str], ...] = ()


def in_a_page(rendered: Mapping[int, Rendered]) -> dict[int, Shown]:
    """Make what is shown of samples fit for a page.

    Args:
        rendered: what is shown of each sample, by index.

    Returns:
        The same with pictures as addresses and values as texts.
    """
    return {
        index: Shown(
            "" if one.image is None else _address(one.image),
            one.text,
            tuple((name, as_text(value)) for name, value in one.values),
        )
        for index, one in rendered.items()
    }


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


def _address(image: np.ndarray) -> str:
    picture = as_picture(image)
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
