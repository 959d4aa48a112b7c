"""Training with the callback is what it is without, and everything is as before afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_accie import InfluenceCallback
from tests.problems import Classifier, adamw, quiet_trainer, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")


class Losses(Callback):
    """Keeps the loss of every training batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def data(n: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


def module(configure: Any) -> Classifier:
    torch.manual_seed(3)
    first = nn.Linear(4, 8, bias=False)
    layers = [first, nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return Classifier(nn.Sequential(*layers), configure)


def generators() -> tuple[Any, ...]:
    states: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), states[1].tolist(), states[2:]


def run(
    root: Path, configure: Any, loader: dict[str, Any], callbacks: list[Any], **trainer: Any
) -> Any:
    model, losses = module(configure), Losses()
    train = DataLoader(data(32, 0), batch_size=6, **loader)
    own = torch.Generator().manual_seed(2)  # of the loader's own, beside the global one
    valid = DataLoader(data(15, 1), batch_size=7, shuffle=True, generator=own)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    trainer_ = quiet_trainer(root, callbacks=[losses, *callbacks], **trainer)
    trainer_.fit(model, train, valid)
    return model, losses.losses, (*generators(), own.get_state().tolist()), train, trainer_


@pytest.mark.parametrize("when", ["manual", "fit_end", "live"])
@pytest.mark.parametrize(
    ("configure", "loader", "trainer"),
    [
        (sgd(momentum=0.9), {"shuffle": True}, {}),
        (adamw(), {"shuffle": True, "drop_last": True}, {"accumulate_grad_batches": 2}),
        (
            adamw(),
            {"sampler": WeightedRandomSampler([1.0] * 32, 20)},
            {"gradient_clip_val": 0.1, "val_check_interval": 2},
        ),
    ],
    ids=["sgd", "adamw-accumulate", "sampler-clip"],
)
def test_training_is_bit_identical(
    tmp_path: Path, when: str, configure: Any, loader: dict[str, Any], trainer: dict[str, Any]
) -> None:
    plain, losses, states, *_ = run(tmp_path / "a", configure, loader, [], **trainer)
    live = when == "live"
    callback = InfluenceCallback(
        run="manual" if live else when, live=live, verify=4, top_k=2, console=False
    )
    model, seen, after, train, trainer_ = run(
        tmp_path / "b", configure, loader, [callback], **trainer
    )
    assert seen == losses
    assert after == states
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (callback.scores is not None) == (when == "fit_end")
    assert (callback.live_scores is not None) == live
    assert type(train) is DataLoader
    assert not {"log", "log_dict", "print"} & vars(model).keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.net[0].weight, nn.Parameter)
    assert not {"training_step", "backward", "process_dataloader"} & vars(trainer_.strategy).keys()
    assert model.trainer is trainer_


def test_the_optimiser_keeps_no_hook(tmp_path: Path) -> None:
    kept: list[torch.optim.Optimizer] = []

    class Keeps(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            kept.append(trainer.optimizers[0])

    run(tmp_path, sgd(), {}, [Keeps(), InfluenceCallback(run="manual")])
    assert not kept[0]._optimizer_step_post_hooks


def test_two_callbacks_and_a_second_fit_keep_apart(tmp_path: Path) -> None:
    one = InfluenceCallback(verify=4, top_k=2, console=False)
    two = InfluenceCallback(monitor=negative_loss, verify=4, top_k=2, console=False)
    model, *_, train, trainer = run(tmp_path, sgd(), {"shuffle": True}, [one, two])
    assert one.directory != two.directory
    assert one.scores is not None
    assert two.scores is not None
    torch.testing.assert_close(
        one.scores.estimate,
        -two.scores.estimate,
        rtol=1e-3,
        atol=float(one.scores.estimate.abs().max()) * 0.05,
    )
    first = one.directory
    trainer.fit_loop.max_epochs = 5
    with pytest.warns(UserWarning, match="starts recording at step 18"):
        trainer.fit(model, train, DataLoader(data(15, 1), batch_size=7))
    assert one.directory != first


def negative_loss(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return -module.loss(module.net(x), y)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_namespaces(tmp_path: Path, namespace: str) -> None:
    library = pytest.importorskip(namespace)

    class Plain(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = InfluenceCallback(verify=4, top_k=2, console=False)
    trainer = library.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    loaders = (
        DataLoader(data(32, 0), batch_size=6, shuffle=True),
        DataLoader(data(15, 1), batch_size=7),
    )
    trainer.fit(Plain(), *loaders)
    assert callback.scores is not None
    assert callback.scores.info["bit_exact_replay"]
    reported = float(trainer.callback_metrics["val_loss"])  # summed in single precision
    assert callback.scores.info["query_value"] == pytest.approx(reported, rel=1e-6)
