"""Let the Trainer fork the processes of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_accie import InfluenceCallback, InfluenceScores
from tests.ddp.cases import CASES, loaders, warnings_are_errors
from tests.problems import quiet_trainer


def main(root: Path) -> None:
    warnings_are_errors()
    influence = InfluenceCallback(dirpath=root / "influence", verify=4, top_k=2, console=False)
    torch.manual_seed(5)
    trainer = quiet_trainer(root, callbacks=[influence], devices=2, strategy="ddp_fork")
    trainer.fit(CASES["plain"].make(), *loaders())
    assert influence.scores is None  # the processes that trained have it, and are gone
    scores = InfluenceScores.load(root / "influence")
    assert len(scores.index) == 25
    assert scores.info["bit_exact_replay"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
