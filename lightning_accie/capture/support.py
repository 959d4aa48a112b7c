"""What can be captured. Everything else is refused at fit start, by name, with the way out."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lightning_accie.capture.strategy import check_strategy, check_synchronised
from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.precision import PRECISIONS
from lightning_accie.replay.update_rules import rule_for

_CALLBACKS = {
    "StochasticWeightAveraging": "changes the weights outside the optimiser's steps",
    "WeightAveraging": "changes the weights outside the optimiser's steps",
    "ModelPruning": "changes the weights outside the optimiser's steps",
    "BaseFinetuning": "gives the optimiser other parameters during training",
}
"""Lightning's callbacks that a replay does not follow, by the name of their base, and why."""
_MODULE_HOOKS = (
    "backward",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "on_train_batch_start",
    "on_train_batch_end",
)


_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def check_trainer(trainer: Any) -> None:
    """Refuse what the trainer's own settings rule out; called in ``setup``.

    Args:
        trainer: the Trainer.

    Raises:
        UnsupportedError: naming the setting, and what to do instead.
    """
    check_strategy(trainer.strategy)
    if trainer.strategy.root_device.type == "mps":
        raise UnsupportedError(
            '`Trainer(accelerator="mps")` cannot be replayed: the states of its generator are not '
            "recorded, and it has no double precision, in which influences are added up. Use "
            '`accelerator="cpu"`.'
        )
    precision = str(trainer.precision)
    if precision not in PRECISIONS:
        sixteen = precision in ("16-true", "bf16-true")
        reason = " The weights themselves have 16 bits, which round the effect of one sample away."
        raise UnsupportedError(
            f'`Trainer(precision="{precision}")` cannot be replayed.{reason if sixteen else ""} Use '
            f"one of {', '.join(PRECISIONS)}."
        )
    for other in trainer.callbacks:
        for base in type(other).__mro__:
            if base.__name__ in _CALLBACKS:
                raise UnsupportedError(
                    f"The callback `{type(other).__name__}` {_CALLBACKS[base.__name__]}, so the run "
                    "cannot be replayed. Remove it, or leave InfluenceCallback out."
                )


def check_module(trainer: Any, module: Any) -> None:
    """Refuse what the module's way of training rules out; called in ``on_fit_start``.

    Args:
        trainer: the Trainer, with its optimisers configured.
        module: the LightningModule.

    Raises:
        UnsupportedError: naming what is not supported, and what to do instead.
    """
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"`{type(module).__name__}` uses manual optimisation, whose steps cannot be replayed. "
            "Use automatic optimisation: return the loss from `training_step`."
        )
    if len(trainer.optimizers) != 1:
        raise UnsupportedError(
            f"`configure_optimizers` returned {len(trainer.optimizers)} optimisers; one is needed. "
            "Put the parameters into groups of a single optimiser."
        )
    optimizer = trainer.optimizers[0]
    rule_for(type(optimizer))
    names = step_arguments(module)
    if "dataloader_iter" in names:
        raise UnsupportedError(
            "`training_step(self, dataloader_iter)` draws its own batches, so their samples are "
            "not known. Take `batch` as the argument."
        )
    owned = {id(parameter) for parameter in module.parameters()}
    if any(id(p) not in owned for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedError(
            "The optimiser updates parameters that are not the module's own. Register them as "
            "parameters or submodules of the LightningModule."
        )
    if any(map(torch.nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
        raise UnsupportedError(
            "The module has lazy parameters or buffers that are not initialised yet. Run one batch "
            "through it before `fit`."
        )
    for name, part in module.named_modules():
        if getattr(part, "max_norm", None) is not None and isinstance(part, _EMBEDDINGS):
            raise UnsupportedError(
                f"`{name}` is a `{type(part).__name__}` with `max_norm={part.max_norm}`: its forward "
                "pass writes to the weights, which a replay moves by the optimiser's steps alone. "
                "Leave `max_norm` out, and scale what the embedding gives, or penalise its size."
            )
    check_synchronised(trainer, module)


def step_arguments(module: Any) -> list[str]:
    """Name the arguments of ``training_step``.

    Returns:
        Their names, without ``self``.
    """
    return list(inspect.signature(module.training_step).parameters)


def overridden_hooks(module: Any) -> list[str]:
    """List the hooks that the module overrides and a replay does not run.

    They may be harmless (logging a norm); a mismatch names them.

    Returns:
        The hooks' names.
    """
    found = []
    for name in _MODULE_HOOKS:
        function = getattr(type(module), name, None)
        defined_in = getattr(function, "__module__", "") or ""
        if function is not None and not defined_in.startswith(("lightning.", "pytorch_lightning.")):
            found.append(name)
    return found
