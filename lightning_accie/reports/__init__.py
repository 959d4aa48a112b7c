"""Reports: what was found, where people look. A report reads `InfluenceScores`; it never computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_accie.images import ReadSample
from lightning_accie.rendered import Render, Rendered, render_samples
from lightning_accie.reports import comet, csv, generic, mlflow, neptune, tensorboard, wandb, words
from lightning_accie.reports.console import print_report
from lightning_accie.reports.metrics import live_scalars
from lightning_accie.reports.namespaces import namespace_of
from lightning_accie.reports.report import Report
from lightning_accie.scores import InfluenceScores

_READERS = {
    "CSVLogger": csv,
    "CometLogger": comet,
    "MLFlowLogger": mlflow,
    "NeptuneLogger": neptune,
    "TensorBoardLogger": tensorboard,
    "WandbLogger": wandb,
}


@rank_zero_only
def report_all(
    loggers: Iterable[Any], report: Report, *, run: object = None, console: bool = True
) -> None:
    """Report to every logger, and on the terminal; on the process of rank 0 only.

    A logger that fails is named in a warning, and the others still get their report.

    Args:
        loggers: Lightning loggers, of `lightning.pytorch` or `pytorch_lightning`.
        report: what was found.
        run: what stands for one callback in one `fit`; None for a run of its own. Each has names of
            its own in a logger.
        console: whether to print.
    """
    run = object() if run is None else run
    for logger in loggers:
        try:
            _reader(logger).report(report, logger, namespace_of(logger, run))
        # Any error at all: it may come from a service or a file system, and a report that fails must
        # cost neither the other reports nor the training run behind it.
        except Exception as error:
            rank_zero_warn(
                f"The influence report to {type(logger).__name__} is incomplete: "
                f"{type(error).__name__}: {error}"
            )
    if console:
        print_report(report.scores, report.top_k)


def render_strongest(
    scores: InfluenceScores, top_k: int, sample: ReadSample, render: Render | None
) -> dict[int, Rendered]:
    """Read what the reports show of the strongest samples.

    What fails is told in a warning: a report must cost neither the ranking nor the training run.

    Args:
        scores: what was found.
        top_k: samples on each side.
        sample: reads a training sample by its index.
        render: the user's own way to show one.

    Returns:
        What is shown of each, by index; nothing where that failed.
    """
    strongest = [*scores.top_harmful(top_k).index, *scores.top_helpful(top_k).index]
    try:
        return render_samples(sample, map(int, strongest), render)
    # Any error at all: it may come from the user's dataset or function.
    except Exception as error:
        rank_zero_warn(
            "The influence reports show no pictures or texts: reading the samples failed: "
            f"{type(error).__name__}: {error}. The scores are not affected."
        )
        return {}


@rank_zero_only
def report_live(
    loggers: Iterable[Any],
    scores: InfluenceScores,
    top: InfluenceScores,
    *,
    step: int,
    run: object,
) -> None:
    """Tell every logger of the samples that harm most while the run goes on; on rank 0 only.

    Args:
        loggers: Lightning loggers.
        scores: of the samples that the latest steps drew.
        top: the most harmful of them, with the user's columns.
        step: the training step to log at.
        run: see `report_all`.
    """
    for logger in loggers:
        namespace = f"{namespace_of(logger, run)}/live"
        logger.log_metrics(live_scalars(scores, namespace), step=step)
        table = getattr(_reader(logger), "table", None)
        if table is not None and len(top):
            table(top, words.live_title(scores), logger, f"{namespace}/top_harmful", step)


def _reader(logger: Any) -> Any:
    # By name: `lightning.pytorch` and `pytorch_lightning` have a class each.
    for base in type(logger).__mro__:
        if base.__name__ in _READERS:
            return _READERS[base.__name__]
    return generic
