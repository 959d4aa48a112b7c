"""The paper's ways to make ACC-SGD-IE cheaper, in float64, against outside truths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_accie import InfluenceCallback
from lightning_accie.errors import UnsupportedError
from lightning_accie.estimators import AccSgdIE, LeaveOneOut, SgdIE, TracIn
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.layers import chosen_names
from lightning_accie.estimators.measure import Prices
from tests.problems import Classifier, Regressor, adam, classification, record, regression, sgd
from tests.problems import smooth_net as net_of_two
from tests.truth import central_difference, mean_loss, recorded_batches

HEAD = "net.2"
CLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"},
}


def retrain_head(
    whole: nn.Sequential,
    data: Any,
    batches: Any,
    configure: Any,
    weights: Tensor,
    *,
    loss: Any = F.cross_entropy,
    clip: dict[str, Any],
) -> nn.Sequential:
    """Plain torch: a run with all weights 1, and beside it one of the last layer alone, which takes the
    first layer, and its part in the gradient's norm, from the other run at each step."""
    x, y = data.tensors
    twin = copy.deepcopy(whole)
    head = twin[2]
    optimizers = configure(list(whole.parameters())), configure(list(head.parameters()))
    limit = clip.get("gradient_clip_val")
    for (batch,) in batches:
        index = torch.tensor(batch)
        for net, w in ((whole, torch.ones(len(y)).double()), (twin, weights)):
            net.zero_grad()
            losses = loss(net(x[index]), y[index], reduction="none").reshape(len(index), -1).mean(1)
            ((losses * w[index]).sum() / len(index)).backward()
        for mine, recorded in zip(twin[0].parameters(), whole[0].parameters(), strict=True):
            mine.grad = recorded.grad.clone()
        for net in (whole, twin):
            if limit and "gradient_clip_algorithm" in clip:
                nn.utils.clip_grad_value_(net.parameters(), limit)
            elif limit:
                nn.utils.clip_grad_norm_(net.parameters(), limit)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for mine, recorded in zip(twin[0].parameters(), whole[0].parameters(), strict=True):
                mine.copy_(recorded)
    return twin


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_layers_of_sgd_ie_is_the_derivative_of_training_them(
    tmp_path: Path, optimiser: str, clip: str
) -> None:
    configure = {"sgd": sgd(), "momentum": sgd(momentum=0.9), "adam": adam()}[optimiser]
    data, val = classification(20), classification(11, seed=3)
    net = net_of_two()
    initial = copy.deepcopy(net)
    engine = record(tmp_path, Classifier(net, configure), data, val, **CLIPS[clip])
    replay = engine.replay("val_loss")
    found = SgdIE(layers=HEAD).estimate(replay).influence
    batches = recorded_batches(engine.trajectory)

    def query(weights: Tensor) -> float:
        start = copy.deepcopy(initial)
        twin = retrain_head(start, data, batches, configure, weights, clip=CLIPS[clip])
        return mean_loss(twin, val.tensors)

    for j in (0, 7, 19):
        slope = central_difference(query, 20, j)
        assert float(found[j]) == pytest.approx(-slope, rel=2e-5, abs=1e-9)
    whole = SgdIE().estimate(replay).influence
    assert float((whole - found).norm() / whole.norm()) > 1e-2


def test_layers_of_acc_is_exact_where_they_are_a_least_squares_problem(tmp_path: Path) -> None:
    """Given the first layer, F_t is affine in the last one."""
    configure = sgd(momentum=0.8, weight_decay=0.01)
    data, val = regression(20), regression(11, seed=3)
    net = net_of_two(outputs=2)
    initial = copy.deepcopy(net)
    engine = record(tmp_path, Regressor(net, configure), data, val)
    found = AccSgdIE(layers=[f"{HEAD}.*"]).estimate(engine.replay("val_loss")).influence
    batches = recorded_batches(engine.trajectory)
    whole = mean_loss(net, val.tensors, F.mse_loss)
    truth = []
    for j in range(20):
        weights = torch.ones(20).double()
        weights[j] = 0
        start = copy.deepcopy(initial)
        twin = retrain_head(start, data, batches, configure, weights, loss=F.mse_loss, clip={})
        truth.append(mean_loss(twin, val.tensors, F.mse_loss) - whole)
    exact = torch.tensor(truth, dtype=torch.float64)
    assert float((found - exact).norm() / exact.norm()) < 1e-9


