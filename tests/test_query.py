"""The query is the number that Lightning reports, and its gradient that of the plain mean loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_accie import InfluenceCallback, InfluenceEngine, QueryError, UnsupportedError
from lightning_accie.query import ModuleQuery
from tests.problems import Classifier, classification, fit, quiet_trainer, sgd, smooth_net

X, Y = classification(11, seed=3).tensors
TRAIN = classification(12)


def loader(n: int = 11, seed: int = 3, **settings: Any) -> DataLoader[Any]:
    """Uneven: batches of 4, 4 and 3."""
    return DataLoader(classification(n, seed=seed), **{"batch_size": 4, **settings})


def opened(
    root: Path, module: Classifier, valid: Any, monitor: Any = "val_loss", **trainer: Any
) -> tuple[InfluenceEngine, dict[str, float]]:
    """Train, validate at the end of the last epoch, and open; with what Lightning reports."""
    influence = InfluenceCallback(run="manual", console=False, monitor=monitor)
    torch.manual_seed(5)
    trainer_ = quiet_trainer(root, callbacks=[influence], **{"max_epochs": 2, **trainer})
    train = DataLoader(TRAIN, batch_size=6)
    trainer_.fit(module, train, valid)
    reported = {name: float(value) for name, value in trainer_.callback_metrics.items()}
    assert influence.directory is not None
    engine = InfluenceEngine(
        influence.directory / "trajectory", module, train, val_dataloaders=valid, progress=False
    )
    return engine, reported


def query_of(engine: InfluenceEngine, name: Any = None, **given: Any) -> tuple[ModuleQuery, Any]:
    replay = engine.replay(name, **given)
    assert isinstance(replay.query, ModuleQuery)
    return replay.query, replay.final.state.params


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def plain_gradient(module: Classifier, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    module.eval()
    loss = F.cross_entropy(module.net(x), y)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


# ---------------------------------------------------------------------- what is logged, and how


class ExplicitSize(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y), batch_size=1)


class Summed(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y, reduction="sum")
        self.log("val_loss", loss, reduce_fx="sum")


class ByPosition(Classifier):
    """Arguments of ``log`` by position, as Lightning takes them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y, reduction="sum")
        self.log("val_loss", loss, False, None, False, True, "sum")


class WithoutIndex(Classifier):
    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        super().validation_step(batch, 0)


class OtherThird(Classifier):
    """The third argument is not the loader's index, and Lightning does not pass it."""

    def validation_step(self, batch: Any, batch_idx: int, prefix: str = "val") -> None:
        x, y = batch
        self.log(f"{prefix}_loss", self.loss(self.net(x), y))


class Anything(Classifier):
    def validation_step(self, *args: Any) -> None:  # type: ignore[override]
        batch, index = args
        super().validation_step(batch, index)


