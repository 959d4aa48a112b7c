"""s_0 … s_T again, forwards or backwards, checked against the recorded run, within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accie.errors import TrajectoryError, UnsupportedError
from lightning_accie.replay.fidelity import Fidelity
from lightning_accie.replay.module import RecordedLoss, TrainingProgram
from lightning_accie.replay.random_state import Restorable
from lightning_accie.replay.schedule import LEAST_ROOM, anchors, split, steps_run
from lightning_accie.replay.state import Params, Slots, State
from lightning_accie.replay.step import TANGENTS, StepMap, total_gradient
from lightning_accie.replay.tape import Tape, saved_bytes
from lightning_accie.replay.update import Clip, Update
from lightning_accie.replay.update_rules import rule_named
from lightning_accie.trajectory.records import MicroBatch, RandomState, RecordedSteps, Step


@dataclass(frozen=True)
class Snapshot:
    """Everything that step ``step`` starts from.

    Attributes:
        step: t.
        state: s_t.
        counts: per parameter, the updates it has had.
        buffers: the module's buffers; all ranks begin a step with those of rank 0.
        random: per rank, the generators' states that its last drawing step left, where known.
    """

    step: int
    state: State
    counts: Mapping[str, int]
    buffers: Mapping[str, Tensor]
    random: Mapping[int, RandomState] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Count the bytes held.

        Returns:
            State, buffers and generators.
        """
        random = [state for states in self.random.values() for state in states.values()]
        extra = [*self.buffers.values(), *random]
        return self.state.nbytes() + sum(t.numel() * t.element_size() for t in extra)


@dataclass(frozen=True)
class Visit:
    """One stop of a walk: F_t and the state it starts from; the module is bound to that state."""

    map: StepMap
    snapshot: Snapshot
    epoch: int
    """The epoch whose batches it took."""
    trainable: tuple[str, ...]
    """The names of the parameters that the run trains."""

    @property
    def step(self) -> int:
        """The step's number t."""
        return self.snapshot.step

    @property
    def state(self) -> State:
        """s_t."""
        return self.snapshot.state


@dataclass
class Kept:
    """What a walk forwards keeps for the walk back, within the memory budget.

    Attributes:
        visits: the last steps; all of them, where they fit.
        anchors: snapshots from which the segments before can be run again.
    """

    visits: list[Visit] = field(default_factory=list)
    anchors: list[Snapshot] = field(default_factory=list)


class _Ran(NamedTuple):
    """A step's micro-batches, run: their losses and gradient, and what they left behind."""

    losses: list[RecordedLoss]
    gradient: Params
    random: Mapping[int, RandomState]
    buffers: Mapping[str, Tensor]