@pytest.mark.parametrize("optimiser", ["nesterov", "adam"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "acc"])
def test_layers_that_never_move_make_no_difference(
    tmp_path: Path, optimiser: str, settings: dict[str, Any]
) -> None:
    configure = {"nesterov": sgd(momentum=0.9, nesterov=True), "adam": adam()}[optimiser]

    class StillTrunk(Classifier):
        def configure_optimizers(self) -> Any:
            trunk, head = self.net[0].parameters(), self.net[2].parameters()
            return configure([{"params": list(trunk), "lr": 0.0}, {"params": list(head)}])

    data, val = classification(20), classification(11, seed=3)
    replay = record(tmp_path, StillTrunk(net_of_two(), configure), data, val, **settings).replay(
        "val_loss"
    )
    for kind in (SgdIE, TracIn, AccSgdIE):
        whole = kind().estimate(replay).influence
        assert float(whole.abs().max()) > 1e-4
        for layers in (HEAD, lambda name: name.startswith("net.2")):
            found = kind(layers=layers).estimate(replay).influence
            torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-14)


class TwoHeads(Classifier):
    """Every second step trains the other head."""

    def __init__(self, configure: Any) -> None:
        super().__init__(net_of_two(), configure)
        self.heads = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.heads[batch_idx % 2](self.net(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self.heads[0](self.net(x)), y))


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_layers_that_some_steps_do_not_train(tmp_path: Path, optimiser: str) -> None:
    """By every way; a trunk that stays still makes the head's the whole influence."""
    configure = {"momentum": sgd(momentum=0.9), "adam": adam()}[optimiser]

    class StillTrunk(TwoHeads):
        def configure_optimizers(self) -> Any:
            trunk, heads = self.net.parameters(), self.heads.parameters()
            return configure([{"params": list(trunk), "lr": 0.0}, {"params": list(heads)}])

    data, val = classification(20), classification(11, seed=3)
    replay = record(tmp_path, StillTrunk(configure), data, val).replay("val_loss")
    for kind in (SgdIE, TracIn, AccSgdIE):
        whole = kind().estimate(replay).influence
        assert float(whole.abs().max()) > 1e-4
        for tangents, product in (
            ("vectorized", "double-backward"),
            ("one-by-one", "reverse-over-forward"),
            ("double-backward", "double-backward"),
        ):
            replay.walker.tangents, replay.walker.product = tangents, product
            found = kind(layers="heads.0").estimate(replay).influence
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-14)
            other = kind(layers="heads.1").estimate(replay).influence
            assert float(other.abs().max()) < 1e-15  # the query does not see it


def test_layers_without_running_statistics_of_their_own(tmp_path: Path) -> None:
    """What BatchNorm keeps is followed at every step, also where none of the layers is trained."""

    class Normalised(TwoHeads):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure)
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()

    data, val = classification(20), classification(11, seed=3)
    replay = record(tmp_path, Normalised(sgd(momentum=0.9)), data, val).replay("val_loss")
    found = []
    for way in ("vectorized", "double-backward"):
        replay.walker.tangents = way
        found.append(AccSgdIE(layers="heads.0").estimate(replay).influence)
    first = SgdIE(layers="heads.0").estimate(replay).influence
    assert float(first.abs().max()) > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)
    uncorrected = AccSgdIE(query="linear", layers="heads.0", correction_steps=(0, 0))
    torch.testing.assert_close(uncorrected.estimate(replay).influence, first, rtol=1e-9, atol=1e-14)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    data, val = classification(20), classification(11, seed=3)
    module = Classifier(net_of_two(), sgd(lr=0.3, momentum=0.5))
    return record(tmp_path_factory.mktemp("run"), module, data, val, max_epochs=5).replay(
        "val_loss"
    )


