"""Bars, and where there are none."""

from __future__ import annotations

import io

import pytest
import rich
from rich.console import Console

from lightning_accie.progress import RichProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_no_line_is_left_where_no_bar_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    monkeypatch.setattr(rich, "_console", console)
    with RichProgress().task("SGD-IE", 3) as advance:
        advance(3)
    assert ("SGD-IE" in file.getvalue()) == terminal
    assert bool(file.getvalue()) == terminal
