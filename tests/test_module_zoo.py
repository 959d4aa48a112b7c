"""Modules as people write them, the whole way: recorded, replayed to the bit, ranked, retrained."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.problems import record, regression
from tests.replay.tasks import Task, drops_its_own_term_alone


class Squares(Task):
    """A regression; what varies is the network."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean(1) / len(x)


# ---------------------------------------------------------------------- networks


def images(x: Tensor) -> Tensor:
    """``[B, 4]`` as small images."""
    return x.view(len(x), 1, 2, 2).repeat(1, 1, 2, 2)


class Norms(nn.Module):
    """Convolutions, every normalisation, dropout, pooling, and the way back up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(4), nn.Tanh(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        )
        self.down = nn.Sequential(nn.Conv2d(4, 3, 2), nn.Softplus(), nn.AvgPool2d(2, stride=1))
        self.up = nn.ConvTranspose2d(3, 2, 2)
        self.drop = nn.Dropout2d(0.2)
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norms(self.first(images(x))))
        return self.head(self.up(self.down(hidden)))


class Tied(nn.Module):
    """One matrix on the way in and out, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))


class Low(nn.Module):
    """A low-rank change of a frozen weight, as a parametrisation."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.3 * torch.randn(2, columns))
        self.b = nn.Parameter(0.3 * torch.randn(rows, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def adapted() -> nn.Module:
    net = plain()
    for part in (net[0], net[2]):
        part.requires_grad_(False)
        parametrize.register_parametrization(part, "weight", Low(*part.weight.shape))
    return net


class Adapter(nn.Module):
    """The same by hand, around a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.low = Low(*layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.low.b @ self.low.a)


def adapted_by_hand() -> nn.Module:
    net = plain()
    return nn.Sequential(Adapter(net[0]), net[1], Adapter(net[2]))


def partly_frozen() -> nn.Module:
    net = plain()
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net


class Masked(nn.Module):
    """Attention with a causal mask and with padding, then a stack of encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.mix = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, activation="gelu")
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x[..., None])
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)
        hidden = hidden + self.mix(hidden, hidden, hidden, attn_mask=causal, is_causal=True)[0]
        padding = torch.stack([torch.zeros_like(x[:, 0]), *[x[:, 0] > 0.5] * 3], 1).bool()
        hidden = self.stack(hidden.transpose(0, 1), src_key_padding_mask=padding)
        return self.head(hidden[0])


class Words(nn.Module):
    """An embedding with padding, and recurrence in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=0)
        self.rnn = nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed((2 * x).long().abs() % 5))[0].mean(1))


