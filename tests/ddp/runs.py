"""All that two processes do for these tests, in one go: starting them takes longest.

With ``whole``, every kind of loader is dealt out, every case trained, one resumed, one
ranked at its best checkpoint, and rank 0 killed in
an analysis.
With ``faults``, everything else goes wrong, and rank 1 is killed in training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.ddp import best, deal, faults, resume, train


def main(root: Path, what: str) -> None:
    if what == "whole":
        deal.main(root)
        train.main(root)
        resume.main(root)
        best.main(root)
        faults.killed_in_analysis(root)
    else:
        faults.main(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # past the teardown of a group whose other process is dead, in which torch may abort
