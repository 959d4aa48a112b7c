"""Whatever the loaders are: captured, fetched again, and replayed to the bit, all the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_accie import InfluenceEngine, LeaveOneOut, SgdIE
from lightning_accie.estimators import AccSgdIE
from tests.problems import Classifier, adamw, classification, fit, record, sgd, smooth_net
from tests.truth import mean_loss, recorded_batches, retrain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Keyed(Dataset):
    """Samples are dicts, read one by one or many at once."""

    def __init__(self, data: TensorDataset, many: bool) -> None:
        self.data = data
        if many:
            self.__getitems__ = lambda indices: [self[index] for index in indices]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"x": x, "y": y, "name": f"sample {index}", "weights": np.ones(2)}


class Blocks:
    """A batch sampler of the user's own: blocks of uneven size, one sample twice in its batch."""

    def __iter__(self):
        order = torch.randperm(24).tolist()
        return iter([order[:5], [*order[5:9], order[5]], order[9:]])

    def __len__(self) -> int:
        return 3


def none_if_first(samples: list[Any]) -> Any:
    """A collate function that drops batches."""
    if any(torch.equal(x, classification().tensors[0][0]) for x, _ in samples):
        return None
    return torch.utils.data.default_collate(samples)


def halves() -> tuple[TensorDataset, TensorDataset]:
    return classification(15), classification(8, seed=9)


def nested() -> Dataset[Any]:
    """Subsets of a concatenation of subsets."""
    parts = ConcatDataset([Subset(part, range(len(part) - 2)) for part in halves()])
    return Subset(Subset(parts, list(range(18, 0, -1))), [0, 2, 4, 5, 6, 7, 8, 9, 12, 14, 17])


def loader(data: Any = None, batch_size: Any = 6, **options: Any) -> DataLoader[Any]:
    if not options.keys() & {"sampler", "batch_sampler"}:
        options.setdefault("shuffle", True)
    data = classification() if data is None else data
    if "batch_sampler" in options:
        return DataLoader(data, **options)
    return DataLoader(data, batch_size, **options)


def by_name(**options: Any) -> dict[str, DataLoader[Any]]:
    a, b = halves()
    return {"a": loader(a, 4, **options), "b": loader(b, 3, **options)}


def combined(mode: str, **options: Any) -> Any:
    return CombinedLoader(by_name(**options), mode)


class Any_(Classifier):
    """Takes batches of any of these structures; with several loaders, the sum of their means."""

    def parts(self, batch: Any) -> list[Tensor]:
        """The losses by sample, one tensor a loader."""
        if isinstance(batch, dict) and "x" not in batch:
            return [part for name in batch for part in self.parts(batch[name])]
        if batch is None:
            return []
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        rows = self.net(x.reshape(-1, 4)), y.reshape(-1)
        return [F.cross_entropy(*rows, reduction="none")]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(part.mean() for part in self.parts(batch))  # type: ignore[return-value]


class InPlace(Any_):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(1.5).add_(0.1)
        return super().training_step(batch, batch_idx)


def own_losses(module: Any, batch: Any) -> Tensor:
    parts = module.parts(batch)
    count = sum(map(len, parts))
    return torch.cat([part * count / len(part) for part in parts])


@dataclass(frozen=True)
class Case:
    """Loaders, and how many calls of ``training_step`` three epochs of them make, by hand."""

    name: str
    loaders: Callable[[], Any]
    calls: int
    trainer: dict[str, Any] = field(default_factory=dict)
    several: bool = False
    module: type[Any_] = Any_


