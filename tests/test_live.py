"""The live view of the latest steps, against finite differences in the samples' weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceScores, UnsupportedError
from lightning_accie.live import LiveView
from tests.problems import Classifier, adam, classification, quiet_trainer, sgd, smooth_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TRAIN, VALID = classification(24), classification(11, seed=3)
BATCH = 6


class Keeps(Callback):
    """Keeps weights, optimiser and the view's scores at every validation; before the view is made."""

    def __init__(self, influence: InfluenceCallback) -> None:
        self.influence = influence
        self.states: list[tuple[int, Any, Any]] = []
        self.views: list[InfluenceScores | None] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.keep(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.keep(trainer, module)
            self.views.append(self.influence.live_scores)

    def keep(self, trainer: Any, module: Any) -> None:
        optimizer = trainer.optimizers[0].state_dict()
        self.states.append(
            (trainer.global_step, copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer))
        )


def run(
    root: Path,
    configure: Any = None,
    *,
    callback: dict[str, Any] | None = None,
    net: nn.Module | None = None,
    train: dict[str, Any] | None = None,
    valid: Any = None,
    callbacks: Any = (),
    **trainer: Any,
) -> tuple[InfluenceCallback, Keeps]:
    settings = {"run": "manual", "console": False, "live": True, "top_k": 3, **(callback or {})}
    influence = InfluenceCallback(**settings)
    keeps = Keeps(influence)
    module = Classifier(net or smooth_net(), configure or sgd(momentum=0.9))
    torch.manual_seed(5)
    trainer_ = quiet_trainer(root, callbacks=[influence, keeps, *callbacks], **trainer)
    loader = DataLoader(TRAIN, **{"batch_size": BATCH, **(train or {})})
    if valid is None:
        valid = DataLoader(VALID, batch_size=11)
    trainer_.fit(module, loader, valid)
    return influence, keeps


def retrained(
    configure: Any,
    keeps: Keeps,
    window: int,
    weights: Tensor,
    accumulate: int,
) -> float:
    """q after the window's steps with these weights of the samples: a loop of torch's own."""
    start, state, slots = keeps.states[window]
    end = keeps.states[window + 1][0]
    module = Classifier(smooth_net(), configure)
    module.load_state_dict(state)
    optimizer = configure(list(module.parameters()))
    optimizer.load_state_dict(copy.deepcopy(slots))
    per_epoch = len(TRAIN) // BATCH // accumulate
    for step in range(start, end):
        optimizer.zero_grad()
        for micro in range(accumulate):
            first = ((step % per_epoch) * accumulate + micro) * BATCH
            chosen = slice(first, first + BATCH)
            x, y = TRAIN[chosen]
            losses = nn.functional.cross_entropy(module.net(x), y, reduction="none")
            ((weights[chosen] * losses).sum() / BATCH / accumulate).backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.net(VALID.tensors[0]), VALID.tensors[1]))


