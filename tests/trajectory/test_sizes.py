from __future__ import annotations

from typing import Any

import pytest

from lightning_accie.trajectory.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("7 B", 7),
        ("1kB", 1000),
        ("1 kb", 1000),
        ("3MB", 3_000_000),
        ("2GB", 2_000_000_000),
        (" 2 gb ", 2_000_000_000),
        ("1TB", 10**12),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("1.5GiB", 1_610_612_736),
        ("2TiB", 2 * 1024**4),
        ("0.1MB", 100_000),  # 0.1 * 1e6 exactly, not through a binary fraction
        ("4.35GB", 4_350_000_000),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "2XB", "-1GB", -1, "1e9", "2 GB of disk", "1,5GB", "٣GB", 2.5, True, None]
)
def test_anything_else_is_refused_with_what_was_given(text: Any) -> None:
    with pytest.raises(ValueError, match="such as '2GB'") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(9_940, "9.9 kB"), (9_960, "10 kB"), (999_499, "999 kB"), (10**12, "1.0 TB")],
)
def test_sizes_are_rounded_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_what_is_written_can_be_read() -> None:
    for size in (1, 15, 999, 1000, 123_456_789, 10**15, 10**20):
        assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)
