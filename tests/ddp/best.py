"""Train with a rate that is too large in the end, and rank at the best checkpoint."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accie import InfluenceCallback
from tests.ddp.cases import PLAIN, Synchronised, loaders
from tests.problems import quiet_trainer, smooth_net

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def overshoots(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 7 else 40.0)


def module() -> Synchronised:
    return Synchronised(smooth_net(), PLAIN, overshoots)


def main(root: Path) -> None:
    saver = ModelCheckpoint(root / "checkpoints", monitor="val_loss")
    influence = InfluenceCallback(
        dirpath=root / "best", at="best", verify=4, top_k=2, console=False
    )
    torch.manual_seed(5 + RANK)
    quiet_trainer(
        root,
        callbacks=[influence, saver],
        enable_checkpointing=True,
        devices=2,
        strategy="ddp",
        max_epochs=4,
        val_check_interval=2,
    ).fit(module(), *loaders())
    assert influence.scores is not None
    told = {
        "info": influence.scores.info,
        "influence": influence.scores.influence.tolist(),
        "path": saver.best_model_path,
    }
    (root / f"best-{RANK}.pickle").write_bytes(pickle.dumps(told))