class Dictionary(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.net(x)
        accuracy = (out.argmax(1) == y).double().mean()
        self.log_dict(dictionary={"val_loss": self.loss(out, y), "val_acc": accuracy})


class SometimesOnly(Classifier):
    """Logs for every second batch; the others have no weight."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            super().validation_step(batch, batch_idx)


class WithMetrics(Classifier):
    """Metrics beside the loss, single and in collections, with buffers and nested."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        accuracy = torchmetrics.classification.MulticlassAccuracy
        self.accuracy = accuracy(3)
        self.others = torchmetrics.MetricCollection({"a": accuracy(3), "b": accuracy(3, top_k=2)})
        self.curve = torchmetrics.classification.MulticlassPrecisionRecallCurve(3, thresholds=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.net(x)
        self.accuracy(out, y)
        self.log("val_acc", self.accuracy)
        self.log_dict(self.others(out, y))
        self.others["a"].update(out, y)
        self.curve.update(out.softmax(1), y)
        self.log("val_loss", self.loss(out, y))


class Item(Classifier):
    """Reads numbers out of tensors, which vmap does not take."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.net(x)
        self.log("val_acc", (out.argmax(1) == y).double().mean().item())
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    "kind",
    [
        Classifier,
        ExplicitSize,
        Summed,
        ByPosition,
        WithoutIndex,
        OtherThird,
        Anything,
        Dictionary,
        SometimesOnly,
        WithMetrics,
        Item,
    ],
)
def test_the_value_is_what_lightning_reports(tmp_path: Path, kind: type[Classifier]) -> None:
    module = kind(net(), sgd())
    engine, reported = opened(tmp_path, module, loader())
    query, params = query_of(engine)
    assert query.value(params) == reported["val_loss"]
    shift = {name: torch.stack([value, value + 0.1]) for name, value in params.items()}
    moved = {name: value[1] for name, value in shift.items()}
    query.vectorize = kind is not Item
    values = query.values(shift)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([query.value(params), query.value(moved)], rel=1e-13)
    assert values[0] != values[1]


@pytest.mark.parametrize("kind", [Classifier, Dictionary, WithMetrics])
def test_the_gradient_is_that_of_the_plain_mean(tmp_path: Path, kind: type[Classifier]) -> None:
    module = kind(net(), sgd())
    engine, _ = opened(tmp_path, module, loader())
    query, params = query_of(engine)
    expected = plain_gradient(module)
    found = query.gradient(params)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)


class DictBatches(Dataset[dict[str, Tensor]]):
    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = classification(n, seed=seed).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class TakesDicts(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["x"], batch["y"]), batch_idx)


def test_batches_of_dictionaries(tmp_path: Path) -> None:
    valid = DataLoader(DictBatches(11, 3), batch_size=4)
    engine, reported = opened(tmp_path, TakesDicts(net(), sgd()), valid)
    query, params = query_of(engine)
    assert query.value(params) == reported["val_loss"]


class SeveralLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        if dataloader_idx == 1:
            self.log("second", self.loss(self.net(batch[0]), batch[1]), add_dataloader_idx=False)


def test_several_loaders(tmp_path: Path) -> None:
    valid = [loader(), loader(9, 4)]
    module = SeveralLoaders(net(), sgd())
    engine, reported = opened(tmp_path, module, valid)
    for name in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1", "second"):
        query, params = query_of(engine, name)
        assert query.value(params) == reported[name]
        data = classification(11, seed=3) if name.endswith("0") else classification(9, seed=4)
        expected = plain_gradient(module, *data.tensors)
        for key, value in query.gradient(params).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-15)
    query, params = query_of(engine, "val_loss")
    with pytest.raises(QueryError, match=r"`second`, `val_loss/dataloader_idx_0`, `val_loss/d.*1`"):
        query.value(params)


@pytest.mark.parametrize(("limit", "count"), [(2, 8), (1.0, 11)])
def test_limited_batches(tmp_path: Path, limit: float, count: int) -> None:
    module = Classifier(smooth_net(), sgd())
    scores = fit(
        tmp_path,
        module,
        DataLoader(TRAIN, batch_size=6),
        loader(),
        callback={"run": "fit_end", "verify": 0},
        limit_val_batches=limit,
    ).scores
    assert scores is not None
    expected = F.cross_entropy(module.net(X[:count]), Y[:count]).item()
    assert scores.info["query_value"] == pytest.approx(expected, rel=1e-13)


def margin(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.multi_margin_loss(module.net(x), y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_callable(tmp_path: Path) -> None:
    module = Classifier(net(), sgd())
    engine, _ = opened(tmp_path, module, loader(), monitor=margin)
    query, params = query_of(engine, margin)
    assert query.name == "margin"
    module.eval()
    assert query.value(params) == pytest.approx(margin(module, (X, Y)).item(), rel=1e-13)
    other = loader(9, 4)
    query, params = query_of(engine, margin, query_dataloader=other)
    expected = margin(module, classification(9, seed=4).tensors).item()
    assert query.value(params) == pytest.approx(expected, rel=1e-13)


# ---------------------------------------------------------------------- one function


class NoisyValidation(Classifier):
    """Draws in ``validation_step``, as a variational model does."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.net(x + torch.randn_like(x)), y))


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize("budget", [10**9, 64])
def test_every_pass_sees_the_same_batches_and_the_same_noise(tmp_path: Path, budget: int) -> None:
    """Also where batches do not fit into memory and are fetched anew, shuffled and limited."""
    own = torch.Generator().manual_seed(0)
    valid = loader(shuffle=True, generator=own)
    engine, _ = opened(tmp_path, NoisyValidation(net(), sgd()), valid)
    engine._val_limits = [2]
    query, params = query_of(engine)
    query.memory_budget = budget
    state, drawn = torch.get_rng_state(), own.get_state()
    first = query.value(params)
    torch.manual_seed(99)
    twice = {name: torch.stack([value, value]) for name, value in params.items()}
    again = [query.value(params), *query.values(twice).tolist()]
    query.vectorize = False
    again += query.values(twice).tolist()
    assert again == pytest.approx([first] * 5, rel=1e-13)
    torch.set_rng_state(state)
    query.gradient(params)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(own.get_state(), drawn)


# ---------------------------------------------------------------------- what cannot be measured


class Logs(Classifier):
    """Logs what a function of (module, outputs, targets) says, beside a loss."""

    def __init__(self, what: Callable[[Any, Tensor, Tensor], Any], **settings: Any) -> None:
        super().__init__(smooth_net(), sgd())
        self.what, self.settings = what, settings
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self.net(x)
        self.log("another", self.loss(out, y))
        self.log("it", self.what(self, out, y), **self.settings)


def accuracy(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y).double().mean()


def flat(module: Any, out: Tensor, y: Tensor) -> Tensor:
    return (out * 0.0).mean()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "metric": (
        lambda m, out, y: (m.accuracy(out, y), m.accuracy)[1],
        {},
        "`it` is a torchmetrics metric",
    ),
    "metric-value": (lambda m, out, y: m.accuracy(out, y), {}, "`it` is a torchmetrics metric"),
    "float": (
        lambda m, out, y: F.cross_entropy(out, y).item(),
        {},
        "`it` is a float, not a tensor",
    ),
    "detached": (lambda m, out, y: F.cross_entropy(out, y).detach(), {}, "`it` has no gradient"),
    "accuracy": (accuracy, {}, "`it` has no gradient"),
    "flat": (flat, {}, "gradient of `it` is zero everywhere"),
    "maximum": (
        lambda m, out, y: F.cross_entropy(out, y),
        {"reduce_fx": "max"},
        "reduce_fx='max'.*only the mean and the sum",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_differentiated_is_refused_within_the_first_step(
    tmp_path: Path, case: str
) -> None:
    what, settings, message = BAD[case]
    module = Logs(what, **settings)
    with pytest.raises(QueryError, match=message):
        fit(
            tmp_path,
            module,
            DataLoader(TRAIN, batch_size=6),
            loader(),
            callback={"run": "fit_end", "monitor": "it"},
        )
    assert module.trainer.global_step == 1
    module = Logs(what, **settings)
    engine, _ = opened(tmp_path, module, loader(), monitor="it")  # recording alone is no question
    with pytest.raises(QueryError, match=message) as refusal:
        engine.estimate(verify=0)
    named = case in ("detached", "accuracy", "flat")
    assert ('with a gradient: use `monitor="another"`.' in str(refusal.value)) == named
    assert engine.estimate("another", verify=0).info["query"] == "another"


@pytest.mark.parametrize("what", [accuracy, flat], ids=["accuracy", "flat"])
def test_a_function_without_a_slope_is_told_what_to_return(tmp_path: Path, what: Any) -> None:
    engine, _ = opened(tmp_path, Classifier(smooth_net(), sgd()), loader())
    with pytest.raises(QueryError, match=r"Return the mean loss of the batch"):
        engine.estimate(lambda module, batch: what(module, module.net(batch[0]), batch[1]))


class Counted(TensorDataset):
    """Counts what is read of it in this process."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return super().__getitem__(index)

    __getitems__ = None


def test_an_unknown_name_is_refused_within_the_first_step(tmp_path: Path) -> None:
    """From its first batches, without workers and without drawing."""
    data = Counted(X, Y)
    valid = DataLoader(data, batch_size=4, num_workers=1, shuffle=True)
    module = Classifier(smooth_net(), sgd())
    with (
        pytest.warns(UserWarning, match="shuffling enabled"),
        pytest.raises(QueryError, match=r'`monitor="loss"`.*which logs `val_loss`\.'),
    ):
        fit(
            tmp_path,
            module,
            DataLoader(TRAIN, batch_size=6),
            valid,
            callback={"run": "fit_end", "monitor": "loss"},
        )
    assert module.trainer.global_step == 1
    assert len(data.read) == 4 + 11  # the first batch, then up to 32 of them


class Twice(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            super().validation_step(batch, batch_idx)


def test_a_name_that_is_logged_twice_is_refused(tmp_path: Path) -> None:
    engine, _ = opened(tmp_path, Twice(smooth_net(), sgd()), loader())
    query, params = query_of(engine)
    with pytest.raises(QueryError, match="logged 2 times"):
        query.value(params)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_no_validation_data(tmp_path: Path) -> None:
    train = DataLoader(TRAIN, batch_size=6)
    with pytest.raises(QueryError, match=r"no validation data.*`query_dataloader="):
        fit(tmp_path, Classifier(smooth_net(), sgd()), train, None, callback={"run": "fit_end"})
    module = Classifier(smooth_net(), sgd())
    engine, _ = opened(tmp_path, module, loader())
    alone = InfluenceEngine(engine.trajectory, module, train, progress=False)
    with pytest.raises(QueryError, match="no validation data"):
        alone.estimate()
    assert alone.estimate(query_dataloader=loader(), verify=0).info["query"] == "val_loss"
    empty = DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=4)
    with pytest.raises(QueryError, match="no validation data"):
        alone.estimate(query_dataloader=empty)


def test_validation_that_is_due_later_or_never(tmp_path: Path) -> None:
    found = fit(
        tmp_path,
        Classifier(smooth_net(), sgd()),
        DataLoader(TRAIN, batch_size=6),
        loader(),
        callback={"run": "fit_end", "verify": 0},
        check_val_every_n_epoch=7,
    )
    assert found.scores is not None


def test_validation_batches_from_several_loaders_at_once(tmp_path: Path) -> None:
    both = CombinedLoader({"a": loader(), "b": loader(9, 4)}, "max_size")
    module = Classifier(smooth_net(), sgd())
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r'mode="max_size".*query_dataloader'):
        fit(
            tmp_path,
            module,
            DataLoader(TRAIN, batch_size=6),
            both,
            callback={"run": "fit_end"},
        )


# ---------------------------------------------------------------------- some batches, some loaders


class LogsWhere(Classifier):
    """Logs the loss for the batches and loaders that it is told."""

    def __init__(self, where: Any) -> None:
        super().__init__(smooth_net(), sgd())
        self.where = where

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        if self.where(batch_idx, dataloader_idx):
            self.log("val_loss", self.loss(self.net(x), y))


def valid(n: int) -> DataLoader[Any]:
    return DataLoader(classification(n, seed=3), batch_size=4)


def fit_to_the_end(root: Path, module: Classifier, val: Any, monitor: str) -> Any:
    influence = InfluenceCallback(monitor, console=False, verify=4, top_k=2)
    trainer = quiet_trainer(root, callbacks=[influence], max_epochs=2)
    trainer.fit(module, DataLoader(classification(24), batch_size=6, shuffle=True), val)
    assert influence.scores is not None
    return influence.scores, trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(
    ("where", "sizes", "monitor"),
    [
        (lambda batch, loader: batch % 2 == 1, [11], "val_loss"),
        (lambda batch, loader: batch == 2, [11], "val_loss"),
        (lambda batch, loader: batch == 20, [90], "val_loss"),
        (lambda batch, loader: loader == 1, [11, 7], "val_loss/dataloader_idx_1"),
        (lambda batch, loader: batch == loader, [11, 7], "val_loss/dataloader_idx_0"),
        (lambda batch, loader: True, [11, 0], "val_loss/dataloader_idx_0"),
    ],
)
def test_a_monitor_of_some_batches_or_loaders(
    tmp_path: Path, where: Any, sizes: list[int], monitor: str
) -> None:
    val = [valid(n) for n in sizes] if len(sizes) > 1 else valid(sizes[0])
    scores, metrics = fit_to_the_end(tmp_path, LogsWhere(where), val, monitor)
    assert scores.info["query_value"] == pytest.approx(float(metrics[monitor]), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(
    ("where", "sizes", "monitor", "words"),
    [
        (lambda batch, loader: False, [11], "val_loss", "logs nothing. Log it there"),
        (lambda batch, loader: True, [11], "val_los", "logs `val_loss`"),
        (lambda batch, loader: True, [11, 7], "val_loss", "`val_loss/dataloader_idx_0`"),
        (lambda batch, loader: True, [11, 0], "val_loss/dataloader_idx_1", "not logged"),
        (lambda batch, loader: True, [0], "val_loss", "no validation data"),
        (lambda batch, loader: True, [], "val_loss", "no validation data"),
    ],
)
def test_a_monitor_that_is_nowhere(
    tmp_path: Path, where: Any, sizes: list[int], monitor: str, words: str
) -> None:
    val = [valid(n) for n in sizes]
    with pytest.raises(QueryError, match=words):
        fit_to_the_end(tmp_path, LogsWhere(where), val, monitor)
