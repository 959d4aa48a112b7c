"""A fit that is resumed goes on with its trajectory, or says why it cannot.

The truth is the uninterrupted run, where the loaders make the two equal, and the weights that the
resumed training itself ended with.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable as Function
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accie import InfluenceCallback, InfluenceEngine, Trajectory
from lightning_accie.capture.resume import Bookmark
from lightning_accie.trajectory.records import Step
from tests.problems import Classifier, adamw, classification, quiet_trainer, sgd

stateful = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*resuming from a checkpoint that ended before the epoch ended",
        ".set_vital. is deprecated",  # torchdata 0.11, on torch 2.13
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",
        "Be aware that when using `ckpt_path`",  # ModelCheckpoint and the like, left out
    )
]


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """Lightning ignores further Ctrl-C after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Seeds(Callback):
    """Makes the noise of a batch depend on its place in the run alone, as no resumed run's does."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


class Does(Callback):
    """Does something once, after a batch."""

    def __init__(self, batch: int, what: Function[[Any], None]) -> None:
        self.left, self.what = batch, what

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.what(trainer)


def raises(error: BaseException) -> Function[[Any], None]:
    def what(trainer: Any) -> None:
        raise error

    return what


def noisy(configure: Any = None, *, norm: bool = True) -> Classifier:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if norm else []
    layers = [nn.Linear(4, 8), *middle, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return Classifier(nn.Sequential(*layers).double(), configure or adamw())


def shuffled(n: int = 30) -> Any:
    return stateful.StatefulDataLoader(classification(n), batch_size=5, shuffle=True)


def in_order(n: int = 30) -> Any:
    return DataLoader(classification(n), batch_size=5)


def valid() -> Any:
    return DataLoader(classification(11, seed=3), batch_size=7)


def saver(root: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root / "checkpoints", "{step}", save_top_k=-1, **when)


def run(
    root: Path,
    *others: Any,
    train: Any = None,
    module: Any = None,
    ckpt: Path | None = None,
    callback: dict[str, Any] | None = None,
    seeds: bool = True,
    **trainer: Any,
) -> tuple[InfluenceCallback, Classifier]:
    """Fit six batches an epoch under the callback, capture only."""
    module = module or noisy()
    influence = InfluenceCallback(**{"run": "manual", "console": False, **(callback or {})})
    callbacks = [influence, *others, *([Seeds()] if seeds else [])]
    torch.manual_seed(7)  # a stateful loader's sampler draws its seed when it is made
    trainer["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    quiet_trainer(root, callbacks=callbacks, **trainer).fit(
        module, (train or shuffled)(), valid(), ckpt_path=ckpt
    )
    return influence, module


def broken(root: Path, *others: Any, error: type[BaseException], **given: Any) -> InfluenceCallback:
    """The same for a run that ends with an error."""
    influence = []

    class Keeps(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            influence.append(trainer.callbacks[0])

    with pytest.raises(error):
        run(root, *others, Keeps(), **given)
    return influence[0]


def trajectory_of(influence: InfluenceCallback) -> Trajectory:
    assert influence.directory is not None
    return Trajectory.open(influence.directory / "trajectory")


def facts(step: Step) -> Any:
    """All that a step records but for where its random state is kept."""
    micros = [
        (
            [(piece.source, piece.indices.tolist()) for piece in micro.pieces],
            micro.batch_idx,
            micro.epoch,
            micro.global_step,
            micro.loss,
            micro.accumulate,
            micro.draws,
        )
        for micro in step.micro_batches
    ]
    return step.number, micros, step.settings


def check_same_run(one: Trajectory, other: Trajectory) -> None:
    assert [facts(step) for step in one.steps()] == [facts(step) for step in other.steps()]
    last = len(one)
    tensors, others = one.checkpoint(last).tensors, other.checkpoint(last).tensors
    names = [name for name in tensors if not name.startswith("random/")]
    assert all(torch.equal(tensors[name], others[name]) for name in names)


def check_replay(trajectory: Trajectory, module: Classifier, train: Any = None) -> None:
    """From step 0 on, bit for bit, to the weights and the statistics that training ended with."""
    engine = InfluenceEngine(
        trajectory, noisy(module.configure, norm=len(module.net) > 4), train or in_order(),
        val_dataloaders=valid(), progress=False,
    )  # fmt: skip
    walker = engine._walker
    snapshot = walker.start()
    for _ in range(len(walker)):
        snapshot = walker._advance(snapshot)[1]
    assert walker.fidelity.bit_exact
    assert walker.fidelity.losses == sum(len(step.micro_batches) for step in trajectory.steps())
    for name, parameter in module.named_parameters():
        assert torch.equal(snapshot.state.params[name], parameter), name
    for name, buffer in module.named_buffers():
        assert torch.equal(snapshot.buffers[name], buffer), name
    scores = engine.estimate(verify=3, top_k=2)
    assert scores.info["bit_exact_replay"]
    assert scores.info["steps"] == len(trajectory)


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


# ---------------------------------------------------------------------- where the runs are equal


def finished(root: Path, when: dict[str, Any], **given: Any) -> InfluenceCallback:
    """Two epochs to their end: the run may have gone further than its checkpoint."""
    return run(root, saver(root, **when), max_epochs=2, **given)[0]


def crashed(root: Path, when: dict[str, Any], **given: Any) -> InfluenceCallback:
    stop = Does(11, raises(ValueError("boom")))
    return broken(root, saver(root, **when), stop, error=ValueError, max_epochs=3, **given)


def interrupted(root: Path, when: dict[str, Any], **given: Any) -> InfluenceCallback:
    stop = Does(11, raises(KeyboardInterrupt()))
    return broken(root, saver(root, **when), stop, error=SystemExit, max_epochs=3, **given)


def killed(root: Path, when: dict[str, Any], **given: Any) -> InfluenceCallback:
    """What is on disk after eleven batches, nothing having been closed."""
    copy = root.with_name("killed")
    stop = Does(11, lambda trainer: shutil.copytree(root, copy))
    influence, _ = run(root, saver(root, **when), stop, max_epochs=3, **given)
    shutil.rmtree(root)
    copy.rename(root)
    return influence


EPOCH, STEPS = {"every_n_epochs": 1}, {"every_n_train_steps": 4}


@pytest.mark.parametrize("fixed", [False, True], ids=["new-directory", "in-place"])
@pytest.mark.parametrize(
    ("first", "train", "when", "at"),
    [
        (finished, in_order, EPOCH, 6),
        (finished, in_order, EPOCH, 12),
        (finished, shuffled, STEPS, 8),
        (crashed, shuffled, STEPS, 8),
        (interrupted, in_order, EPOCH, 6),
        (killed, shuffled, STEPS, 8),
    ],
    ids=["epoch-end", "run-end", "mid-epoch", "crashed", "interrupted", "killed"],
)
def test_a_resumed_trajectory_is_the_uninterrupted_one(
    tmp_path: Path, fixed: bool, first: Any, train: Any, when: dict[str, Any], at: int
) -> None:
    root = tmp_path / "run"
    callback = {"dirpath": root / "fixed"} if fixed else {}
    before = first(root, when, train=train, callback=callback)
    old = contents(before.directory)
    old_length = len(trajectory_of(before))
    assert old_length >= at
    ckpt = root / "checkpoints" / f"step={at}.ckpt"
    influence, module = run(root, train=train, ckpt=ckpt, max_epochs=3, callback=callback)
    whole, _ = run(tmp_path / "whole", train=train, max_epochs=3)
    trajectory = trajectory_of(influence)
    assert (trajectory.status, len(trajectory)) == ("finished", 18)
    assert [entry["step"] for entry in trajectory.header["resumed"]] == [at]
    check_same_run(trajectory, trajectory_of(whole))
    trajectory.verify()
    check_replay(trajectory, module)
    assert (influence.directory == before.directory) == fixed
    if fixed:
        named = {"manifest.json", *(f"step-{t:09d}.safetensors" for t in (0, 18))}
        found = {path.name for path in trajectory.directory.rglob("*") if path.is_file()}
        assert {name for name in found if not name.startswith("steps-")} == named
    else:
        assert contents(before.directory) == old
        assert len(trajectory_of(before)) == old_length


class SavesOnException(Callback):
    def on_exception(self, trainer: Any, *rest: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "on.ckpt")


def test_a_checkpoint_that_is_saved_on_the_exception(tmp_path: Path) -> None:
    """By then the trajectory is closed."""
    stop = Does(8, raises(ValueError("boom")))
    broken(tmp_path, stop, SavesOnException(), error=ValueError, max_epochs=3)
    influence, module = run(tmp_path, ckpt=tmp_path / "on.ckpt", max_epochs=3)
    whole, _ = run(tmp_path / "whole", max_epochs=3)
    assert trajectory_of(influence).header["resumed"][0]["step"] == 8
    check_same_run(trajectory_of(influence), trajectory_of(whole))
    check_replay(trajectory_of(influence), module)


def test_it_can_be_resumed_again_and_again(tmp_path: Path) -> None:
    callback = {"dirpath": tmp_path / "fixed"}
    run(tmp_path, saver(tmp_path, **STEPS), max_epochs=1, callback=callback)
    for at, epochs in ((4, 2), (8, 3), (16, 4)):
        ckpt = tmp_path / "checkpoints" / f"step={at}.ckpt"
        influence, module = run(
            tmp_path, saver(tmp_path, **STEPS), ckpt=ckpt, max_epochs=epochs, callback=callback
        )
    whole, _ = run(tmp_path / "whole", max_epochs=4)
    trajectory = trajectory_of(influence)
    assert [entry["step"] for entry in trajectory.header["resumed"]] == [4, 8, 16]
    check_same_run(trajectory, trajectory_of(whole))
    check_replay(trajectory, module)


# ---------------------------------------------------------------------- where they are not


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("saved_after", [1, 2, 7, 8, 9])
def test_noise_and_broken_windows_are_right_behind_the_splice(
    tmp_path: Path, norm: bool, saved_after: int
) -> None:
    """The noise differs from the first run's, and a window's gradients are lost with the process."""
    save = Does(saved_after, lambda trainer: trainer.save_checkpoint(tmp_path / "a.ckpt"))
    settings = {"accumulate_grad_batches": 3, "seeds": False, "max_epochs": 3}
    run(tmp_path, save, module=noisy(norm=norm), **settings)
    influence, module = run(tmp_path, module=noisy(norm=norm), ckpt=tmp_path / "a.ckpt", **settings)
    trajectory = trajectory_of(influence)
    steps = saved_after // 3
    assert trajectory.header["resumed"][0]["step"] == steps
    assert trajectory.header["resumed"][0]["buffers"] == (norm and saved_after % 3 != 0)
    assert len(trajectory) == 6
    assert len(trajectory.step(steps).micro_batches) == 3 - saved_after % 3
    check_replay(trajectory, module)


def test_a_window_broken_twice_at_one_step(tmp_path: Path) -> None:
    """The second time it is resumed before another step was taken."""
    settings = {"accumulate_grad_batches": 3, "seeds": False, "max_epochs": 2}

    def save(name: str, after: int) -> Does:
        return Does(after, lambda trainer: trainer.save_checkpoint(tmp_path / name))

    run(tmp_path, save("a.ckpt", 4), **settings)
    run(tmp_path, save("b.ckpt", 1), ckpt=tmp_path / "a.ckpt", **settings)
    influence, module = run(tmp_path, ckpt=tmp_path / "b.ckpt", **settings)
    trajectory = trajectory_of(influence)
    assert [entry["step"] for entry in trajectory.header["resumed"]] == [1, 1]
    assert [entry["buffers"] for entry in trajectory.header["resumed"]] == [False, True]
    assert trajectory.checkpoint_steps == (0, 1, 4)
    check_replay(trajectory, module)


class ReadsTheTrainer(Classifier):
    """The loss depends on how long the run was meant to be when the step was taken."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.1 * self.trainer.max_epochs)


