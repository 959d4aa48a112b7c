"""ACC-SGD-IE of every sample, in a few directions (method: section 5).

SGD-IE's figure is exact to first order; what ACC-SGD-IE (arXiv 2510.26185) adds to it needs Δ_j only
where j is drawn, and only through H_j. With u_t the vectors of SGD-IE's backward walk,

    ⟨∇q, Δ_j⟩ = Σ_{t: j ∈ S_t} (η_t/|m|) ⟨u_{t+1}, g_j + H_j Δ_j⟩,      Δ_j ≈ Vc_j:

    c_j <- c_j - η (VᵀH_tV) c_j + 1[j ∈ S_t] (η/|m|) Vᵀ(g_j + H_j Vc_j)

V has r orthonormal columns. The query's curvature, ½ c_jᵀ(Vᵀ∇²q V)c_j, is most of what evaluating the
query adds.

| symbol | name |
|---|---|
| V | ``basis`` |
| c_j | a row of ``c``, ``[n, r]`` |
| -η_t u_{t+1}, for any SGD | ``mu``, SGD-IE's cotangent λ_{t+1} pulled back through U |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError, first_line
from lightning_accie.estimators.acc_sgd_ie import BLOW_UP, AccSgdIE
from lightning_accie.estimators.base import (
    Candidates,
    Estimate,
    Estimator,
    Replay,
    candidates_to_json,
    check_candidates,
)
from lightning_accie.estimators.basis import Basis
from lightning_accie.estimators.chunks import choose
from lightning_accie.estimators.kept import Regularly
from lightning_accie.estimators.low_rank_walks import Backwards, Forwards, Notes, Walks
from lightning_accie.estimators.own_curvature import (
    FullHessian,
    GaussNewton,
    Note,
    OwnCurvature,
    Spots,
    check_gauss_newton,
)
from lightning_accie.estimators.reduced import ReducedUpdate, check_update
from lightning_accie.estimators.sgd_ie import (
    KEEP_EVERY,
    SgdIE,
    WalkBack,
    no_larger_than_the_run,
    pull_bytes,
)
from lightning_accie.estimators.sketch import sketched
from lightning_accie.replay.state import dot
from lightning_accie.replay.walker import Kept, Visit

CURVATURES = ("gauss-newton", "hessian")
QUERIES = ("second-order", "linear")


class LowRankAccSgdIE(Estimator):
    """Accumulative SGD influence of every sample, at a price that does not grow with their number.

    For runs of SGD (momentum, Nesterov, dampening, weight decay, schedules, parameter groups,
    accumulation) without gradient clipping.

    Args:
        rank: r, the number of directions; with as many as there are trained parameters, and
            ``curvature="hessian"``, the result is that of `AccSgdIE`.
        curvature: ``"gauss-newton"`` takes the curvature of the losses in the network's outputs
            alone: r derivatives of these a step at most, exact for generalised linear models. It
            needs losses such as ``F.cross_entropy`` of the network's outputs. ``"hessian"`` goes
            with any loss, and takes r Hessian products a step and two for every sample that the
            step draws.
        query: ``"second-order"`` adds the query's curvature to the ``"linear"`` ⟨∇q, Δ_j⟩.
        refresh_every: after how many steps VᵀH_tV is computed anew. It moves slowly, but is that of
            one batch: with more than 1, it is the mean of the new one and the one before.
        candidates: None for every sample, a count (the strongest by SGD-IE), or sample numbers.
        seed: of the random weights by which gradients are mixed to find V.

    Raises:
        ValueError: if an argument is none of these.
    """

    name = "low-rank-acc-sgd-ie"

    def __init__(
        self,
        rank: int = 16,
        curvature: str = "gauss-newton",
        query: str = "second-order",
        refresh_every: int = 4,
        candidates: Candidates = None,
        seed: int = 0,
    ) -> None:
        self.rank = _count("rank", rank)
        self.refresh_every = _count("refresh_every", refresh_every)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"`seed` must be an integer, got {seed!r}.")
        self.seed = seed
        self.curvature = _one_of("curvature", curvature, CURVATURES)
        self.query = _one_of("query", query, QUERIES)
        self.candidates = check_candidates(candidates)

    def settings(self) -> dict[str, Any]:
        """Describe the settings.

        Returns:
            JSON values.
        """
        return {
            "rank": self.rank,
            "curvature": self.curvature,
            "query": self.query,
            "refresh_every": self.refresh_every,
            "candidates": candidates_to_json(self.candidates),
            "seed": self.seed,
        }

    def estimate(self, replay: Replay) -> Estimate:
        """Walk the run forwards in V's coordinates, and backwards as SGD-IE does.

        Ctrl-C ends it without a result, as none is known before the end; what the walks have found is
        kept, as it is where the analysis is killed. It is one walk for all samples, whose price is that
        of the directions: there is nothing in it to deal out to several processes.

        Args:
            replay: the run and the query.

        Returns:
            The influence of the candidates. ``extras`` holds ``"sgd_ie"``, SGD-IE's figure;
            ``"linear"``, with the correction; ``"second_order"`` where asked for, with the query's
            curvature; and ``"relative_change"``, ‖c_j‖/‖θ_T‖. ``trusted`` is False where the last
            exceeds `BLOW_UP`, where SGD-IE's figure is not trusted, or where one is not finite.

        Raises:
            UnsupportedError: if the run's optimiser, clipping, or loss is none that this estimator
                follows, before any work is done.
        """
        self._check(replay.walker.first_loss())
        beginning = WalkBack.begun(replay)
        samples = choose(replay, self.candidates)
        walks = Walks(replay, self.key, samples)
        through = self.curvature == "hessian"
        basis = walks.basis(lambda: sketched(replay, self.rank, self.seed, through=through))
        curve = self._query_curvature(replay, basis)
        replay = _shared(replay, basis)
        way = FullHessian if self.curvature == "hessian" else GaussNewton
        own: OwnCurvature = way(replay, Spots(replay, samples), basis)
        kept = Kept()
        forwards = walks.forwards() or Forwards(basis.rows.new_zeros(len(samples), basis.rank))
        unfinished = len(forwards.notes) < len(replay.walker)
        if unfinished:
            self._forwards(replay, own, basis, kept, samples, forwards, walks)
        back = None if unfinished else walks.backwards()
        back = back or Backwards(beginning, forwards.c.new_zeros(len(samples), dtype=torch.float64))
        self._backwards(replay, own, kept, forwards.notes, back, walks)
        return self._found(replay, samples, back, forwards.c, curve)

    def probe(self, visit: Visit) -> None:
        """Do one step of each walk."""
        self._check(visit)
        SgdIE().probe(visit)
        if self.curvature == "hessian":
            AccSgdIE().probe(visit)

    def _check(self, visit: Visit) -> None:
        """Refuse what this estimator does not follow."""
        check_update(visit.map.update)
        if self.query != "linear" and visit.state.statistics:
            raise UnsupportedError(
                "LowRankAccSgdIE does not carry the running statistics of normalisation layers, "
                "which the query reads, in its directions. Use "
                '`LowRankAccSgdIE(query="linear")`, which needs none, or '
                "`AccSgdIE(candidates=...)`."
            )
        if self.curvature == "gauss-newton":
            check_gauss_newton(visit)

    def _forwards(
        self,
        replay: Replay,
        own: OwnCurvature,
        basis: Basis,
        kept: Kept,
        samples: Tensor,
        walk: Forwards,
        walks: Walks,
    ) -> None:
        """Walk to the end of the run; steps that an earlier analysis has done are only replayed."""
        visits = int(replay.visits[replay.positions(samples)].sum())
        update, keep = ReducedUpdate(basis), Regularly(KEEP_EVERY)
        with replay.progress.task("low-rank: forwards", len(replay.walker)) as advance:
            for visit in replay.walker.forwards(kept):
                if visit.step == len(walk.notes):
                    walk.notes.append(self._step(visit, own, update, walk))
                    _check_memory(walk.notes[-1], visits, replay.memory_budget)
                    keep(lambda: walks.keep_forwards(walk))
                advance(1)
        walks.keep_forwards(walk)

    def _step(
        self, visit: Visit, own: OwnCurvature, update: ReducedUpdate, walk: Forwards
    ) -> Note | None:
        """Carry c along one step; gives what is noted of it."""
        if not visit.map.losses:
            return None
        stale = walk.matrix is None or visit.step % self.refresh_every == 0
        found = own.forwards(visit, walk.c, matrix=stale)
        walk.matrix = self._mean(walk.matrix, found.matrix)
        change = walk.c @ walk.matrix
        change.index_add_(0, found.note.spots, -found.slope - found.bend)
        walk.c, walk.slots = update(visit, walk.c, walk.slots, change)
        return found.note

    def _mean(self, matrix: Tensor | None, found: Tensor | None) -> Tensor:
        """VᵀH_tV for this step and, where it is not computed anew for each, those until the next."""
        if matrix is None or found is None or self.refresh_every == 1:
            known = matrix if found is None else found
            assert known is not None
            return known
        return torch.lerp(matrix, found, 0.5)  # one batch stands for several

    def _backwards(
        self,
        replay: Replay,
        own: OwnCurvature,
        kept: Kept,
        notes: Notes,
        back: Backwards,
        walks: Walks,
    ) -> None:
        """Walk back as SGD-IE does, and add up what the own curvature adds to it."""
        walk, keep = back.walk, Regularly(KEEP_EVERY)
        with replay.progress.task("low-rank: backwards", walk.step) as advance:
            for visit in replay.walker.backwards(kept, before=walk.step):
                note = notes[visit.step]
                if note is None:
                    walk.cotangent, by_weight = visit.map.vjp(visit.state, walk.cotangent)
                else:
                    walk.cotangent, by_weight, gain = own.backwards(visit, walk.cotangent, note)
                    back.correction.index_add_(0, note.spots, -gain.double())
                walk.influence.index_add_(0, visit.map.samples, -by_weight.double().cpu())
                walk.step = visit.step
                keep(lambda: walks.keep_backwards(back))
                advance(1)
        walks.keep_backwards(back)

    def _query_curvature(self, replay: Replay, basis: Basis) -> Tensor | None:
        """Vᵀ∇²q V in float64, where asked for."""
        if self.query == "linear":
            return None
        try:
            products = replay.query.hessian_products(replay.final.state.visible, basis.directions)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"`{replay.query.name}` has no second derivative: {first_line(error)} Use "
                '`LowRankAccSgdIE(query="linear")`.'
            ) from error
        return basis.project(products).double()

    def _found(
        self,
        replay: Replay,
        samples: Tensor,
        back: Backwards,
        c: Tensor,
        curve: Tensor | None,
    ) -> Estimate:
        """The figures, ``[n]`` each."""
        params, c = replay.final.state.params, c.double()
        first = back.walk.influence[samples]
        scale = max(float(dot(params, params).sqrt()), 1e-30)
        figures = {
            "sgd_ie": first,
            "linear": first + back.correction.cpu(),
            "relative_change": c.norm(dim=1).cpu() / scale,
        }
        influence = figures["linear"]
        if curve is not None:
            influence = influence + ((c @ curve) * c).sum(1).cpu() / 2
            figures["second_order"] = influence
        trusted = influence.isfinite() & (figures["relative_change"] <= BLOW_UP)
        trusted &= no_larger_than_the_run(replay, first)
        return Estimate(self.name, samples, influence, trusted, extras=figures)


def _shared(replay: Replay, basis: Basis) -> Replay:
    """The room that V and λ leave: half of it for states, a quarter each for notes and directions."""
    rest = max(0, replay.memory_budget - basis.rows.nbytes - pull_bytes(replay))
    return replace(replay, walker=replay.walker.within(rest // 2), memory_budget=rest // 4)


def _check_memory(note: Note | None, visits: int, budget: int) -> None:
    """Refuse a run whose notes will not fit, once the size of one of them is known."""
    if note is None:
        return
    need = visits * note.values[:1].nbytes
    if need > budget:
        raise UnsupportedError(
            f"LowRankAccSgdIE keeps {note.values[:1].numel()} numbers for every visit of a sample, "
            f"{need / 1e6:.0f} MB for this run, and `memory_budget` leaves {budget / 1e6:.0f} MB for "
            'them. Raise `memory_budget=`, or use `estimator="sgd-ie"`.'
        )


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer from 1, got {value!r}.")
    return value


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
    return value
