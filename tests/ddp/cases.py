"""The runs of two processes that the tests look at, as both sides make them."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.problems import (
    Classifier,
    Configure,
    adamw,
    classification,
    quiet_trainer,
    sgd,
    smooth_net,
)

PATCHED = {"training_step", "backward", "process_dataloader"}
"""What the callback replaces of a strategy while it trains."""
DATA, VALIDATION = 25, 11
"""Neither divides by two: the distributed sampler draws a sample twice."""


def datasets() -> tuple[TensorDataset, TensorDataset]:
    return classification(DATA), classification(VALIDATION, seed=3)


def loaders(batch_size: int = 5) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train, valid = datasets()
    return DataLoader(train, batch_size, shuffle=True), DataLoader(valid, batch_size=7)


def warnings_are_errors() -> None:
    """As pytest has it; for processes of their own."""
    warnings.simplefilter("error")
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*`torch.jit.script.*",
        ".*smaller than the logging interval.*",
        ".*recommended to use .*sync_dist.*",
        ".*find_unused_parameters=True was specified.*",
    ):
        warnings.filterwarnings("ignore", message)


class Synchronised(Classifier):
    """Logs the mean over the processes."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y), sync_dist=True)


class Drawing(Synchronised):
    """Each process draws numbers of its own, now and then, from two generators."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.global_step % 3 == self.global_rank:
            x = x + 0.1 * torch.randn_like(x) + 0.01 * float(np.random.randn())  # noqa: NPY002
        return super().training_step((x, y), batch_idx)


class OneSided(Synchronised):
    """Only the second process uses the head."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.head = nn.Linear(3, 3).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        return self.loss(self.head(logits) if self.global_rank == 1 else logits, y)


class Centred(Synchronised):
    """Keeps a running mean of its inputs, and subtracts it: a buffer that matters for the loss.

    Not yet at the first step, where it would be in the way of finding the samples' losses.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = super().training_step((x - self.centre, y), batch_idx)
        if self.global_step > 0:
            self.centre.mul_(0.5).add_(0.5 * x.mean(0))
        return loss


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=60)


def layered(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    # Without a bias: BatchNorm cancels it, and Adam would scale up the rounding of its gradient.
    first = nn.Linear(4, 6, bias=False)
    return nn.Sequential(first, *middle, nn.Tanh(), nn.Linear(6, 3)).double()


class Single(Synchronised):
    """Takes its batches in single precision, for autocast."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x.float(), y), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        super().validation_step((x.float(), y), batch_idx)


@dataclass(frozen=True)
class Case:
    """What to train, and how.

    With ``combined``, Lightning gets the validation data as a CombinedLoader, in which it puts its
    own samplers.
    """

    make: Callable[[], Classifier]
    configure: Configure
    trainer: dict[str, Any] = field(default_factory=dict)
    combined: bool = False


PLAIN, MOMENTUM, ADAM = sgd(), sgd(momentum=0.9), adamw(weight_decay=0.1)

CASES = {
    "plain": Case(
        lambda: Classifier(smooth_net(), PLAIN),
        PLAIN,
        {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
    ),
    "momentum": Case(
        lambda: Synchronised(smooth_net(), MOMENTUM, one_cycle),
        MOMENTUM,
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.2},
    ),
    "batchnorm": Case(
        lambda: Synchronised(layered(nn.BatchNorm1d(6)), ADAM), ADAM, {"accumulate_grad_batches": 2}
    ),
    "drawing": Case(
        lambda: Drawing(layered(nn.BatchNorm1d(6), nn.Dropout(0.3)), ADAM),
        ADAM,
        combined=True,
    ),
    "one-sided": Case(
        lambda: OneSided(smooth_net(), MOMENTUM),
        MOMENTUM,
        {"strategy": "ddp_find_unused_parameters_true"},
    ),
    "bf16": Case(
        lambda: Single(layered(nn.Dropout(0.3)).float(), MOMENTUM),
        MOMENTUM,
        {"precision": "bf16-mixed", "gradient_clip_val": 0.3},
    ),
    "buffer": Case(
        lambda: Centred(smooth_net(), PLAIN),
        PLAIN,
        {"accumulate_grad_batches": 2},
    ),
}


class Losses(Callback):
    """Keeps the loss of every training batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def train(root: Path, case: Case, callbacks: list[Callback], **settings: Any) -> dict[str, Any]:
    """Train as one of several processes, and tell what came out."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.manual_seed(1)
    module, losses = case.make(), Losses()
    torch.manual_seed(5 + rank)
    np.random.seed(5 + rank)  # noqa: NPY002
    random.seed(5 + rank)
    options = {"devices": 2, "strategy": "ddp", **case.trainer, **settings}
    trainer = quiet_trainer(root, callbacks=[losses, *callbacks], **options)
    data = loaders()
    valid = CombinedLoader(data[1], "sequential") if case.combined else data[1]
    trainer.fit(module, data[0], valid)
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "losses": losses.losses,
        "generators": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        ),
        "loaders": [type(loader) for loader in data],
        "left": sorted(
            {"training_step", "backward", "process_dataloader"} & vars(trainer.strategy).keys()
        ),
    }
