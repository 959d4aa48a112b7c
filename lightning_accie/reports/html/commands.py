"""How to make the analysis again, as lines to copy."""

from __future__ import annotations

from pathlib import Path

from lightning_accie.rendered import clean
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import REPORT_FILE
from lightning_accie.trajectory.files import FOLDER


def of(scores: InfluenceScores, directory: Path) -> list[tuple[str, str]]:
    """The lines that read these scores again, and that make them again.

    Args:
        scores: what was found.
        directory: where the report is.

    Returns:
        What each block does, and its lines.
    """
    blocks = [
        (
            "In a terminal, from this folder",
            "lightning-accie show .\n"
            "lightning-accie export . --csv ranking.csv\n"
            f"lightning-accie report . -o {REPORT_FILE}",
        ),
        (
            "Read the ranking in Python, from this folder",
            "from lightning_accie import InfluenceScores\n\n"
            'scores = InfluenceScores.load(".")\n'
            "scores.top_harmful(10).to_pandas()",
        ),
    ]
    if "trajectory" in scores.info:
        blocks.append(
            ("Make the ranking again, with the module and its data", _again(scores, directory))
        )
    return blocks


def _again(scores: InfluenceScores, directory: Path) -> str:
    info = scores.info
    beside = Path(info["trajectory"]) == directory / FOLDER
    trajectory = FOLDER if beside else clean(info["trajectory"])
    asked = [repr(clean(info.get("query", "val_loss")))]
    asked += [
        f"{name}={info[name]!r}"
        for name in ("estimator", "at", "top_k", "verify", "seed")
        if name in info
    ]
    return (
        "from lightning_accie import InfluenceEngine\n\n"
        f"engine = InfluenceEngine({trajectory!r}, model, datamodule)\n"
        f"scores = engine.estimate({', '.join(asked)})"
    )
