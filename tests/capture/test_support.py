"""What cannot be recorded is refused at fit start, by name, with the way out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceCallback, UnsupportedError
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net


def fit(
    root: Path,
    module: Classifier,
    data: Any = None,
    callbacks: list[Any] | None = None,
    influence: dict[str, Any] | None = None,
    **trainer: Any,
) -> InfluenceCallback:
    """Train for a step or two; the refusals come before the second."""
    settings = {"console": False, "verify": 2, "top_k": 1, **(influence or {})}
    callback = InfluenceCallback(**settings)
    torch.manual_seed(5)
    trainer_ = quiet_trainer(root, callbacks=[callback, *(callbacks or [])], **trainer)
    train = DataLoader(classification(12) if data is None else data, batch_size=6)
    trainer_.fit(module, train, DataLoader(classification(5, seed=3), batch_size=5))
    return callback


def refused(root: Path, module: Classifier, *words: str, **settings: Any) -> None:
    """The run stops within the first step, and the message has these words."""
    with pytest.raises(UnsupportedError) as caught:
        fit(root, module, **settings)
    for word in words:
        assert word in str(caught.value)
    assert module.trainer.global_step <= 1
    assert "training_step" not in vars(module.trainer.strategy)


# ---------------------------------------------------------------------- the optimiser


class Manual(Classifier):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False


class Two(Classifier):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)], []


def test_manual_optimisation(tmp_path: Path) -> None:
    refused(tmp_path, Manual(smooth_net(), sgd()), "manual", "return the loss")


def test_two_optimisers(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="multiple optimizers"):
        fit(tmp_path, Two(smooth_net(), sgd()))
    both = Two(smooth_net(), sgd())
    both.automatic_optimization = False
    refused(tmp_path, both, "manual")


@pytest.mark.parametrize(
    ("optimiser", "reason"),
    [
        (torch.optim.LBFGS, "several times in a step"),
        (torch.optim.ASGD, "learning rate of the step before"),
        (torch.optim.Rprop, "signs of the gradient"),
        (torch.optim.Adafactor, "have in common"),
        (torch.optim.SparseAdam, "sparse"),
    ],
)
def test_optimisers_without_a_rule(tmp_path: Path, optimiser: Any, reason: str) -> None:
    module = Classifier(smooth_net(), lambda p: optimiser(p, lr=0.1))
    named = f"`{optimiser.__name__}` has no update rule ("
    refused(tmp_path, module, named, reason, "`SGD`", "register_update_rule")


def test_a_namesake_of_one_of_torchs_is_given_no_reason(tmp_path: Path) -> None:
    class ASGD(torch.optim.SGD): ...

    module = Classifier(smooth_net(), lambda p: ASGD(p, lr=0.1))
    refused(tmp_path, module, "`ASGD` has no update rule, so its steps")


def test_an_optimiser_of_foreign_parameters(tmp_path: Path) -> None:
    foreign = nn.Parameter(torch.zeros(3))
    module = Classifier(smooth_net(), lambda p: torch.optim.SGD([*p, foreign], lr=0.1))
    refused(tmp_path, module, "not the module's own", "Register them")


@pytest.mark.parametrize(
    "lazy", [nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False)], ids=["parameter", "buffer"]
)
def test_lazy_modules(tmp_path: Path, lazy: nn.Module) -> None:
    net = nn.Sequential(smooth_net(), lazy)
    module = Classifier(net, lambda _: torch.optim.SGD(net[0].parameters(), lr=0.1))
    refused(tmp_path, module, "not initialised yet", "one batch")


# ---------------------------------------------------------------------- the trainer


class Finetuning(BackboneFinetuning):
    def on_fit_start(self, *args: Any) -> None: ...

    def freeze_before_training(self, pl_module: Any) -> None: ...


@pytest.mark.parametrize(
    "other",
    [
        StochasticWeightAveraging(swa_lrs=0.1),
        ModelPruning("l1_unstructured", amount=0.1),
        Finetuning(),
        # Not in the oldest Lightning that is supported.
        *([callbacks.WeightAveraging()] if hasattr(callbacks, "WeightAveraging") else []),
    ],
    ids=lambda other: type(other).__name__,
)
def test_callbacks_that_change_the_run(tmp_path: Path, other: Callback) -> None:
    module = Classifier(smooth_net(), sgd())
    refused(tmp_path, module, f"`{type(other).__name__}`", "Remove it", callbacks=[other])


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_weights_in_16_bits(tmp_path: Path, precision: str) -> None:
    module = Classifier(nn.Linear(4, 3), sgd())
    words = [f'precision="{precision}"', "16 bits", "32-true", "bf16-mixed"]
    refused(tmp_path, module, *words, precision=precision)


def test_double_precision_is_replayed_to_the_bit(tmp_path: Path) -> None:
    module = Classifier(nn.Linear(4, 3), sgd())
    g = torch.Generator().manual_seed(0)
    single = TensorDataset(torch.randn(12, 4, generator=g), torch.arange(12) % 3)
    scores = fit(tmp_path, module, single, precision="64-true").scores
    assert scores is not None
    assert scores.info["bit_exact_replay"]
    assert module.net.weight.dtype == torch.float64


# ---------------------------------------------------------------------- the step


class DrawsItsOwn(Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_a_step_that_draws_its_own_batches(tmp_path: Path) -> None:
    refused(tmp_path, DrawsItsOwn(smooth_net(), sgd()), "dataloader_iter", "batch")


class Augmenting(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn_like(x), y


def test_random_augmentation(tmp_path: Path) -> None:
    data = Augmenting(*classification(12).tensors)
    words = ("at random", 'capture="batches"', "training_step")
    indices = {"capture": "indices"}
    refused(tmp_path, Classifier(smooth_net(), sgd()), *words, data=data, influence=indices)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x.long().abs() % 5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_operator_without_the_derivative_that_the_estimator_needs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    refused(tmp_path, Classifier(Bag(), sgd()), "embedding_bag", 'estimator="leave-one-out"')
    callback = fit(tmp_path, Classifier(Bag(), sgd()), influence={"estimator": "leave-one-out"})
    assert callback.scores is not None
    assert callback.scores.replayed == 12


@pytest.mark.parametrize(
    ("held", "kind"),
    [(threading.Lock, "lock"), (lambda: 2 * torch.ones(1, requires_grad=True), "Tensor")],
)
def test_a_module_that_cannot_be_copied(tmp_path: Path, held: Any, kind: str) -> None:
    module = Classifier(smooth_net(), sgd())
    module.net.keeps = held()
    refused(tmp_path, module, f"`self.net.keeps` is a `{kind}`", "__deepcopy__")


# ---------------------------------------------------------------------- hidden hands


class HalvesInAHook(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5


class Halves(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad *= 0.5


class KeepsAList(Classifier):
    """The penalty is on parameters that a copy of the module does not find by name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.penalised = [p for p in self.net.parameters() if p.dim() > 1]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().loss(logits, target) + sum(p.square().sum() for p in self.penalised)


@pytest.mark.parametrize("rate", [0.1, 1e-9])
def test_changed_gradients_are_seen_however_small_the_step(tmp_path: Path, rate: float) -> None:
    configure = sgd(lr=rate)
    refused(tmp_path, HalvesInAHook(smooth_net(), configure), "`on_before_optimizer_step`")
    small = rate < 0.1  # else the state itself is seen to differ
    words = ["another callback", "put it into the loss"] if small else ["something besides"]
    refused(tmp_path, Classifier(smooth_net(), configure), *words, callbacks=[Halves()])
    refused(
        tmp_path, KeepsAList(smooth_net(), configure), "a list of its own" if small else "reads"
    )


class ClipsByItself(Classifier):
    """Harmless: what it does is what the Trainer would."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = float(sum(p.grad.norm() for p in self.parameters() if p.grad is not None))


def test_a_hook_that_only_looks_is_fine(tmp_path: Path) -> None:
    scores = fit(tmp_path, ClipsByItself(smooth_net(), sgd())).scores
    assert scores is not None
    assert scores.info["bit_exact_replay"]
