"""Kills a fit with SIGKILL at random moments, then opens what is left.

    python -m tests.stress.kill_anywhere [--points 50] [--seed 0]

A child process trains under the callback. It says when it enters the phase that is looked at; the
parent waits for a random part of that phase's usual length and kills it. What is on disk then must be
the truth, or be refused: a trajectory opens up to its last flush, replays to the bit, and gives the
ranking of a run that ended there by itself; scores are whole, or absent, or refused. The truth comes
from runs that nobody killed, one of them without the callback.

All killing comes before all checking, since a process that has used autograd does not fork well.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_accie.callback
from lightning_accie import InfluenceCallback, InfluenceEngine, InfluenceScores, Trajectory
from lightning_accie.capture.recording import Recording
from lightning_accie.errors import TrajectoryError
from lightning_accie.scores_files import ScoresError
from lightning_accie.trajectory import checkpoints
from lightning_accie.trajectory.writer import TrajectoryWriter
from tests.problems import Classifier, adamw, classification, quiet_trainer
from tests.steady import steady_choices

STEPS = 40
ANALYSIS: dict[str, Any] = {"verify": 4, "top_k": 2}
NAMES = ("index", "influence", "estimate", "visits", "exact", "trusted")

Work = Callable[[], object]


@dataclass(frozen=True)
class Phase:
    """What a child is killed in: the ``nth`` call of ``owner.method``."""

    name: str
    owner: Any
    method: str
    calls: int = 1
    over_others: bool = False

    @property
    def what(self) -> tuple[str, str]:
        return self.owner.__name__, self.method

    @property
    def saves_only(self) -> bool:
        """Whether the child trains nothing, and only saves what is there."""
        return self.over_others and self.method == "save"


PHASES = [
    Phase("capture", Recording, "_train"),
    Phase("writing a checkpoint", TrajectoryWriter, "checkpoint", calls=6),
    Phase("analysis", InfluenceEngine, "estimate"),
    Phase("scores.save", InfluenceScores, "save"),
    Phase("writing reports", lightning_accie.callback, "report_all"),
    Phase("overwriting a run", TrajectoryWriter, "__init__", over_others=True),
    Phase("scores.save over others", InfluenceScores, "save", over_others=True),
]
OPENING = Phase("opening a trajectory", TrajectoryWriter, "__init__")


# ------------------------------------------------------------------ the run


def module() -> Classifier:
    """Dropout, so that random states are on disk too; float64."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)]
    return Classifier(nn.Sequential(*layers).double(), adamw())


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(classification(24), batch_size=6, shuffle=True)
    return train, DataLoader(classification(11, seed=3), batch_size=7)


def fit(directory: Path, *callbacks: Callback, seed: int = 5, steps: int = STEPS) -> Classifier:
    model = module()
    torch.manual_seed(seed)
    loggers = [CSVLogger(directory / "logs"), TensorBoardLogger(directory / "logs")]
    trainer = quiet_trainer(
        directory, callbacks=list(callbacks), logger=loggers, max_epochs=-1, max_steps=steps
    )
    trainer.fit(model, *loaders())
    return model


def recording(directory: Path) -> InfluenceCallback:
    return InfluenceCallback(dirpath=directory, overwrite=True, console=False, **ANALYSIS)


@contextmanager
def close_checkpoints() -> Iterator[None]:
    """Checkpoints at 0, 2, 8, 18, 32 and 40, a flush every five steps, and steady choices."""
    with steady_choices() as patch:
        patch.setattr(checkpoints, "SPACING", 2)
        writer = partial(TrajectoryWriter, flush_steps=5)
        patch.setattr("lightning_accie.capture.opening.TrajectoryWriter", writer)
        patch.setattr("lightning_accie.capture.recorder._MOST_WAITING", 1)
        yield


# ------------------------------------------------------------------ killing


def announce(phase: Phase, pipe: int, nth: int | None, letters: bytes = b"be") -> None:
    """Write one letter as the phase begins and one as it ends: its nth call, or every one."""
    begin, end = letters[:1], letters[1:]
    if phase.method == "_train":  # from the opening of the trajectory to its close
        Recording._begin = announced(Recording._begin, pipe, begin)  # type: ignore[method-assign]
        Recording.finish = announced(Recording.finish, pipe, b"", end)  # type: ignore[method-assign]
        return
    original = getattr(phase.owner, phase.method)
    setattr(phase.owner, phase.method, announced(original, pipe, begin, end, nth))


def announced(
    original: Callable[..., Any],
    pipe: int,
    begin: bytes,
    end: bytes = b"",
    nth: int | None = None,
) -> Any:
    """The function, with letters written around its nth call, or around every one."""
    calls = count()

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        speaks = nth in (None, next(calls))
        os.write(pipe, begin if speaks else b"")
        found = original(*args, **kwargs)
        os.write(pipe, end if speaks else b"")
        return found

    return call


