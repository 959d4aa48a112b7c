"""Progress bars for long work, consistent with the Trainer's own bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from tqdm.auto import tqdm

from lightning_accie.estimators.base import Advance, NoProgress, Progress


class RichProgress:
    """Bars by rich."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Open a bar.

        Args:
            description: what is being done.
            total: units of work.

        Yields:
            What to call with the units done.
        """
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        console = get_console()
        if not (console.is_terminal or console.is_jupyter):  # it would leave a blank line there
            yield lambda units: None
            return
        with RichBars(*columns, transient=True, console=console) as bars:
            task = bars.add_task(description, total=total)
            yield lambda units: bars.advance(task, units)


class TqdmProgress:
    """Bars by tqdm."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Open a bar.

        Args:
            description: what is being done.
            total: units of work.

        Yields:
            What to call with the units done.
        """
        with tqdm(total=total, desc=description, leave=False, unit="step") as bar:

            def advance(units: int) -> None:
                bar.update(units)

            yield advance


def progress_like(trainer: Any) -> Progress:
    """Choose bars like the Trainer's.

    Args:
        trainer: the Trainer.

    Returns:
        Bars of the same library; none where the Trainer shows none.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or not getattr(bar, "is_enabled", True):
        return NoProgress()
    return RichProgress() if _is_rich(bar) else TqdmProgress()


def close_bar(trainer: Any) -> None:
    """Let the Trainer's bar stand where training left it.

    Rich's is live until the Trainer's own teardown, and would be drawn over what is printed here. It
    opens anew for the next stage.

    Args:
        trainer: the Trainer, after training.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and _is_rich(bar):
        bar._stop_progress()


def _is_rich(bar: Any) -> bool:
    return any(base.__name__ == "RichProgressBar" for base in type(bar).__mro__)
