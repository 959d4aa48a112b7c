"""The first-step self-check: the first optimiser step of `fit` is replayed at once.

What cannot be replayed is refused within the first seconds, not after hours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_accie.capture.stretch import Stretch
from lightning_accie.described import Describe, described
from lightning_accie.errors import ReplayMismatchError, UnsupportedError
from lightning_accie.rendered import Render, render_samples
from lightning_accie.replay import random_state
from lightning_accie.replay.batches import Batches
from lightning_accie.replay.data_check import compare_data
from lightning_accie.replay.loss_form import LossForm
from lightning_accie.replay.module import SampleLosses, TrainingProgram
from lightning_accie.replay.probe import check_derivatives, find_loss_form
from lightning_accie.replay.state import State
from lightning_accie.replay.walker import Snapshot, Visit, Walker

CACHE = 2**26
"""Bytes of memory that the check may take."""
QueryCheck = Callable[[TrainingProgram, Snapshot], None]
RoomCheck = Callable[[Walker], None]
_MOVEMENT_TOLERANCE = 0.05
"""Adam's first step turns rounding into movement where a gradient is next to zero."""
_ROUNDINGS = 50
"""A gradient of as many roundings of the largest one is nothing but rounding, ..."""
_NOTICEABLE = 0.01
"""... and matters where it moved its parameter by such a share of what the step moved at most."""


