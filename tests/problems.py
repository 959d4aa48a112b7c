"""Small float64 problems, trained by a real Trainer under the callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie.callback import InfluenceCallback
from lightning_accie.engine import InfluenceEngine

Configure = Callable[[list[nn.Parameter]], Any]


def sgd(**settings: Any) -> Configure:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **settings})


def adam(**settings: Any) -> Configure:
    return lambda parameters: torch.optim.Adam(parameters, **{"lr": 0.05, **settings})


def adamw(**settings: Any) -> Configure:
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 0.05, **settings})


class Classifier(LightningModule):
    """A small network with a smooth activation; logs its validation loss."""

    def __init__(
        self, net: nn.Module, configure: Configure, schedule: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.configure = configure
        self.schedule = schedule

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = self.configure(list(self.parameters()))
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Regressor(Classifier):
    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(logits, target)


def smooth_net(inputs: int = 4, hidden: int = 5, outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def classification(n: int = 24, inputs: int = 4, classes: int = 3, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64)
    w = torch.randn(inputs, classes, generator=g, dtype=torch.float64)
    noise = torch.randn(n, classes, generator=g, dtype=torch.float64)
    return TensorDataset(x, (x @ w + noise).argmax(1))


def regression(n: int = 24, inputs: int = 4, outputs: int = 2, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64)
    w = torch.randn(inputs, outputs, generator=g, dtype=torch.float64)
    noise = torch.randn(n, outputs, generator=g, dtype=torch.float64)
    return TensorDataset(x, x @ w + 0.3 * noise)


def quiet_trainer(root: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = dict(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=3,
        default_root_dir=root,
    )
    return Trainer(**{**defaults, **settings})


def fit(
    root: Path,
    module: LightningModule,
    train: Any,
    val: Any,
    *,
    callback: dict[str, Any] | None = None,
    **trainer: Any,
) -> InfluenceCallback:
    """Train under the callback, capture only."""
    influence = InfluenceCallback(**{"run": "manual", "console": False, **(callback or {})})
    torch.manual_seed(5)
    callbacks = [influence, *trainer.pop("callbacks", [])]
    quiet_trainer(root, callbacks=callbacks, **trainer).fit(module, train, val)
    return influence


def record(
    root: Path,
    module: LightningModule,
    dataset: TensorDataset,
    val: TensorDataset,
    *,
    batch_size: int = 6,
    callback: dict[str, Any] | None = None,
    loader: dict[str, Any] | None = None,
    **trainer: Any,
) -> InfluenceEngine:
    """Train under the callback, then open the trajectory."""
    train = DataLoader(dataset, batch_size=batch_size, **{"shuffle": True, **(loader or {})})
    valid = DataLoader(val, batch_size=7)
    influence = fit(root, module, train, valid, callback=callback, **trainer)
    assert influence.directory is not None
    return InfluenceEngine(
        influence.directory / "trajectory",
        module,
        train,
        val_dataloaders=valid,
        sample_losses=(callback or {}).get("sample_losses"),
        progress=False,
    )
