"""Two processes train under the callback; one process opens, replays and ranks the run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accie import InfluenceEngine, LeaveOneOut, SgdIE, Trajectory
from tests.ddp.cases import CASES, DATA, datasets, loaders
from tests.ddp.truth import mean_loss, retrain, windows
from tests.problems import quiet_trainer

Opener = Callable[..., InfluenceEngine]


@pytest.fixture
def results(whole: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank told of a case."""
    return lambda case: [
        pickle.loads((whole / f"{case}-{rank}.pickle").read_bytes()) for rank in range(2)
    ]


@pytest.fixture
def opened(results: Callable[[str], list[dict[str, Any]]]) -> Opener:
    """Opens a case's trajectory in this process, with plain loaders."""

    def engine(case: str, **settings: Any) -> InfluenceEngine:
        directory = results(case)[0]["directory"]
        train, valid = loaders()
        torch.manual_seed(9)
        module = CASES[case].make()
        return InfluenceEngine(
            directory / "trajectory",
            module,
            train,
            val_dataloaders=valid,
            progress=False,
            **settings,
        )

    return engine


def fresh(case: str) -> nn.Module:
    """The network as training found it."""
    torch.manual_seed(1)
    return CASES[case].make().net


@pytest.mark.parametrize("case", CASES)
def test_training_is_what_it_is_without(results: Any, case: str) -> None:
    ranks = results(case)
    for rank in ranks:
        plain, seen = rank["plain"], rank["seen"]
        for name, value in plain["state"].items():
            assert torch.equal(seen["state"][name], value), name
        assert seen["losses"] == plain["losses"]
        assert seen["generators"] == plain["generators"]
        assert seen["loaders"] == plain["loaders"]
        assert seen["left"] == []
    assert ranks[0]["seen"]["losses"] != ranks[1]["seen"]["losses"]
    assert ranks[0]["directory"] == ranks[1]["directory"]


@pytest.mark.parametrize("case", ["plain", "drawing"])
def test_every_rank_takes_its_share_of_the_analysis(results: Any, case: str) -> None:
    first, second = results(case)
    assert first["influence"] == second["influence"]
    assert not set(first["share"]) & set(second["share"])
    assert abs(len(first["share"]) - len(second["share"])) <= 2
    assert sorted(first["share"] + second["share"]) == first["replayed"] == second["replayed"]


@pytest.mark.parametrize("case", CASES)
def test_one_process_replays_it_to_the_bit(results: Any, opened: Opener, case: str) -> None:
    engine = opened(case)
    walker = engine._walker
    steps = [visit.step for visit in walker.forwards()]
    assert steps == list(range(len(engine.trajectory)))
    assert walker.fidelity.bit_exact
    assert walker.fidelity.losses == 2 * len(results(case)[0]["seen"]["losses"])
    assert walker.fidelity.checkpoints >= 2
    del engine.trajectory._checkpoints[len(steps)]  # else the end is loaded, not replayed
    final = opened(case)._walker
    final._checkpoints = frozenset(engine.trajectory.checkpoint_steps)
    assert len(final._checkpoints) >= 2
    snapshot = final.final()
    trained = results(case)[0]["seen"]["state"]
    for name, value in {**snapshot.state.params, **snapshot.buffers}.items():
        assert torch.equal(trained[name], value), name