@pytest.mark.parametrize("when", ["manual", "fit_end"])
def test_each_part_is_replayed_with_its_own_facts(tmp_path: Path, when: str) -> None:
    def module() -> Classifier:
        return ReadsTheTrainer(noisy().net, sgd())

    run(tmp_path, saver(tmp_path, **STEPS), module=module(), max_epochs=2)
    influence, trained = run(
        tmp_path, module=module(), ckpt=tmp_path / "checkpoints" / "step=8.ckpt", max_epochs=3,
        callback={"run": when, "verify": 2, "top_k": 2},
    )  # fmt: skip
    scores = influence.scores
    if scores is None:
        engine = InfluenceEngine(
            trajectory_of(influence), module(), in_order(), val_dataloaders=valid(), progress=False
        )
        scores = engine.estimate(verify=2, top_k=2)
    assert scores.info["bit_exact_replay"]
    assert scores.info["steps"] == 18
    x, y = classification(11, seed=3).tensors
    trained.eval()
    assert scores.info["query_value"] == pytest.approx(trained.loss(trained.net(x), y).item())


def test_two_callbacks_each_go_on_with_their_own(tmp_path: Path) -> None:
    def second(module: Any, batch: Any) -> Tensor:
        return module.net(batch[0])[:, 0].square().mean()

    def pair() -> InfluenceCallback:
        return InfluenceCallback(second, run="manual")

    run(tmp_path, pair(), saver(tmp_path, **EPOCH), max_epochs=1)
    other = pair()
    ckpt = tmp_path / "checkpoints" / "step=6.ckpt"
    one, _ = run(tmp_path, other, ckpt=ckpt, max_epochs=2)
    found = [trajectory_of(each) for each in (one, other)]
    assert [len(trajectory) for trajectory in found] == [12, 12]
    assert [trajectory.header["monitor"] for trajectory in found] == ["val_loss", "second"]
    assert one.directory != other.directory


