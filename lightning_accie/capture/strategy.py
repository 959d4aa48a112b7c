"""Which strategies can be recorded: a single device, and plain distributed data-parallel training."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_accie.errors import UnsupportedError

_SINGLE = 'Use `strategy="ddp"`, or `strategy="auto"` with `devices=1`'
_REQUIRED = ("broadcast_buffers", "forward_sync_buffers", "init_sync")
"""Arguments of DistributedDataParallel that, switched off, let the ranks drift apart."""
_HARMLESS = (
    "find_unused_parameters",
    "static_graph",
    "gradient_as_bucket_view",
    "bucket_cap_mb",
    "bucket_cap_mb_list",
    "dim",
    "check_reduction",
)
_COMMUNICATION = {
    "_ddp_comm_hook": "ddp_comm_hook",
    "_ddp_comm_wrapper": "ddp_comm_wrapper",
    "_ddp_comm_state": "ddp_comm_state",
    "_model_averaging_period": "model_averaging_period",
}
_BACKENDS = ("gloo", "nccl", "mpi")


def check_strategy(strategy: Any) -> None:
    """Refuse strategies under which the steps are not those of one module.

    Args:
        strategy: the Trainer's.

    Raises:
        UnsupportedError: naming the strategy or its argument, and what to do instead.
    """
    name = type(strategy).__name__
    if name == "SingleDeviceStrategy":
        return
    if name != "DDPStrategy":
        raise UnsupportedError(
            f"The strategy `{name}` cannot be recorded: it may shard or change the weights. "
            f"{_SINGLE}."
        )
    for attribute, argument in _COMMUNICATION.items():
        if getattr(strategy, attribute, None) is not None:
            raise UnsupportedError(
                f"`DDPStrategy({argument}=...)` changes how gradients or weights are averaged, "
                "which a replay does not follow. Leave it out."
            )
    for argument, value in strategy._ddp_kwargs.items():
        if argument in _REQUIRED and value is False:
            raise UnsupportedError(
                f"`DDPStrategy({argument}={value})` lets the processes' modules differ, and only "
                "that of rank 0 is recorded. Leave the argument out."
            )
        if argument not in (*_REQUIRED, *_HARMLESS):
            raise UnsupportedError(
                f"`DDPStrategy({argument}=...)` is not known to keep the mean of the gradients. "
                "Leave the argument out."
            )
    backend = strategy.process_group_backend
    if backend is not None and any(
        part.rpartition(":")[2] not in _BACKENDS for part in str(backend).split(",")
    ):
        raise UnsupportedError(
            f"`DDPStrategy(process_group_backend={backend!r})` may average gradients in a way of "
            f"its own. Use one of {', '.join(_BACKENDS)}."
        )
    if strategy._layer_sync is not None:
        raise UnsupportedError(_synchronised("`Trainer(sync_batchnorm=True)`"))


def check_synchronised(trainer: Any, module: nn.Module) -> None:
    """Refuse modules whose forward pass needs the other processes, or leaves them out.

    Args:
        trainer: the Trainer.
        module: the LightningModule.

    Raises:
        UnsupportedError: naming what is not supported, and what to do instead.
    """
    if trainer.world_size < 2:
        return
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            raise UnsupportedError(_synchronised(f"The layer `{name}` is a `SyncBatchNorm`. It"))
    if getattr(module, "_ddp_params_and_buffers_to_ignore", None):
        raise UnsupportedError(
            "The module keeps parameters or buffers out of DistributedDataParallel, so they differ "
            "between the processes, and only those of rank 0 are recorded. Share all of them."
        )


def _synchronised(what: str) -> str:
    return (
        f"{what} takes batch statistics over all processes, and a replay runs the batches one by "
        "one. Use plain BatchNorm, or another norm."
    )
