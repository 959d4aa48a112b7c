"""The user's ``training_step`` as a function: of a recorded batch, parameters and sample weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accie.errors import ReplayMismatchError, TrajectoryError, UnsupportedError
from lightning_accie.replay import random_state
from lightning_accie.replay.batches import Batches, versions
from lightning_accie.replay.loss_form import LossForm
from lightning_accie.replay.neutral import StandInTrainer, neutral_copy
from lightning_accie.replay.operators import Differentiable
from lightning_accie.replay.outputs import Outputs
from lightning_accie.replay.per_sample import WeightedReduction
from lightning_accie.replay.precision import Precision
from lightning_accie.replay.random_state import Restorable
from lightning_accie.replay.state import Params
from lightning_accie.replay.statistics import RunningStatistics, tracks
from lightning_accie.replay.tape import Bound, Tape
from lightning_accie.trajectory.records import MicroBatch

SampleLosses = Callable[[Any, Any], Tensor]
"""``sample_losses(module, batch) -> [B]``: the user's own per-sample losses."""


class TrainingProgram:
    """A neutral copy of the module that evaluates recorded training steps.

    Args:
        module: the user's LightningModule; a copy of it is run.
        header: the trajectory's header.
        batches: where recorded batches come from.
        live: the trainer, where the analysis runs inside `fit`.
        datamodule: whose transfer hooks apply, if it overrides them.
        sample_losses: the user's per-sample losses, or None to find them in ``training_step``.
        device: where to compute.
        full_precision: whether `weighted` and the query run without the autocast of the recorded
            run. After float16 they always do: the scale of its loss keeps gradients within its
            narrow range, and would not do so for second derivatives.

    Attributes:
        recorded: the precision in which training ran, and in which `run` does.
        analysis: the precision of everything else.
    """

    def __init__(
        self,
        module: Any,
        header: Mapping[str, Any],
        batches: Batches,
        *,
        live: Any = None,
        datamodule: Any = None,
        sample_losses: SampleLosses | None = None,
        device: torch.device | None = None,
        full_precision: bool = False,
    ) -> None:
        self.header = header
        self.recorded = Precision(header["precision"])
        narrow = self.recorded.autocast is torch.float16
        self.analysis = self.recorded.full if full_precision or narrow else self.recorded
        self.batches = batches
        self.live = live
        self.device = device or torch.device("cpu")
        earlier = [(e["global_step"], e["trainer"]) for e in header.get("resumed", ())]
        self.trainer = StandInTrainer(header["trainer"], live, earlier)
        self.module = neutral_copy(module, self.trainer).to(self.device)
        self.sample_losses = sample_losses
        self.form = LossForm.from_json(header["loss_form"]) if "loss_form" in header else LossForm()
        self.untransformed: str | None = None
        """Why the step does not run under `torch.func`, where it does not; the probe finds out."""
        self.writes_buffers = False
        """Whether the step writes to buffers other than running statistics (spectral_norm does)."""
        self.substitute: Callable[[Any], Any] | None = None
        """Replaces the batch in `weighted`; the probe at fit start uses it."""
        self._works_in_place = False
        self._hooks = transfer_hooks(self.module, datamodule, self.device)
        self._takes_index = len(header["step_arguments"]) > 1
        self._set_modes(header["eval_modules"])
        named = dict(self.module.named_parameters())
        self.names: tuple[str, ...] = tuple(n for group in header["groups"] for n in group)
        self.trainable = tuple(name for name in self.names if name not in header["frozen"])
        self._places = parameter_places(self.module, {name: named[name] for name in self.names})
        self.parameters: Params = {name: named[name] for name in self.names}
        for name, parameter in named.items():
            parameter.requires_grad_(name in self.trainable)
            parameter.grad = None
        self.buffers = dict(self.module.named_buffers())
        self.statistics = RunningStatistics(self.module)
        parts = list(self.module.modules())
        self._tracking = [part for part in parts if tracks(part)]
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in parts)

    def _set_modes(self, eval_modules: list[str]) -> None:
        self.module.train()
        parts = dict(self.module.named_modules())
        for name in eval_modules:
            parts[name].training = False

    @property
    def tracks_statistics(self) -> bool:
        """Whether a normalisation layer updates running statistics in the step."""
        return bool(self._tracking)

    # ------------------------------------------------------------------ state of the copy

    def bind(self, params: Params) -> None:
        """Run the copy on these parameters from now on; nothing is copied.

        Each tensor stands where the module's own parameter stood, as a leaf of its own: graphs
        made before stay valid.
        """
        leaves = {name: params[name].detach() for name in self.names}
        for name in self.trainable:
            leaves[name].requires_grad_()
        self._put(leaves)

    def _put(self, params: Params) -> None:
        for name, places in self._places.items():
            for holder, key in places:
                holder[key] = params[name]
        self.parameters = params

    @contextmanager
    def _on(self, params: Params | None) -> Iterator[None]:
        """Run on explicit parameters, such as those of a `torch.func` transform."""
        if params is None:
            yield
            return
        before = self.parameters
        self._put(params)
        try:
            yield
        finally:
            self._put(before)

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Copy buffers into the copy; those not given stay."""
        with torch.no_grad():
            for name, value in buffers.items():
                self.buffers[name].copy_(value)

    def load_frozen(self, name: str, value: Tensor) -> None:
        """Copy in a parameter that the optimiser does not update.

        Raises:
            TrajectoryError: if the module has no such parameter of that shape.
        """
        target = dict(self.module.named_parameters()).get(name)
        if target is None or target.shape != value.shape:
            raise TrajectoryError(
                f"The trajectory holds a parameter `{name}` of shape {tuple(value.shape)}, which "
                "the module does not have. Pass the module that was trained."
            )
        with torch.no_grad():
            target.copy_(value)

    def buffer_versions(self) -> tuple[int, ...]:
        """Tell whether a buffer was written to since the last call.

        Returns:
            Autograd's version counter of every buffer.
        """
        return tuple(buffer._version for buffer in self.buffers.values())

    # ------------------------------------------------------------------ evaluating a step

    def batch(self, micro: MicroBatch) -> Any:
        """The recorded batch as ``training_step`` received it.

        Returns:
            The batch after the transfer hooks, on the device.
        """
        return self.prepared(self.batches.fetch(micro))

    def prepared(self, batch: Any) -> Any:
        """A batch of `batches` as ``training_step`` would receive it.

        Returns:
            The batch after the transfer hooks, on the device.
        """
        return batch if self.batches.ready else self.transfer(batch)

    def transfer(self, batch: Any) -> Any:
        """Convert and move a batch as the Trainer did.

        Returns:
            The batch after the precision's conversion and the transfer hooks, on the device.
        """
        if self.recorded.name == "64-true":
            batch = pytree.tree_map(_to_double, batch)
        return self._hooks(batch, self.device) if self._hooks is not None else batch

    def run(self, micro: MicroBatch, random: Restorable | None) -> Tensor | None:
        """Run the step exactly as training did, buffers and generators included.

        Args:
            micro: the record.
            random: the generators' states before it, or None where it draws nothing.

        Returns:
            The returned loss with its graph, or None.
        """
        return self._evaluate(micro, random, self.recorded)

    def plain(self, micro: MicroBatch, random: Restorable | None) -> Tensor | None:
        """Run the step in the precision of the analysis, without weights.

        What buffers it writes to stay as they were, but for running statistics: those do not change
        what the step gives.

        Args:
            micro: the record.
            random: the generators' states before it, or None where it draws nothing.

        Returns:
            The returned loss with its graph, or None.
        """
        with self._buffers_kept() if self.writes_buffers else nullcontext():
            return self._evaluate(micro, random, self.analysis)

    def _evaluate(
        self, micro: MicroBatch, random: Restorable | None, precision: Precision
    ) -> Tensor | None:
        batch = self._prepare(micro, random)
        before = None if self._works_in_place else versions(batch)
        with precision.context(self.device.type):
            loss = self._training_step(batch, micro)
        self._works_in_place = before is None or versions(batch) != before
        return loss

    def _prepare(self, micro: MicroBatch, random: Restorable | None) -> Any:
        """Put generators and counters where they stood; gives the batch."""
        batch = self.batch(micro)
        if self.substitute is not None:
            batch = self.substitute(batch)
        if self._works_in_place:  # on a copy of its own: torch.func lets it change no other
            batch = pytree.tree_map_only(Tensor, Tensor.clone, batch)
        if random is not None:
            random.restore(self._cuda)
        self.trainer.stand_at(micro.epoch, micro.global_step, micro.rank)
        return batch

    def _training_step(self, batch: Any, micro: MicroBatch) -> Tensor | None:
        arguments = (batch, micro.batch_idx) if self._takes_index else (batch,)
        output = self.module.training_step(*arguments)
        return output.get("loss") if isinstance(output, Mapping) else output

    @property
    def _cuda(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None

    def random_now(self, *, host: bool) -> dict[str, Tensor]:
        """The generators' states.

        Args:
            host: whether those of `random` and `numpy.random` are among them.

        Returns:
            The states by name.
        """
        return random_state.capture(cuda=self._cuda, host=host)

    def precision(self) -> AbstractContextManager[None]:
        """Set up the precision of the analysis.

        Returns:
            The context to evaluate in; derivatives are taken outside of it, as training does.
        """
        return self.analysis.context(self.device.type)

    def weighted(
        self,
        micro: MicroBatch,
        random: Restorable | None,
        weights: Tensor,
        params: Params | None = None,
        *,
        around: bool = True,
    ) -> Tensor:
        """The step's loss with per-sample weights (method: section 1).

        Args:
            micro: the record.
            random: the generators' states before it, or None where it draws nothing.
            weights: ``[B]``.
            params: explicit parameters, or None for those bound.
            around: see `WeightedReduction`.

        Returns:
            Σ_i w_i ℓ_i/|m| + R, before the multiplication by c_m.

        Raises:
            ReplayMismatchError: if ``training_step`` returns None.
        """
        return self.observed(micro, random, weights, params, around=around)[0]

    def observed(
        self,
        micro: MicroBatch,
        random: Restorable | None,
        weights: Tensor,
        params: Params | None = None,
        *,
        around: bool = True,
    ) -> tuple[Tensor, list[Outputs]]:
        """The same, and what entered the losses; see `weighted` and `WeightedReduction.outputs`."""
        batch = self._prepare(micro, random)
        kept = self._buffers_kept() if self.writes_buffers else nullcontext()
        with self.precision(), self._differentiable(), self._on(params), kept:
            if self.sample_losses is not None:
                return self._with_sample_losses(batch, micro, random, weights), []
            spans = self.batches.spans(micro)
            with WeightedReduction(weights, self.form, spans=spans, around=around) as mode:
                loss = self._training_step(batch, micro)
        return _require(loss, micro), mode.outputs

    @contextmanager
    def fixed_statistics(self) -> Iterator[None]:
        """Let normalisation layers use their running statistics: no sample then sees another.

        Yields:
            Nothing.
        """
        for part in self._tracking:
            part.training = False
        try:
            yield
        finally:
            for part in self._tracking:
                part.training = True

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Set up what a derivative needs and a plain run does not.

        Normalisation layers use the batch's statistics without updating the running ones (the
        gradients are the same, and `torch.func` cannot update a buffer in place); recurrent layers
        run without mkldnn, which has no forward mode, and without cuDNN, which has no second
        derivative of them either.
        """
        mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        tracking = [part.track_running_stats for part in self._tracking]
        if self._recurrent:  # not `flags` of `torch.backends`, which warn, and set other things too
            torch._C._set_mkldnn_enabled(False)
            torch._C._set_cudnn_enabled(False)
        for part in self._tracking:
            part.track_running_stats = False
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(mkldnn)
            torch._C._set_cudnn_enabled(cudnn)
            for part, value in zip(self._tracking, tracking, strict=True):
                part.track_running_stats = value

    @contextmanager
    def held(self, params: Params | None = None) -> Iterator[None]:
        """Keep things as `weighted` has them, for a backward pass that runs parts of it again.

        Activation checkpointing does, in the precision that it remembers itself.

        Args:
            params: explicit parameters, or None for those bound.

        Yields:
            Nothing.
        """
        with self._differentiable(), self._on(params), Differentiable():
            yield

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}
        versions = self.buffer_versions()
        try:
            yield
        finally:
            if self.buffer_versions() != versions:
                self.load_buffers(before)

    def _with_sample_losses(
        self,
        batch: Any,
        micro: MicroBatch,
        random: Restorable | None,
        weights: Tensor,
    ) -> Tensor:
        assert self.sample_losses is not None
        twice = self.form.penalty  # statistics follow training_step then, which runs below
        with Differentiable():
            with self.statistics.paused() if twice else nullcontext():
                losses = self.sample_losses(self.module, batch)
            if losses.shape != weights.shape:
                raise UnsupportedError(
                    f"`sample_losses` returned a tensor of shape {tuple(losses.shape)} for a batch "
                    f"of {len(weights)} samples; it must return one loss a sample, shape "
                    f"({len(weights)},)."
                )
            losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
            if not twice:
                return torch.dot(losses, weights.to(losses.dtype)) / len(weights)
            if random is not None:  # the second forward pass draws what the first drew
                random.restore(self._cuda)
            loss = _require(self._training_step(batch, micro), micro)
        return loss + torch.dot(losses, (weights - 1.0).to(losses.dtype)) / len(weights)