def test_another_dirpath_takes_the_steps_along(tmp_path: Path) -> None:
    run(tmp_path, saver(tmp_path, **EPOCH), max_epochs=1, callback={"dirpath": tmp_path / "a"})
    ckpt = tmp_path / "checkpoints" / "step=6.ckpt"
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        influence, module = run(
            tmp_path, ckpt=ckpt, max_epochs=2, callback={"dirpath": tmp_path / "b"}
        )
    trajectory = trajectory_of(influence)
    assert trajectory.directory == tmp_path / "b" / "trajectory"
    assert len(trajectory) == 12
    assert len(Trajectory.open(tmp_path / "a" / "trajectory")) == 6
    check_replay(trajectory, module)


def test_a_checkpoint_saved_after_the_fit(tmp_path: Path) -> None:
    influence = InfluenceCallback(run="manual")
    trainer = quiet_trainer(tmp_path, callbacks=[influence, Seeds()], max_epochs=1)
    trainer.fit(noisy(), in_order(), valid())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, module = run(tmp_path, train=in_order, ckpt=tmp_path / "a.ckpt", max_epochs=2)
    assert len(trajectory_of(resumed)) == 12
    check_replay(trajectory_of(resumed), module)


# ---------------------------------------------------------------------- why it cannot go on


def starts_anew(
    root: Path, reason: str, *, ckpt: Path | None = None, steps: int = 6, **given: Any
) -> Trajectory:
    ckpt = ckpt or root / "checkpoints" / "step=6.ckpt"
    with pytest.warns(UserWarning, match=f"starts recording at step 6 .*{reason}"):
        influence, _ = run(root, ckpt=ckpt, **{"max_epochs": 2, **given})
    trajectory = trajectory_of(influence)
    assert (len(trajectory), trajectory.header["resumed"]) == (steps, [])
    return trajectory


