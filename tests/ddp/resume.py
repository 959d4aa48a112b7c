"""Train for two epochs, and go on from the checkpoint: elsewhere first, then in place."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_accie import InfluenceCallback
from tests.ddp.cases import CASES, loaders
from tests.problems import quiet_trainer

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def fit(root: Path, directory: str, epochs: int, ckpt_path: Path | None = None) -> Any:
    torch.manual_seed(1)
    module = CASES["drawing"].make()
    torch.manual_seed(5 + RANK)
    influence = InfluenceCallback(run="manual", dirpath=root / directory)
    trainer = quiet_trainer(
        root, callbacks=[influence], devices=2, strategy="ddp", max_epochs=epochs
    )
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer


def main(root: Path) -> None:
    warnings.filterwarnings("ignore", "Be aware that when using")  # the directory is another one
    checkpoint = root / "two.ckpt"
    fit(root, "first", 2).save_checkpoint(checkpoint)
    states = {}
    for directory in ("elsewhere", "first"):
        trainer = fit(root, directory, 4, checkpoint)
        states[directory] = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    (root / f"resumed-{RANK}.pickle").write_bytes(pickle.dumps(states))
