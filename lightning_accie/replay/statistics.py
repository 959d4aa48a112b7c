"""The running statistics of normalisation layers, carried along with the weights.

In training, BatchNorm normalises by its batch's own mean and variance, and follows them,

    b <- (1 - f) b + f stat(x),

f being its ``momentum``. The query runs in evaluation mode and normalises by b. So b never reaches a
training loss, but through x it depends on every weight before the layer, and the query depends on it:
without the sample j the statistics too would have come out otherwise. They are a part of the state s_t
(method: section 1), linear in themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_accie.replay.state import Params

_Met = list[tuple[_NormBase, Tensor]]


class RunningStatistics:
    """Follows the running statistics of a module's layers as functions of what enters them.

    Args:
        module: the module, its layers in the modes of training.

    Attributes:
        names: the buffers that are followed; none where no layer tracks statistics.
        left_out: those that are not, since they come out otherwise than these formulas say.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = {id(buffer): name for name, buffer in module.named_buffers()}
        self._places: dict[_NormBase, tuple[str, str]] = {}
        self._met: _Met | None = None
        for part in module.modules():
            if tracks(part) and isinstance(part, (_BatchNorm, _InstanceNorm)):
                mean, variance = part.running_mean, part.running_var
                if mean is not None and variance is not None:
                    self._places[part] = (buffers[id(mean)], buffers[id(variance)])
                    part.register_forward_pre_hook(self._meet, with_kwargs=True)
        self.names = tuple(name for pair in self._places.values() for name in pair)
        self.left_out: tuple[str, ...] = ()

    def leave_out(self) -> None:
        """Follow none of them: they stay as the recorded run had them."""
        self.names, self.left_out = (), self.names

    def of(self, buffers: Any) -> Params:
        """Pick those that are followed.

        Args:
            buffers: a mapping of buffers by name.

        Returns:
            The running statistics by name.
        """
        return {name: buffers[name] for name in self.names}

    @contextmanager
    def following(self, before: Params, turn: int = 0) -> Iterator[Params]:
        """Follow them through one run of the training step.

        Args:
            before: the statistics before it; empty to follow none.
            turn: how many runs of this optimiser step came before it, which a cumulative average
                (``momentum=None``) needs to know.

        Yields:
            The statistics after it, put in when the context ends.
        """
        after = dict(before)
        outer, self._met = self._met, [] if before else None
        try:
            yield after
            calls: dict[_NormBase, int] = {}
            for part, entered in self._met or ():
                self._follow(after, part, entered, turn + calls.get(part, 0))
                calls[part] = calls.get(part, 0) + 1
        finally:
            self._met = outer

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing for a while.

        Yields:
            Nothing.
        """
        met, self._met = self._met, None
        try:
            yield
        finally:
            self._met = met

    def _meet(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._met is not None:
            assert isinstance(part, _NormBase)
            self._met.append((part, args[0] if args else kwargs["input"]))

    def _follow(self, after: Params, part: _NormBase, entered: Tensor, turn: int) -> None:
        factor = part.momentum
        if factor is None:
            assert part.num_batches_tracked is not None
            factor = 1.0 / (int(part.num_batches_tracked) + turn + 1)
        for name, value in zip(self._places[part], _moments(part, entered), strict=True):
            old = after[name]
            after[name] = (1.0 - factor) * old + factor * value.to(old.dtype)


def tracks(part: nn.Module) -> bool:
    """Whether a layer updates running statistics in training.

    Args:
        part: the layer, in the mode of training.

    Returns:
        Whether it does.
    """
    return part.training and bool(getattr(part, "track_running_stats", False))


def _moments(part: _NormBase, entered: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's running mean and variance follow: of the batch; of instances, their mean."""
    entered = entered.to(torch.promote_types(entered.dtype, torch.float32))
    if not isinstance(part, _InstanceNorm):
        variance, mean = torch.var_mean(entered, (0, *range(2, entered.dim())))
        return mean, variance
    if entered.dim() == part._get_no_batch_dim():
        entered = entered[None]
    variance, mean = torch.var_mean(entered, tuple(range(2, entered.dim())))
    return mean.mean(0), variance.mean(0)