@pytest.mark.parametrize(
    ("configure", "accumulate", "trainer"),
    [
        (sgd(momentum=0.9, weight_decay=0.01), 1, {}),
        (adam(), 1, {"val_check_interval": 2}),
        (sgd(momentum=0.5), 2, {"accumulate_grad_batches": 2}),
    ],
    ids=["sgd-epochs", "adam-within-epochs", "accumulated"],
)
def test_the_view_is_the_derivative_in_the_samples_weights(
    tmp_path: Path, configure: Any, accumulate: int, trainer: dict[str, Any]
) -> None:
    influence, keeps = run(tmp_path, configure, max_epochs=3, **trainer)
    windows = len(keeps.states) - 1
    assert windows == (6 if "val_check_interval" in trainer else 3)
    for window, scores in enumerate(keeps.views):
        assert scores is not None
        first, last = keeps.states[window][0], keeps.states[window + 1][0]
        assert scores.info["window"] == [first + 1, last]
        assert scores.info["steps"] == last - first
        drawn = (last - first) * BATCH * accumulate
        assert len(scores) == min(drawn, len(TRAIN))
        assert scores.info["query_value"] == pytest.approx(
            retrained(configure, keeps, window, torch.ones(len(TRAIN)), accumulate), rel=1e-9
        )
        for place in (0, 3, len(scores) - 1):
            sample, eps = int(scores.index[place]), 1e-4
            values = []
            for sign in (1, -1):
                weights = torch.ones(len(TRAIN), dtype=torch.float64)
                weights[sample] += sign * eps
                values.append(retrained(configure, keeps, window, weights, accumulate))
            # Influence is q without the sample minus q, to first order.
            assert float(scores.influence[place]) == pytest.approx(
                -(values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-9
            )
    assert influence.live_scores is keeps.views[-1]
    assert influence.scores is None


def test_the_first_scores_come_with_the_first_validation(tmp_path: Path) -> None:
    influence, keeps = run(tmp_path, max_epochs=2, num_sanity_val_steps=2)
    assert len(keeps.views) == 2
    assert all(view is not None for view in keeps.views)
    assert keeps.views[0] is not keeps.views[1]
    assert keeps.views[-1] is influence.live_scores


def test_a_view_within_an_accumulation_window_waits_for_the_next_and_it_is_said(
    tmp_path: Path,
) -> None:
    with pytest.warns(UserWarning, match="multiple of `accumulate_grad_batches`") as caught:
        _, keeps = run(tmp_path, max_epochs=2, accumulate_grad_batches=4, val_check_interval=2)
    assert sum("accumulate_grad" in str(warning.message) for warning in caught) == 1
    windows = [None if view is None else view.info["window"] for view in keeps.views]
    assert windows == [None, [1, 1], [1, 1], [2, 2]]


def test_batch_norm_dropout_augmented_batches_and_several_loaders(tmp_path: Path) -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(TRAIN)

        def __getitem__(self, index: int) -> Any:
            x, y = TRAIN[index]
            return x + 0.1 * torch.randn_like(x), y

    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = batch
            self.log("val_loss", self.loss(self.net(x), y), add_dataloader_idx=dataloader_idx > 0)

    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
    ).double()
    influence = InfluenceCallback(live=True, top_k=3, verify=4, console=False)
    trainer = quiet_trainer(tmp_path, callbacks=[influence], val_check_interval=2)
    valid = [DataLoader(VALID, batch_size=4, shuffle=True), DataLoader(TRAIN, batch_size=9)]
    trainer.fit(Several(net, adam()), DataLoader(Augmented(), batch_size=6, shuffle=True), valid)
    live, scores = influence.live_scores, influence.scores
    assert live is not None
    assert scores is not None
    assert scores.info["capture"] == "batches"
    assert live.info["window"] == [11, 12]
    assert live.info["query_value"] == scores.info["query_value"]
    assert live.info["query_value"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert influence.directory is not None


def test_layers_and_a_query_of_its_own(tmp_path: Path) -> None:
    def twice(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return 2 * module.loss(module.net(x), y)

    query = DataLoader(VALID, batch_size=11)
    every, _ = run(tmp_path / "a")
    doubled, _ = run(tmp_path / "b", callback={"monitor": twice, "query_dataloader": query})
    head, _ = run(tmp_path / "c", callback={"layers": "net.2"})
    assert every.live_scores is not None
    assert doubled.live_scores is not None
    assert head.live_scores is not None
    torch.testing.assert_close(doubled.live_scores.influence, 2 * every.live_scores.influence)
    assert not torch.allclose(head.live_scores.influence, every.live_scores.influence)


def test_early_stopping_and_a_resumed_fit(tmp_path: Path) -> None:
    stops = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    influence, _ = run(tmp_path, max_epochs=9, callbacks=[stops], enable_checkpointing=True)
    assert influence.live_scores is not None
    assert influence.live_scores.info["window"] == [5, 8]
    (saved,) = tmp_path.rglob("*.ckpt")
    trainer = quiet_trainer(tmp_path / "again", callbacks=[influence], max_epochs=3)
    trainer.fit(
        Classifier(smooth_net(), sgd(momentum=0.9)),
        DataLoader(TRAIN, batch_size=BATCH),
        DataLoader(VALID, batch_size=11),
        ckpt_path=saved,
    )
    assert influence.live_scores.info["window"] == [9, 12]


class Attention(nn.Module):
    """An operator whose fused kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[..., None])).mean(1))


@pytest.mark.parametrize(
    ("net", "workers", "trainer", "window"),
    [
        (smooth_net, 0, {"fast_dev_run": 2}, [1, 2]),
        (smooth_net, 1, {}, [5, 8]),
        (smooth_net, 0, {"inference_mode": False, "limit_val_batches": 1}, [5, 8]),
        (smooth_net, 0, {"check_val_every_n_epoch": 2, "max_epochs": 4}, [9, 16]),
        (smooth_net, 0, {"reload_dataloaders_every_n_epochs": 1}, [5, 8]),
        (lambda: Attention().double(), 0, {}, [5, 8]),
    ],
    ids=["fast-dev-run", "workers", "no-inference-mode", "every-other", "reloaded", "attention"],
)
def test_there_is_a_view_and_the_weights_are_those_without(
    tmp_path: Path, net: Any, workers: int, trainer: dict[str, Any], window: list[int]
) -> None:
    alive = {"num_workers": workers, "persistent_workers": workers > 0}
    states = []
    for live in (False, True):
        influence, keeps = run(
            tmp_path / str(live),
            callback={"live": live},
            net=net(),
            train={"shuffle": True, **alive},
            valid=DataLoader(VALID, batch_size=7, **alive),
            **{"max_epochs": 2, **trainer},
        )
        states.append(keeps.states[-1][1])
    assert influence.live_scores is not None
    assert influence.live_scores.info["window"] == window
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


# ---------------------------------------------------------------------- what is told


def test_it_tells_the_log_and_the_loggers_under_names_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    settings = {"run": "fit_end", "verify": 0, "estimator": "sgd-ie"}
    with caplog.at_level(logging.INFO):
        influence, keeps = run(
            tmp_path,
            callback={**settings, "describe": lambda sample: {"label": int(sample[1])}},
            logger=logger,
            max_epochs=2,
        )
    found = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    found.Reload()
    views = [view for view in keeps.views if view is not None]
    for name, place in (("most_harmful", 0), ("most_helpful", -1)):
        told = [(event.step, event.value) for event in found.Scalars(f"influence/live/{name}")]
        order = [view.influence.sort().values[place].item() for view in views]
        assert told == [(4, pytest.approx(order[0])), (8, pytest.approx(order[1]))]
    table = found.Tensors("influence/live/top_harmful/text_summary")
    assert [event.step for event in table] == [4, 8]
    lines = table[1].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0].startswith("Most harmful in steps 5 to 8: without it in these steps val\\_loss")
    worst = int(views[1].top_harmful(1).index)
    assert lines[2].endswith("| visits | label |")
    assert lines[4].startswith(f"| 1 | {worst} |")
    assert lines[4].endswith(f"| {int(TRAIN[worst][1])} |")
    assert (
        f"Influence in steps 5 to 8 on val_loss = {views[1].info['query_value']:.4g}" in caplog.text
    )
    assert found.Scalars("influence/query")  # the report at the end keeps its names
    assert influence.scores is not None


def test_a_view_that_fails_is_the_last_one_and_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def broken(self: LiveView, *rest: Any) -> Any:
        asked.append(rest)
        raise RuntimeError("no view today")

    monkeypatch.setattr(LiveView, "_scores", broken)
    settings = {"run": "fit_end", "verify": 0, "estimator": "sgd-ie"}
    with pytest.warns(UserWarning, match="no live view any more: RuntimeError: no view today"):
        influence, _ = run(tmp_path, callback=settings)
    assert len(asked) == 1
    assert influence.live_scores is None
    assert influence.scores is not None
    assert influence.scores.info["steps"] == 12


# ---------------------------------------------------------------------- what is refused


def test_without_validation_it_is_refused(tmp_path: Path) -> None:
    influence, _ = run(tmp_path, max_epochs=1)
    assert influence.live_scores is not None
    trainer = quiet_trainer(tmp_path, callbacks=[influence], limit_val_batches=0)
    with pytest.raises(UnsupportedError, match="`live=True` shows influence at the end of each"):
        trainer.fit(Classifier(smooth_net(), sgd()), DataLoader(TRAIN), DataLoader(VALID))
    assert influence.live_scores is None


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_accie.live import check_live

    trainer = quiet_trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 2))
    with pytest.raises(UnsupportedError, match="one process, and this run has 2"):
        check_live(trainer)
