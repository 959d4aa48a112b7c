"""Hook events -> the records of a trajectory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from lightning_accie.capture.draws import DrawWatch, Verdict
from lightning_accie.capture.indices import Drawn, pieces_of
from lightning_accie.capture.patch import Patch
from lightning_accie.capture.snapshot import parameter_groups, take
from lightning_accie.capture.support import overridden_hooks, step_arguments
from lightning_accie.capture.weight_watch import WeightWatch
from lightning_accie.replay.update_rules import qualified_name
from lightning_accie.trajectory.checkpoints import next_candidate
from lightning_accie.trajectory.records import Checkpoint, GroupSettings, MicroBatch, Piece, Step

_MOST_WAITING = 256
"""Complete steps that may wait to be made records of, ..."""
_LONGEST_WAIT = 1.0
"""... and the seconds that they may wait."""

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

    def extend(self, steps: Sequence[Step]) -> None:
        """Take the next steps."""
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


Claim = Callable[[], tuple[Drawn, np.ndarray | None]]
"""Gives what the batch just delivered is made of, and checksums of its samples."""

Keep = Callable[[Any, tuple[Piece, ...]], tuple[tuple[Piece, ...], int] | None]
"""Keeps a batch: its samples and its number, or None where recording has just stopped."""

_Call = list[Any]
"""A call of ``training_step`` as it is noted; `_micro_batch` makes a record of it. The verdict on the
random numbers that it drew comes last, and later."""


class Recorder:
    """Watches one `fit` and writes down its steps.

    A step ends when the optimiser's post-step hook fires. A step that a `GradScaler` skips, because
    its gradients overflowed, moves nothing: its batches leave no record.

    What is done at every step is kept to a handful of Python calls: between two steps of a model
    caches are cold, and each costs microseconds. So the steps are noted as plain lists, and records
    made of many at once.

    Args:
        trainer: the Trainer, about to train.
        module: the LightningModule.
        claim: gives the samples of the batch just delivered.
        owner: the callback. Events count while the trainer has it: a tuner that borrows the trainer
            takes its callbacks away.
    """

    def __init__(self, trainer: Any, module: Any, claim: Claim, owner: object) -> None:
        self._trainer = trainer
        self._module = module
        self._claim = claim
        self._owner = owner
        self._optimizer: torch.optim.Optimizer = trainer.optimizers[0]
        self._groups = parameter_groups(module, self._optimizer)
        # What `trainer.current_epoch`, `trainer.global_step` and the `batch_idx` of hooks are read
        # from, several properties further in.
        loop = trainer.fit_loop
        self._epochs = loop.epoch_progress.current
        self._batches = loop.epoch_loop.batch_progress
        progress = loop.epoch_loop.automatic_optimization.optim_progress
        self._optimizer_steps = progress.optimizer.step
        self._scaler = getattr(trainer.strategy.precision_plugin, "scaler", None)
        device = trainer.strategy.root_device
        self.weights = WeightWatch(trainer, module, overridden_hooks(module))
        self._draws = DrawWatch(device if device.type == "cuda" else None)
        self._window: list[_Call] = []  # the calls since the last step
        self._window_step = 0
        self._unjudged: list[_Call] = []
        self._complete: list[tuple[list[_Call], tuple[GroupSettings, ...], float]] = []
        self._handed_over = 0
        self._hand_over_at = 0.0
        self._next_of_note = 0
        self._settings: tuple[GroupSettings, ...] = ()
        self._groups_seen: list[dict[str, Any]] | None = None
        self._hook: RemovableHandle | None = None
        self._patches: list[Patch] = []
        self._scale = 1.0
        self._computed = False
        self.sink: Sink | None = None
        self.on_first_call: Callable[[tuple[Piece, ...]], None] | None = None
        self.on_written: Callable[[], None] | None = None
        """Called when the weights were first written to by something besides the optimiser."""
        self.keep: Keep | None = None

    # ------------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Start watching ``training_step``, the backward pass and the optimiser."""
        strategy = self._trainer.strategy
        self._patches = [
            Patch(strategy, "training_step", lambda original: partial(self._watch, original)),
            Patch(strategy, "backward", lambda original: partial(self._backward, original)),
        ]
        self._hook = self._optimizer.register_step_post_hook(self._stepped)

    def detach(self) -> None:
        """Undo `attach`; may be called twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for patch in self._patches:
            patch.undo()
        self._patches = []

    # ------------------------------------------------------------------ events

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._handed_over + len(self._complete)

    def go_on(self, steps: int) -> None:
        """Count from where an earlier part of the run ended."""
        self._handed_over = steps

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
        if not self._patches or self._owner not in self._trainer.callbacks:
            return original(*args, **kwargs)
        samples, prints = self._claim()
        if self.on_first_call is not None:
            self.on_first_call(pieces_of(samples))
            self.on_first_call = None
            self.weights.begin()
        elif self.weights.before(self.steps) and self.on_written is not None:
            self.on_written()
        pieces, number = None, None
        if self.keep is not None:  # before the step, which may change its batch in place
            kept = self.keep(args[0], pieces_of(samples))
            if kept is None:
                return original(*args, **kwargs)
            pieces, number = kept
        batch_idx, epoch = self._batches.current.ready - 1, self._epochs.completed
        global_step = self._optimizer_steps.total.completed
        self._computed = False
        if self._window and self._window_step != global_step:
            self._drop_skipped()
        verdicts = self._draws.begin()
        if verdicts:
            self._judge(verdicts)
        accumulate = self._trainer.accumulate_grad_batches
        call = [samples, pieces, number, prints, batch_idx, epoch, global_step, accumulate, None]
        self._unjudged.append(call)
        output = original(*args, **kwargs)
        if self._next_of_note == 0:  # no step was taken yet
            self.weights.within()
        loss = output if isinstance(output, torch.Tensor) else _loss_of(output)
        if loss is None:
            self._computed = True  # no backward pass follows
        else:
            call[-1] = _read(loss)
        self._window.append(call)
        self._window_step = global_step
        # What comes between two epochs draws: samplers, and the seeds of workers.
        if self._batches.is_last_batch:
            self._judge(self._draws.epoch_ends())
        elif self._draws.closely:
            self._judge(self._draws.settle(right_after=True))
        return output

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the backward pass; from here on the optimiser may be about to step."""
        output = original(*args, **kwargs)
        self._computed = True
        return output

    @property
    def stepping(self) -> bool:
        """Whether the optimiser is about to step and has not been seen to have stepped.

        The weights may be those of no step then.
        """
        now = self._optimizer_steps.current
        return now.ready > now.completed and self._computed

    def _judge(self, verdicts: Sequence[Verdict]) -> None:
        """It is known now whether the last calls drew random numbers."""
        for call, verdict in zip(self._unjudged, verdicts, strict=True):
            call.append(verdict)
        self._unjudged.clear()

    def interrupted(self) -> None:
        """Something besides training, such as a validation, is about to run between two calls."""
        if verdicts := self._draws.interrupted():
            self._judge(verdicts)

    def forget_random(self) -> None:
        """Let a replay begin here without the generators' states that a checkpoint would hold."""
        self._draws.forget()

    def settle(self) -> None:
        """Complete the records of all steps that were taken, and pass them on."""
        if self._window and self._window_step != self._optimizer_steps.total.completed:
            self._drop_skipped()
        self._hand_over()

    def _drop_skipped(self) -> None:
        """Forget the batches of a step that is over without the optimiser having moved anything."""
        self._judge(self._draws.settle(right_after=False))
        if any(call[-1].draws for call in self._window):
            self._draws.forget()
        self._window = []

    @property
    def processes(self) -> int:
        """How many take part in the run."""
        return int(self._trainer.world_size)

    @property
    def mid_window(self) -> bool:
        """Whether micro-batches have run whose step has not."""
        return bool(self._window)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimiser has stepped; read the settings before any scheduler moves them."""
        self._computed = False
        if self.sink is None or self._owner not in self._trainer.callbacks:
            return
        self.weights.stepped()
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser skips by itself
        if found_inf is not None and bool(found_inf):
            return
        if self._scaler is not None:
            self._scale = float(self._scaler.get_scale())
        if optimizer.param_groups != self._groups_seen:
            self._note_settings(optimizer.param_groups)
        self._complete.append((self._window, self._settings, self._scale))
        self._window = []
        waiting = len(self._complete)
        if self._handed_over + waiting >= self._next_of_note:
            self._note_state()
        elif waiting >= _MOST_WAITING or monotonic() >= self._hand_over_at:
            self._hand_over()

    def _note_state(self) -> None:
        """After the first step, which is checked at once, and where the state may be kept."""
        assert self.sink is not None
        self._next_of_note = next_candidate(self.steps)
        self._hand_over()
        if self._patches and self.sink.wants_checkpoint(self.steps):
            self.sink.checkpoint(self.take(self.steps))

    def _note_settings(self, groups: list[dict[str, Any]]) -> None:
        """Read the settings in force; steps that have the same share one record of them."""
        settings = tuple(map(_settings, groups))
        if settings != self._settings:
            self._settings = settings
        # A tensor or a list can change in place, and would then be equal to itself.
        constant = all(
            _is_constant(v) for group in groups for n, v in group.items() if n != "params"
        )
        self._groups_seen = list(map(dict, groups)) if constant else None

    def _hand_over(self) -> None:
        """Make records of the complete steps and pass them on."""
        # Hooks, or other code, may have drawn since the last call ended.
        self._judge(self._draws.settle(right_after=False))
        if self._complete:
            assert self.sink is not None
            steps = [
                Step(number, tuple(map(_micro_batch, window)), settings, scale)
                for number, (window, settings, scale) in enumerate(
                    self._complete, self._handed_over
                )
            ]
            self._handed_over += len(steps)
            self._complete = []
            self.sink.extend(steps)
        self._hand_over_at = monotonic() + _LONGEST_WAIT


def _micro_batch(call: _Call) -> MicroBatch:
    samples, pieces, number, prints, batch_idx, epoch, global_step, accumulate, loss, drawn = call
    return MicroBatch(
        pieces_of(samples) if pieces is None else pieces,
        batch_idx,
        epoch,
        global_step,
        None if loss is None else float(loss),
        accumulate,
        drawn.draws,
        drawn.random,
        batch=number,
        prints=prints if number is None else None,
    )


def _read(loss: torch.Tensor) -> Any:
    """A loss as a number; on another device as a copy, for which no step has to wait."""
    return loss.item() if loss.is_cpu else loss.detach().clone()


def _loss_of(output: Any) -> torch.Tensor | None:
    return output.get("loss") if isinstance(output, Mapping) else output


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
