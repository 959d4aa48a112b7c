"""Train every case, without and with the callback; what came out goes to a file a rank."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from lightning_accie import InfluenceCallback
from lightning_accie.estimators.chunks import ChunkedEstimator
from lightning_accie.trajectory import checkpoints
from tests.ddp.cases import CASES, train, warnings_are_errors


def note_shares() -> list[int]:
    """Every sample that this process finds figures of."""
    finish, seen = ChunkedEstimator.finish, []

    def noted(self: Any, replay: Any, samples: Any, advance: Any) -> Any:
        seen.extend(samples.tolist())
        return finish(self, replay, samples, advance)

    ChunkedEstimator.finish = noted  # type: ignore[method-assign]
    return seen


def main(root: Path) -> None:
    warnings_are_errors()
    shares = note_shares()
    checkpoints.SPACING = 1  # before the steps 1 and 4, in the middle of an epoch
    for name, case in CASES.items():
        plain = train(root / name, case, [])
        shares.clear()
        influence = InfluenceCallback(
            run="fit_end" if name in {"plain", "drawing"} else "manual",
            verify=4,
            top_k=2,
            console=False,
            loss_column=True,
            describe=describe,
        )
        seen = train(root / name, case, [influence])
        result = {"plain": plain, "seen": seen, "directory": influence.directory}
        scores = influence.scores
        if scores is not None:
            result |= {
                "share": shares.copy(),
                "replayed": scores.index[~scores.exact.isnan()].tolist(),
                "influence": scores.influence.tolist(),
                "index": scores.index.tolist(),
                "info": scores.info,
                "labels": scores.columns["label"],
            }
        path = root / f"{name}-{os.environ['LOCAL_RANK']}.pickle"
        path.write_bytes(pickle.dumps(result))


def describe(sample: object) -> dict[str, object]:
    return {"label": int(sample[1])}  # type: ignore[index]