class Walker:
    """Replays a trajectory and stops at its steps.

    Args:
        trajectory: the recorded run.
        program: the module's training step.
        memory_budget: bytes that stored states may take; what does not fit is recomputed from the
            nearest stored state.
        product: how `StepMap.vjp` computes; see there.
    """

    def __init__(
        self,
        trajectory: RecordedSteps,
        program: TrainingProgram,
        *,
        memory_budget: int,
        product: str = "double-backward",
    ) -> None:
        self.trajectory = trajectory
        self.program = program
        self.memory_budget = memory_budget
        self.product = product
        self.vectorize = True
        self.tangents = TANGENTS[0]
        header = trajectory.header
        self.fidelity = Fidelity(header, program.recorded)
        self._rule = rule_named(header["optimizer"])
        clip = header["clip"]
        self._clip = Clip(clip["algorithm"], clip["value"]) if clip else None
        self._groups = [tuple(group) for group in header["groups"]]
        self._tapes: bool | None = None
        self._tape_bytes = 0
        self._bytes: int | None = None
        self._graph_bytes: int | None = None
        self._checkpoints = frozenset(trajectory.checkpoint_steps)
        resumed = header.get("resumed", ())
        self._new_buffers: dict[int, Mapping[str, Tensor] | None] = {
            e["step"]: None for e in resumed if e["buffers"]
        }
        """Steps before which the run was resumed with other buffers than it had left; see there."""
        self._held: Mapping[str, Tensor] | None = None
        self._first_loss: Snapshot | None = None
        self._versions: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.trajectory)

    # ------------------------------------------------------------------ walks

    def start(self) -> Snapshot:
        """Load s_0.

        Returns:
            The snapshot before the first step.
        """
        return self._load(0)

    def forwards(self, kept: Kept | None = None) -> Iterator[Visit]:
        """Walk from s_0 to s_T.

        Args:
            kept: empty; takes what `backwards` then need not compute again.

        Yields:
            Every step in order; with ``kept``, with the graphs of its losses where the weighted
            loss has the very gradient that training had.
        """
        places = [] if kept is None else anchors(len(self), self._room())
        snapshot = self.start()
        for _ in range(len(self)):
            last = bool(places) and snapshot.step >= self._last_segment(places)
            visit, following = self._advance(snapshot, keep_tape=last and self._keeps_tapes())
            if kept is not None and last:
                kept.visits.append(visit)
            elif kept is not None and visit.step in places:
                kept.anchors.append(visit.snapshot)
            self._rebind(visit)
            yield visit
            snapshot = following

    def _last_segment(self, places: list[int]) -> int:
        """Where the steps begin that a walk forwards keeps, beside its anchors."""
        free = self._room() - len(places) + 1
        return max(places[-1], len(self) - free)

    def first_loss(self) -> Visit:
        """Give the first step that has a loss: what ways and prices are tried on.

        Returns:
            The step. ``training_step`` may have returned None before.

        Raises:
            UnsupportedError: if it has returned nothing else.
        """
        if self._first_loss is not None:
            visit = self._advance(self._first_loss)[0]
            self._rebind(visit)
            return visit
        for visit in self.forwards():
            if visit.map.losses:
                self._first_loss = visit.snapshot
                return visit
        raise UnsupportedError(
            f"`training_step` returned no loss in any of the {len(self)} steps: nothing was trained, "
            "and no sample has any influence. Return the loss."
        )

    def final(self) -> Snapshot:
        """Replay to the end of the run, or load its final checkpoint.

        Returns:
            The snapshot s_T.
        """
        if len(self) in self._checkpoints:
            return self._load(len(self))
        snapshot = self._load(max(self._checkpoints))
        while snapshot.step < len(self):
            snapshot = self._advance(snapshot)[1]
        return snapshot

    def backwards(self, kept: Kept | None = None, *, before: int | None = None) -> Iterator[Visit]:
        """Walk from s_{T-1} down to s_0, recomputing segments that do not fit the memory budget.

        Args:
            kept: what `forwards` kept of the whole run; used up. An empty one is as none.
            before: without that, begin at the step before this one.

        Yields:
            Every step, the last one first.
        """
        if kept is None or not (kept.visits or kept.anchors):
            kept = Kept(anchors=[self.start()])
        stop = (len(self) if before is None else before) - len(kept.visits)
        yield from self._popped(kept.visits)
        while kept.anchors:
            visits = self._segment(kept.anchors, stop)
            stop -= len(visits)
            yield from self._popped(visits)

    def _segment(self, places: list[Snapshot], stop: int) -> list[Visit]:
        """Run the last steps before ``stop``, as many as fit, from the last of the anchors.

        Others are added where more than that lie between; one whose steps are all run is taken off.

        Returns:
            Their visits.
        """
        room = self._room()
        while (rest := stop - places[-1].step) > (free := room - len(places) + 1) > 1:
            places.append(self._run_to(places[-1], places[-1].step + split(rest, free)))
        snapshot = places.pop() if rest <= free else self._run_to(places[-1], stop - 1)
        visits = []
        while snapshot.step < stop:
            visit, snapshot = self._advance(snapshot, keep_tape=self._keeps_tapes())
            visits.append(visit)
        return visits

    def _run_to(self, snapshot: Snapshot, step: int) -> Snapshot:
        while snapshot.step < step:
            snapshot = self._advance(snapshot)[1]
        return snapshot

    def _popped(self, visits: list[Visit]) -> Iterator[Visit]:
        while visits:
            visit = visits.pop()
            self._rebind(visit)
            yield visit

    def without_tapes(self) -> Walker:
        """Look at the same run for work that differentiates no step's gradient.

        Returns:
            A walker that keeps states alone, and so more of them.
        """
        twin = copy(self)
        twin._tapes = False
        return twin

    def within(self, memory_budget: int) -> Walker:
        """Look at the same run with less room, where other things share it.

        Args:
            memory_budget: bytes that stored states may take, if they may not take less already.

        Returns:
            A walker with that room.
        """
        twin = copy(self)
        twin.memory_budget = min(self.memory_budget, memory_budget)
        return twin

    def least_bytes(self) -> int:
        """Tell what `backwards` cannot do without.

        Returns:
            The bytes of two states.
        """
        return LEAST_ROOM * self._snapshot_bytes()

    def graph_bytes(self) -> int:
        """Measure what the graph of one step's losses holds, at the first that has any.

        Returns:
            The bytes.
        """
        if self._graph_bytes is None:
            losses = self.first_loss().map.losses
            held = (saved_bytes(partial(loss.bound, loss.ones(), {})) for loss in losses)
            self._graph_bytes = sum(held)
        return self._graph_bytes

    def passes(self) -> float:
        """Count how often `backwards` runs each step forwards, in the mean.

        Returns:
            1 where all states fit into memory, about one more for every level of recomputation.
        """
        return steps_run(len(self), self._room()) / max(1, len(self))

    def held_bytes(self) -> int:
        """Tell how much `backwards` holds at most, of states and graphs.

        Returns:
            The bytes.
        """
        return min(len(self), self._room()) * self._held_a_step()

    def _room(self) -> int:
        """How many steps fit the budget, each with its snapshot and its tape, if tapes are kept."""
        return self._fitting(self._held_a_step())

    def _fitting(self, each: int) -> int:
        return max(LEAST_ROOM, self.memory_budget // max(1, each))

    def _held_a_step(self) -> int:
        return self._snapshot_bytes() + (self._tape_bytes if self._keeps_tapes() else 0)

    def _snapshot_bytes(self) -> int:
        """The bytes of a snapshot once the first step has made the optimiser's slots."""
        if self._bytes is None:
            self._bytes = self._advance(self.start())[1].nbytes() if len(self) else 0
        return self._bytes

    def _rebind(self, visit: Visit) -> None:
        self.program.bind(visit.state.params)
        self._restore_buffers(visit.snapshot.buffers)

    # ------------------------------------------------------------------ one step

    def _advance(self, snapshot: Snapshot, *, keep_tape: bool = False) -> tuple[Visit, Snapshot]:
        """Run one recorded step as training did, and check it.

        With ``keep_tape`` the step's graph is kept for `StepMap.vjp`, which saves running it again.

        Returns:
            The visit, and the snapshot after it.
        """
        step = self.trajectory.step(snapshot.step)
        ran = self._gradient(step, snapshot, keep_tape=keep_tape)
        update = self._update(step, snapshot)
        with torch.no_grad():
            state = update(snapshot.state, ran.gradient)
        used = tuple(name for name in self.program.trainable if name in ran.gradient)
        counts = {name: n + (name in ran.gradient) for name, n in snapshot.counts.items()}
        visit = Visit(
            StepMap(
                ran.losses,
                update,
                used,
                penalty=self.program.form.penalty,
                product=self.product,
                vectorize=self.vectorize,
                tangents=self.tangents,
                transforms=self.program.untransformed is None,
            ),
            snapshot,
            step.micro_batches[0].epoch if step.micro_batches else 0,
            self.program.trainable,
        )
        state = state._replace(statistics=self.program.statistics.of(ran.buffers))
        following = Snapshot(snapshot.step + 1, state, counts, ran.buffers, ran.random)
        return visit, self._check_state(following)

    def again(self, visit: Visit) -> State:
        """Repeat a step as training did it, and compare it with no checkpoint.

        Args:
            visit: the step.

        Returns:
            The state after it.
        """
        ran = self._gradient(self.trajectory.step(visit.step), visit.snapshot)
        with torch.no_grad():
            return visit.map.update(visit.state, ran.gradient)

    def _gradient(self, step: Step, snapshot: Snapshot, *, keep_tape: bool = False) -> _Ran:
        """Run a step's micro-batches."""
        self.program.bind(snapshot.state.params)
        self._restore_buffers(snapshot.buffers)
        random = dict(snapshot.random)
        left: Mapping[str, Tensor] | None = None
        rank = turn = 0
        losses: list[RecordedLoss] = []
        grads: list[tuple[int, Params]] = []
        for micro in step.micro_batches:
            if micro.rank != rank:  # DDP gives every rank the buffers that rank 0 has
                left = self._copy_buffers() if left is None else left
                self._restore_buffers(snapshot.buffers)
                rank, turn = micro.rank, 0
            before = (micro.random or random.get(rank)) if micro.draws else None
            restorable = None if before is None else Restorable.of(before)
            loss = RecordedLoss(self.program, micro, restorable, turn)
            turn += 1
            gradient = self._run_taped(step, loss) if keep_tape else self._run(step, loss)
            if micro.draws:
                random[rank] = self.program.random_now(host="numpy" in (before or {}))
            if gradient is not None:
                losses.append(loss)
                grads.append((rank, gradient))
        left = self._copy_buffers() if left is None else left
        return _Ran(losses, self._total(grads, step.loss_scale), random, left)

    def _run(self, step: Step, loss: RecordedLoss) -> Params | None:
        """The gradient as training computed it, times the loss's scale; None without a loss."""
        value = self.program.run(loss.micro, loss.random)
        self.fidelity.check_loss(step, loss.micro, value)
        if value is None:
            return None
        names = self.program.trainable
        parameters = [self.program.parameters[name] for name in names]
        value = value / loss.micro.divisor * step.loss_scale
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return {name: g for name, g in zip(names, grads, strict=True) if g is not None}

    def _run_taped(self, step: Step, loss: RecordedLoss) -> Params | None:
        """The same, to the bit, with the graph kept."""
        if loss.micro.loss is None:
            return self._run(step, loss)
        loss.tape = Tape.of(loss, self.program.trainable)
        self.fidelity.check_loss(step, loss.micro, _returned(loss.tape.value, loss.micro))
        return loss.tape.detached()

    def _keeps_tapes(self) -> bool:
        """Whether the weighted loss gives the very gradient that training had.

        It does not where a derivative needs other kernels than a plain run does (attention), and
        the running statistics of normalisation layers would not be updated. Found out once, at
        the first step.

        Returns:
            Whether the walk keeps the graphs. Each saves running its step once more, and takes the
            room of states, for want of which steps are run again.
        """
        as_recorded = self.program.analysis == self.program.recorded
        if not as_recorded or self.product != "double-backward":
            return False
        if self._tapes is None:
            self._tapes = self._tapes_match()
        if not self._tapes:
            return False
        states, steps = self._snapshot_bytes(), len(self)
        with_tapes, without = self._fitting(states + self._tape_bytes), self._fitting(states)
        return steps_run(steps, with_tapes) <= steps_run(steps, without) + steps

    def _tapes_match(self) -> bool:
        if self.program.tracks_statistics or self.program.writes_buffers:
            return False
        visit, _ = self._advance(self.start())
        self._rebind(visit)
        step = self.trajectory.step(0)
        for loss in visit.map.losses:
            assert isinstance(loss, RecordedLoss)
            plain = self._run(step, loss)
            self._tape_bytes += saved_bytes(partial(Tape.of, loss, self.program.trainable))
            taped = Tape.of(loss, self.program.trainable)
            recorded = loss.micro.loss
            if float(_returned(taped.value, loss.micro)) != recorded or plain is None:
                return False
            pairs = ((plain.get(name), taped.grads.get(name)) for name in self.program.trainable)
            if any(a is None or b is None or not torch.equal(a, b) for a, b in pairs):
                return False
        return bool(visit.map.losses)

    def _total(self, grads: list[tuple[int, Params]], scale: float) -> Params:
        """The gradient that the optimiser had; a parameter that no micro-batch used has none."""
        total = total_gradient(grads, self.program.trainable)
        # The scale of the loss goes out by its reciprocal, as `torch.amp.GradScaler` does it.
        return total if scale == 1.0 else {name: g * (1.0 / scale) for name, g in total.items()}

    def _update(self, step: Step, snapshot: Snapshot) -> Update:
        settings = {
            name: group
            for names, group in zip(self._groups, step.settings, strict=True)
            for name in names
        }
        return Update(self._rule, settings, snapshot.counts, self._clip)

    # ------------------------------------------------------------------ buffers and checkpoints

    def _copy_buffers(self) -> Mapping[str, Tensor]:
        """The module's buffers now; copied only when one was written to since the last copy."""
        versions = self.program.buffer_versions()
        if self._held is None or self._versions != versions:
            self._held = {name: b.detach().clone() for name, b in self.program.buffers.items()}
            self._versions = versions
        return self._held

    def _restore_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        if buffers is self._held and self._versions == self.program.buffer_versions():
            return
        self.program.load_buffers(buffers)
        self._held, self._versions = buffers, self.program.buffer_versions()

    def _load(self, step: int) -> Snapshot:
        checkpoint = self.trajectory.checkpoint(step)
        tensors = checkpoint.tensors
        params: dict[str, Tensor] = {}
        slots: Slots = {name: {} for name in self.program.names}
        buffers: dict[str, Tensor] = {}
        random: dict[str, Tensor] = {}
        for key, value in sorted(tensors.items()):  # `State.leaves` counts on slots in this order
            kind, _, name = key.partition("/")
            if kind == "random":
                random[name] = value
                continue
            value = value.to(self.program.device)
            if kind == "params":
                params[name] = value
            elif kind == "buffers":
                buffers[name] = value
            elif kind == "slots":
                parameter, _, slot = name.rpartition("/")
                slots[parameter][slot] = value
            elif kind == "frozen":
                self.program.load_frozen(name, value)
        if set(params) != set(self.program.names):
            raise TrajectoryError(
                f"Checkpoint {step} of the trajectory {self.trajectory.directory} does not hold "
                "the parameters that its header names. The trajectory is damaged; record it again."
            )
        ordered = {name: params[name] for name in self.program.names}
        counts = {name: int(checkpoint.meta["counts"][name]) for name in self.program.names}
        state = State(ordered, slots, self.program.statistics.of(buffers))
        return Snapshot(step, state, counts, buffers, {0: random} if random else {})

    # ------------------------------------------------------------------ checks

    def _check_state(self, snapshot: Snapshot) -> Snapshot:
        """Compare with the checkpoint of this step, where there is one, and go on from it."""
        if snapshot.step in self._new_buffers:
            buffers = self._resumed_buffers(snapshot.step)
            state = snapshot.state._replace(statistics=self.program.statistics.of(buffers))
            snapshot = replace(snapshot, state=state, buffers=buffers)
        if snapshot.step not in self._checkpoints or snapshot.step in self.fidelity.seen:
            return snapshot
        recorded = self._load(snapshot.step)
        self.fidelity.check_state(snapshot.step, snapshot.state, recorded.state)
        if self.fidelity.bit_exact:
            return snapshot
        return replace(snapshot, state=recorded.state, buffers=recorded.buffers)

    def _resumed_buffers(self, step: int) -> Mapping[str, Tensor]:
        """The buffers with which the run was resumed.

        A checkpoint of Lightning's that was saved in the middle of an accumulation window has the
        running statistics of micro-batches whose gradient was lost, and which are no part of the run.

        Returns:
            The buffers by name.
        """
        known = self._new_buffers[step]
        if known is None:
            known = self._new_buffers[step] = self._load(step).buffers
        return known


def _returned(share: Tensor, micro: MicroBatch) -> Tensor:
    """What ``training_step`` returned, from its share in the step's loss.

    Dividing and multiplying by 3 again may round; where the recorded loss has this very share, it is
    the recorded loss.

    Returns:
        The loss.
    """
    recorded = share.new_tensor(float("nan") if micro.loss is None else micro.loss)
    same = torch.equal(recorded / micro.divisor, share)
    return recorded if same else share * micro.divisor
