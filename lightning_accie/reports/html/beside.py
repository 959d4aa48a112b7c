"""The report that the callback leaves beside the scores, and what it takes to make it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie.rendered import Rendered
from lightning_accie.reports.html.page import write_report
from lightning_accie.reports.html.samples import Shown, in_a_page, write_examples
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import EXAMPLES_FILE, REPORT_FILE


def write_beside(
    scores: InfluenceScores, directory: Path, *, top_k: int, rendered: Mapping[int, Rendered]
) -> None:
    """Write ``report.html``, and ``examples.json`` where it shows samples.

    What fails is told in a warning: a report must cost neither the ranking nor the training run.

    Args:
        scores: what was found.
        directory: where the scores are.
        top_k: samples to show on each side.
        rendered: what is shown of the strongest samples, by index; of none to show numbers alone.
    """
    shown: dict[int, Shown] = {}

    def encode() -> None:
        shown.update(in_a_page(rendered))

    def keep() -> None:
        write_examples(directory, shown)

    def page() -> None:
        path = write_report(scores, directory / REPORT_FILE, top_k=top_k, shown=shown)
        rank_zero_info(f"Influence report: {path}")

    _try(encode, "The influence report shows no pictures or texts")
    if shown:
        _try(keep, f"{EXAMPLES_FILE}, to make the report again with, was not written")
    _try(page, f"The influence report {directory / REPORT_FILE} was not written")


def _try(do: Callable[[], None], what: str) -> None:
    try:
        do()
    # Any error at all: it may come from pillow or the file system.
    except Exception as error:
        rank_zero_warn(f"{what}: {type(error).__name__}: {error}. The scores are not affected.")
