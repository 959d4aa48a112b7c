"""Fact 6: replaying with w = 1 reproduces the recorded run bit for bit on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.problems import Classifier, adam, adamw, record, sgd


def net(kind: str) -> nn.Module:
    torch.manual_seed(1)
    middle: dict[str, list[nn.Module]] = {
        "plain": [],
        "dropout": [nn.Dropout(0.3)],
        "batchnorm": [nn.BatchNorm1d(8)],
        "layernorm": [nn.LayerNorm(8)],
        "both": [nn.BatchNorm1d(8), nn.Dropout(0.2)],
    }
    first = nn.Linear(4, 8, bias=kind not in ("batchnorm", "both"))
    return nn.Sequential(first, *middle[kind], nn.ReLU(), nn.Linear(8, 3))


class Noisy(Classifier):
    """Draws random numbers in the step, and reads the epoch and the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)
        scale = 1.0 + 0.01 * self.current_epoch + 0.001 * self.global_step + 0.0001 * batch_idx
        return F.cross_entropy(self.net(x), y) * scale + 1e-3 * sum(
            p.square().sum() for p in self.parameters()
        )


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)


def float32_data(n: int, seed: int) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(
        torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)
    )


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "sgd-momentum-decay": (Classifier, sgd(momentum=0.9, weight_decay=0.01), None, {}),
    "nesterov-one-cycle": (Classifier, sgd(momentum=0.9, nesterov=True), one_cycle, {}),
    "adamw": (Classifier, adamw(), one_cycle, {}),
    "adam-amsgrad": (Classifier, adam(amsgrad=True, weight_decay=0.02), None, {}),
    "accumulate-2": (Classifier, adamw(), None, {"accumulate_grad_batches": 2}),
    "accumulate-4-partial": (Classifier, sgd(momentum=0.9), None, {"accumulate_grad_batches": 4}),
    "clip-norm": (Classifier, sgd(), None, {"gradient_clip_val": 0.2}),
    "clip-value": (
        Classifier,
        adam(),
        None,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "noise-epoch-step": (Noisy, adamw(), one_cycle, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("layers", ["plain", "dropout", "batchnorm", "layernorm", "both"])
@pytest.mark.parametrize("case", CASES)
def test_replay_is_bit_exact(tmp_path: Path, case: str, layers: str) -> None:
    module_class, configure, schedule, settings = CASES[case]
    module = module_class(net(layers), configure, schedule)
    engine = record(
        tmp_path,
        module,
        float32_data(47, 0),
        float32_data(20, 1),
        batch_size=5,
        max_epochs=4,
        **settings,
    )
    walker = engine._walker
    snapshot = walker.start()
    for _ in range(len(walker)):
        snapshot = walker._advance(snapshot)[1]
    assert walker.fidelity.losses == 40
    assert walker.fidelity.checkpoints >= 1
    assert walker.fidelity.bit_exact
    for name, parameter in module.named_parameters():
        assert torch.equal(snapshot.state.params[name], parameter), name
    for name, buffer in module.named_buffers():
        assert torch.equal(snapshot.buffers[name], buffer), name


def test_a_backward_walk_with_little_memory_visits_the_same_states(tmp_path: Path) -> None:
    module = Noisy(net("both"), adamw(), one_cycle)
    engine = record(
        tmp_path, module, float32_data(46, 0), float32_data(20, 1), batch_size=2, max_epochs=3
    )
    walker = engine._walker
    forwards = [(v.step, [t.clone() for t in v.state.leaves()]) for v in walker.forwards()]
    walker.memory_budget = 1  # room for the fewest states there can be
    assert walker.passes() > 3
    seen = 0
    for visit, (step, leaves) in zip(walker.backwards(), reversed(forwards), strict=True):
        assert visit.step == step
        assert all(torch.equal(a, b) for a, b in zip(visit.state.leaves(), leaves, strict=True))
        seen += 1
    assert seen == len(walker) == 69


@pytest.mark.parametrize("layers", ["plain", "dropout"])
def test_a_run_past_its_first_checkpoints(tmp_path: Path, layers: str) -> None:
    """A checkpoint on the way closes the step before it, and adds none of its own."""
    module = Classifier(net(layers), sgd(momentum=0.9))
    engine = record(
        tmp_path, module, float32_data(40, 0), float32_data(20, 1), batch_size=1, max_epochs=7
    )
    assert len(engine.trajectory) == 280
    assert engine.trajectory.checkpoint_steps == (0, 256, 280)
    assert all(len(step.micro_batches) == 1 for step in engine.trajectory.steps())
    walker = engine._walker
    states = [visit.snapshot for visit in walker.forwards()]
    assert walker.fidelity.losses >= 280
    assert walker.fidelity.checkpoints == 2
    assert walker.fidelity.bit_exact
    assert states[-1].step == 279


class SeldomNoisy(Classifier):
    """Its own hook draws before the sixth step is taken, and its next training step draws too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = 0.1 * torch.randn_like(x) if self.global_step == 6 else 0.0
        return F.cross_entropy(self.net(x + noise), y)

    def on_after_backward(self) -> None:
        if self.global_step == 5:
            torch.rand(3)


def test_what_a_hook_draws_is_not_taken_for_the_steps_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_accie.capture.recorder._MOST_WAITING", 1)
    module = SeldomNoisy(net("plain"), sgd())
    engine = record(
        tmp_path, module, float32_data(24, 0), float32_data(8, 1), loader={"shuffle": False}
    )
    draws = [step.micro_batches[0].draws for step in engine.trajectory.steps()]
    assert draws[5:7] == [True, True]  # of the first it cannot be told
    assert not any(draws[4:5])
    walker = engine.replay("val_loss").walker
    assert len(list(walker.forwards())) == 12
    assert walker.fidelity.bit_exact