def parameter_places(
    module: nn.Module, parameters: Mapping[str, Tensor]
) -> dict[str, list[tuple[Any, Any]]]:
    """Find everywhere that a module keeps its parameters.

    Args:
        module: the module.
        parameters: the parameters of interest, by name.

    Returns:
        Per name, the containers and keys that hold the parameter: several where weights are tied,
        and the flat list that recurrent layers read.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    places: dict[str, list[tuple[Any, Any]]] = {name: [] for name in parameters}
    for part in module.modules():
        holders: list[tuple[Any, Any]] = [(part._parameters, key) for key in part._parameters]
        if isinstance(part, nn.RNNBase):
            holders += [(part._flat_weights, place) for place in range(len(part._flat_weights))]
        for holder, key in holders:
            if id(holder[key]) in names:
                places[names[id(holder[key])]].append((holder, key))
    return places


class RecordedLoss:
    """c_m L_m(θ, w) of one recorded micro-batch; a `MicroLoss`.

    Args:
        program: the module's training step.
        micro: the record.
        random: the generators' states before it, or None where it draws nothing.
        turn: how many micro-batches of this rank came before it in its step.
    """

    def __init__(
        self,
        program: TrainingProgram,
        micro: MicroBatch,
        random: Restorable | None,
        turn: int = 0,
    ) -> None:
        self._turn = turn
        self.tape: Tape | None = None
        self.program = program
        self.micro = micro
        self.random = random
        self.rank = micro.rank
        self.samples = torch.from_numpy(program.batches.sample_numbers(micro))
        # A tape keeps this, and the loss the tape: were it a method, neither would go before the
        # garbage collector finds them, and the graphs of a whole walk with them.
        self.held = partial(_held, program)

    def functional(
        self, params: Params, weights: Tensor, statistics: Params
    ) -> tuple[Tensor, Params]:
        """The loss from explicit parameters.

        Returns:
            A scalar, and the running statistics after it.
        """
        with self._following(statistics) as after:
            # Not `around`: forward mode over two gradients that meet fails on torch's symbolic zeros.
            loss = self.program.weighted(self.micro, self.random, weights, params, around=False)
        return loss / self.micro.divisor, after

    def bound(self, weights: Tensor, statistics: Params) -> Bound:
        """The loss from the bound parameters.

        Returns:
            A scalar with its graph, and what belongs to it.
        """
        with self._following(statistics) as after:
            loss, outputs = self.program.observed(self.micro, self.random, weights)
        return Bound(loss / self.micro.divisor, self.program.parameters, after, outputs)

    def _following(self, statistics: Params) -> AbstractContextManager[Params]:
        """DDP keeps the statistics of rank 0 alone."""
        if self.rank:
            return nullcontext(statistics)
        return self.program.statistics.following(statistics, self._turn)

    def ones(self) -> Tensor:
        """The weights of the real run.

        Returns:
            ``[B]`` ones.
        """
        parameter = next(iter(self.program.parameters.values()))
        return torch.ones(len(self.samples), dtype=parameter.dtype, device=parameter.device)


def _held(program: TrainingProgram, params: Params | None = None) -> AbstractContextManager[None]:
    """Where a backward pass over a loss belongs; see `TrainingProgram.held`."""
    return program.held(params) if program.untransformed is not None else nullcontext()


def _require(loss: Tensor | None, micro: MicroBatch) -> Tensor:
    if loss is None:
        raise ReplayMismatchError(
            f"training_step returned None for batch {micro.batch_idx} of epoch {micro.epoch}, but "
            "a loss in the recorded run: it depends on something that is not in the trajectory."
        )
    return loss


def _to_double(leaf: Any) -> Any:
    """What `Trainer(precision="64-true")` does to a batch."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


