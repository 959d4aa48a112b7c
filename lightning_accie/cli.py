"""``lightning-accie``: what needs neither the module nor its data, from a terminal.

torch and Lightning are imported within the commands, so that help and completion are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_accie.comparison import Comparison, RankCorrelation
    from lightning_accie.doctor import Finding
    from lightning_accie.scores import InfluenceScores

FAILED = 1
"""Exit code where what was asked for cannot be done, or is not in order; 2 is a wrong command line."""

app = typer.Typer(
    name="lightning-accie",
    help="Look at, export, compare and check what InfluenceCallback has written.",
    epilog="Exit codes: 0 done; 1 cannot be done, or not in order; 2 wrong command line.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Where the callback has written: <log_dir>/influence.")
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Examples to show on each side.")]


def _version(asked: bool) -> None:
    if asked:
        import lightning_accie

        typer.echo(lightning_accie.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Look at, export, compare and check what InfluenceCallback has written."""


@app.command()
def show(directory: Directory, top_k: TopK = 25) -> None:
    """Print the most harmful and most helpful examples, and how far to trust them."""
    with _errors():
        scores = _scores(directory)
        from lightning_accie.reports.console import print_report

        print_report(scores, top_k)


@app.command()
def export(
    directory: Directory,
    csv: Annotated[Path | None, typer.Option(help="CSV file; - for standard output.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Parquet file (needs pyarrow).")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Write the whole ranking for another program: CSV, Parquet or JSON."""
    if csv is None and parquet is None and json is None:
        raise typer.BadParameter("name a file: --csv FILE, --parquet FILE or --json FILE")
    with _errors():
        scores = _scores(directory)
        from lightning_accie.export import write_json, write_parquet

        if csv is not None and str(csv) == "-":
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")  # type: ignore[union-attr]
            scores.to_csv(sys.stdout)
        elif csv is not None:
            _written(csv, scores.to_csv)
        if parquet is not None:
            _written(parquet, lambda file: write_parquet(scores, file))
        if json is not None:
            _written(json, lambda file: write_json(scores, file))


@app.command()
def report(
    directory: Directory,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; default report.html in the directory."),
    ] = None,
    top_k: TopK = 25,
    samples: Annotated[
        bool,
        typer.Option(help="Show pictures and texts, of the examples that examples.json keeps."),
    ] = True,
) -> None:
    """Make report.html again, without the data: pictures and texts come from examples.json."""
    with _errors():
        scores = _scores(directory)
        from lightning_accie.reports.html.page import write_report
        from lightning_accie.reports.html.samples import read_examples
        from lightning_accie.scores_files import REPORT_FILE

        shown = read_examples(directory) if samples else {}
        file = directory / REPORT_FILE if output is None else output
        _written(file, lambda path: write_report(scores, path, top_k=top_k, shown=shown))


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
    other: Annotated[Path, typer.Argument(metavar="DIR", help="Another run's directory.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Movers to name.")] = 10,
) -> None:
    """Compare two rankings of the same data: rank correlation, and the examples that moved most."""
    with _errors():
        rankings = _scores(one), _scores(other)
        from lightning_accie.comparison import compare as compared

        _print_comparison(compared(*rankings, k=top_k))


@app.command()
def verify(directory: Directory) -> None:
    """Read every file of a trajectory, and of the scores beside it, against its checksum."""
    with _errors():
        from lightning_accie.scores import InfluenceScores
        from lightning_accie.scores_files import JSON_FILE
        from lightning_accie.trajectory.reader import Trajectory

        trajectory = Trajectory.open(directory)
        trajectory.verify()
        why = f" ({trajectory.reason})" if trajectory.reason else ""
        states = len(trajectory.checkpoint_steps)
        typer.echo(
            f"{trajectory.directory}: {len(trajectory)} steps, {states} checkpoints, "
            f"{trajectory.status}{why}. Every file is as it was written."
        )
        beside = directory.parent if trajectory.directory == directory.absolute() else directory
        if (beside / JSON_FILE).exists():
            count = len(InfluenceScores.load(beside))
            typer.echo(f"{beside / JSON_FILE}: scores of {count} samples, as they were written.")


@app.command()
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:OBJECT]", help="A LightningModule or Trainer, or what makes one."
        ),
    ] = None,
) -> None:
    """Say what of this environment, and of a module or Trainer of yours, is supported."""
    with _errors():
        from lightning_accie.doctor import environment, examine

        found = environment() + ([] if path is None else examine(path))
        _print_findings(found)
        if any(finding.state == "refused" for finding in found):
            raise typer.Exit(FAILED)


# ---------------------------------------------------------------------- parts


@contextmanager
def _errors() -> Iterator[None]:
    """Tell expected errors in a line, with exit code 1; a bug keeps its traceback."""
    from lightning_accie.errors import InfluenceError

    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except (InfluenceError, OSError, ImportError) as error:
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(FAILED) from error


def _scores(directory: Path) -> InfluenceScores:
    from lightning_accie.scores import InfluenceScores

    return InfluenceScores.load(directory)


def _written(file: Path, write: Callable[[Path], Any]) -> None:
    write(file)
    typer.echo(f"Wrote {file}", err=True)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_comparison(found: Comparison) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lightning_accie.rendered import clean

    console = _console()
    estimates = (
        []
        if found.estimates is None
        else [f"Estimates with estimates alone: {_correlation(found.estimates)}"]
    )
    lines = [
        f"{found.count} samples in common; only in the first {found.only[0]}, in the second "
        f"{found.only[1]}",
        f"{_correlation(found.order)}, Jaccard@{found.k} {found.jaccard:.2f}, same sign "
        f"{found.sign_agreement:.0%}",
        *estimates,
        *(f"They differ in {clean(difference)}" for difference in found.differences),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="Moved most", title_justify="left")
    for name in ("sample", "rank", "then", "influence", "then"):
        table.add_column(name, justify="right")
    for mover in found.movers:
        ranks = map(str, mover.ranks)
        influences = (
            f"{value:+.2e} {'✓' if exact else ' '}"
            for value, exact in zip(mover.influences, mover.exact, strict=True)
        )
        # As a text: an id may hold what looks like markup.
        table.add_row(Text(clean(mover.sample)), *ranks, *influences)
    console.print(table if found.movers else "No sample moved.")
    if any(any(mover.exact) for mover in found.movers):
        console.print(
            "✓: exact. A sample that is exact in one ranking alone may have moved by that.",
            markup=False,
            highlight=False,
        )


def _correlation(found: RankCorrelation) -> str:
    tau = "not computed of so many" if found.kendall_tau is None else f"{found.kendall_tau:.2f}"
    return f"Spearman {found.spearman:.2f}, Kendall τ {tau}"


def _print_findings(found: list[Finding]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "missing": "dim", "note": "yellow", "refused": "bold red"}
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "state", "found"):
        table.add_column(name)
    for finding in found:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(Text(finding.what), state, Text(finding.words))
    _console().print(table)


def main() -> None:
    """Run the command line."""
    app(prog_name="lightning-accie")
