"""Going on with the trajectory of a `fit` that is resumed from a checkpoint of Lightning's.

The callback's state in such a checkpoint is a *bookmark*: which trajectory, where it is, and how many
of its steps had been taken. A trajectory gets a new identity whenever it is taken up, and remembers
up to which step it shares the steps of its predecessors. So a bookmark from before a splice still
fits what came out of it, and one from a part that was cut off does not.

A bookmark is followed only if the state with which training goes on is, by its checksum, the one
that was saved, and where the trajectory has that state itself, is the same there.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_accie.capture.recorder import Recorder
from lightning_accie.errors import TrajectoryError
from lightning_accie.replay.header import check_header
from lightning_accie.trajectory.reader import Trajectory
from lightning_accie.trajectory.records import Checkpoint
from lightning_accie.trajectory.splice import After

_STATE = ("params/", "frozen/", "slots/")
_COMPARED = {
    "module": "the module",
    "parameters": "the parameters",
    "groups": "the optimiser's parameter groups",
    "frozen": "the choice of frozen parameters",
    "optimizer": "the optimiser",
    "clip": "the gradient clipping",
    "precision": "the precision",
    "eval_modules": "the choice of parts in evaluation mode",
    "step_arguments": "the arguments of `training_step`",
    "monitor": "the monitor",
    "capture": "what is kept of the training data",
}
"""What must be the same in all of a trajectory, by its key in the header."""


@dataclass(frozen=True)
class Bookmark:
    """How far a trajectory had come when a checkpoint was saved.

    Attributes:
        trajectory: its identity.
        directory: where it is.
        monitor: the query that it is recorded for.
        steps: its steps.
        processes: of the run.
        state: the checksum of parameters and optimiser slots.
        buffers: the checksum of the module's buffers; empty where the trajectory does not give them.
        lacking: why nobody can go on from here; empty where one can.
    """

    trajectory: str
    directory: str
    monitor: str
    steps: int
    processes: int
    state: str
    buffers: str
    lacking: str = ""

    def to_state(self) -> dict[str, Any]:
        """Give the bookmark as a callback's state.

        Returns:
            Texts and integers only: checkpoints are loaded with ``weights_only=True``.
        """
        return asdict(self)

    @classmethod
    def from_state(cls, state: Any) -> Bookmark | None:
        """Read what `to_state` gave.

        Returns:
            The bookmark; None where ``state`` is something else.
        """
        expected = {field.name: field.type for field in fields(cls)}
        found = isinstance(state, Mapping) and {k: type(v).__name__ for k, v in state.items()}
        return cls(**state) if found == expected else None


@dataclass(frozen=True)
class Continuation:
    """How a trajectory goes on.

    Attributes:
        after: what is kept of the earlier one.
        resumed: for the header: every splice so far.
        saved: the steps of the checkpoints that it saved, by path.
    """

    after: After
    resumed: list[dict[str, Any]]
    saved: dict[str, int]


def new_identity() -> str:
    """Make a trajectory's identity; no generator of the run is drawn from.

    Returns:
        A text that no other trajectory has.
    """
    return uuid.uuid4().hex


def find_bookmark(states: Mapping[str, Any], key: str, monitor: str) -> Bookmark | None:
    """Look for a callback's bookmark in a checkpoint.

    Args:
        states: the states of all callbacks, by their keys.
        key: the callback's own.
        monitor: the name of its query. Where ``dirpath`` is another one now, so is the key; the
            query then tells the bookmark, if there is one such.

    Returns:
        The bookmark, or None.
    """
    own = Bookmark.from_state(states.get(key))
    if own is not None:
        return own
    found = [Bookmark.from_state(state) for state in states.values()]
    others = [bookmark for bookmark in found if bookmark and bookmark.monitor == monitor]
    return others[0] if len(others) == 1 else None


def bookmark(
    place: tuple[str, str], monitor: str, recorder: Recorder, lacking: str = ""
) -> Bookmark:
    """Mark how far a trajectory has come.

    Args:
        place: its identity and its directory.
        monitor: the query that it is recorded for.
        recorder: what records it; its last step is settled.
        lacking: why nobody can go on from here, where that is known.

    Returns:
        The bookmark.
    """
    if recorder.stepping:
        lacking = lacking or "The checkpoint was saved in the middle of an optimiser step."
    state = recorder.initial(copy=False)
    return Bookmark(
        trajectory=place[0],
        directory=place[1],
        monitor=monitor,
        steps=recorder.steps,
        processes=recorder.processes,
        state=checksum(state),
        buffers="" if recorder.mid_window else buffers_checksum(state),
        lacking=lacking,
    )


def checksum(checkpoint: Checkpoint, kinds: tuple[str, ...] = _STATE) -> str:
    """Sum up the tensors of a state.

    Args:
        checkpoint: of step 0, in which frozen parameters stand too.
        kinds: the beginnings of their names.

    Returns:
        A SHA-256 in hexadecimal.
    """
    digest = sha256(json.dumps(checkpoint.meta, sort_keys=True).encode())
    for name in sorted(name for name in checkpoint.tensors if name.startswith(kinds)):
        tensor = checkpoint.tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def buffers_checksum(checkpoint: Checkpoint) -> str:
    """Sum up a module's buffers.

    Returns:
        A SHA-256 in hexadecimal; the same whatever the other tensors are.
    """
    return checksum(Checkpoint(0, checkpoint.tensors), ("buffers/",))


def go_on(
    found: Bookmark | None,
    header: Mapping[str, Any],
    state: Checkpoint,
    processes: int,
    global_step: int,
) -> Continuation | None:
    """Go on with the trajectory that a bookmark names, or warn and say why one cannot.

    Args:
        found: the bookmark; this and the rest as `follow` has it.
        header: what the new trajectory's header would be.
        state: the state with which training goes on, as if it were step 0.
        processes: of the resumed run.
        global_step: the Trainer's, with which it goes on.

    Returns:
        How to go on; None where the trajectory begins here.
    """
    try:
        return follow(found, header, state, processes, global_step)
    except TrajectoryError as reason:
        rank_zero_warn(
            f"InfluenceCallback starts recording at step {global_step} of a resumed run, and "
            "influence will be that of the steps from here on: it cannot go on with what was "
            f"recorded before. {reason}"
        )
    return None


def follow(
    bookmark: Bookmark | None,
    header: Mapping[str, Any],
    state: Checkpoint,
    processes: int,
    global_step: int,
) -> Continuation:
    """Find out how to go on with the trajectory that a bookmark names.

    Args:
        bookmark: from the checkpoint that the run was resumed from, or None where it has none.
        header: what the new trajectory's header would be.
        state: the state with which training goes on, as if it were step 0.
        processes: of the resumed run.
        global_step: the Trainer's, with which it goes on.

    Returns:
        How to go on.

    Raises:
        TrajectoryError: saying why one cannot.
    """
    if bookmark is None:
        raise TrajectoryError("No checkpoint with this callback's state was loaded.")
    if bookmark.lacking:
        raise TrajectoryError(bookmark.lacking)
    if bookmark.processes != processes:
        raise TrajectoryError(
            f"The checkpoint was saved by {bookmark.processes} processes, and this run has "
            f"{processes}."
        )
    trajectory = Trajectory.open(bookmark.directory)
    check_header(trajectory.header, trajectory.directory)
    _check_reach(bookmark, trajectory)
    _check_same(trajectory.header, header, trajectory.directory)
    if checksum(state) != bookmark.state:
        raise TrajectoryError(
            "The weights or the optimiser's state with which training goes on are not those that "
            "were saved in the checkpoint."
        )
    trajectory.verify(bookmark.steps)
    _check_state(trajectory, state, bookmark.steps)
    return _continuation(bookmark, trajectory, state, global_step)


def _check_reach(bookmark: Bookmark, trajectory: Trajectory) -> None:
    """The trajectory must have the steps that the bookmark means."""
    header = trajectory.header
    shared = {entry["id"]: entry["step"] for entry in header.get("resumed", ())}
    shared[header.get("id")] = len(trajectory)
    if bookmark.trajectory not in shared:
        raise TrajectoryError(f"{trajectory.directory} holds the trajectory of another run now.")
    reach = shared[bookmark.trajectory]
    if reach < bookmark.steps:
        raise TrajectoryError(
            f"The checkpoint was saved after {bookmark.steps} recorded steps, of which "
            f"{trajectory.directory} has the first {reach} only: the recording broke off before "
            "they were written, or another resumed run has taken their place."
        )


def _check_same(recorded: Mapping[str, Any], header: Mapping[str, Any], directory: Path) -> None:
    """What is recorded must be one run's."""
    present = json.loads(json.dumps(header))
    pairs = {what: (recorded.get(key), present[key]) for key, what in _COMPARED.items()}
    sizes = [[loader["samples"] for loader in h["loaders"]] for h in (recorded, present)]
    pairs["the number of training samples"] = (sizes[0], sizes[1])
    for what, (then, now) in pairs.items():
        if then != now:
            short = len(f"{then}{now}") < 200
            values = f" (recorded {then}, now {now})" if short else ""
            raise TrajectoryError(f"In {directory} {what} differs from this run's{values}.")


