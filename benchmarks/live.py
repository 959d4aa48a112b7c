"""What a live view costs, as a ratio to the training steps that it looks at, one thread.

    python benchmarks/live.py [--publish]

The two networks of `cost.py`, validated every so many steps on 300 examples. Within one fit the views
and the training steps between them are timed, but for the first, in which both warm up. The median over
the validations of a fit, and the range of the fits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import arguments, machine, publish, quieten, trainer
from cost import Problem, Timed, data_of, problems

from lightning_accie import InfluenceCallback

WINDOWS = (20, 200)
VIEWS = 6


class TimedView(InfluenceCallback):
    """Notices how long its views take, and where they begin."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.views: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        begun = perf_counter()
        super().on_validation_end(trainer, pl_module)
        self.views.append((begun, perf_counter()))


def ratios(problem: Problem, window: int) -> list[float]:
    """One fit: each view's time over that of the steps it looked at."""
    torch.manual_seed(0)
    module = Timed(problem.net())
    root = Path(tempfile.mkdtemp())
    influence = TimedView(
        live=True, run="manual", dirpath=root / "influence", console=False, overwrite=True
    )
    runner = trainer(
        root,
        callbacks=[influence],
        max_steps=VIEWS * window,
        val_check_interval=window,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    runner.fit(module, *data_of(problem))
    found = []
    for number, (begun, ended) in enumerate(influence.views):
        steps = module.begun[number * window : (number + 1) * window]
        # From the first step to the last, and one more of the mean: validation lies behind that.
        training = (steps[-1] - steps[0]) * window / (window - 1)
        found.append((ended - begun) / training)
    assert influence.live_scores is not None
    return found


def main() -> None:
    options = arguments(__doc__)
    quieten()
    torch.set_num_threads(1)
    names = [problem.name for problem in problems()]
    lines = [
        "| a view, as a ratio to the training steps it looks at | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for window in WINDOWS:
        each = []
        for problem in problems():
            fits = [ratios(problem, window) for _ in range(options.repeats)]
            typical = sorted(median(found[1:]) for found in fits)
            each.append(f"{median(typical):.2f} ({typical[0]:.2f} to {typical[-1]:.2f})")
        lines.append(f"| {window} steps between validations | " + " | ".join(each) + " |")
    text = (
        "\n".join(lines)
        + f"\n\nMedians over {options.repeats} fits, with their range. {machine()}."
    )
    print(text)
    if options.publish:
        publish("live", text)


if __name__ == "__main__":
    main()