def recorded(trajectory: Trajectory, ranks: int = 2) -> list[list[list[list[int]]]]:
    """Per step and rank the recorded micro-batches."""
    return [
        [
            [micro.pieces[0].indices.tolist() for micro in step.micro_batches if micro.rank == rank]
            for rank in range(ranks)
        ]
        for step in trajectory.steps()
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_batches_are_those_that_the_sampler_dealt(opened: Opener, case: str) -> None:
    trajectory = opened(case).trajectory
    accumulate = CASES[case].trainer.get("accumulate_grad_batches", 1)
    dealt = list(windows(DATA, 3, 5, accumulate))
    assert recorded(trajectory) == dealt
    assert {m.divisor for s in trajectory.steps() for m in s.micro_batches} == {2 * accumulate}
    drawn = np.bincount([i for step in dealt for rank in step for m in rank for i in m])
    source, index, count = trajectory.visits()
    assert source.tolist() == [0] * DATA
    assert index.tolist() == list(range(DATA))
    assert count.tolist() == drawn.tolist()
    assert sum(drawn) == 3 * (DATA + 1)  # one sample an epoch is drawn twice


def settings(case: str) -> dict[str, Any]:
    """How the plain loop trains the case."""
    trainer = CASES[case].trainer
    clip = trainer.get("gradient_clip_val")
    return {
        "configure": CASES[case].configure,
        "accumulate": trainer.get("accumulate_grad_batches", 1),
        "clip": clip and (trainer.get("gradient_clip_algorithm", "norm"), clip),
        "schedule": CASES[case].make().schedule,
    }


@pytest.mark.parametrize("case", ["plain", "momentum", "batchnorm"])
def test_influence_is_that_of_a_plain_loop_over_both_shares(opened: Opener, case: str) -> None:
    train, valid = (data.tensors for data in datasets())
    ones, how = torch.ones(DATA, dtype=torch.float64), settings(case)
    net = retrain(fresh(case), train, ones, **how)
    base = mean_loss(net, valid)
    expected = []
    for sample in range(DATA):
        without = retrain(fresh(case), train, ones * (torch.arange(DATA) != sample), **how)
        expected.append(mean_loss(without, valid) - base)
    scores = opened(case).estimate(estimator=LeaveOneOut(), verify=0)
    assert scores.info["query_value"] == pytest.approx(base, rel=1e-12)
    found = scores.influence[torch.as_tensor(scores.index).argsort()]
    torch.testing.assert_close(
        torch.as_tensor(found), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-12
    )
    assert max(map(abs, expected)) > 1e-4


def test_sgd_ie_is_the_slope_in_the_weight_shared_by_both_ranks(opened: Opener) -> None:
    train, valid = (data.tensors for data in datasets())
    how = settings("momentum")
    scores = opened("momentum").estimate(estimator=SgdIE(), verify=0)
    by_index = dict(zip(scores.index.tolist(), scores.influence.tolist(), strict=True))
    for sample in (0, 7, 24):
        ends = []
        for shift in (1e-5, -1e-5):
            weights = torch.ones(DATA, dtype=torch.float64)
            weights[sample] += shift
            net = retrain(fresh("momentum"), train, weights, **how)
            ends.append(mean_loss(net, valid))
        assert by_index[sample] == pytest.approx(-(ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("case", ["plain", "drawing"])
def test_every_rank_has_the_scores(results: Any, opened: Opener, case: str) -> None:
    first, second = results(case)
    for name in ("index", "influence", "info", "labels"):
        assert first[name] == second[name]
    assert first["info"]["bit_exact_replay"]
    labels = datasets()[0].tensors[1]
    assert first["labels"] == labels[first["index"]].tolist()
    later = opened(case).estimate(verify=4, top_k=2)
    by_index = dict(zip(first["index"], first["influence"], strict=True))
    for index, influence in zip(later.index.tolist(), later.influence.tolist(), strict=True):
        assert influence == pytest.approx(by_index[index], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("case", ["plain", "drawing"])
def test_the_query_is_measured_on_all_validation_data(
    tmp_path: Path, results: Any, case: str
) -> None:
    module = CASES[case].make()
    module.load_state_dict(results(case)[0]["seen"]["state"])
    (metrics,) = quiet_trainer(tmp_path).validate(module, loaders()[1], verbose=False)
    value = results(case)[0]["info"]["query_value"]
    assert value == pytest.approx(metrics["val_loss"], rel=1e-6)  # summed in single precision