def _check_state(trajectory: Trajectory, state: Checkpoint, step: int) -> None:
    """Where the trajectory has the state itself, it must be the same."""
    if step not in trajectory.checkpoint_steps:
        return
    kept = trajectory.checkpoint(step)
    names = [name for name in kept.tensors if name.startswith(_STATE)]
    same = all(
        name in state.tensors and torch.equal(kept.tensors[name], _cpu(state.tensors[name]))
        for name in names
    )
    if not same or kept.meta != state.meta:
        raise TrajectoryError(
            f"The weights or the optimiser's state with which training goes on are not those that "
            f"{trajectory.directory} has after {step} steps."
        )


def _continuation(
    bookmark: Bookmark, trajectory: Trajectory, state: Checkpoint, global_step: int
) -> Continuation:
    steps, header = bookmark.steps, trajectory.header
    # The running statistics of a broken accumulation window, say: no replay gives them.
    other = buffers_checksum(state) != (bookmark.buffers or buffers_checksum(Checkpoint(0, {})))
    before = header.get("resumed", ())
    other |= any(entry["buffers"] and entry["step"] == steps for entry in before)
    earlier = [_cut(entry, steps, global_step) for entry in before]
    splice = {
        "id": header["id"],
        "step": steps,
        "global_step": global_step,
        "trainer": header["trainer"],
        "buffers": other,
    }
    resumed = [*earlier, splice]
    pinned = frozenset(entry["step"] for entry in resumed if entry["buffers"])
    last = steps - 1 if other else steps
    saved = {path: step for path, step in header.get("saved", {}).items() if step <= steps}
    return Continuation(After(trajectory.directory, steps, last, pinned), resumed, saved)


def _cut(entry: dict[str, Any], steps: int, global_step: int) -> dict[str, Any]:
    """An earlier splice, as seen from one at an earlier step or a later one."""
    if entry["step"] < steps:
        return entry
    return {**entry, "step": steps, "global_step": global_step, "buffers": False}


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
