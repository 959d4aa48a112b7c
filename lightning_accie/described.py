"""The user's own columns: what ``describe=`` says of every sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_accie.errors import DescribeError
from lightning_accie.scores import checked_column

Describe = Callable[[Any], Mapping[str, Any]]


def described(
    describe: Describe, numbers: Sequence[int], sample: Callable[[int], Any]
) -> dict[str, list[Any]]:
    """Describe samples.

    Args:
        describe: the user's function.
        numbers: the samples' numbers.
        sample: reads a sample by its number.

    Returns:
        One value a sample and column; None where a sample's dict lacks the column.

    Raises:
        DescribeError: naming the sample, if the function fails or returns something else than a
            dict; naming the column, if its name is taken or it holds what is not a single value.
    """
    rows = [_row(describe, number, sample(number)) for number in numbers]
    names = {name: None for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        try:
            checked_column(name, values, len(rows))
        except (TypeError, ValueError) as error:
            raise DescribeError(f"`describe` gave a column that cannot be kept. {error}") from error
    return columns


def _row(describe: Describe, number: int, sample: Any) -> Mapping[str, Any]:
    try:
        row = describe(sample)
    except Exception as error:
        raise DescribeError(
            f"`describe` failed on sample {number}: {type(error).__name__}: {error}. It is called with "
            "what the dataset gives for each sample."
        ) from error
    if not isinstance(row, Mapping):
        raise DescribeError(
            f"`describe` must return a dict of plain values by column name, but returned a "
            f"{type(row).__name__} for sample {number}."
        )
    return row
