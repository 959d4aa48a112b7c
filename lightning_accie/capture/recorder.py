"""Hook events -> the records of a trajectory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from lightning_accie.capture.draws import DrawWatch, Verdict
from lightning_accie.capture.patch import Patch
from lightning_accie.capture.snapshot import parameter_groups, take
from lightning_accie.capture.support import overridden_hooks, step_arguments
from lightning_accie.capture.weight_watch import WeightWatch
from lightning_accie.replay.update_rules import qualified_name
from lightning_accie.trajectory.records import Checkpoint, GroupSettings, MicroBatch, Piece, Step

_FACTS = (
    "max_epochs",
    "max_steps",
    "num_training_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "world_size",
    "global_rank",
    "num_devices",
    "num_nodes",
)


class Sink(Protocol):
    """Where records go: a `TrajectoryWriter`."""

    def append(self, step: Step) -> None:
        """Take the next step."""
        ...

    def wants_checkpoint(self, step: int) -> bool:
        """Tell whether the state before ``step`` is to be kept."""
        ...

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep a state."""
        ...


def describe(
    trainer: Any, module: Any, sources: list[Any], monitor: str, capture: str
) -> dict[str, Any]:
    """Write a trajectory's header.

    Args:
        trainer: the Trainer at train start.
        module: the LightningModule.
        sources: the flattened training dataloaders.
        monitor: the query's name.
        capture: ``"indices"`` or ``"batches"``.

    Returns:
        JSON values that a replay needs, or that an error message wants to name.
    """
    optimizer = trainer.optimizers[0]
    groups = parameter_groups(module, optimizer)
    named = dict(module.named_parameters())
    clip = trainer.gradient_clip_val
    algorithm = trainer.gradient_clip_algorithm or "norm"
    facts = {name: getattr(trainer, name, None) for name in _FACTS}
    return {
        "module": qualified_name(type(module)),
        "parameters": [[n, list(p.shape), str(p.dtype)] for n, p in named.items()],
        "groups": [list(group) for group in groups],
        "frozen": [n for group in groups for n in group if not named[n].requires_grad],
        "optimizer": qualified_name(type(optimizer)),
        "clip": {"algorithm": str(getattr(algorithm, "value", algorithm)), "value": float(clip)}
        if clip
        else None,
        "precision": str(trainer.precision),
        "eval_modules": [n for n, part in module.named_modules() if not part.training],
        "step_arguments": step_arguments(module),
        "overridden_hooks": overridden_hooks(module),
        "trainer": {n: v for n, v in facts.items() if isinstance(v, (int, float, type(None)))},
        "loaders": [
            {"samples": len(loader.dataset), "batch_size": loader.batch_size} for loader in sources
        ],
        "capture": capture,
        "monitor": monitor,
        "device": str(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lightning": str(lightning.__version__),
        },
    }


Keep = Callable[[Any, tuple[Piece, ...]], tuple[tuple[Piece, ...], int] | None]
"""Keeps a batch: its samples and its number, or None where recording has just stopped."""