@pytest.fixture
def resumable(tmp_path: Path) -> Path:
    """A run of six steps with a checkpoint at its end."""
    run(tmp_path, saver(tmp_path, **EPOCH), max_epochs=1)
    return tmp_path


def edit(root: Path, change: Function[[dict[str, Any]], None]) -> None:
    path = root / "checkpoints" / "step=6.ckpt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def bookmark_in(content: dict[str, Any]) -> tuple[str, Bookmark]:
    for key, state in content["callbacks"].items():
        if (found := Bookmark.from_state(state)) is not None:
            return key, found
    raise AssertionError


def change_bookmark(root: Path, **values: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        key, found = bookmark_in(content)
        content["callbacks"][key] = replace(found, **values).to_state()

    edit(root, change)


def test_the_old_trajectory_is_gone(resumable: Path) -> None:
    shutil.rmtree(resumable / "influence")
    starts_anew(resumable, "holds no trajectory")


@pytest.mark.parametrize("name", ["steps-000000", "checkpoints/step-000000000"])
def test_the_old_trajectory_is_damaged(resumable: Path, name: str) -> None:
    path = resumable / "influence" / "trajectory" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    starts_anew(resumable, "is damaged: its checksum")


def test_the_old_trajectory_is_shorter(resumable: Path) -> None:
    change_bookmark(resumable, steps=7)
    starts_anew(resumable, "after 7 recorded steps, of which .* has the first 6 only")


def test_another_run_is_in_its_place(resumable: Path) -> None:
    shutil.rmtree(resumable / "influence")
    run(resumable, max_epochs=2)
    starts_anew(resumable, "holds the trajectory of another run")


def test_its_steps_were_replaced_by_another_resumed_run(tmp_path: Path) -> None:
    """In place, from an earlier checkpoint: what came behind that is another run's now."""
    callback = {"dirpath": tmp_path / "fixed"}
    first, again = saver(tmp_path / "a", **STEPS), saver(tmp_path / "b", **STEPS)
    run(tmp_path, first, max_epochs=2, callback=callback)
    early = tmp_path / "a" / "checkpoints" / "step=4.ckpt"
    run(tmp_path, again, ckpt=early, max_epochs=2, callback=callback, seeds=False)
    late = tmp_path / "a" / "checkpoints" / "step=8.ckpt"
    with pytest.warns(UserWarning, match="has the first 4 only: .*another resumed run"):
        influence, _ = run(tmp_path, ckpt=late, max_epochs=3, callback=callback)
    assert influence.directory == tmp_path / "fixed-1"
    assert len(trajectory_of(influence)) == 10
    assert len(Trajectory.open(tmp_path / "fixed" / "trajectory")) == 12
    # What both have in common is still there.
    influence, module = run(tmp_path, ckpt=early, max_epochs=2, callback=callback)
    assert len(trajectory_of(influence)) == 12
    check_replay(trajectory_of(influence), module)


def test_another_number_of_processes(resumable: Path) -> None:
    change_bookmark(resumable, processes=2)
    starts_anew(resumable, "saved by 2 processes, and this run has 1")


def test_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    quiet_trainer(
        tmp_path, callbacks=[saver(tmp_path, **EPOCH)], enable_checkpointing=True, max_epochs=1
    ).fit(noisy(), shuffled(), valid())
    starts_anew(tmp_path, "No checkpoint with this callback's state")


def test_another_state_of_the_callback(resumable: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        key, _ = bookmark_in(content)
        content["callbacks"][key] = {"trajectory": 3}

    edit(resumable, change)
    starts_anew(resumable, "No checkpoint with this callback's state")


def test_another_module(resumable: Path) -> None:
    class Other(Classifier):
        pass

    starts_anew(resumable, "the module differs .*Classifier, now .*Other", module=Other(
        noisy().net, adamw()
    ))  # fmt: skip


def test_other_data(resumable: Path) -> None:
    starts_anew(resumable, r"training samples differs .*\[30\], now \[60\]", train=lambda: in_order(60),
                steps=12)  # fmt: skip


@pytest.mark.parametrize("what", ["weights", "slots"])
def test_another_state(resumable: Path, what: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if what == "weights":
            content["state_dict"]["net.0.weight"][0, 0] += 1e-9
        else:
            content["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] += 1e-9

    edit(resumable, change)
    starts_anew(resumable, "not those that were saved in the checkpoint")


def test_a_state_that_was_changed_before_it_was_saved(tmp_path: Path) -> None:
    influence = InfluenceCallback(run="manual")
    trainer = quiet_trainer(tmp_path, callbacks=[influence, Seeds()], max_epochs=1)
    module = noisy()
    trainer.fit(module, in_order(), valid())
    with torch.no_grad():
        module.net[0].weight.mul_(0.5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    starts_anew(tmp_path, "not those that .* has after 6 steps", ckpt=tmp_path / "a.ckpt")


class SavesInTheStep(Classifier):
    """As Ctrl-C there does, with a checkpoint that is saved on exceptions."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 6:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "a.ckpt")


def test_a_checkpoint_from_within_an_optimiser_step(tmp_path: Path) -> None:
    run(tmp_path, module=SavesInTheStep(noisy().net, adamw()), max_epochs=2)
    starts_anew(tmp_path, "in the middle of an optimiser step", ckpt=tmp_path / "a.ckpt", steps=5)


def test_a_recording_that_had_stopped(tmp_path: Path) -> None:
    def stop(trainer: Any) -> None:
        trainer.callbacks[0]._recording._stop(OSError("the disk is full"))

    with pytest.warns(UserWarning, match="stopped recording"):
        run(tmp_path, Does(3, stop), saver(tmp_path, **EPOCH), max_epochs=1)
    starts_anew(tmp_path, "The recording had stopped")


def test_no_checkpoint_has_numpy_or_classes(resumable: Path) -> None:
    path = resumable / "checkpoints" / "step=6.ckpt"
    content = torch.load(path, weights_only=True)
    _, found = bookmark_in(content)
    assert {type(value) for value in found.to_state().values()} == {str, int}
    assert not any(isinstance(value, np.generic) for value in found.to_state().values())
