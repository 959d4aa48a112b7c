"""Reductions whose elements are not one row a sample: tokens, pixels, views, several loaders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie import InfluenceEngine, LeaveOneOut, UnsupportedError
from lightning_accie.replay.loss_form import Layout, LossForm
from tests.problems import fit, record
from tests.replay.tasks import Task, drops_its_own_term_alone

LENGTH, WORDS = 4, 5


def texts(n: int, seed: int = 0) -> TensorDataset:
    """``[n, T]`` tokens and what to predict of them; -100 where there is nothing to predict."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, WORDS, (n, LENGTH), generator=g)
    y = (x + x.roll(1, 1)) % WORDS
    y[torch.rand(n, LENGTH, generator=g) < 0.2] = -100
    y[:, 0] = x[:, 0]
    return TensorDataset(x, y)


def tagger(*, normalised: bool = False) -> nn.Module:
    middle: list[nn.Module] = [nn.BatchNorm1d(LENGTH), nn.Dropout(0.2)] if normalised else []
    return nn.Sequential(nn.Embedding(WORDS, 6), nn.Tanh(), *middle, nn.Linear(6, WORDS)).double()


class Tokens(Task):
    """``logits.reshape(B·T, C)``, as language models do."""

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).reshape(-1, WORDS), y.reshape(-1), ignore_index=-100)

    def by_token(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).transpose(1, 2), y, reduction="none")

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return self.by_token(x, y).sum(1) / (y != -100).sum()

    def query(self, x: Tensor, y: Tensor) -> Tensor:
        return self.by_token(x, y).sum(1).mean()


class TimeMajor(Tokens):
    """``[T·B, C]``: the rows take turns."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).transpose(0, 1).reshape(-1, WORDS), y.T.reshape(-1))


class TimeMajorByHand(Tokens):
    """``[T, B]``, a mask and a mean over it, both by hand."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(self.logits(x).permute(1, 2, 0), y.T, reduction="none")
        mask = (y.T != -100).double()
        return (losses * mask).sum() / mask.sum()


class CausalAttention(Tokens):
    """Within a text, tokens see the earlier ones; the last has nothing to predict."""

    def logits(self, x: Tensor) -> Tensor:
        embed, mix, head = self.net
        h = embed(x)
        return head(h + F.scaled_dot_product_attention(mix(h), h, h, is_causal=True))

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(x)[:, :-1].contiguous().view(-1, WORDS)
        return F.cross_entropy(logits, x[:, 1:].contiguous().view(-1))

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(x)[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, x[:, 1:], reduction="none").mean(1) / len(x)


class MeansOverOneDimensionEach(Tokens):
    """The samples go first, then the tokens."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return self.by_token(x, y).mean(0).sum()

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return self.by_token(x, y).sum(1) / len(x)


class MeansFromWithin(MeansOverOneDimensionEach):
    """The tokens go first, then the samples."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sum(self.by_token(x, y), dim=-1, keepdim=True).mean(dim=0).squeeze()


class UncertaintyWeighted(Tokens):
    """Two tasks, one in blocks and one row by row, their weights learned (Kendall et al. 2018)."""

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.log_variance = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def first(self, x: Tensor) -> Tensor:
        return self.net(x).mean(dim=(1, 2)) - x.double().mean(1)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = super().written(x, y)
        first = F.mse_loss(self.first(x), torch.zeros(len(x)).double(), reduction="sum") / len(x)
        losses = torch.stack([tokens, first])
        return (torch.exp(-self.log_variance) * losses + self.log_variance).sum()

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        factor = torch.exp(-self.log_variance)
        return factor[0] * super().own(x, y) + factor[1] * self.first(x).square() / len(x)

    def rest(self) -> Tensor:
        return self.log_variance.sum()