def check_first_step(
    first: Stretch,
    module: Any,
    source: Batches,
    *,
    live: Any = None,
    datamodule: Any = None,
    sample_losses: SampleLosses | None = None,
    probe: Callable[[Visit], None] | None = None,
    check_query: QueryCheck | None = None,
    check_room: RoomCheck | None = None,
    describe: Describe | None = None,
    render: Render | None = None,
    device: torch.device | None = None,
    full_precision: bool = False,
) -> LossForm:
    """Replay the first step, compare, and find the per-sample losses.

    Args:
        first: the recorded step between its two states.
        module: the user's module, in any state.
        source: where the step's batches come from.
        live: the trainer.
        datamodule: the trainer's datamodule, or None.
        sample_losses: the user's per-sample losses, or None.
        probe: what the estimator computes at a step (`Estimator.probe`), tried here.
        check_query: tries the query, given the replayed module and the state after the step.
        check_room: refuses a memory budget that is too small for the analysis.
        describe: the user's columns, tried on the first sample here; None where nobody will ask.
        render: the user's way to show a sample, tried on it too.
        device: where training runs.
        full_precision: see `TrainingProgram`.

    Returns:
        How the loss splits into per-sample parts.

    Raises:
        UnsupportedError: with the reason, if the step cannot be replayed or split.
        DescribeError: if ``describe`` fails.
        RenderError: if ``render`` fails.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    with random_state.isolated(cuda), torch.compiler.set_stance("force_eager"):
        program = TrainingProgram(
            module,
            first.header,
            source,
            live=live,
            datamodule=datamodule,
            sample_losses=sample_losses,
            device=device,
            full_precision=full_precision,
        )
        try:
            compare_data(first.step(0).micro_batches, source)
        except ReplayMismatchError as error:
            raise UnsupportedError(f"The first batch cannot be fetched again. {error}") from error
        walker = Walker(first, program, memory_budget=CACHE)
        try:
            visit = next(walker.forwards())
        except ReplayMismatchError as error:
            raise UnsupportedError(
                f"The first training step could not be replayed. {error} (If the data are made at "
                'random in a way that was not noticed, `capture="batches"` keeps them as they were.)'
            ) from error
        _check_finite(first)
        form = find_loss_form(program, visit.map.losses[0])  # type: ignore[arg-type]
        if program.statistics.left_out:
            rank_zero_warn(_left_out(program.statistics.left_out))
        settled = replace(visit.map, penalty=form.penalty, transforms=program.untransformed is None)
        visit = replace(visit, map=settled)
        _check_movement(walker.again(visit), visit, first)
        if noise := _moved_by_rounding(visit, first):
            rank_zero_warn(_noisy(noise))
        if probe is not None:
            check_derivatives(probe, visit)
        if check_room is not None:
            check_room(walker)
        if check_query is not None:
            check_query(program, walker.final())
        if describe is not None:
            described(describe, _first_sample(first, source), source.sample)
        if render is not None:
            render_samples(source.sample, _first_sample(first, source), render)
    return form


def _moved_by_rounding(visit: Visit, first: Stretch) -> list[str]:
    """Parameters whose gradient is next to nothing, and that Adam moves all the same."""
    after = first.checkpoint(1).tensors
    params = visit.state.params
    slopes = {n: after[f"slots/{n}/exp_avg"] for n in params if f"slots/{n}/exp_avg" in after}
    sizes = {n: float(slope.abs().max()) for n, slope in slopes.items() if slope.numel()}
    moved = {n: float((after[f"params/{n}"].to(params[n]) - params[n]).abs().max()) for n in sizes}
    largest, farthest = max(sizes.values(), default=0.0), max(moved.values(), default=0.0)
    return [
        name
        for name, size in sizes.items()
        if 0 < size <= _ROUNDINGS * torch.finfo(params[name].dtype).eps * largest
        and moved[name] > _NOTICEABLE * farthest
    ]


def _noisy(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4]) + (", …" if len(names) > 4 else "")
    return (
        f"The gradient of {shown} is no more than rounding, as that of a bias in front of BatchNorm, "
        "which subtracts it again. Adam scales it up to steps of full size, so that exact replays "
        "depend on rounding and no estimate follows them. Use `bias=False` there, or "
        '`Trainer(precision="64-true")`.'
    )


def _first_sample(first: Stretch, source: Batches) -> list[int]:
    numbers = [source.sample_numbers(micro).tolist() for micro in first.step(0).micro_batches]
    return [number for part in numbers for number in part][:1]


def _left_out(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4]) + (", …" if len(names) > 4 else "")
    return (
        f"The running statistics {shown} follow something else than what enters their layers once a "
        "batch (activation checkpointing runs the layers twice), so InfluenceCallback cannot tell what "
        "they would have been without an example. It takes those of the recorded run, which may "
        "change the influence of single examples, in sign too. Keep normalisation layers out of what "
        "is checkpointed, or use GroupNorm or LayerNorm."
    )


def _check_finite(first: Stretch) -> None:
    """A step that leaves no finite weights says nothing about the module."""
    losses = [micro.loss for micro in first.step(0).micro_batches if micro.loss is not None]
    tensors = first.checkpoint(1).tensors
    lost = [n for n, t in tensors.items() if n.startswith("params/") and not t.isfinite().all()]
    if lost or not all(map(math.isfinite, losses)):
        loss = ", ".join(f"{loss:.4g}" for loss in losses)
        raise UnsupportedError(
            f"Training diverged at its first step (loss {loss}"
            + (f"; `{lost[0].partition('/')[2]}` is not finite after it" if lost else "")
            + "), so there is nothing to analyse. Look at the data, the initial weights and the "
            "learning rate."
        )


def _check_movement(replayed: State, visit: Visit, first: Stretch) -> None:
    """The gradient of the returned loss must be all that moved the parameters."""
    # Compared with how far they moved, which may be little beside their size.
    after = first.checkpoint(1).tensors
    moved = missed = 0.0
    for name, before in visit.state.params.items():
        recorded = after[f"params/{name}"].to(before)
        moved += float((recorded - before).double().square().sum())
        missed += float((recorded - replayed.params[name]).double().square().sum())
    if not missed <= _MOVEMENT_TOLERANCE**2 * moved:
        hooks = ", ".join(f"`{hook}`" for hook in first.header["overridden_hooks"])
        raise UnsupportedError(
            "The first optimiser step moved the parameters otherwise than the gradient of the "
            "returned loss does, so something changed the gradients or the weights. It may be "
            "another callback (`on_before_optimizer_step`), "
            + (f"or what the module overrides: {hooks}, " if hooks else "")
            + "or a parameter that `training_step` reaches through a list of its own. A replay runs "
            "none of it: put it into the loss, or leave InfluenceCallback out."
        )
