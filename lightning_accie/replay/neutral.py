"""Making a copy of the user's module harmless to run outside its Trainer.

The copy logs nothing, counts nothing in metrics, and sees a stand-in trainer that tells it the
recorded epoch and step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_accie.errors import UnsupportedError, first_line


class _Silent:
    """A logger that takes any call and does nothing."""

    def __getattr__(self, name: str) -> _Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Silent:
        return self


class StandInTrainer:
    """What the replayed module sees as ``self.trainer``.

    Epoch, step and rank are the recorded ones; everything else is the live trainer's where there is
    one, or one of the facts that the trajectory recorded.

    Args:
        facts: what was recorded of the Trainer.
        live: the Trainer, where there is one.
        earlier: for a run that was resumed, the facts that held before a global step; in order.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        live: Any = None,
        earlier: Sequence[tuple[int, Mapping[str, Any]]] = (),
    ) -> None:
        self.logger = _Silent()
        self.loggers = [self.logger]
        self.training = True
        self.validating = False
        self.sanity_checking = False
        self._facts = facts
        self._live = live
        self._earlier = earlier
        self.stand_at(0, 0, 0)

    def stand_at(self, epoch: int, step: int, rank: int) -> None:
        """Tell the module where in the run it is, and as which of the run's processes."""
        self.current_epoch = epoch
        self.global_step = step
        self.global_rank = rank
        self.is_global_zero = rank == 0
        # As Lightning numbers the processes of a node.
        self.local_rank = rank % max(1, int(self._facts.get("num_devices") or 1))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for until, facts in self._earlier:
            if self.global_step < until and name in facts:
                return facts[name]
        if self._live is not None:
            return getattr(self._live, name)
        if name in self._facts:
            return self._facts[name]
        raise AttributeError(
            f"The module reads `self.trainer.{name}`, which a replay without its Trainer cannot "
            'provide. Analyse at the end of `fit` (`run="fit_end"`), or pass the value to the '
            "module as a hyper-parameter."
        )


_NO_VALUE = torch.tensor(float("nan"))
"""What every stub gives for a metric's value: a loss that uses it shows."""


class _MetricStub(nn.Module):
    """Stands for a torchmetrics metric, and keeps its buffers, which a run records.

    A metric that holds others (a `MetricCollection`, a wrapper) is a mapping of stubs.
    """

    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        for name, child in metric.named_children():
            self.add_module(name, _MetricStub(child))
        for name, buffer in metric.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute()

    __call__: Any = forward

    def compute(self) -> Any:
        return {name: stub.compute() for name, stub in self.items()} if len(self) else _NO_VALUE

    def update(self, *args: Any, **kwargs: Any) -> None: ...

    def reset(self) -> None: ...

    def __len__(self) -> int:
        return len(self._modules)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def keys(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules.keys()

    def values(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules.values()

    def items(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules.items()


def is_metric(value: Any) -> bool:
    """Tell a torchmetrics metric, the stub that stands for one, or a stub's value.

    Returns:
        Whether ``value`` is one.
    """
    return (
        value is _NO_VALUE
        or isinstance(value, _MetricStub)
        or any(base.__module__.split(".")[0] == "torchmetrics" for base in type(value).__mro__)
    )


_TORCHS = ("_parameters", "_buffers", "_modules")
_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def neutral_copy(module: nn.Module, trainer: StandInTrainer) -> Any:
    """Copy a LightningModule and silence the copy.

    Args:
        module: the user's module; it is left as it is.
        trainer: the stand-in the copy sees as ``self.trainer``.

    Returns:
        The copy.

    Raises:
        UnsupportedError: if the module cannot be copied.
    """
    live = getattr(module, "_trainer", None)
    fabric = getattr(module, "_fabric", None)
    memo: dict[int, Any] = {id(owner): None for owner in (live, fabric) if owner is not None}
    try:
        twin = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, ValueError) as error:
        names = ", ".join(_uncopiable(module, memo)) or "something in it"
        raise UnsupportedError(
            f"The module `{type(module).__name__}` cannot be copied for the replay: {names} "
            f"({first_line(error)}). Keep open files, locks and tensors that are part of a graph out "
            "of its attributes (make them where they are used, or detach them), or give the module a "
            "`__deepcopy__`."
        ) from error
    for part in twin.modules():
        if hasattr(part, "log_dict") and hasattr(part, "training_step"):
            part.__dict__.update(log=_ignore, log_dict=_ignore, print=_ignore)
            part.__dict__["_trainer"] = trainer
            if part.__dict__.get("_compiler_ctx") is not None:
                # Lightning puts the compiled steps of a `torch.compile`d module on the instance,
                # where they are bound to the module that was trained.
                for name in _STEPS:
                    part.__dict__.pop(name, None)
                part.__dict__["_compiler_ctx"] = None
        for name, child in list(part.named_children()):
            if is_metric(child):
                part._modules[name] = _MetricStub(child)
    return twin


def _uncopiable(module: nn.Module, memo: dict[int, Any]) -> list[str]:
    """Name the attributes that `copy.deepcopy` does not take, with their types."""
    found = []
    for place, part in module.named_modules():
        for name, value in vars(part).items():
            if name in _TORCHS or id(value) in memo:
                continue
            try:
                copy.deepcopy(value, dict(memo) | {id(p): None for p in module.modules()})
            except (TypeError, RuntimeError, ValueError):
                owner = f"self.{place}" if place else "self"
                found.append(f"`{owner}.{name}` is a `{type(value).__name__}`")
    return found


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands for `log`, `log_dict` and `print`."""
