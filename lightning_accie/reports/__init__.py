"""Reports: what was found, where people look. A report reads `InfluenceScores`; it never computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lightning_accie.images import ReadSample
from lightning_accie.reports import csv, generic, tensorboard, wandb
from lightning_accie.reports.console import print_report
from lightning_accie.scores import InfluenceScores

_READERS = {"CSVLogger": csv, "TensorBoardLogger": tensorboard, "WandbLogger": wandb}


@rank_zero_only
def report_all(
    loggers: Iterable[Any],
    scores: InfluenceScores,
    *,
    step: int,
    top_k: int = 25,
    namespace: str = "influence",
    sample: ReadSample | None = None,
    console: bool = True,
) -> None:
    """Report to every logger, and on the terminal; on the process of rank 0 only.

    A logger that fails is named in a warning, and the others still get their report.

    Args:
        loggers: Lightning loggers, of `lightning.pytorch` or `pytorch_lightning`.
        scores: what was found.
        step: the training step to log at.
        top_k: samples to show on each side.
        namespace: what the names of metrics begin with.
        sample: reads a training sample by its index, for images of the strongest ones.
        console: whether to print.
    """
    for logger in loggers:
        try:
            _reader(logger).report(
                scores, logger, step=step, top_k=top_k, namespace=namespace, sample=sample
            )
        # Any error at all: it may come from a service, a file system or the user's dataset, and a
        # report that fails must cost neither the other reports nor the training run behind it.
        except Exception as error:
            rank_zero_warn(
                f"The influence report to {type(logger).__name__} is incomplete: "
                f"{type(error).__name__}: {error}"
            )
    if console:
        print_report(scores, top_k)


def _reader(logger: Any) -> Any:
    # By name: `lightning.pytorch` and `pytorch_lightning` have a class each.
    for base in type(logger).__mro__:
        if base.__name__ in _READERS:
            return _READERS[base.__name__]
    return generic
