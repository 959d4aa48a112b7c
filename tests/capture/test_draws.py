"""What is kept of the generators' states is enough to give each call the numbers that it drew."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accie.capture.draws import DrawWatch, Verdict
from lightning_accie.replay import random_state
from tests.problems import Classifier, record, sgd
from tests.replay.test_bit_exact import float32_data, net

Draws = Callable[[int, random.Random], bool]


@dataclass
class Run:
    """A made-up run: which of its calls draw, and where something draws right after a call."""

    calls: Draws
    beside: Draws
    epoch: int = 40
    validates_every: int = 0

    def watched(self, length: int, seed: int) -> tuple[list[int], list[Tensor], list[Verdict]]:
        """Returns how many numbers each call drew, the true states before them, and the verdicts."""
        chance, watch = random.Random(seed), DrawWatch(None)
        drawn, before, verdicts = [], [], []
        torch.manual_seed(seed)
        for call in range(length):
            verdicts += watch.begin()
            before.append(torch.get_rng_state())
            drawn.append(chance.randrange(1, 5) if self.calls(call, chance) else 0)
            torch.rand(drawn[-1])
            if (call + 1) % self.epoch == 0:
                verdicts += watch.epoch_ends()
                torch.rand(2)  # the sampler of the next epoch
            elif watch.closely:
                verdicts += watch.settle(right_after=True)
            if self.validates_every and (call + 1) % self.validates_every == 0:
                verdicts += watch.interrupted()
                torch.rand(2)
            if self.beside(call, chance):
                torch.rand(1)
        return drawn, before, [*verdicts, *watch.settle(right_after=False)]


def missed(run: Run, seed: int = 0) -> list[int]:
    """Replay the calls in order.

    Returns:
        Those that drew, and would now draw other numbers.
    """
    drawn, before, verdicts = run.watched(300, seed)
    assert len(verdicts) == 300
    torch.manual_seed(1234)
    wrong = []
    for call, verdict in enumerate(verdicts):
        if verdict.random is not None:
            torch.set_rng_state(verdict.random["torch"])
        if drawn[call]:
            if not (verdict.draws and torch.equal(torch.get_rng_state(), before[call])):
                wrong.append(call)
            torch.rand(drawn[call])
    return wrong


def never(call: int, chance: random.Random) -> bool:
    return False


def always(call: int, chance: random.Random) -> bool:
    return True


def seldom(call: int, chance: random.Random) -> bool:
    return chance.random() < 0.03


def every_16th(call: int, chance: random.Random) -> bool:
    return call % 16 == 0


def late(call: int, chance: random.Random) -> bool:
    return call > 77


def from_the_third_epoch(call: int, chance: random.Random) -> bool:
    return call >= 80


RUNS = {
    "nothing": Run(never, never),
    "dropout": Run(always, never),
    "dropout and hooks": Run(always, seldom),
    "seldom": Run(seldom, never),
    "seldom, validated": Run(seldom, never, validates_every=7),
    "hooks": Run(never, seldom),
    "lazy penalty and hooks": Run(every_16th, seldom),
    "late": Run(late, never, validates_every=11),
    "an epoch that begins to draw": Run(from_the_third_epoch, from_the_third_epoch),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RUNS)
def test_every_call_that_drew_finds_the_state_it_drew_from(name: str, seed: int) -> None:
    assert missed(RUNS[name], seed) == []


def test_only_a_first_stretch_that_mixes_with_something_else_is_lost() -> None:
    def both(call: int, chance: random.Random) -> bool:
        return call >= 103

    wrong = missed(Run(both, both))
    assert wrong
    assert all(103 < call < 112 for call in wrong)


def test_a_run_that_draws_nothing_is_seldom_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    capture = random_state.capture

    def counted(**settings: object) -> object:
        nonlocal reads
        reads += 1
        return capture(**settings)

    monkeypatch.setattr(random_state, "capture", counted)
    _, _, verdicts = Run(never, never, epoch=1000).watched(800, 0)
    assert not any(verdict.draws for verdict in verdicts)
    assert reads < 800 / 8 + 15


class Penalised(Classifier):
    """Draws in every 13th step, in the middle of an epoch first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x) if self.global_step % 13 == 12 else torch.zeros_like(x)
        return F.cross_entropy(self.net(x + 0.1 * noise), y)


@pytest.mark.parametrize("val_check_interval", [1.0, 3])
def test_a_run_that_begins_to_draw_is_replayed_bit_for_bit(
    tmp_path: Path, val_check_interval: float
) -> None:
    engine = record(
        tmp_path,
        Penalised(net("plain"), sgd(momentum=0.9)),
        float32_data(100, 0),
        float32_data(20, 1),
        batch_size=5,
        max_epochs=3,
        val_check_interval=val_check_interval,
    )
    steps = list(engine.trajectory.steps())
    assert all(steps[step].micro_batches[0].draws for step in (12, 25, 38, 51))
    walker = engine.replay("val_loss").walker
    assert len(list(walker.forwards())) == 60
    assert walker.fidelity.bit_exact
    assert walker.fidelity.losses >= 60