WORKERS = {"num_workers": 2, "persistent_workers": True}
# `fit` takes no `CombinedLoader(mode="sequential")`; Lightning says so itself.
CASES = [
    Case("plain", loader, 12),
    Case("drop_last", lambda: loader(batch_size=7, drop_last=True), 9),
    Case("unbatched", lambda: loader(batch_size=None), 72),
    Case("dicts", lambda: loader(Keyed(classification(), many=False)), 12),
    Case("many_at_once", lambda: loader(Keyed(classification(), many=True)), 12),
    Case("nested", lambda: loader(nested(), 3), 12),
    Case("concat", lambda: loader(ConcatDataset(halves())), 12),
    Case("custom_sampler", lambda: loader(batch_sampler=Blocks()), 9),
    Case("replacement", lambda: loader(sampler=RandomSampler(range(24), replacement=True)), 12),
    Case("weighted", lambda: loader(sampler=WeightedRandomSampler([1.0, 5.0] * 12, 18)), 9),
    Case("none_batches", lambda: loader(collate_fn=none_if_first), 9),
    Case("workers", lambda: loader(num_workers=2), 12),
    Case("persistent_workers", lambda: loader(**WORKERS), 12),
    Case(
        "persistent_weighted",
        lambda: loader(sampler=WeightedRandomSampler([1.0] * 24, 18), **WORKERS),
        9,
    ),
    Case("reload", loader, 12, {"reload_dataloaders_every_n_epochs": 1}),
    Case("accumulate", loader, 12, {"accumulate_grad_batches": 3}),
    Case("changed_in_place", loader, 12, module=InPlace),
    Case("dict_of_loaders", by_name, 12, several=True),
    Case("min_size", lambda: combined("min_size"), 9, several=True),
    Case("max_size", lambda: combined("max_size"), 12, several=True),
    Case("max_size_cycle", lambda: combined("max_size_cycle"), 12, several=True),
    Case("persistent_max_size", lambda: combined("max_size", **WORKERS), 12, several=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_from_capture_to_exact_replay(tmp_path: Path, case: Case) -> None:
    valid = DataLoader(classification(11, seed=3), batch_size=7)
    module = case.module(smooth_net(), adamw())
    losses = own_losses if case.several else None
    callback = {"sample_losses": losses, "estimator": "sgd-ie"}
    influence = fit(tmp_path, module, case.loaders(), valid, callback=callback, **case.trainer)
    assert influence.directory is not None
    engine = InfluenceEngine(
        influence.directory / "trajectory",
        module,
        case.loaders(),
        val_dataloaders=valid,
        sample_losses=losses,
        progress=False,
    )
    visits = sum(1 for _ in engine._walker.forwards())
    fidelity = engine._walker.fidelity
    assert visits == len(engine.trajectory)
    assert fidelity.losses == case.calls
    assert fidelity.bit_exact
    for name, value in engine._walker.final().state.params.items():
        assert torch.equal(value, dict(module.named_parameters())[name]), name
    assert int(engine.replay("val_loss").visits.sum()) == sum(
        len(batch) for step in recorded_batches(engine.trajectory) for batch in step
    )


# ------------------------------------------------------ a sample several times in one batch

REPEATING = {
    "replacement": lambda: RandomSampler(range(20), replacement=True, num_samples=24),
    "weighted": lambda: WeightedRandomSampler([9.0, 4.0, *[1.0] * 18], 24),
}


@pytest.mark.parametrize("configure", [sgd(momentum=0.9), adamw()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sampler", REPEATING)
def test_weights_of_repeated_draws_add_up(tmp_path: Path, sampler: str, configure: Any) -> None:
    """SGD-IE is the derivative in one weight of all draws; exact replay leaves all of them out."""
    data, val = classification(20), classification(11, seed=3)
    net = smooth_net()
    initial = copy.deepcopy(net)
    module = Classifier(net, configure)
    engine = record(
        tmp_path, module, data, val, loader={"sampler": REPEATING[sampler](), "shuffle": False}
    )
    batches = recorded_batches(engine.trajectory)
    repeated = sorted(
        {index for step in batches for batch in step for index in batch if batch.count(index) > 1}
    )
    assert len(repeated) >= 3
    replay = engine.replay("val_loss")
    slopes, exact = SgdIE().estimate(replay), LeaveOneOut(repeated[:3]).estimate(replay)

    def query(weights: Tensor) -> float:
        trained = retrain(copy.deepcopy(initial), data.tensors, batches, configure, weights)
        return mean_loss(trained, val.tensors)

    whole = query(torch.ones(20).double())
    assert whole == pytest.approx(mean_loss(net, val.tensors), rel=1e-12)
    for place, j in enumerate(repeated[:3]):
        at = int((slopes.samples == j).nonzero())
        moved = torch.ones(3, 20).double()
        moved[0, j], moved[1, j], moved[2, j] = 1 + 1e-5, 1 - 1e-5, 0
        up, down, without = map(query, moved)
        slope = (up - down) / 2e-5
        assert float(slopes.influence[at]) == pytest.approx(-slope, rel=2e-5, abs=1e-9)
        assert float(exact.influence[place]) == pytest.approx(without - whole, rel=1e-8, abs=1e-13)
        drawn = sum(batch.count(j) for step in batches for batch in step)
        assert int(replay.visits[at]) == drawn


def test_acc_on_least_squares_with_repeated_draws(tmp_path: Path) -> None:
    """There ACC is the truth, a sample twice in its batch included."""
    from tests.problems import Regressor, regression

    data, val = regression(20), regression(11, seed=3)
    net = torch.nn.Linear(4, 2).double()
    initial = copy.deepcopy(net)
    sampler = REPEATING["weighted"]()
    engine = record(
        tmp_path, Regressor(net, sgd()), data, val, loader={"sampler": sampler, "shuffle": False}
    )
    replay = engine.replay("val_loss")
    acc = AccSgdIE([0, 1]).estimate(replay).influence
    whole = mean_loss(net, val.tensors, F.mse_loss)
    for j in (0, 1):
        weights = torch.ones(20).double()
        weights[j] = 0
        trained = retrain(
            copy.deepcopy(initial),
            data.tensors,
            recorded_batches(engine.trajectory),
            sgd(),
            weights,
            loss=F.mse_loss,
        )
        truth = mean_loss(trained, val.tensors, F.mse_loss) - whole
        assert float(acc[j]) == pytest.approx(truth, rel=1e-9)
