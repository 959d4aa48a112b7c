"""For the terminal: the strongest samples, and how far the figures can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_accie.rendered import clean
from lightning_accie.reports import words
from lightning_accie.scores import InfluenceScores

_GAP = 4
_ANY_WIDTH = 100_000


def print_report(scores: InfluenceScores, top_k: int, console: Console | None = None) -> None:
    """Print the report.

    Args:
        scores: what was found.
        top_k: samples to show on each side.
        console: where to; default standard output.
    """
    console = Console() if console is None else console
    if console.encoding.lower().startswith("utf"):
        console.print(render(scores, top_k))
        return
    # A code page has neither τ nor, perhaps, the letters of the user's texts.
    with console.capture() as capture:
        console.print(render(scores, top_k))
    text = capture.get().encode(console.encoding, errors="replace").decode(console.encoding)
    console.file.write(text)


def render(scores: InfluenceScores, top_k: int) -> RenderableType:
    """Lay the report out for whatever width it is printed at.

    Args:
        scores: what was found.
        top_k: samples to show on each side.

    Returns:
        What a rich Console prints: the two tables side by side where there is room for that, else
        one below the other, with as many of the user's columns as fit.
    """
    return _Report(scores, top_k)


class _Report:
    def __init__(self, scores: InfluenceScores, top_k: int) -> None:
        self.scores = scores
        self.sides = (
            (words.harmful_title(scores), scores.top_harmful(top_k), "red"),
            (words.helpful_title(scores), scores.top_helpful(top_k), "green"),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        own: list[str] = []
        for name in self.scores.columns:
            if max(self._widths(console, [*own, name])) <= width:
                own.append(name)
        yield Text(words.headline(self.scores), style="bold")
        for line in words.reserves(self.scores):
            yield Text(line, style="bold yellow")
        tables = self._tables(own)
        if sum(self._widths(console, own)) + _GAP <= width:
            grid = Table.grid(padding=(0, _GAP, 0, 0))
            grid.add_row(*tables)
            yield Padding(grid, (1, 0))
        else:
            for table in tables:
                yield Padding(table, (1, 0, 0, 0))
            yield ""
        for line in (words.LEGEND, *self._left_out(own)):
            yield Text(line, style="dim")
        yield ""
        for line in words.trust(self.scores):
            yield Padding(Text(line.strip()), (0, 0, 0, 2 * line.startswith(" ")))

    def _widths(self, console: Console, own: Sequence[str]) -> list[int]:
        unlimited = console.options.update(max_width=_ANY_WIDTH)
        return [Measurement.get(console, unlimited, table).maximum for table in self._tables(own)]

    def _tables(self, own: Sequence[str]) -> list[Table]:
        return [_table(title, top, style, own) for title, top, style in self.sides]

    def _left_out(self, own: Sequence[str]) -> list[str]:
        missing = [clean(name) for name in self.scores.columns if name not in own]
        if not missing:
            return []
        return [f"Not shown, for lack of width: {', '.join(missing)} (to_csv() has all columns)."]


def _table(title: str, top: InfluenceScores, style: str, own: Sequence[str]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for name in words.COLUMNS:
        table.add_column(
            name,
            justify="center" if name == "exact" else "right",
            style=style if name == "influence" else "",
            no_wrap=True,
        )
    for name in own:
        texts = any(isinstance(value, str) for value in top.columns[name])
        table.add_column(Text(clean(name)), justify="left" if texts else "right", no_wrap=True)
    columns = {name: top.columns[name] for name in own}
    for row in words.cells(replace(top, columns=columns)):
        table.add_row(*(Text(cell) for cell in row))
    if not len(top):
        table.caption = "no such sample"
    return table
