"""How scores are kept on disk: two files that are read back, and one for people.

    scores.safetensors   the numbers
    scores.json          the rest, with the checksums of the numbers and of itself
    scores.csv           the table; never read back

Each is written whole or not at all, the JSON last. A pair that was not written together, or is not
as it was written, is refused. The JSON is Python's dialect, which has ``NaN`` and ``Infinity``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_accie.errors import InfluenceError
from lightning_accie.trajectory.files import read_regular, write
from lightning_accie.trajectory.sealed import Seal
from lightning_accie.trajectory.tensors import dump, load

if TYPE_CHECKING:
    import pandas

CSV_FILE = "scores.csv"
TENSORS_FILE = "scores.safetensors"
JSON_FILE = "scores.json"
REPORT_FILE = "report.html"
EXAMPLES_FILE = "examples.json"
"""What a report shows of the strongest samples; beside the scores, and removed with them."""

_DAMAGED = "Copy the directory again from where the scores were saved, or save them again."


class ScoresError(InfluenceError):
    """Saved scores are missing, damaged, too new, or two files that do not belong together."""


_SEAL = Seal("scores", 1, ScoresError)


def write_scores(
    directory: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], table: str
) -> None:
    """Write the three files.

    Args:
        directory: where to; made if it is not there.
        tensors: the numbers by name.
        content: JSON values by name.
        table: the text of the CSV file.

    Raises:
        TypeError: where ``content`` holds what is no JSON value.
        OSError: where the file system refuses.
    """
    numbers = dump(tensors, _SEAL.format)
    text = _SEAL.seal({"tensors_sha256": sha256(numbers).hexdigest(), "content": content})
    directory.mkdir(parents=True, exist_ok=True)
    write_table(directory / CSV_FILE, table)
    write(directory, TENSORS_FILE, numbers)
    write(directory, JSON_FILE, text)


def remove_scores(directory: Path) -> None:
    """Delete what `write_scores` wrote, where it is there, and the report that was made of it.

    Args:
        directory: where it is.

    Raises:
        OSError: where the file system refuses.
    """
    for name in (
        JSON_FILE,
        TENSORS_FILE,
        CSV_FILE,
        REPORT_FILE,
        EXAMPLES_FILE,
    ):  # without the JSON the others count for nothing
        (directory / name).unlink(missing_ok=True)


def data_frame(table: Mapping[str, Any]) -> pandas.DataFrame:
    """Make a data frame of a table.

    Args:
        table: columns by name.

    Returns:
        One row an entry.

    Raises:
        ImportError: if pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise ImportError(
            "to_pandas() needs pandas. Install it with `pip install 'lightning_accie[pandas]'`."
        ) from error
    return DataFrame(table)


def csv_text(table: Mapping[str, Sequence[Any]]) -> str:
    """Write a table as CSV.

    Args:
        table: columns of one length by name: numbers, texts, and None for empty cells.

    Returns:
        The text. Floats stand as `repr` gives them, so that they are read back exactly.
    """
    text = io.StringIO(newline="")
    # With the default line ends every Python quotes both halves, should a text hold one of them.
    writer = csv.writer(text)
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


def write_table(path: Path, table: str) -> None:
    """Write a CSV file whole or not at all.

    Args:
        path: the file.
        table: its text.

    Raises:
        OSError: where the file system refuses.
    """
    # File names in the user's columns may be no valid text; they must not break the export.
    write(path.parent, path.name, table.encode("utf-8", errors="backslashreplace"))


def read_scores(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_scores` wrote.

    Args:
        directory: where it is.

    Returns:
        The tensors and the JSON values.

    Raises:
        ScoresError: where a file is missing, damaged, too new, or not of the other's making.
    """
    path = directory / JSON_FILE
    try:
        document = _SEAL.unseal(path, _read(path))
    except (ValueError, RecursionError) as error:
        raise ScoresError(f"{path} is damaged: {error}. {_DAMAGED}") from error
    path = directory / TENSORS_FILE
    numbers = _read(path)
    if sha256(numbers).hexdigest() != document.get("tensors_sha256"):
        raise ScoresError(
            f"{path} is not the file that {JSON_FILE} was written with: it is damaged, or one of "
            f"the two was replaced. {_DAMAGED}"
        )
    try:
        return load(numbers)[0], document["content"]
    except (KeyError, ValueError) as error:  # with a right checksum: nothing of `write_scores`
        raise ScoresError(f"{path} does not hold scores: {error}.") from error


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = sorted(path.parent.glob(f"influence*/{path.name}"))  # a logger's directory
        found = f" There is one in {inside[-1].parent}." if inside else ""
        raise ScoresError(
            f"{path} is missing. Give the directory that InfluenceScores.save, or "
            f"InfluenceCallback, has written.{found}"
        ) from error
    except OSError as error:
        raise ScoresError(f"{path} cannot be read: {error.strerror}.") from error
