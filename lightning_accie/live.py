"""`LiveView`: which samples harm while the run goes on.

At the end of each validation the optimiser steps since the last one are replayed, and SGD-IE walks back
over them: the influence that leaving a sample out of these steps alone would have on the query at the
present weights. The model, the optimiser, the loaders' generators and the random state are left as
they were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_accie.capture.generators import kept as kept_generators
from lightning_accie.capture.recording import Recording
from lightning_accie.capture.stretch import Stretch
from lightning_accie.data import validation_loaders
from lightning_accie.described import Describe, described
from lightning_accie.errors import QueryError, UnsupportedError
from lightning_accie.estimators import SgdIE
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.measure import Ladder, choose_product
from lightning_accie.query import ModuleQuery, QueryFunction
from lightning_accie.replay import random_state
from lightning_accie.replay.batches import Batches
from lightning_accie.replay.drawn import drawn
from lightning_accie.replay.module import SampleLosses, TrainingProgram
from lightning_accie.replay.probe import find_loss_form
from lightning_accie.replay.walker import Walker
from lightning_accie.reports import report_live
from lightning_accie.reports.words import live_line
from lightning_accie.scores import InfluenceScores


def check_live(trainer: Any) -> None:
    """Refuse what leaves nothing to see; called in ``on_fit_start``.

    Args:
        trainer: the Trainer.

    Raises:
        UnsupportedError: naming the setting, and what to do instead.
    """
    if trainer.world_size > 1:
        raise UnsupportedError(
            f"`live=True` works in one process, and this run has {trainer.world_size}. Leave `live` "
            "out: the ranking at the end of `fit` covers all of them."
        )
    if not trainer.enable_validation:
        raise UnsupportedError(
            "`live=True` shows influence at the end of each validation, and this `fit` has none: "
            "there are no validation data, no `validation_step`, or `limit_val_batches` is 0. Give "
            "validation data, or leave `live` out."
        )


@dataclass
class LiveView:
    """Ranks the samples of the steps since the last validation, and tells of the most harmful.

    A view that fails is told in a warning, and is the last one of this `fit`: training goes on.

    Attributes:
        monitor: see `InfluenceCallback`, as all that follow.
        estimator: walks back over the steps.
        top_k: how many harmful samples to tell of.
        memory_budget: bytes.
        sample_losses: the user's per-sample losses, or None.
        query_dataloader: batches for the query, or None for the Trainer's validation data.
        describe: the user's columns, for the samples that are told of.
        full_precision: whether to compute without autocast.
    """

    monitor: QueryFunction | str
    estimator: SgdIE
    top_k: int
    memory_budget: int
    sample_losses: SampleLosses | None
    query_dataloader: Any
    describe: Describe | None
    full_precision: bool
    _product: str = ""
    _warned: bool = field(default=False)
    _ended: bool = field(default=False)

    def look(self, recording: Recording, module: Any, trainer: Any) -> InfluenceScores | None:
        """Rank and tell; called in ``on_validation_end``.

        Args:
            recording: the run so far.
            module: the LightningModule.
            trainer: the Trainer.

        Returns:
            The scores of the samples that were drawn since the last call; None where there is no view.
        """
        if self._ended or not recording.running:
            return None
        try:
            if recording.mid_window():
                self._tell_of_accumulation()
                return None
            cut = recording.cut()
            if cut is None:
                return None
            stretch, source = cut
            last = trainer.global_step
            with self._untouched(source, trainer):
                scores = self._scores(stretch, source, module, trainer, last)
                top = self._described(scores.top_harmful(self.top_k), source)
            rank_zero_info(live_line(scores))
            report_live(trainer.loggers, scores, top, step=last, run=recording)
        # Any error at all: it may come from the user's module or data, and must not end the training.
        except Exception as error:
            self._ended = True
            recording.cut_no_more()
            rank_zero_warn(
                f"InfluenceCallback shows no live view any more: {type(error).__name__}: {error} "
                "Training goes on, and so does the recording."
            )
            return None
        return scores

    def _tell_of_accumulation(self) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "A validation came in the middle of an accumulation window, where there is no live "
                "view: the steps count for the next one. Let `val_check_interval` be a multiple of "
                "`accumulate_grad_batches`."
            )

    @contextmanager
    def _untouched(self, source: Batches, trainer: Any) -> Iterator[None]:
        """Compute with gradients, within Lightning's validation, and leave everything as it is."""
        device = trainer.strategy.root_device
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            random_state.isolated(device if device.type == "cuda" else None),
            kept_generators([source, trainer.datamodule]),
        ):
            yield

    def _validation(self, trainer: Any) -> tuple[list[Any], Any]:
        """The loaders of the validation that has just ended, and the batches to take from each."""
        if self.query_dataloader is not None:
            return validation_loaders(self.query_dataloader), None
        loop = trainer.fit_loop.epoch_loop.val_loop
        return validation_loaders(loop._combined_loader), loop._max_batches or None

    def _scores(
        self, stretch: Stretch, source: Batches, module: Any, trainer: Any, last: int
    ) -> InfluenceScores:
        module = getattr(module, "_orig_mod", module)  # what `torch.compile` was given
        replay = self._replay(stretch, source, module, trainer)
        value = replay.query.value(replay.final.state.visible)
        if not math.isfinite(value):
            raise QueryError(f"`{replay.query.name}` is {value}.")
        found = self.estimator.estimate(replay)
        count = len(found.samples)
        return InfluenceScores(
            index=found.samples,
            influence=found.influence,
            estimate=found.influence,
            visits=replay.visits,
            exact=torch.full((count,), float("nan"), dtype=torch.float64),
            estimator=(found.estimator,) * count,
            trusted=found.trusted,
            info={
                "query": replay.query.name,
                "query_value": value,
                "estimator": found.estimator,
                "settings": self.estimator.settings(),
                "steps": len(stretch),
                "window": [last - len(stretch) + 1, last],
            },
        )

    def _replay(self, stretch: Stretch, source: Batches, module: Any, trainer: Any) -> Replay:
        device = trainer.strategy.root_device
        program = TrainingProgram(
            module,
            stretch.header,
            source,
            live=trainer,
            datamodule=trainer.datamodule,
            sample_losses=self.sample_losses,
            device=device,
            full_precision=self.full_precision,
        )
        walker = Walker(stretch, program, memory_budget=self.memory_budget // 2)
        find_loss_form(program, walker.first_loss().map.losses[0])  # type: ignore[arg-type]
        if self._product:
            walker.product = self._product
        else:
            choose_product(Ladder(walker))
            self._product = walker.product
        final = walker.final()
        samples, visits, first, after = drawn(stretch, source)
        loaders, limits = self._validation(trainer)
        query = ModuleQuery(
            program,
            module,
            self.monitor,
            loaders,
            limits=limits,
            buffers=final.buffers,
            memory_budget=self.memory_budget // 4,
        )
        half = self.memory_budget // 2
        return Replay(walker, query, samples, visits, first, after, final, memory_budget=half)

    def _described(self, top: InfluenceScores, source: Batches) -> InfluenceScores:
        if self.describe is None:
            return top
        return top.with_columns(**described(self.describe, top.index.tolist(), source.sample))
