"""Train two of the cases in three processes; what came out goes to a file a rank."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from lightning_accie import InfluenceCallback
from lightning_accie.trajectory import checkpoints
from tests.ddp.cases import CASES, train, warnings_are_errors

RANKS = 3
TRAINED = ("momentum", "drawing")


def main(root: Path) -> None:
    warnings_are_errors()
    checkpoints.SPACING = 1
    for name in TRAINED:
        influence = InfluenceCallback(
            dirpath=root / name, run="fit_end", verify=4, top_k=2, console=False
        )
        seen = train(root / name, CASES[name], [influence], devices=RANKS)
        scores = influence.scores
        assert scores is not None
        result = {"state": seen["state"], "influence": scores.influence.tolist()}
        path = root / f"{name}-{os.environ['LOCAL_RANK']}.pickle"
        path.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