class Recorder:
    """Watches one `fit` and writes down its steps.

    A step ends when the optimiser's post-step hook fires. Its record is complete when it is also
    known whether its last batch drew random numbers, which may be at the start of the next one.
    A step that a `GradScaler` skips, because its gradients overflowed, moves nothing: its batches
    leave no record.

    Args:
        trainer: the Trainer, about to train.
        module: the LightningModule.
        claim: gives the pieces of the batch just delivered, and checksums of its samples.
        enabled: whether events count now; false while a tuner borrows the trainer.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        claim: Callable[[], tuple[tuple[Piece, ...], np.ndarray | None]],
        enabled: Callable[[], bool],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._claim = claim
        self._enabled = enabled
        self._optimizer: torch.optim.Optimizer = trainer.optimizers[0]
        self._groups = parameter_groups(module, self._optimizer)
        # What `trainer.current_epoch` and `trainer.global_step` read, several properties further in.
        loop = trainer.fit_loop
        self._epochs = loop.epoch_progress.current
        self._optimizer_steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        device = trainer.strategy.root_device
        self.weights = WeightWatch(trainer, module, overridden_hooks(module))
        self._draws = DrawWatch(device if device.type == "cuda" else None)
        self._open: Callable[..., MicroBatch] | None = None
        self._due = False
        self._fresh = True
        self.pieces: tuple[Piece, ...] = ()
        self._prints: np.ndarray | None = None
        self._batch_idx = 0
        self._pending: list[MicroBatch] = []
        self._settings: tuple[GroupSettings, ...] = ()
        self._groups_seen: list[dict[str, Any]] | None = None
        self._hook: RemovableHandle | None = None
        self._patch: Patch | None = None
        self._scale = 1.0
        self.steps = 0
        self.stepping = False
        """Whether the optimiser is about to step and has not been seen to have stepped."""
        self.sink: Sink | None = None
        self.on_first_call: Callable[[], None] | None = None
        self.on_written: Callable[[], None] | None = None
        """Called when the weights were first written to by something besides the optimiser."""
        self.keep: Keep | None = None

    # ------------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Start watching ``training_step`` and the optimiser."""
        self._patch = Patch(self._trainer.strategy, "training_step", self._watching)
        self._hook = self._optimizer.register_step_post_hook(self._stepped)

    def detach(self) -> None:
        """Undo `attach`; may be called twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._patch is not None:
            self._patch.undo()
            self._patch = None

    def _watching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self._enabled():
                return self._watch(original, *args, **kwargs)
            return original(*args, **kwargs)

        return training_step

    # ------------------------------------------------------------------ events

    def batch_started(self, batch_idx: int) -> None:
        """Note the batch that is about to be trained on."""
        self.pieces, self._prints = self._claim()
        self._batch_idx = batch_idx

    def initial(self, *, copy: bool = True) -> Checkpoint:
        """Take the state as one to begin with: frozen parameters are part of it.

        Args:
            copy: whether the tensors are copies rather than the live ones.

        Returns:
            The checkpoint, of step 0.
        """
        return self.take(0, copy=copy)

    def take(self, step: int, *, copy: bool = False) -> Checkpoint:
        """Take the full state now.

        Returns:
            The checkpoint before step ``step``.
        """
        random = self._draws.left_behind
        return take(step, self._module, self._optimizer, self._groups, random, copy=copy)

    def _watch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` and record it as a micro-batch."""
        if self.on_first_call is not None:
            self.on_first_call()
            self.on_first_call = None
            self.weights.begin()
        elif self.weights.before(self.steps + self._due) and self.on_written is not None:
            self.on_written()
        pieces, number = self.pieces, None
        if self.keep is not None:  # before the step, which may change its batch in place
            kept = self.keep(args[0], pieces)
            if kept is None:
                return original(*args, **kwargs)
            pieces, number = kept
        epoch, global_step = self._epochs.completed, self._optimizer_steps.total.completed
        self._close(self._draws.begin())
        self._drop_skipped()
        output = original(*args, **kwargs)
        if self._fresh:
            self.weights.within()
        self._open = partial(
            MicroBatch,
            pieces,
            self._batch_idx,
            epoch,
            global_step,
            _loss_value(output),
            self._trainer.accumulate_grad_batches,
            batch=number,
            prints=self._prints if number is None else None,
        )
        self._close(self._draws.end())
        return output

    def _close(self, verdict: Verdict | None) -> None:
        """What the open micro-batch drew is known now: its record, and its step's, are complete."""
        if verdict is None or self._open is None:
            return
        self._pending.append(self._open(draws=verdict.draws, random=verdict.random))
        self._open = None
        if self._due:
            self._emit()

    def forget_random(self) -> None:
        """Let a replay begin here without the generators' states that a checkpoint would hold."""
        self._draws.forget()

    def settle(self) -> None:
        """Complete the record of the last step, if it is still open."""
        # Other code may have drawn since, so what the generators are at now is not the call's doing.
        self._close(self._draws.settle(right_after=False))
        self._drop_skipped()

    def _drop_skipped(self) -> None:
        """Forget the batches of a step that is over without the optimiser having moved anything."""
        if not self._pending or self._pending[-1].global_step == self._trainer.global_step:
            return
        if any(micro.draws for micro in self._pending):
            self._draws.forget()
        self._pending.clear()
        self.stepping = False

    @property
    def processes(self) -> int:
        """How many take part in the run."""
        return int(self._trainer.world_size)

    @property
    def mid_window(self) -> bool:
        """Whether micro-batches have run whose step has not."""
        return bool(self._pending) or self._open is not None

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimiser has stepped; read the settings before any scheduler moves them."""
        self.stepping = False
        if not self._enabled() or self.sink is None:
            return
        self.weights.stepped()
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser skips by itself
        if found_inf is not None and bool(found_inf):
            return
        scaler = getattr(self._trainer.strategy.precision_plugin, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._note_settings(optimizer.param_groups)
        self._due = True
        keep = self.sink.wants_checkpoint(self.steps + 1)
        if keep or self._fresh:  # the first step is complete at once: all ranks check it together
            self._close(self._draws.settle(right_after=True))
        if self._due and self._open is None:
            self._emit()
        if keep:
            self.sink.checkpoint(self.take(self.steps))

    def _note_settings(self, groups: list[dict[str, Any]]) -> None:
        """Read the settings in force; steps that have the same share one record of them."""
        now = [dict(group) for group in groups]
        if now == self._groups_seen:
            return
        settings = tuple(_settings(group) for group in groups)
        if settings != self._settings:
            self._settings = settings
        values = [v for group in now for name, v in group.items() if name != "params"]
        # A tensor or a list can change in place, and would then be equal to itself.
        self._groups_seen = now if all(map(_is_constant, values)) else None

    def _emit(self) -> None:
        assert self.sink is not None
        step = Step(self.steps, tuple(self._pending), self._settings, self._scale)
        self._pending.clear()
        self._due = self._fresh = False
        self.steps += 1
        self.sink.append(step)


def _loss_value(output: Any) -> float | None:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return None if loss is None else float(loss.item())


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's hyper-parameters as JSON values."""
    return {name: _plain(value) for name, value in group.items() if name != "params"}


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value