class Halved(torch.autograd.Function):
    """A function of its own with `setup_context` and forward mode, which torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent / 2


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(self.net(x))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


NETWORKS = {
    "norms": Norms,
    "tied": Tied,
    "adapted": adapted,
    "adapted-by-hand": adapted_by_hand,
    "partly-frozen": partly_frozen,
    "masked-attention": Masked,
    "words": Words,
    "own-function": OwnFunction,
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks(tmp_path: Path, case: str) -> None:
    torch.manual_seed(2)
    task = Squares(NETWORKS[case]().double(), momentum=0.5)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    data = regression(9), regression(7, seed=1)
    drops_its_own_term_alone(tmp_path, task, *data, slope=True, batch_size=4, max_epochs=2)
    for name, parameter in task.named_parameters():
        assert torch.equal(before[name], parameter) is not parameter.requires_grad, name


# ---------------------------------------------------------------------- steps


class Busy(Squares):
    """Logs, measures, reads the trainer, and weighs its loss by epoch and step."""

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.error = torchmetrics.MeanSquaredError(num_outputs=2)
        self.several = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError()])
        self.turn = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.error.update(self.net(x), y)
            self.log_dict(self.several(self.net(x), y))
        self.log("error", self.error.compute().mean(), prog_bar=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        factor = 1.0 + 0.1 * self.current_epoch + 0.01 * self.global_step + 0.001 * batch_idx
        return {"loss": loss * factor * self.trainer.max_epochs, "seen": x.detach()}

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        """In plain training: two epochs of three steps."""
        step, self.turn = self.turn, self.turn + 1
        factor = 1.0 + 0.1 * (step // 3) + 0.01 * step + 0.001 * (step % 3)
        return super().own(x, y) * factor * 2


def test_a_busy_step(tmp_path: Path) -> None:
    torch.manual_seed(2)
    data = regression(9), regression(7, seed=1)
    task = Busy(plain().double())
    drops_its_own_term_alone(tmp_path, task, *data, slope=True, batch_size=4, max_epochs=2)


# ---------------------------------------------------------------------- batches and outputs


@dataclass
class Pair:
    x: Tensor
    y: Tensor


class Encoding(UserDict):
    """A mapping with attributes, as tokenisers return it."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Output(OrderedDict):
    """What models of another library return: a mapping, and attributes of the same names."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def stacked(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def nested(rows: list[Any]) -> Any:
    x, y = stacked(rows)
    return {"inputs": {"left": x[:, :2], "right": [x[:, 2:]]}, "targets": (y, "a text", 3)}


def as_dataclass(rows: list[Any]) -> Any:
    return Pair(*stacked(rows))


def as_encoding(rows: list[Any]) -> Any:
    x, y = stacked(rows)
    return Encoding({"input_values": x, "labels": y})


class Structured(Squares):
    """Takes the batch apart as it comes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, Pair):
            return super().training_step((batch.x, batch.y), batch_idx)
        if isinstance(batch, Encoding):
            pair = batch.input_values, batch["labels"]
            output = Output(loss=super().training_step(pair, batch_idx), logits=None)
            assert output.loss is output["loss"]
            return output
        x = torch.cat([batch["inputs"]["left"], batch["inputs"]["right"][0]], 1)
        return super().training_step((x, batch["targets"][0]), batch_idx)


@pytest.mark.parametrize("collate", [nested, as_dataclass, as_encoding])
def test_batches(tmp_path: Path, collate: Any) -> None:
    torch.manual_seed(2)
    data = regression(9), regression(7, seed=1)
    drops_its_own_term_alone(
        tmp_path,
        Structured(plain().double()),
        *data,
        slope=True,
        batch_size=4,
        max_epochs=2,
        loader={"collate_fn": collate},
    )


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("whole", [False, True], ids=["network", "module"])
def test_compiled(tmp_path: Path, whole: bool) -> None:
    """The analysis runs uncompiled; the scores are those of a run that was never compiled."""
    scores = []
    for compiled in (True, False):
        torch.manual_seed(2)
        task: Any = Squares(plain().double())
        if compiled and whole:
            task = torch.compile(task, backend="eager")
        elif compiled:
            task.net = torch.compile(task.net, backend="eager")
        data = regression(8), regression(7, seed=1)
        engine = record(tmp_path / str(compiled), task, *data, batch_size=4, max_epochs=2)
        scores.append(engine.estimate(verify=4, top_k=2))
        assert scores[-1].info["bit_exact_replay"]
        assert scores[-1].info["vectorized"]
    assert torch.equal(scores[0].influence, scores[1].influence)
    assert torch.equal(scores[0].exact.nan_to_num(), scores[1].exact.nan_to_num())


def test_the_copy_is_the_only_one_that_is_touched(tmp_path: Path) -> None:
    """The user's module comes out as it went in, networks with buffers and metrics included."""
    torch.manual_seed(2)
    task = Squares(Norms().double())
    data = regression(8), regression(7, seed=1)
    engine = drops_its_own_term_alone(tmp_path, task, *data, batch_size=4, max_epochs=1)
    state = copy.deepcopy(engine.module.state_dict())
    engine.estimate(verify=2, top_k=1)
    after = engine.module.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
