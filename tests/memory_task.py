"""Analyses a run, and prints by how much the resident memory has grown at the peak.

python -m tests.memory_task DIRECTORY ESTIMATOR MEMORY_BUDGET
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from lightning_accie import InfluenceEngine
from tests.problems import Classifier, classification, record, sgd


def status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def recorded(root: Path, *sizes: int, samples: int, epochs: int) -> InfluenceEngine:
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    net = nn.Sequential(layers[0], nn.Tanh(), *layers[1:]).double()
    train, val = (classification(n, inputs=sizes[0], classes=sizes[-1]) for n in (samples, 100))
    return record(root, Classifier(net, sgd()), train, val, batch_size=50, max_epochs=epochs)


def main(root: Path, estimator: str, budget: str) -> None:
    torch.set_num_threads(1)
    small = recorded(root / "small", 4, 3, 3, samples=100, epochs=1)
    small.estimate("val_loss", estimator, verify=0)  # what torch loads once does not count
    engine = recorded(root / "large", 300, 300, 200, 3, samples=1000, epochs=5)
    engine = InfluenceEngine(
        engine.trajectory.directory,
        engine.module,
        engine._given["data"],
        val_dataloaders=engine._given["val_dataloaders"],
        memory_budget=budget,
        progress=False,
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    engine.estimate("val_loss", estimator, verify=0)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