def start(prepare: Callable[[int], None], work: Work) -> tuple[int, int]:
    """Work in a child; give its number and the pipe on which it says how far it is."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with close_checkpoints():
        prepare(write)
        work()
    os._exit(0)


def usual_lengths(directory: Path) -> dict[tuple[str, str], list[float]]:
    """How long the calls of every phase take in a run that nobody kills, in seconds."""
    phases = [phase for phase in PHASES if not phase.over_others]

    def prepare(pipe: int) -> None:
        for at, phase in enumerate(phases):
            announce(phase, pipe, None, bytes([2 * at, 2 * at + 1]))
        announce(OPENING, pipe, None, bytes([2 * len(phases), 2 * len(phases) + 1]))

    child, pipe = start(prepare, partial(fit, directory, recording(directory)))
    lengths: dict[tuple[str, str], list[float]] = {}
    begun: dict[int, float] = {}
    while letter := os.read(pipe, 1):
        at, ends = divmod(letter[0], 2)
        now = time.perf_counter()
        if ends:
            phase = [*phases, OPENING][at]
            lengths.setdefault(phase.what, []).append(now - begun[at])
        begun[at] = now
    os.close(pipe)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the run that nobody kills failed")
    return lengths


def kill(phase: Phase, directory: Path, nth: int, delay: float) -> bool:
    """Kill a child ``delay`` seconds into the phase; whether it was still in it."""
    if phase.saves_only:
        work: Work = partial(save_again, directory)
    else:
        work = partial(fit, directory, recording(directory))
    child, pipe = start(partial(announce, phase, nth=nth), work)
    if os.read(pipe, 1) != b"b":
        raise RuntimeError("a child ended before the phase that it was to be killed in")
    moment = time.perf_counter() + delay
    while time.perf_counter() < moment:
        if moment - time.perf_counter() > 0.002:  # sleeping overshoots short phases
            time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    still = os.read(pipe, 1) == b""
    os.close(pipe)
    return still


def save_again(directory: Path) -> None:
    InfluenceScores.load(directory / "new").save(directory)


def kill_many(
    phase: Phase, root: Path, points: int, lengths: list[float], rng: random.Random, others: Path
) -> int:
    """Kill ``points`` children in a phase; how many were still in it."""
    inside = 0
    for at in range(points):
        nth = rng.randrange(phase.calls)
        directory = prepare(phase, root / str(at), others)
        inside += kill(phase, directory, nth, rng.uniform(0, lengths[nth]))
    return inside


def prepare(phase: Phase, directory: Path, others: Path) -> Path:
    """A directory to train in: empty, or with another run and its scores in it."""
    if not phase.over_others:
        directory.mkdir(parents=True)
        return directory
    shutil.copytree(others / "old", directory)
    if phase.saves_only:
        shutil.copytree(others / "new", directory / "new")
    return directory


def make_others(root: Path) -> None:
    """A finished run of another seed in ``old``, one of the usual seed in ``new``; in a child."""
    child = os.fork()
    if child == 0:
        with close_checkpoints():
            fit(root / "old", recording(root / "old"), seed=6)
            fit(root / "new", recording(root / "new"))
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the runs to be overwritten could not be made")


# ------------------------------------------------------------------ the truth


class States(Callback):
    """Keeps the parameters before every step, of a run without InfluenceCallback."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._keep(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self._keep(pl_module)

    def _keep(self, model: nn.Module) -> None:
        self.states.append({n: p.detach().clone() for n, p in model.named_parameters()})