class TwoViews(Tokens):
    """Two views of every sample, one below the other."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.cat([self.logits(x), 2 * self.logits(x)])
        return F.nll_loss(logits.log_softmax(-1).mean(1), torch.cat([x[:, 0], x[:, 0]]))

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.logits(x)
        views = [a.log_softmax(-1).mean(1) for a in (z, 2 * z)]
        return sum(F.nll_loss(a, x[:, 0], reduction="none") for a in views) / (2 * len(x))  # type: ignore[return-value]


class TextsAsLongAsTheBatch(TimeMajorByHand):
    """``[T, B]`` with T = B: as many rows as samples, and none of them a sample's."""


TEXTS: dict[str, tuple[type[Tokens], dict[str, Any], int]] = {
    "tokens": (Tokens, {}, 6),
    "tokens-with-noise": (Tokens, {"normalised": True}, 6),
    "tokens-batches-of-one": (Tokens, {}, 1),
    "tokens-last-batch-of-one": (Tokens, {}, 4),
    "time-major": (TimeMajor, {}, 6),
    "time-major-with-noise": (TimeMajor, {"normalised": True}, 6),
    "time-major-by-hand": (TimeMajorByHand, {}, 6),
    "as-long-as-the-batch": (TextsAsLongAsTheBatch, {}, LENGTH),
    "samples-first": (MeansOverOneDimensionEach, {}, 6),
    "tokens-first": (MeansFromWithin, {}, 6),
    "uncertainty": (UncertaintyWeighted, {}, 6),
    "uncertainty-of-two": (UncertaintyWeighted, {}, 2),
    "two-views": (TwoViews, {}, 6),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(tmp_path: Path, case: str) -> None:
    kind, settings, batch_size = TEXTS[case]
    torch.manual_seed(2)
    task = kind(tagger(**settings), momentum=0.5)
    drops_its_own_term_alone(
        tmp_path, task, texts(13), texts(9, 1), batch_size=batch_size, max_epochs=2
    )


def test_causal_attention(tmp_path: Path) -> None:
    torch.manual_seed(2)
    parts = [nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.Linear(6, WORDS)]
    task = CausalAttention(nn.Sequential(*parts).double())
    drops_its_own_term_alone(tmp_path, task, texts(13), texts(9, 1), max_epochs=2)


def test_the_order_is_found_and_not_assumed(tmp_path: Path) -> None:
    """Blocks and turns have the same shape; what tells them apart is whose elements change."""
    forms = {}
    for kind in (Tokens, TimeMajor, TimeMajorByHand, TextsAsLongAsTheBatch):
        torch.manual_seed(2)
        size = LENGTH if kind is TextsAsLongAsTheBatch else 6
        root = tmp_path / kind.__name__
        engine = record(root, kind(tagger()), texts(12), texts(9, 1), batch_size=size, max_epochs=1)
        forms[kind] = LossForm.from_json(engine.trajectory.header["loss_form"])
    assert forms[Tokens].layouts == {0: Layout(0, "blocked")}
    assert forms[TimeMajor].layouts == {0: Layout(0, "interleaved")}
    assert forms[TimeMajorByHand].layouts == {0: Layout(1, "single")}
    assert forms[TextsAsLongAsTheBatch].layouts == {0: Layout(1, "single")}
    first = {
        "hand_written": True,
        "excluded": [1],
        "penalty": True,
    }  # as the first release wrote it
    assert LossForm.from_json(first) == LossForm("whole", frozenset([1]), {}, True)
    for form in forms.values():
        assert LossForm.from_json(form.to_json()) == form


# ---------------------------------------------------------------------- images


class Segmentation(Task):
    """A class for every pixel, ``[B, C, H, W]``."""

    flat = False

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        if self.flat:
            logits, y = logits.permute(0, 2, 3, 1).reshape(-1, 3), y.reshape(-1)
        return F.cross_entropy(logits, y, label_smoothing=0.1, weight=torch.ones(3).double())

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(self.net(x), y, reduction="none", label_smoothing=0.1)
        return losses.mean((1, 2)) / len(x)

    def query(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class FlatSegmentation(Segmentation):
    """The same, pixel by pixel."""

    flat = True


class Dice(Segmentation):
    """One score for the whole batch: a ratio of sums."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.net(x).softmax(1)[:, 1]
        return 1 - 2 * (p * (y == 1)).sum() / (p.sum() + (y == 1).sum())


def images(n: int, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 4, 5, generator=g, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 0] > 1).long())


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", [Segmentation, FlatSegmentation])
def test_segmentation(tmp_path: Path, kind: type[Task]) -> None:
    torch.manual_seed(2)
    drops_its_own_term_alone(tmp_path, kind(convolutions()), images(13), images(9, 1), max_epochs=2)


# ---------------------------------------------------------------------- several loaders


class TwoSets(Task):
    """Labelled and unlabelled data, a loss over each, and one that needs both."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, _) = batch["labelled"], batch["unlabelled"]
        agree = F.mse_loss(self.net(u), self.net(-u).detach(), reduction="sum") / len(u)
        everyone = self.net(torch.cat([x, u])).square().mean()
        return F.mse_loss(self.net(x), y) + 0.5 * agree + 0.1 * everyone


def sets_retrained(start: nn.Module, trajectory: Any, data: Any, without: int) -> nn.Module:
    """Plain training; ``without`` counts the unlabelled after the labelled."""
    net = copy.deepcopy(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    count = len(data[0])
    for step in trajectory.steps():
        first, second = (piece.indices for piece in step.micro_batches[0].pieces)
        x, y = (tensor[first] for tensor in data[0].tensors)
        u = data[1].tensors[0][second]
        kept = torch.tensor([i != without for i in first])
        also = torch.tensor([count + i != without for i in second])
        losses = (net(x) - y).square().mean(1) * kept
        agree = (net(u) - net(-u).detach()).square().sum(1) * also
        everyone = net(torch.cat([x, u])).square().mean(1) * torch.cat([kept, also])
        optimizer.zero_grad()
        (losses.mean() + 0.5 * agree.mean() + 0.1 * everyone.mean()).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("sizes", [(6, 4), (5, 5)], ids=["other-sizes", "same-size"])
def test_a_loss_for_each_of_two_loaders(tmp_path: Path, sizes: tuple[int, int]) -> None:
    torch.manual_seed(2)
    task = TwoSets(small())
    start = copy.deepcopy(task.net)
    data = points(12), points(17, 2)
    names = ("labelled", "unlabelled")
    loaders = {
        name: DataLoader(part, batch_size=size, shuffle=True)
        for name, part, size in zip(names, data, sizes, strict=True)
    }
    valid = DataLoader(points(11, 1), batch_size=11)
    train = CombinedLoader(loaders, mode="min_size")
    influence = fit(tmp_path, task, train, valid)
    assert influence.directory is not None
    engine = InfluenceEngine(
        influence.directory / "trajectory", task, train, val_dataloaders=valid, progress=False
    )
    x, y = points(11, 1).tensors
    replay = engine.replay("val_loss")
    labelled = replay.samples < 12
    chosen = [*replay.samples[labelled][:2].tolist(), *replay.samples[~labelled][:2].tolist()]
    found = LeaveOneOut(chosen).estimate(replay)
    nets = [sets_retrained(start, engine.trajectory, data, j) for j in [*chosen, -1]]
    losses = [F.mse_loss(net(x), y).item() for net in nets]
    for loss, influence_ in zip(losses, found.influence.tolist(), strict=False):
        assert influence_ == pytest.approx(loss - losses[-1], rel=1e-7, abs=1e-12)


# ---------------------------------------------------------------------- weights for elements


class WeightedSquares(Task):
    """``mse_loss(weight=)`` divides by the weights' sum, ``huber_loss(weight=)`` by the count."""

    def weight(self, y: Tensor) -> Tensor:
        return 0.5 + (y > 0).double()

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        z, w = self.net(x), self.weight(y)
        return F.mse_loss(z, y, weight=w) + F.huber_loss(z, y, weight=w)

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        z, w = self.net(x), self.weight(y)
        squares = (w * (z - y).square()).sum(1) / w.sum()
        return squares + (w * F.huber_loss(z, y, reduction="none")).mean(1) / len(x)


def points(n: int, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def test_weights_of_regression_losses(tmp_path: Path) -> None:
    torch.manual_seed(2)
    drops_its_own_term_alone(tmp_path, WeightedSquares(small()), points(17), points(11, 1))


class Spoken(Task):
    """`ctc_loss`: a mean over samples of what is divided by each one's length; differentiable once."""

    def losses(self, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        logits = self.net(x).view(len(x), 4, 3).log_softmax(-1)
        lengths = 1 + (x[:, 0] > 0).long()
        given = torch.full((len(x),), 4)
        return F.ctc_loss(logits.transpose(0, 1), y, given, lengths, reduction=reduction)

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return self.losses(x, y, "mean")

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        return self.losses(x, y, "none") / (1 + (x[:, 0] > 0).double()) / len(x)

    def query(self, x: Tensor, y: Tensor) -> Tensor:
        return self.losses(x, y, "sum") / len(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ctc(tmp_path: Path) -> None:
    torch.manual_seed(2)
    data = []
    for n, seed in ((13, 0), (9, 1)):
        x, y = points(n, seed).tensors
        data.append(TensorDataset(x, 1 + (y > 0).long()))
    task = Spoken(nn.Linear(4, 12).double())
    only = {"estimator": "leave-one-out"}
    drops_its_own_term_alone(tmp_path / "a", task, *data, max_epochs=2, callback=only)
    with pytest.raises(UnsupportedError, match=r"ctc_loss.*leave-one-out"):
        record(tmp_path / "b", Spoken(nn.Linear(4, 12).double()), *data)


# ---------------------------------------------------------------------- what is refused


class Asleep(Task):
    """Flattened, and nothing there at the first step: nobody can tell whose it will be."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        hinge = (z.abs() - 50).clamp_min(0).T.reshape(-1)
        return (z - y).square().mean() + hinge.mean()


class NormLoss(Task):
    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.net(x) - y)


class RootMeanSquare(Task):
    def written(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y).sqrt()


class FlatContrast(Task):
    """Both views in one list, each compared with all: every row sees every sample."""

    def written(self, x: Tensor, y: Tensor) -> Tensor:
        views = torch.cat([self.net(x), self.net(2 * x)])
        near = views @ views.T - 1e3 * torch.eye(len(views), dtype=x.dtype)
        return F.cross_entropy(near, torch.arange(len(views)).roll(len(x)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Asleep, r"`mean` reduces a tensor of shape \(12,\).*constant at the first step"),
        (NormLoss, "reduces by `linalg_vector_norm`, which is no sum over samples"),
        (RootMeanSquare, "not a weighted sum"),
        (FlatContrast, r"cross_entropy` reduces a tensor of shape \(12,\).*told apart"),
    ],
)
def test_the_reason_is_named(tmp_path: Path, kind: type[Task], reason: str) -> None:
    torch.manual_seed(2)
    with pytest.raises(UnsupportedError, match=rf"(?s)`{kind.__name__}.training_step`.*{reason}"):
        record(tmp_path, kind(small(), lr=1e-6), points(18), points(11, 1))


def test_a_ratio_of_sums_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(2)
    with pytest.raises(UnsupportedError, match="not a weighted sum"):
        record(tmp_path, Dice(convolutions()), images(17), images(9, 1))


@pytest.mark.parametrize("refused", [FlatContrast, NormLoss])
def test_the_advice_runs(tmp_path: Path, refused: type[Task]) -> None:
    """The lines that the message shows are Python, and unpack the batch as it is."""
    torch.manual_seed(2)
    with pytest.raises(UnsupportedError) as caught:
        record(tmp_path, refused(small(), lr=1e-6), points(18), points(11, 1))
    text = str(caught.value)
    lines = text[text.index("    def sample_losses") : text.index("    InfluenceCallback(")]
    space: dict[str, Any] = {"F": F}
    exec("if True:\n" + lines, space)
    assert "x, y = batch" in lines
    assert f"[{6}" in lines
    assert "6, -1" not in lines  # the last batch may be smaller