def test_without_any_correction_acc_is_sgd_ie(shuffled: Replay) -> None:
    first = SgdIE().estimate(shuffled).influence
    for never in ({"correction_steps": (0, 0)}, {"correction_epochs": range(5, 9)}):
        found = AccSgdIE(query="linear", **never).estimate(shuffled).influence
        torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-14)
    corrected = AccSgdIE(query="linear").estimate(shuffled).influence
    assert float((corrected - first).norm() / first.norm()) > 1e-2


def test_corrections_in_some_epochs_are_those_of_their_steps(shuffled: Replay) -> None:
    """Four steps an epoch."""
    by_epochs = AccSgdIE(correction_epochs=(1, 3)).estimate(shuffled).influence
    by_steps = AccSgdIE(correction_steps=(4, 12)).estimate(shuffled).influence
    assert torch.equal(by_epochs, by_steps)
    whole = AccSgdIE().estimate(shuffled).influence
    assert not torch.allclose(by_steps, whole, rtol=1e-6)
    assert torch.equal(AccSgdIE(correction_steps=(0, 20)).estimate(shuffled).influence, whole)


def test_a_correction_at_random_is_right_in_the_mean(shuffled: Replay) -> None:
    """Δ is linear in each draw, and every draw is independent of what came before it."""
    whole = AccSgdIE(query="linear").estimate(shuffled).influence
    seeds = torch.stack(
        [
            AccSgdIE(query="linear", correction_probability=0.4, seed=seed)
            .estimate(shuffled)
            .influence
            for seed in range(48)
        ]
    )
    error = seeds.std(0) / 48**0.5
    assert bool((seeds.std(0) > 0).all())
    assert float(((seeds.mean(0) - whole) / error).square().mean().sqrt()) < 1.5
    first = SgdIE().estimate(shuffled).influence
    assert float(((first - whole) / error).square().mean().sqrt()) > 4  # no correction is seen


def test_a_draw_does_not_depend_on_the_samples_beside_it(shuffled: Replay) -> None:
    settings: dict[str, Any] = {"correction_probability": 0.5, "seed": 3}
    whole = AccSgdIE(**settings).estimate(shuffled).influence
    some = AccSgdIE([2, 11, 17], **settings).estimate(shuffled).influence
    torch.testing.assert_close(some, whole[[2, 11, 17]], rtol=1e-12, atol=1e-15)
    other = AccSgdIE(correction_probability=0.5, seed=4).estimate(shuffled).influence
    assert not torch.allclose(other, whole, rtol=1e-6)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_numpy_transcription_with_the_curvature_of_some_steps(tmp_path: Path, every: int) -> None:
    """Logistic regression: the middle step of each segment stands for all of it."""
    data, val = classification(18, classes=2), classification(11, classes=2, seed=3)
    net = nn.Linear(4, 1, bias=False).double()
    theta = net.weight.detach().numpy().ravel().copy()

    class Logistic(Classifier):
        def loss(self, logits: Tensor, target: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits[:, 0], target.double())

    engine = record(tmp_path, Logistic(net, sgd(lr=0.3)), data, val, max_epochs=5)
    x, y = data.tensors[0].numpy(), data.tensors[1].numpy()
    xv, yv = val.tensors[0].numpy(), val.tensors[1].numpy()
    delta, lr = np.zeros((18, 4)), 0.3
    batches = recorded_batches(engine.trajectory)  # 15 steps
    middles = {
        2: {1: 2, 3: 2, 5: 2, 7: 2, 9: 2, 11: 2, 13: 2, 14: 1},
        3: {1: 3, 4: 3, 7: 3, 10: 3, 13: 3},
        7: {3: 7, 10: 7, 14: 1},
    }[every]
    for t, (batch,) in enumerate(batches):
        xb, yb = x[batch], y[batch]
        p = 1 / (1 + np.exp(-xb @ theta))
        hessian = (xb * (p * (1 - p))[:, None]).T @ xb / len(batch)
        new = delta - middles.get(t, 0) * lr * delta @ hessian
        for place, j in enumerate(batch):
            own = p[place] * (1 - p[place]) * np.outer(xb[place], xb[place])
            new[j] += lr / len(batch) * ((p[place] - yb[place]) * xb[place] + own @ delta[j])
        theta, delta = theta - lr * xb.T @ (p - yb) / len(batch), new
    slope = xv.T @ (1 / (1 + np.exp(-xv @ theta)) - yv) / len(yv)
    found = AccSgdIE(query="linear", every_k_steps=every).estimate(engine.replay("val_loss"))
    np.testing.assert_allclose(found.influence.numpy(), delta @ slope, rtol=1e-9, atol=1e-14)


