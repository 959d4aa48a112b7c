"""Scores as files for other programs: Parquet and JSON. CSV is `InfluenceScores.to_csv`."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_accie.scores import InfluenceScores
from lightning_accie.trajectory.files import write


def write_json(scores: InfluenceScores, file: Path) -> None:
    """Write the scores as JSON (RFC 8259: what is not finite is null).

    Args:
        scores: what was found.
        file: the file; an object with ``info``, ``agreement`` and ``samples``: one object a sample,
            strongest harm first, with the names of `InfluenceScores.to_dict`.

    Raises:
        OSError: where the file system refuses.
    """
    table = scores.to_dict()
    document = {
        "info": scores.info,
        "agreement": [asdict(found) for found in scores.agreement],
        "samples": [
            dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)
        ],
    }
    text = json.dumps(_finite(document), indent=1, allow_nan=False)
    write(file.parent, file.name, (text + "\n").encode("ascii"))


def write_parquet(scores: InfluenceScores, file: Path) -> None:
    """Write the table as Parquet.

    Args:
        scores: what was found.
        file: the file; the columns of `InfluenceScores.to_dict`, strongest harm first.
            ``exact_influence`` is null where there was no exact replay. A column of the user's that
            mixes types is written as texts. ``info`` stands in the schema's metadata, as JSON.

    Raises:
        ImportError: if pyarrow is not installed.
        OSError: where the file system refuses.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow. Install it with `pip install 'lightning_accie[parquet]'`."
        ) from error
    table = scores.to_dict()
    exact = [None if math.isnan(figure) else figure for figure in table["exact_influence"]]
    columns = {name: _of_one_type(values) for name, values in table.items()}
    made = pyarrow.table({**columns, "exact_influence": pyarrow.array(exact, pyarrow.float64())})
    info = json.dumps(_finite(dict(scores.info)), allow_nan=False)
    made = made.replace_schema_metadata({"lightning_accie": info})
    content = io.BytesIO()
    parquet.write_table(made, content)
    write(file.parent, file.name, content.getvalue())


def _of_one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    large = any(isinstance(value, int) and abs(value) >= 2**63 for value in values)
    if kinds == {int, float} and not large:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1 or large:
        values = [None if value is None else str(value) for value in values]
    # What is no Unicode, such as a path of another encoding, Parquet does not take.
    return [_unicode(value) if isinstance(value, str) else value for value in values]


def _unicode(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