@cache
def true_states(seed: int) -> list[dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as directory:
        states = States()
        fit(Path(directory), states, seed=seed)
    return states.states


@cache
def true_scores(seed: int, steps: int) -> InfluenceScores:
    """The ranking of a run of this length that ended by itself."""
    with tempfile.TemporaryDirectory() as directory:
        influence = recording(Path(directory))
        fit(Path(directory), influence, seed=seed, steps=steps)
    assert influence.scores is not None
    return influence.scores


# ------------------------------------------------------------------ judging


def check(claim: bool, directory: Path, words: str) -> None:
    if not claim:
        raise AssertionError(f"{directory}: {words}")


def judge_trajectory(directory: Path) -> str:
    """What became of the trajectory; raises where it gives something false."""
    where = directory / "trajectory"
    try:
        trajectory = Trajectory.open(where)
    except TrajectoryError as error:
        check(not (where / "manifest.json").exists(), where, f"a manifest is refused: {error}")
        return "no trajectory"
    trajectory.verify()
    train, valid = loaders()
    make = partial(
        InfluenceEngine, trajectory, module(), train, val_dataloaders=valid, progress=False
    )
    if not len(trajectory):
        try:
            make()
        except TrajectoryError as error:
            check("no complete training step" in str(error), where, str(error))
            return "no step yet"
        raise AssertionError(f"{where}: a run without steps is taken for one")
    seed = 5 if torch.equal(drawn(trajectory), first_batch(5)) else 6
    judge_company(directory, seed)
    engine = make()
    judge_states(engine, true_states(seed))
    found, expected = engine.estimate(**ANALYSIS), true_scores(seed, len(trajectory))
    check(same(found, expected), where, "its ranking is not that of a run of its length")
    check(bool(found.info["bit_exact_replay"]), where, "the replay is not bit-exact")
    return f"{len(trajectory)} steps"


def judge_company(directory: Path, seed: int) -> None:
    """The scores of a run that was overwritten must not stand beside the run that replaced it."""
    try:
        found = InfluenceScores.load(directory)
    except ScoresError:
        return
    if not (directory / "new").exists():  # `save` by hand, over another run's
        check(same(found, true_scores(seed, STEPS)), directory, "the scores are another run's")


def judge_states(engine: InfluenceEngine, states: list[dict[str, Tensor]]) -> None:
    """Compare every replayed state with that of the plain run, bit for bit."""
    where = engine.trajectory.directory
    visits = [visit.snapshot for visit in engine._walker.forwards()]
    check(len(visits) == len(engine.trajectory), where, "not every step is visited")
    for snapshot in [*visits, engine._walker.final()]:
        for name, value in snapshot.state.params.items():
            true = torch.equal(value, states[snapshot.step][name])
            check(true, where, f"`{name}` before step {snapshot.step} is not that of training")


def judge_scores(directory: Path) -> str:
    """What became of the scores; raises where they are false."""
    expected = [true_scores(seed, STEPS) for seed in (5, 6)]
    table = directory / "scores.csv"
    if table.exists():
        texts = [scores._csv_text().encode() for scores in expected]
        check(table.read_bytes() in texts, directory, "scores.csv is neither table")
    try:
        found = InfluenceScores.load(directory)
    except ScoresError as error:
        missing = "is missing" in str(error)
        check(missing or "not the file that" in str(error), directory, str(error))
        return "absent" if missing else "refused"
    check(any(same(found, true) for true in expected), directory, "the scores are false")
    return "whole"


def same(one: InfluenceScores, other: InfluenceScores) -> bool:
    """Whether every figure is the same to the bit."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in NAMES]
    equal = all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in pairs)
    return equal and one.estimator == other.estimator and repr(one) == repr(other)


def drawn(trajectory: Trajectory) -> Tensor:
    return torch.from_numpy(trajectory.step(0).micro_batches[0].pieces[0].indices)


@cache
def first_batch(seed: int) -> Tensor:
    with tempfile.TemporaryDirectory() as directory:
        fit(Path(directory), recorder := recording(Path(directory)), seed=seed, steps=1)
        assert recorder.directory is not None
        return drawn(Trajectory.open(recorder.directory / "trajectory"))


def judge(root: Path) -> tuple[Counter[str], Counter[str]]:
    """Judge what all the children of a phase have left."""
    trajectories: Counter[str] = Counter()
    scores: Counter[str] = Counter()
    for directory in sorted(root.iterdir()):
        trajectories[judge_trajectory(directory)] += 1
        scores[judge_scores(directory)] += 1
        TrajectoryWriter(directory / "trajectory", {}, disk_budget=1, overwrite=True).close()
        left = {path.name for path in (directory / "trajectory").iterdir()}
        check(left == {"manifest.json", "checkpoints"}, directory, f"a new writer leaves {left}")
    return trajectories, scores


def line(phase: Phase, points: int, inside: int, found: tuple[Counter[str], Counter[str]]) -> str:
    lengths = Counter(
        {int(name.split()[0]): n for name, n in found[0].items() if name[0].isdigit()}
    )
    opened = sum(lengths.values())
    reach = f" ({min(lengths)} to {max(lengths)} steps)" if lengths else ""
    others = "".join(f", {n} {name}" for name, n in found[0].items() if not name[0].isdigit())
    scores = ", ".join(f"{n} {name}" for name, n in sorted(found[1].items()))
    return (
        f"| {phase.name} | {points} | {inside} | {opened} opened, replayed to the bit and ranked"
        f"{reach}{others} | {scores} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50, help="children to kill in each phase")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    print("| killed in | points | still in it | trajectories | scores |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, close_checkpoints():
        root = Path(name)
        make_others(root / "others")
        lengths = usual_lengths(root / "usual")
        inside = [
            kill_many(
                phase, root / phase.name, options.points, lengths[phase.what], rng, root / "others"
            )
            for phase in PHASES
        ]
        for phase, count in zip(PHASES, inside, strict=True):
            found = judge(root / phase.name)
            print(line(phase, options.points, count, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
