"""`write_report`: scores and samples -> one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_accie.agreement import Agreement
from lightning_accie.images import ReadSample
from lightning_accie.rendered import Render, clean, render_samples
from lightning_accie.reports import words
from lightning_accie.reports.html import commands, figures
from lightning_accie.reports.html.samples import Shown, in_a_page
from lightning_accie.reports.html.table import table
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import CSV_FILE
from lightning_accie.trajectory.files import write
from lightning_accie.trajectory.manifest import package_version

_ASSETS = "assets"
_CHART = "vendor/chart.umd.min.js"


@dataclass(frozen=True)
class Card:
    """One of the strongest samples.

    Attributes:
        index: its index.
        place: its place among the most harmful, or helpful, ones.
        rank: its place in the whole ranking.
        influence: as a text.
        exact: the exact influence as a text; empty where the sample was not replayed.
        estimate: the estimate, as a text.
        estimator: whose estimate the influence is; empty where it is exact.
        trusted: False where it is not to be relied on.
        visits: how often training drew it.
        shown: its picture, text and values.
        own: names and values of the user's columns.
    """

    index: int
    place: int
    rank: int
    influence: str
    exact: str
    estimate: str
    estimator: str
    trusted: bool
    visits: int
    shown: Shown
    own: tuple[tuple[str, str], ...]

    @property
    def described(self) -> str:
        """What a picture of it is called."""
        told = ", ".join(f"{name} {value}" for name, value in self.own[:3] if value)
        return f"Training example {self.index}" + (f": {told}" if told else "")


def write_report(
    scores: InfluenceScores,
    file: str | os.PathLike[str],
    *,
    top_k: int = 25,
    sample: ReadSample | None = None,
    render: Render | None = None,
    shown: Mapping[int, Shown] | None = None,
) -> Path:
    """Write the analysis as one HTML file, which opens from disk and loads nothing else.

    It says what influence is, how far this ranking can be trusted, which samples are the most harmful
    and most helpful, and has the table of all samples to search, sort and filter. ``scores.csv``
    beside the file is linked where it is there.

    **The pictures, texts and values of the strongest samples stand in the file** where ``sample`` is
    given, and the columns of ``describe=`` in any case: share it as you would share the data.

    Args:
        scores: what was found, of all samples.
        file: the file; replaced where it is there, and written whole or not at all.
        top_k: samples to show on each side.
        sample: reads a training sample by its index, such as `InfluenceEngine.sample`. Without it the
            samples are shown by their numbers and columns alone.
        render: your own way to show a sample: ``callable(sample)``; see `InfluenceCallback`.
        shown: in place of ``sample``: what is shown of each sample, by index.

    Returns:
        The file's path.

    Raises:
        RenderError: if ``render`` fails, or returns what cannot be shown.
        ValueError: if ``top_k`` is negative, or ``scores`` holds part of a ranking.
        OSError: where the file system refuses.

    Examples:
        >>> scores = engine.estimate("val_loss")  # doctest: +SKIP
        >>> write_report(scores, "report.html", sample=engine.sample)  # doctest: +SKIP
        PosixPath('report.html')
    """
    path = Path(file)
    if scores.rank is not None and len(scores) and int(scores.rank.max()) > len(scores):
        raise ValueError("`scores` holds part of a ranking: give the scores of all samples.")
    harmful, helpful = scores.top_harmful(top_k), scores.top_helpful(top_k)
    if sample is not None:
        strongest = [*harmful.index.tolist(), *helpful.index.tolist()]
        shown = in_a_page(render_samples(sample, strongest, render))
    cards = [_cards(top, shown or {}) for top in (harmful, helpful)]
    page = _render(scores, cards[0], cards[1], path.absolute().parent)
    # Texts of the user's may be no valid Unicode.
    write(path.parent, path.name, page.encode("utf-8", errors="replace"))
    return path


def _render(
    scores: InfluenceScores, harmful: Sequence[Card], helpful: Sequence[Card], directory: Path
) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, _ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": _signed,
        "figure": _figure,
        "share": _share,
        "hundredths": _hundredths,
    }
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    chart, script = _asset(_CHART).partition("//# sourceMappingURL")[0], _asset("report.js")
    data = {
        "table": table(scores.ranked()),
        "histogram": figures.histogram(scores),
        "scatter": figures.scatter(scores),
        "query": words.query(scores),
    }
    return environment.get_template("report.html.j2").render(
        words=words,
        scores=scores,
        query=words.query(scores),
        facts=list(_facts(scores)),
        agreements=[(_whose(found), found) for found in scores.agreement],
        sides=(
            ("harmful", words.harmful_title(scores), harmful),
            ("helpful", words.helpful_title(scores), helpful),
        ),
        groups=figures.groups(scores),
        data=data,
        csv=CSV_FILE if (directory / CSV_FILE).is_file() else "",
        commands=commands.of(scores, directory),
        style=Markup(_asset("report.css")),
        scripts=[Markup(chart), Markup(script)],
        policy=_policy(chart, script),
        version=package_version(),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(_ASSETS, *name.split("/")).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """A content security policy: these scripts run, pictures are in the file, nothing is loaded."""
    digests = [sha256(script.encode("utf-8")).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _cards(top: InfluenceScores, shown: Mapping[int, Shown]) -> list[Card]:
    assert top.rank is not None  # `top` is a ranking
    rows = zip(top.index.tolist(), top.rank.tolist(), top.visits.tolist(), strict=True)
    return [
        Card(
            index=index,
            place=place + 1,
            rank=rank,
            influence=_signed(top.influence[place].item()),
            **_known(top, place),
            trusted=bool(top.trusted[place]),
            visits=visits,
            shown=shown.get(index, Shown()),
            own=tuple((clean(n), _figure(column[place])) for n, column in top.columns.items()),
        )
        for place, (index, rank, visits) in enumerate(rows)
    ]


def _known(top: InfluenceScores, place: int) -> dict[str, Any]:
    replayed = not top.exact[place].isnan()
    return {
        "exact": _signed(top.exact[place].item()) if replayed else "",
        "estimate": _signed(top.estimate[place].item()),
        "estimator": "" if replayed else top.estimator[place],
    }


def _facts(scores: InfluenceScores) -> Iterator[tuple[str, str]]:
    """The run in a line."""
    info = scores.info
    for key, name in (("module", "module"), ("optimizer", "optimiser")):
        if info.get(key):
            yield name, clean(info[key]).rpartition(".")[2]
    if info.get("precision"):
        yield "precision", clean(info["precision"])
    if info.get("samples"):
        yield "training examples", f"{info['samples']}, of which {len(scores)} were drawn"
    if info.get("estimator"):
        yield "estimator", clean(info["estimator"])
    yield "replayed exactly", f"{scores.replayed} of {len(scores)}"
    if info.get("seconds"):
        yield "analysis", f"{sum(info['seconds'].values()):.0f} s"


def _whose(found: Agreement) -> str:
    return {
        "verified": "all replayed",
        "strongest": "the strongest",
        "random": "drawn at random",
    }.get(found.sample, found.sample)


def _signed(value: float) -> str:
    return f"{value:+.2e}" if math.isfinite(value) else "unknown"


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return clean(value)
    return "–" if math.isnan(value) else f"{value:.4g}"


def _hundredths(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
