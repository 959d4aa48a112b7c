"""The configurations that `configurations.py` measures, each with a twin that weights its samples.

A case trains as a user writes it, ``written``. Its twin computes the same loss by plain torch, as a sum
over samples of ``own`` times a weight that comes with the data, so that Lightning itself can train
again without a sample, or with a little more of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

SAMPLES = 24
Optimise = Callable[[LightningModule], Any]
Compute = Callable[["Model", Any, Any], Tensor]
"""(model, x, y) -> a scalar, or ``[B]`` for a sample's own share of it."""


@dataclass(frozen=True)
class Loss:
    """A loss told twice: as a user writes it, and as the sum of the samples' own shares and a rest."""

    written: Compute
    own: Compute
    rest: Callable[[Model], Tensor | float] = lambda model: 0.0


class Model(LightningModule):
    """Trains on ``loss.written``, or as the twin on the weighted sum of ``loss.own``."""

    def __init__(self, net: nn.Module, loss: Loss, optimise: Optimise) -> None:
        super().__init__()
        self.net, self.told, self.optimise = net, loss, optimise
        self.twin = False

    def share(self, batch: Any) -> Tensor:
        x, y, w = batch
        if not self.twin:
            return self.told.written(self, x, y)
        own = self.told.own(self, x, y)
        return (own * w.to(own.dtype)).sum() + self.told.rest(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.share(batch)
        self.log("train_loss", loss, batch_size=6)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.query(batch), batch_size=12)

    def query(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return self.told.written(self, x, y)

    def configure_optimizers(self) -> Any:
        return self.optimise(self)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        group: under which heading it stands.
        name: what it is.
        net: makes the network, in float64.
        loss: what it trains on.
        optimise: ``configure_optimizers``.
        data: makes ``(x, y)`` of n samples by a seed.
        loaders: makes the training loaders of a dataset of ``(x, y, w)``.
        trainer: arguments of the Trainer.
        callbacks: makes callbacks of the Trainer, given the run's directory.
        model: the LightningModule's class.
        precision: ``"double"``, ``"single"`` or ``"half"``: how well a weighted sum agrees with the
            loss itself. In half precision the rounding hides a sample, and there are no twins.
        derivatives: whether its operators have the second derivatives that SGD-IE needs.
        influence: further arguments of the callback.
        at: where the run ends for the ranking.
        resumed: after how many steps `fit` stops and goes on from a checkpoint; 0 for never.
        rounds: whether a replay is only promised to a few roundings.
    """

    group: str
    name: str
    net: Callable[[], nn.Module] = field(default=lambda: mlp())
    loss: Loss = field(default_factory=lambda: CROSS_ENTROPY)
    optimise: Optimise = field(default_factory=lambda: sgd(momentum=0.5))
    data: Callable[[int, int], tuple[Tensor, Tensor]] = field(default=lambda n, s: classes(n, s))
    loaders: Callable[[Any], Any] = field(default=lambda data: loader(data))
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[Path], list[Any]] = lambda root: []
    model: type[Model] = Model
    precision: str = "double"
    derivatives: bool = True
    influence: dict[str, Any] = field(default_factory=dict)
    at: str = "last"
    resumed: int = 0
    rounds: bool = False


# ------------------------------------------------------------------ parts


def mlp(*between: nn.Module, outputs: int = 3, inputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), *between, nn.Linear(6, outputs)).double()


def classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loader(data: Any, batch_size: Any = 6, **options: Any) -> DataLoader[Any]:
    if not options.keys() & {"sampler", "batch_sampler"}:
        options.setdefault("shuffle", True)
    return DataLoader(
        data, **({} if "batch_sampler" in options else {"batch_size": batch_size}), **options
    )


def optimiser(kind: Any, **settings: Any) -> Optimise:
    return lambda model: kind(model.parameters(), **settings)


def sgd(**settings: Any) -> Optimise:
    return optimiser(torch.optim.SGD, **{"lr": 0.1, **settings})


def adam(**settings: Any) -> Optimise:
    return optimiser(torch.optim.Adam, **{"lr": 0.02, **settings})


def adamw(**settings: Any) -> Optimise:
    return optimiser(torch.optim.AdamW, **{"lr": 0.02, **settings})


def scheduled(
    optimise: Optimise, schedule: Callable[[Any], Any], interval: str = "step"
) -> Optimise:
    def configure(model: LightningModule) -> Any:
        found = optimise(model)
        return {
            "optimizer": found,
            "lr_scheduler": {"scheduler": schedule(found), "interval": interval},
        }

    return configure


def groups(model: Any) -> Any:
    last = list(model.net[-1].parameters())
    rest = list(model.net[:-1].parameters())
    settings = [
        {"params": rest, "lr": 0.05},
        {"params": last, "weight_decay": 0.1, "momentum": 0.9},
    ]
    return torch.optim.SGD(settings, lr=0.2)


def of(function: Callable[..., Tensor], **options: Any) -> Loss:
    """A function of `torch.nn.functional` over one row a sample, with ``reduction="mean"``."""

    def own(model: Model, x: Tensor, y: Tensor) -> Tensor:
        elements = function(model.net(x), y, reduction="none", **options)
        return elements.reshape(len(x), -1).mean(1) / len(x)

    return Loss(lambda model, x, y: function(model.net(x), y, **options), own)


CROSS_ENTROPY = of(F.cross_entropy)


# ------------------------------------------------------------------ optimisers and the Trainer


def optimiser_cases() -> Iterator[Case]:
    case = Case("Optimisers", "")
    told: dict[str, Optimise] = {
        "SGD": sgd(),
        "SGD, weight decay": sgd(weight_decay=0.05),
        "SGD, momentum": sgd(momentum=0.9),
        "SGD, momentum and dampening": sgd(momentum=0.8, dampening=0.3),
        "SGD, Nesterov, weight decay": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
        "SGD, maximize": sgd(lr=0.02, maximize=True, weight_decay=0.01),
        "Adam": adam(),
        "Adam, coupled weight decay": adam(weight_decay=0.1),
        "Adam, amsgrad": adam(amsgrad=True, betas=(0.8, 0.9)),
        "Adam, maximize": adam(lr=0.005, maximize=True),
        "AdamW": adamw(weight_decay=0.1),
        "AdamW, amsgrad": adamw(amsgrad=True),
        "groups with settings of their own": groups,
        "RMSprop, centred, momentum": optimiser(
            torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True
        ),
        "Adagrad": optimiser(torch.optim.Adagrad, lr=0.05, lr_decay=0.1, weight_decay=0.02),
        "Adadelta": optimiser(torch.optim.Adadelta, lr=0.7, eps=1e-5),
        "Adamax": optimiser(torch.optim.Adamax, lr=0.02, weight_decay=0.02),
        "NAdam": optimiser(torch.optim.NAdam, lr=0.01, weight_decay=0.02),
        "RAdam": optimiser(torch.optim.RAdam, lr=0.02, weight_decay=0.02),
        "SGD, momentum, `foreach=True`": sgd(momentum=0.9, foreach=True),
        "AdamW, `foreach=True`": adamw(foreach=True),
        "SGD, momentum, `fused=True`": sgd(momentum=0.9, fused=True),
        "AdamW, `fused=True`": adamw(fused=True),
    }
    for name, optimise in told.items():
        yield replace(case, name=name, optimise=optimise, rounds="fused" in name)


def schedule_cases() -> Iterator[Case]:
    rates = torch.optim.lr_scheduler
    told: dict[str, Optimise] = {
        "OneCycleLR, every step, with its momentum": scheduled(
            sgd(momentum=0.9), lambda o: rates.OneCycleLR(o, max_lr=0.2, total_steps=40)
        ),
        "OneCycleLR of AdamW's betas": scheduled(
            adamw(), lambda o: rates.OneCycleLR(o, max_lr=0.05, total_steps=40)
        ),
        "ExponentialLR, every epoch": scheduled(
            sgd(), lambda o: rates.ExponentialLR(o, gamma=0.5), "epoch"
        ),
        "CosineAnnealingLR, every step": scheduled(
            adam(), lambda o: rates.CosineAnnealingLR(o, T_max=12)
        ),
        "CyclicLR, every step": scheduled(
            sgd(momentum=0.5), lambda o: rates.CyclicLR(o, 0.01, 0.2, step_size_up=3)
        ),
    }
    for name, optimise in told.items():
        yield Case("Learning-rate schedules", name, optimise=optimise)


def trainer_cases() -> Iterator[Case]:
    told: dict[str, dict[str, Any]] = {
        "`accumulate_grad_batches=2`": {"accumulate_grad_batches": 2},
        "`accumulate_grad_batches=3`, a partial window": {"accumulate_grad_batches": 3},
        "clipping by norm": {"gradient_clip_val": 0.2},
        "clipping by value": {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"},
        "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
        "`limit_train_batches=3`": {"limit_train_batches": 3},
        "`limit_train_batches=0.5`": {"limit_train_batches": 0.5},
        "`max_steps`, within an epoch": {"max_steps": 7, "max_epochs": -1},
        "`val_check_interval=2`": {"val_check_interval": 2},
        "`check_val_every_n_epoch=2`": {"check_val_every_n_epoch": 2},
        "`overfit_batches=2`": {"overfit_batches": 2},
        "`reload_dataloaders_every_n_epochs=1`": {"reload_dataloaders_every_n_epochs": 1},
        "sanity checking": {"num_sanity_val_steps": 2},
        '`precision="64-true"`': {"precision": "64-true"},
        "no validation in `fit`": {"limit_val_batches": 0},
    }
    for name, settings in told.items():
        yield Case("Trainer", name, trainer=settings)
    yield Case(
        "Trainer",
        "`GradientAccumulationScheduler`",
        callbacks=lambda root: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
    )
    yield Case(
        "Trainer",
        "`EarlyStopping`, trained again for as many steps",
        optimise=scheduled(sgd(), overshoots),
        callbacks=lambda root: [EarlyStopping("val_loss", patience=0)],
    )
    yield Case(
        "Trainer",
        '`at="best"`, with a `ModelCheckpoint`',
        optimise=scheduled(sgd(momentum=0.5), overshoots),
        trainer={"val_check_interval": 2},
        callbacks=lambda root: [ModelCheckpoint(root / "best", monitor="val_loss")],
        influence={"at": "best"},
        at="best",
    )
    for name, steps in (("within an epoch", 6), ("at an epoch's end", 4)):
        yield Case(
            "Trainer",
            f"stopped and resumed from `ckpt_path=`, {name}",
            net=lambda: mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)),
            optimise=scheduled(
                adamw(), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12)
            ),
            resumed=steps,
        )
    yield Case(
        "Trainer",
        "clipping by norm under Adam",
        optimise=adam(),
        trainer={"gradient_clip_val": 0.2, "accumulate_grad_batches": 2},
    )


def overshoots(optimizer: Any) -> Any:
    """From the eighth step on the rate is far too large."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 7 else 60.0)


def half() -> dict[str, Any]:
    """What `Trainer(precision="16-mixed")` is on a GPU; its first scale is too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def precision_cases() -> Iterator[Case]:
    """In 16 bits it is left to the replay to show what differs in more than rounding."""
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        for share in (0.0, 0.3):
            yield Case(
                "Precision",
                f"`{precision}`"
                + (", Dropout" if share else "")
                + (", with skipped steps" if precision == "16-mixed" else ""),
                net=lambda share=share: mlp(nn.Dropout(share)).float(),
                data=lambda n, s: (classes(n, s)[0].float(), classes(n, s)[1]),
                optimise=adamw(),
                trainer=half() if precision == "16-mixed" else {"precision": precision},
                precision="single" if precision == "32-true" else "half",
            )


# ------------------------------------------------------------------ losses


def targets(make: Callable[[Tensor, torch.Generator], Tensor]) -> Any:
    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x, _ = classes(n, seed)
        return x, make(x, torch.Generator().manual_seed(seed + 100))

    return data


def noise(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(len(x), 3, generator=g, dtype=torch.float64)


def signs(x: Tensor, g: torch.Generator) -> Tensor:
    return 2.0 * (noise(x, g) > 0).double() - 1.0


def counts(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randint(0, 4, (len(x), 3), generator=g).double()


def one_label(x: Tensor, g: torch.Generator) -> Tensor:
    """The only right class, and -1 in the places of further ones."""
    return F.pad(torch.randint(0, 3, (len(x), 1), generator=g), (0, 2), value=-1)


def weighted_cross_entropy() -> Loss:
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def own(model: Model, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(model.net(x), y, weight=weight, ignore_index=1, reduction="none")
        return losses / (weight[y] * (y != 1)).sum()

    return Loss(
        lambda model, x, y: F.cross_entropy(model.net(x), y, weight=weight, ignore_index=1), own
    )


def pair(function: Callable[..., Tensor], **options: Any) -> Loss:
    """A loss of two inputs and a sign: the network's outputs for a sample and for its negative."""

    def call(model: Model, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return function(model.net(x), model.net(-x), y, **options, **more)

    def own(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return call(model, x, y, reduction="none").reshape(len(x), -1).mean(1) / len(x)

    return Loss(call, own)


def triplet() -> Loss:
    def call(model: Model, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return F.triplet_margin_loss(model.net(x), model.net(x.roll(1, 1)), y, margin=4.0, **more)

    return Loss(call, lambda model, x, y: call(model, x, y, reduction="none") / len(x))


def gaussian() -> Loss:
    def call(model: Model, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return F.gaussian_nll_loss(model.net(x), y, 0.5 + x[:, :3].square(), **more)

    return Loss(call, lambda model, x, y: call(model, x, y, reduction="none").mean(1) / len(x))


def divergence() -> Loss:
    def call(model: Model, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.kl_div(model.net(x).log_softmax(1), y.softmax(1), reduction=reduction)

    return Loss(
        lambda model, x, y: call(model, x, y, "batchmean"),
        lambda model, x, y: call(model, x, y, "none").sum(1) / len(x),
    )


def loss_cases() -> Iterator[Case]:
    real, yes = targets(noise), targets(lambda x, g: (noise(x, g) > 0).double())
    plus = targets(signs)
    told: list[tuple[str, Loss, Any]] = [
        ("`cross_entropy`, weights and `ignore_index`", weighted_cross_entropy(), classes),
        ("`cross_entropy`, label smoothing", of(F.cross_entropy, label_smoothing=0.1), classes),
        (
            "`cross_entropy`, probabilities",
            of(F.cross_entropy),
            targets(lambda x, g: noise(x, g).softmax(1)),
        ),
        ("`nll_loss`", logarithmic(F.nll_loss), classes),
        ("`binary_cross_entropy`", squashed(F.binary_cross_entropy), yes),
        ("`binary_cross_entropy_with_logits`", of(F.binary_cross_entropy_with_logits), yes),
        ("`mse_loss`", of(F.mse_loss), real),
        ("`l1_loss`", of(F.l1_loss), real),
        ("`smooth_l1_loss`", of(F.smooth_l1_loss), real),
        ("`huber_loss`", of(F.huber_loss, delta=0.5), real),
        ("`poisson_nll_loss`", of(F.poisson_nll_loss), targets(counts)),
        ("`gaussian_nll_loss`", gaussian(), real),
        ("`kl_div`, batchmean", divergence(), real),
        ("`hinge_embedding_loss`", of(F.hinge_embedding_loss), plus),
        ("`soft_margin_loss`", of(F.soft_margin_loss), plus),
        ("`multilabel_soft_margin_loss`", of(F.multilabel_soft_margin_loss), yes),
        (
            "`multilabel_margin_loss`",
            of(F.multilabel_margin_loss),
            targets(
                lambda x, g: torch.stack(
                    [classes(len(x), 3)[1], *[-torch.ones(len(x)).long()] * 2], 1
                )
            ),
        ),
        ("`multi_margin_loss`", of(F.multi_margin_loss), classes),
        (
            "`cosine_embedding_loss`",
            pair(F.cosine_embedding_loss),
            targets(lambda x, g: signs(x, g)[:, 0]),
        ),
        ("`margin_ranking_loss`", pair(F.margin_ranking_loss, margin=0.1), plus),
        ("`triplet_margin_loss`", triplet(), real),
        ("a mean by hand", by_hand(lambda rows: rows.mean()), classes),
        (
            "a sum by hand, divided by the batch size",
            by_hand(lambda rows: rows.sum() / len(rows)),
            classes,
        ),
        (
            '`reduction="sum"`',
            Loss(
                lambda m, x, y: F.mse_loss(m.net(x), y, reduction="sum") / 18,
                lambda m, x, y: F.mse_loss(m.net(x), y, reduction="none").sum(1) / 18,
            ),
            real,
        ),
        ("two losses, one weighted", mixed(), classes),
        ("a penalty on the weights", penalised(), classes),
    ]
    for name, loss, data in told:
        second = name not in ("`multi_margin_loss`", "`multilabel_margin_loss`")
        yield Case("Losses", name, loss=loss, data=data, derivatives=second)
    labels = targets(lambda x, g: torch.randint(1, 3, (len(x), 2), generator=g))
    yield Case(
        "Losses", "`ctc_loss`", net=per_token, loss=aligned(), data=labels, derivatives=False
    )
    tokens = targets(lambda x, g: torch.randint(0, 3, (len(x), 4), generator=g))
    yield Case(
        "Losses", "tokens, `[B·T, C]`", loss=flattened(major=False), data=tokens, net=per_token
    )
    yield Case(
        "Losses", "tokens, time first", loss=flattened(major=True), data=tokens, net=per_token
    )


def per_token() -> nn.Module:
    return mlp(inputs=1)


def flattened(major: bool) -> Loss:
    """One row a token; the network sees one number of a sample at a time."""

    def rows(model: Model, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        x, y = (x.t(), y.t()) if major else (x, y)
        logits = model.net(x.unsqueeze(-1))
        return F.cross_entropy(logits.reshape(-1, 3), y.reshape(-1), **more)

    def own(model: Model, x: Tensor, y: Tensor) -> Tensor:
        losses = rows(model, x, y, reduction="none")
        return losses.reshape((4, -1) if major else (-1, 4)).mean(0 if major else 1) / len(x)

    return Loss(rows, own)


def aligned() -> Loss:
    """Two labels for four frames."""

    def call(model: Model, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        frames = model.net(x.unsqueeze(-1)).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(x),), 4), torch.full((len(x),), 2)
        return F.ctc_loss(frames, y, *lengths, **more)

    return Loss(call, lambda model, x, y: call(model, x, y, reduction="none") / 2 / len(x))


def logarithmic(function: Callable[..., Tensor]) -> Loss:
    return Loss(
        lambda m, x, y: function(m.net(x).log_softmax(1), y),
        lambda m, x, y: function(m.net(x).log_softmax(1), y, reduction="none") / len(x),
    )


def squashed(function: Callable[..., Tensor]) -> Loss:
    return Loss(
        lambda m, x, y: function(m.net(x).sigmoid(), y),
        lambda m, x, y: function(m.net(x).sigmoid(), y, reduction="none").mean(1) / len(x),
    )


def by_hand(reduce: Callable[[Tensor], Tensor]) -> Loss:
    def rows(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.net(x), y, reduction="none")

    return Loss(lambda m, x, y: reduce(rows(m, x, y)), lambda m, x, y: rows(m, x, y) / len(x))


def mixed() -> Loss:
    def written(m: Model, x: Tensor, y: Tensor) -> Tensor:
        z = m.net(x)
        return F.cross_entropy(z, y) + 0.1 * F.mse_loss(z, x[:, :3], reduction="sum")

    def own(m: Model, x: Tensor, y: Tensor) -> Tensor:
        z = m.net(x)
        squares = F.mse_loss(z, x[:, :3], reduction="none").sum(1)
        return F.cross_entropy(z, y, reduction="none") / len(x) + 0.1 * squares

    return Loss(written, own)


def penalised() -> Loss:
    def rest(m: Model) -> Tensor:
        return 0.01 * torch.stack([p.square().sum() for p in m.parameters()]).sum()

    return Loss(lambda m, x, y: CROSS_ENTROPY.written(m, x, y) + rest(m), CROSS_ENTROPY.own, rest)


# ------------------------------------------------------------------ modules


class Pooled(nn.Module):
    """Tokens -> classes by attention or recurrence."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(9, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.embed(x))
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden).mean(1))


def sequences(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 9, (n, 5), generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1) % 3


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(1, 4, 2, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.convolve(x.reshape(-1, 1, 2, 2))))
        return self.head(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


class Noisy(Model):
    """Draws from all three generators, and reads the counters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, w = batch
        x = x + 0.1 * torch.randn_like(x) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        scale = 1 + 0.1 * self.current_epoch + 0.01 * self.global_step + 0.001 * batch_idx
        return self.share((x, y, w)) * scale


class SometimesNone(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 2 else self.share(batch)


class GivesADict(Model):
    def training_step(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": self.share(batch), "more": torch.zeros(1)}


class Frozen(Model):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.net[0].requires_grad_(False)


class InPlace(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(1.5).add_(0.1)
        return self.share(batch)


class HalfUnused(Model):
    """A layer without a gradient in every other step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.extra = nn.Linear(4, 4).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, w = batch
        return self.share((self.extra(x) if batch_idx % 2 else x, y, w))


def module_cases() -> Iterator[Case]:
    base = Case("Modules", "")
    between: dict[str, Callable[[], nn.Module]] = {
        "Dropout": lambda: mlp(nn.Dropout(0.3)),
        "BatchNorm": lambda: mlp(nn.BatchNorm1d(6)),
        "BatchNorm and Dropout": lambda: mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)),
        "LayerNorm": lambda: mlp(nn.LayerNorm(6)),
    }
    for name, net in between.items():
        yield replace(base, name=name, net=net)
    tokens = {
        "a Transformer layer, with dropout": lambda: nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.2, batch_first=True, activation="gelu"
        ),
        "LSTM": lambda: nn.LSTM(8, 8, batch_first=True),
        "GRU": lambda: nn.GRU(8, 8, batch_first=True),
        "an embedding": nn.Identity,
    }
    for name, middle in tokens.items():
        yield replace(
            base,
            name=name,
            net=lambda middle=middle: Pooled(middle()).double(),
            data=sequences,
            optimise=adamw(lr=0.005),
        )
    yield replace(base, name="convolution, GroupNorm, pooling", net=lambda: Images().double())
    yield replace(base, name="weight_norm", net=normed)
    yield replace(base, name="random numbers of torch, numpy and random; counters", model=Noisy)
    yield replace(base, name="steps that return None", model=SometimesNone)
    yield replace(base, name="`training_step(batch)` that returns a dict", model=GivesADict)
    yield replace(base, name="frozen layers", model=Frozen)
    yield replace(base, name="a batch changed in place", model=InPlace)
    yield replace(
        base, name="a layer without a gradient at times", model=HalfUnused, optimise=adam()
    )


def normed() -> nn.Module:
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[0])
    return net


# ------------------------------------------------------------------ data


class Blocks:
    """A batch sampler of the user's own: uneven blocks, a sample twice in one."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        return iter([order[:5], [*order[5:9], order[5]], order[9:]])

    def __len__(self) -> int:
        return 3


class Several(Model):
    """A loss for every loader of a dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [self.share(part) for part in batch.values() if part is not None]
        return torch.stack(parts).sum()


class OneByOne(Model):
    """Samples that were never collated."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.share([part.unsqueeze(0) for part in batch])


class Augmented(TensorDataset):
    """Adds other noise to a sample every time."""

    def __getitem__(self, index: int) -> Any:
        x, *rest = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), *rest


class Stream(IterableDataset[Any]):
    """Samples in an order of its own, each with its number."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter([(*self.data[i], i) for i in torch.randperm(SAMPLES).tolist()])


class Named(Model):
    """The batch has the samples' names, too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.share(batch[:3])


def names(batch: Any) -> Tensor:
    return batch[3]


def halves(data: TensorDataset) -> dict[str, DataLoader[Any]]:
    one, two = (
        TensorDataset(*(t[part] for t in data.tensors)) for part in (slice(14), slice(14, None))
    )
    return {"a": loader(one, 4), "b": loader(two, 3)}


def nested(data: TensorDataset) -> DataLoader[Any]:
    parts = ConcatDataset([Subset(data, range(12, SAMPLES)), Subset(data, range(12))])
    return loader(parts)


def data_cases() -> Iterator[Case]:
    told: dict[str, Callable[[Any], Any]] = {
        "`shuffle=False`": lambda data: loader(data, shuffle=False),
        "`drop_last=True`": lambda data: loader(data, 7, drop_last=True),
        "an uneven last batch": lambda data: loader(data, 7),
        "samples drawn twice in a batch": lambda data: loader(
            data, sampler=RandomSampler(data, replacement=True, num_samples=30)
        ),
        "`WeightedRandomSampler`": lambda data: loader(
            data, sampler=WeightedRandomSampler([1.0, 2.0] * 12, 20)
        ),
        "a batch sampler of one's own": lambda data: loader(data, batch_sampler=Blocks()),
        "two workers": lambda data: loader(data, num_workers=2),
        "two persistent workers": lambda data: loader(data, num_workers=2, persistent_workers=True),
    }
    for name, loaders in told.items():
        yield Case("Data", name, loaders=loaders)
    yield Case(
        "Data", "`batch_size=None`", loaders=lambda data: loader(data, None), model=OneByOne,
        optimise=sgd(lr=0.02),
    )  # fmt: skip
    for mode in ("max_size_cycle", "max_size", "min_size"):
        yield Case(
            "Data",
            f'`CombinedLoader` of two, `"{mode}"`',
            loaders=lambda data, mode=mode: CombinedLoader(halves(data), mode),
            model=Several,
        )
    yield Case("Data", "a dict of two loaders", loaders=halves, model=Several)
    yield Case(
        "Data",
        "random augmentation in the dataset, batches kept",
        loaders=lambda data: loader(Augmented(*data.tensors)),
        influence={"capture": "batches"},
    )
    yield Case(
        "Data",
        "an `IterableDataset`, with `sample_id=`",
        loaders=lambda data: loader(Stream(data), shuffle=None),
        model=Named,
        influence={"sample_id": names},
    )


CASES = [
    *optimiser_cases(),
    *schedule_cases(),
    *trainer_cases(),
    *precision_cases(),
    *loss_cases(),
    *module_cases(),
    *data_cases(),
]