_TRANSFER_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


def overrides_transfer(module: Any, datamodule: Any) -> bool:
    """Whether a batch transfer hook is overridden.

    Args:
        module: the LightningModule.
        datamodule: the LightningDataModule, or None.

    Returns:
        Whether one of the hooks is the user's own.
    """
    return any(
        _overrides(owner, name) for owner in (module, datamodule) for name in _TRANSFER_HOOKS
    )


def _overrides(owner: Any, name: str) -> bool:
    defined_in = getattr(type(owner), name, None)
    return defined_in is not None and not defined_in.__qualname__.startswith("DataHooks.")


def transfer_hooks(
    module: Any, datamodule: Any, device: torch.device
) -> Callable[[Any, torch.device], Any] | None:
    """The batch transfer hooks in force.

    Args:
        module: the LightningModule.
        datamodule: the LightningDataModule, or None.
        device: where to.

    Returns:
        What runs them on a batch; None where none is overridden and all is on the CPU.
    """
    owners = [datamodule if _overrides(datamodule, name) else module for name in _TRANSFER_HOOKS]
    if device.type == "cpu" and not any(map(_overrides, owners, _TRANSFER_HOOKS)):
        return None

    def transfer(batch: Any, device: torch.device) -> Any:
        batch = owners[0].on_before_batch_transfer(batch, 0)
        batch = owners[1].transfer_batch_to_device(batch, device, 0)
        return owners[2].on_after_batch_transfer(batch, 0)

    return transfer
