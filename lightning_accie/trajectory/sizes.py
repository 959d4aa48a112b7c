"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FACTORS = {
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL)},
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY)},
    "": 1,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(size: int | str) -> int:
    """Read a size such as ``"2GB"`` or ``"512MiB"``.

    ``kB``, ``MB``, ``GB``, … are powers of 1000, ``KiB``, ``MiB``, ``GiB``, … powers of 1024; upper
    and lower case are the same. A fraction of a byte is dropped.

    Args:
        size: a number of bytes, or a number with a unit.

    Returns:
        The number of bytes.

    Raises:
        ValueError: for anything else, and for negative sizes.

    Examples:
        >>> parse_bytes("2GB"), parse_bytes("512 MiB"), parse_bytes("1.5kB"), parse_bytes(4096)
        (2000000000, 536870912, 1500, 4096)
        >>> parse_bytes("much")
        Traceback (most recent call last):
        ValueError: a size is a number of bytes or a text such as '2GB' or '512MiB', not 'much'
    """
    if type(size) is int and size >= 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _FACTORS:
        raise ValueError(
            f"a size is a number of bytes or a text such as '2GB' or '512MiB', not {size!r}"
        )
    return int(Decimal(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(size: int) -> str:
    """Write a size for people, with two or three digits and a decimal unit.

    Args:
        size: number of bytes, not negative.

    Returns:
        The rounded size with its unit.

    Examples:
        >>> [format_bytes(size) for size in (0, 999, 1_500, 999_600, 2_000_000_000)]
        ['0 B', '999 B', '1.5 kB', '1.0 MB', '2.0 GB']
    """
    value, unit = float(size), 0
    while value >= 999.5 and unit + 1 < len(_DECIMAL):
        value, unit = value / 1000, unit + 1
    digits = 1 if unit and value < 9.95 else 0
    return f"{value:.{digits}f} {_DECIMAL[unit]}"
