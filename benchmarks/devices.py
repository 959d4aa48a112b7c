"""What a second process brings to an analysis, on one thread each.

    python benchmarks/devices.py [--publish]

1000 samples of the digits network (64-32-10, 40 epochs), by exact replay and by ACC-SGD-IE: the time
that `InfluenceEngine(devices=1).estimate` takes, over the time with ``devices=2``. Starting the
processes, and all that one of them does alone, counts too. The two alternate, and the fastest of each
counts.
"""

from __future__ import annotations

from time import perf_counter

import torch
from common import arguments, machine, publish, quieten
from cost import data_of, fit, problems
from torch import Tensor

from lightning_accie import AccSgdIE, InfluenceEngine, LeaveOneOut
from lightning_accie.estimators import Estimator

HEAD = "| 1000 samples | two processes over one | largest difference of the scores |"


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    problem = problems()[0]
    _, influence, module = fit(problem, 40, "capture")
    train, val = data_of(problem)

    def timed(estimator: Estimator, devices: int) -> tuple[float, Tensor]:
        assert influence.directory is not None
        engine = InfluenceEngine(
            influence.directory,
            module,
            train,
            val_dataloaders=val,
            progress=False,
            devices=devices,
        )
        start = perf_counter()
        scores = engine.estimate("val_loss", estimator, verify=0)
        return perf_counter() - start, scores.influence

    lines = [HEAD, "|---|---|---|"]
    for title, estimator in (("exact replay", LeaveOneOut()), ("ACC-SGD-IE", AccSgdIE())):
        pairs = [[timed(estimator, devices) for devices in (1, 2)] for _ in range(options.repeats)]
        one, two = (min(spent for spent, _ in runs) for runs in zip(*pairs, strict=True))
        (_, alone), (_, together) = pairs[0]
        off = float((alone - together).norm() / alone.norm())
        lines.append(f"| {title} | {one / two:.2f} times as fast | {off:.0e} |")
    text = "\n".join(lines) + f"\n\nDifferences relative to the scores (norms). {machine()}."
    print(text)
    if options.publish:
        publish("devices", text)


if __name__ == "__main__":
    main()