def test_all_at_once_by_every_way_to_the_tangents(tmp_path: Path) -> None:
    class Penalised(Classifier):
        def loss(self, logits: Tensor, target: Tensor) -> Tensor:
            weights = sum(p.square().sum() for p in self.parameters())
            return F.cross_entropy(logits, target) + 0.01 * weights

    data, val = classification(20), classification(11, seed=3)
    for name, configure in (("momentum", sgd(momentum=0.9)), ("adam", adam())):
        module = Penalised(net_of_two(), configure)
        replay = record(tmp_path / name, module, data, val).replay("val_loss")
        estimator = AccSgdIE(
            layers=HEAD, every_k_steps=2, correction_probability=0.5, correction_epochs=(0, 2)
        )
        found = []
        for way in ("vectorized", "one-by-one", "double-backward"):
            replay.walker.tangents = way
            found.append(estimator.estimate(replay).influence)
        assert float(found[0].abs().max()) > 1e-4
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-13)


def test_the_layers_that_are_named_are_the_ones_followed() -> None:
    params = ["trunk.0.weight", "trunk.0.bias", "trunk.10.weight", "head.weight", "scale"]
    assert chosen_names(None, params) is None
    for layers, wanted in {
        "head": ["head.weight"],
        "trunk": ["trunk.0.weight", "trunk.0.bias", "trunk.10.weight"],
        "trunk.1*": ["trunk.10.weight"],
        "trunk.0": ["trunk.0.weight", "trunk.0.bias"],
        "*.bias": ["trunk.0.bias"],
        ("scale", "head"): ["head.weight", "scale"],
    }.items():
        assert list(chosen_names(layers, params) or ()) == wanted
    assert chosen_names(lambda name: "bias" in name, params) == ("trunk.0.bias",)
    with pytest.raises(
        ValueError, match=r"'nose', which matches no parameter.*trunk.0, trunk.10, head"
    ):
        chosen_names(("head", "nose"), params)
    with pytest.raises(ValueError, match="chooses no parameter"):
        chosen_names(lambda name: False, params)


def test_what_cannot_be_is_refused_at_fit_start(tmp_path: Path) -> None:
    data, val = classification(20), classification(11, seed=3)
    for estimator in (AccSgdIE(layers="nose"), SgdIE(layers=["net.0", "nose"])):
        with pytest.raises(UnsupportedError, match=r"`layers` has 'nose'.*net\.0, net\.2"):
            record(
                tmp_path,
                Classifier(net_of_two(), sgd()),
                data,
                val,
                callback={"estimator": estimator},
            )
    frozen = net_of_two()
    frozen[0].requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"'net\.0'.* no parameter that is trained.*net\.2"):
        record(
            tmp_path,
            Classifier(frozen, sgd()),
            data,
            val,
            callback={"estimator": SgdIE("net.0")},
        )
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    plain = record(tmp_path / "plain", Classifier(copy.deepcopy(net), sgd()), data, val)
    with pytest.raises(UnsupportedError, match=r"every_k_steps.*net\.1\.running"):
        AccSgdIE(every_k_steps=2).estimate(plain.replay("val_loss"))
    with pytest.raises(UnsupportedError, match=r"every_k_steps.*net\.1\.running"):
        record(
            tmp_path,
            Classifier(net, sgd()),
            data,
            val,
            callback={"estimator": AccSgdIE(every_k_steps=2)},
        )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"layers": 3}, "`layers` must be a glob"),
        ({"layers": []}, "`layers` must be a glob"),
        ({"layers": ["head", ""]}, "`layers` must be a glob"),
        ({"every_k_steps": 0}, "`every_k_steps` must be an integer of at least 1, got 0"),
        ({"every_k_steps": True}, "`every_k_steps` must be an integer"),
        ({"correction_probability": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"correction_probability": 1.5}, "above 0 and at most 1"),
        ({"correction_probability": "0.5"}, "above 0 and at most 1"),
        ({"correction_steps": 5}, "`correction_steps` must be a range or a pair"),
        ({"correction_epochs": (0, 1, 2)}, "`correction_epochs` must be a range or a pair"),
        ({"correction_epochs": (-1, 2)}, "`correction_epochs` must be a range or a pair"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
    ],
)
def test_arguments_that_will_not_do(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AccSgdIE(**settings)


def test_settings_tell_estimators_apart() -> None:
    different = [
        AccSgdIE(),
        AccSgdIE(layers="head"),
        AccSgdIE(every_k_steps=2),
        AccSgdIE(correction_probability=0.5),
        AccSgdIE(correction_probability=0.5, seed=1),
        AccSgdIE(correction_steps=(0, 5)),
        AccSgdIE(correction_epochs=(0, 5)),
    ]
    assert len({estimator.key for estimator in different}) == len(different)
    assert AccSgdIE(seed=3).key == AccSgdIE().key  # without a draw the seed changes nothing
    assert SgdIE(layers="head").key != SgdIE().key


def test_layers_of_the_automatic_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its estimates are those of the estimators by name; its exact replays leave out of everything."""
    data, val = classification(20), classification(11, seed=3)
    engine = record(tmp_path, Classifier(net_of_two(), sgd(lr=0.3)), data, val)
    monkeypatch.setattr("lightning_accie.ranking.measure_prices", lambda *args: Prices(2.0, 1.0))
    auto = engine.estimate(layers=HEAD, top_k=3, verify=4)
    replay = engine.replay("val_loss")
    exact = LeaveOneOut().estimate(replay).influence
    acc = AccSgdIE(layers=HEAD).estimate(replay).influence
    first = SgdIE(layers=HEAD).estimate(replay).influence
    want = {"sgd-ie": first, "acc-sgd-ie": acc, "leave-one-out": exact}
    assert set(auto.estimator) == set(want)
    for i, name in enumerate(auto.estimator):
        expected = float(want[name][int(auto.index[i])])
        assert float(auto.influence[i]) == pytest.approx(expected, rel=1e-9)
    assert auto.info["settings"] == {"layers": [HEAD]}
    strongest = AccSgdIE(2, layers=HEAD).estimate(replay).samples  # by SGD-IE of the same layers
    assert set(strongest.tolist()) == {int(first.argmin()), int(first.argmax())}
    by_name = engine.estimate(estimator="sgd-ie", layers=HEAD, verify=0)
    torch.testing.assert_close(torch.as_tensor(by_name.influence), first, rtol=1e-12, atol=0.0)
    with pytest.raises(UnsupportedError, match="'nose', which matches no parameter"):
        engine.estimate(layers="nose")
    with pytest.raises(ValueError, match="give it to AccSgdIE"):
        engine.estimate(estimator=AccSgdIE(), layers=HEAD)
    with pytest.raises(
        ValueError, match=r"'leave-one-out'. has no `layers`; 'auto', 'sgd-ie', 'acc"
    ):
        engine.estimate(estimator="leave-one-out", layers=HEAD)
    with pytest.raises(MisconfigurationException, match="`layers` must be a glob"):
        InfluenceCallback(layers=3)  # type: ignore[arg-type]
