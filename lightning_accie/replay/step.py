"""F_t: one optimiser step as a pure function of (state, per-sample weights), and its derivatives.

| symbol (method) | name here |
|---|---|
| s_t = (θ_t, slots) | ``state`` |
| w | ``weights``, ``[N]``: every drawn sample of the step, its micro-batches one after the other |
| Σ_m c_m L_m(θ, w_m) | ``losses``, each with c_m already in it |
| b, part of s: running statistics | ``statistics`` |
| g = Σ_m c_m ∇L_m | ``gradient`` |
| U: (s, g) -> s', with clipping in front | ``Update`` |

`StepMap.__call__` is the definition. The other methods are its derivatives, arranged around the split
F_t = U ∘ g: whatever the optimiser, only one Hessian product of the loss is needed, and the rest is
elementwise. Running statistics follow what enters their layers, one micro-batch after the other, and
nothing in the step depends on them: they are carried beside U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from lightning_accie.replay import plain_autograd
from lightning_accie.replay.state import Params, State, unflatten_like
from lightning_accie.replay.tape import Bound, Pulled, Tape
from lightning_accie.replay.update import Update

TANGENTS = ("vectorized", "one-by-one", "double-backward")
"""The ways to many Hessian products at once: forward mode side by side, forward mode one by one, and
backwards twice; the first that a module's operators allow is the cheapest."""
_SHARED_PRIMAL: Any = (None, 0)
"""`vmap`'s output dimensions of (one value for all, one tangent each)."""


class MicroLoss(Protocol):
    """One micro-batch's share c_m L_m(θ, w) of the step's loss, as the replay provides it."""

    @property
    def samples(self) -> Tensor:
        """``[B]`` int64: which training sample each of the batch's B places holds."""
        ...

    @property
    def rank(self) -> int:
        """The process that ran it."""
        ...

    tape: Tape | None
    """Its gradient with the graph, where the walk to this step kept it."""

    def functional(
        self, params: Params, weights: Tensor, statistics: Params
    ) -> tuple[Tensor, Params]:
        """The loss from explicit parameters, and the running statistics after it.

        Runs under `torch.func`'s transforms.
        """
        ...

    def bound(self, weights: Tensor, statistics: Params) -> Bound:
        """The same from the module's bound parameters, for plain autograd."""
        ...

    def held(self, params: Params | None = None) -> AbstractContextManager[None]:
        """Where a backward pass over it belongs, which may run parts of the module again."""
        ...

    def ones(self) -> Tensor:
        """``[B]`` ones in the dtype and on the device of the loss."""
        ...


@dataclass(frozen=True)
class StepMap:
    """F_t at a recorded step.

    Attributes:
        losses: the step's micro-batches.
        update: U at this step.
        used: the names of the parameters that get a gradient at this step.
        penalty: whether the loss has a part R(θ) that belongs to no sample.
        product: how `vjp` gets a Hessian product, ``"double-backward"`` or
            ``"reverse-over-forward"``. The results are the same; which is cheaper depends on the
            module.
        vectorize: whether counterfactuals run side by side (`torch.func.vmap`) or one by one, for
            operators and control flow that vmap does not take.
        tangents: how `push` gets its Hessian products, one of `TANGENTS`.
        transforms: whether the loss runs under `torch.func` at all; without it everything goes by
            plain autograd, one by one.
    """

    losses: Sequence[MicroLoss]
    update: Update
    used: tuple[str, ...]
    penalty: bool = False
    product: str = "double-backward"
    vectorize: bool = True
    tangents: str = "vectorized"
    transforms: bool = True

    # ------------------------------------------------------------------ the map itself

    @property
    def samples(self) -> Tensor:
        """``[N]`` int64: the sample at each place of w."""
        if not self.losses:
            return torch.zeros(0, dtype=torch.int64)
        return torch.cat([loss.samples for loss in self.losses])

    def ones(self) -> Tensor:
        """The weights of the real run.

        Returns:
            ``[N]`` ones.
        """
        return torch.cat([loss.ones() for loss in self.losses]) if self.losses else torch.zeros(0)

    def removal_weights(self, removed: Tensor) -> Tensor:
        """The weights that leave out a sample, or a set of them, in the k-th counterfactual.

        Args:
            removed: ``[K]`` int64, sample numbers, of which a negative one removes nothing; or
                ``[K, n]`` bool, which of all n samples.

        Returns:
            ``[K, N]``: 0 where the place holds what is removed, else 1.
        """
        ones = self.ones()
        return ones * ~self._removes(removed).to(ones.device)

    def _removes(self, removed: Tensor) -> Tensor:
        """Which of the places each counterfactual leaves out, ``[K, N]`` bool."""
        if removed.dtype == torch.bool:
            return removed[:, self.samples]
        return self.samples[None, :] == removed[:, None]

    def __call__(self, state: State, weights: Tensor) -> State:
        """F_t(s, w).

        Args:
            state: s.
            weights: ``[N]``.

        Returns:
            The next state.
        """
        gradient, statistics = self._evaluate(state.params, state.statistics, weights)
        return self.update(state, gradient)._replace(statistics=statistics)

    def gradient(self, params: Params, weights: Tensor) -> Params:
        """∇_θ Σ_m c_m L_m(θ, w_m), for the parameters in use.

        Args:
            params: θ.
            weights: ``[N]``.

        Returns:
            The gradient by parameter name.
        """
        return self._evaluate(params, {}, weights)[0]

    def gradients(self, params: Params, weights: Tensor) -> Params:
        """The same for K weightings of the samples.

        Args:
            params: θ.
            weights: ``[K, N]``.

        Returns:
            The gradients by parameter name, K of them stacked.
        """
        return self._over_rows(partial(self.gradient, params), weights)

    def _evaluate(
        self, params: Params, statistics: Params, weights: Tensor
    ) -> tuple[Params, Params]:
        """The gradient, and the running statistics after the step."""
        parts = []
        for loss, part in zip(self.losses, self._split(weights), strict=True):
            if self.transforms:
                found, statistics = grad(loss.functional, has_aux=True)(params, part, statistics)
            else:
                found, statistics = plain_autograd.gradient(
                    partial(_at, loss, part), params, statistics, self.used, loss.held
                )
            parts.append(found)
        return self._total(parts), statistics

    def _total(self, parts: Sequence[Params]) -> Params:
        """Add up the micro-batches' gradients."""
        pairs = [(loss.rank, part) for loss, part in zip(self.losses, parts, strict=True)]
        return total_gradient(pairs, self.used)

    def _split(self, weights: Tensor) -> list[Tensor]:
        """``[..., N]`` into one ``[..., B]`` a micro-batch."""
        return list(weights.split([len(loss.samples) for loss in self.losses], dim=-1))

    # ------------------------------------------------------------------ forwards

    def advance_many(self, states: State, removed: Tensor) -> State:
        """Take K counterfactual steps at once: F_t(s_k, 1 - e_{removed[k]}).

        Args:
            states: K states, stacked.
            removed: ``[K]`` sample numbers.

        Returns:
            The K next states, stacked.
        """
        if not self.losses:
            return states
        return self._over_rows(self, states, self.removal_weights(removed))

    def _over_rows(self, function: Callable[..., Any], *rows: Any) -> Any:
        """Map a function over the leading dimension of its arguments."""
        if self.vectorize and self.transforms:
            return vmap(function, randomness="same")(*rows)
        return self._one_by_one(function, *rows)

    def _one_by_one(self, function: Callable[..., Any], *rows: Any) -> Any:
        count = len(pytree.tree_leaves(rows)[0])
        found = [function(*pytree.tree_map(lambda t: t[k], rows)) for k in range(count)]  # noqa: B023
        return pytree.tree_map(lambda *values: torch.stack(values), *found)

    def push(
        self,
        state: State,
        tangents: State,
        removed: Tensor,
        *,
        curvature: float = 1.0,
        own: Tensor | None = None,
    ) -> State:
        """The step of ACC-SGD-IE (arXiv 2510.26185; method: section 3), for K samples at once.

        Δ_k <- [F_t(s_t, 1-e_k) - F_t(s_t, 1)] + ∂_s F_t(s_t, 1-e_k) Δ_k

        The Hessian product of the whole batch, HΔ_k, shares one primal between all K; what leaving
        out k changes, -g_k and -H_kΔ_k, is computed for those k alone that the step drew.

        Args:
            state: s_t.
            tangents: Δ, K of them stacked.
            removed: ``[K]`` sample numbers.
            curvature: a factor of HΔ_k; with 0 it is not computed.
            own: ``[K]`` factors of H_kΔ_k, which is not computed where they are 0; None for 1.

        Returns:
            The K next tangents, stacked.
        """
        if not self.losses:
            return tangents
        if curvature:
            gradient, curved, statistics = self.products(state, tangents)
            if curvature != 1.0:
                curved = {name: curvature * value for name, value in curved.items()}
        else:
            gradient, statistics = self._gradient_for_update(state), tangents.statistics
            curved = {name: torch.zeros_like(tangents.params[name]) for name in self.used}
        shift = curved  # where U is linear, the two go through it as one
        if not self.update.linear:
            shift = {name: torch.zeros_like(value) for name, value in curved.items()}
        rows = self._removes(removed).any(1).nonzero()[:, 0]
        factors = torch.ones(len(rows)) if own is None else own[rows]
        self._leave_out(state, tangents, removed, rows[factors == 0], None, curved, shift)
        corrected, factors = rows[factors != 0], factors[factors != 0]
        self._leave_out(state, tangents, removed, corrected, factors, curved, shift)
        pushed = self._push_update(state, gradient, tangents, curved, shift)
        return pushed._replace(statistics=statistics)

    def _leave_out(
        self,
        state: State,
        tangents: State,
        removed: Tensor,
        rows: Tensor,
        factors: Tensor | None,
        curved: Params,
        shift: Params,
    ) -> None:
        """Add -g_k to ``shift``, and -H_kΔ_k times a factor into ``curved``, at some rows."""
        if not len(rows) or not self.used:
            return
        places = rows.to(shift[self.used[0]].device)
        if factors is None:
            first = self.removed_gradients(state.params, removed[rows])
        else:
            moved = {name: value[rows] for name, value in tangents.params.items()}
            first, second = self.leaving_out(state.params, moved, removed[rows])
            for name, value in second.items():
                scale = factors.to(value).view(-1, *[1] * (value.dim() - 1))
                curved[name].index_add_(0, places, value * scale)
        for name, value in first.items():
            shift[name].index_add_(0, places, value)

    def _gradient_for_update(self, state: State) -> Params:
        """∇L at w = 1 where U's derivative depends on it, else a placeholder."""
        linear = self.update.linear
        return self._placeholder(state) if linear else self.gradient(state.params, self.ones())

    @property
    def _backwards(self) -> bool:
        """Whether Hessian products of tangents go without forward mode."""
        return self.tangents == "double-backward" or not self.transforms

    def products(self, state: State, tangents: State) -> tuple[Params, Params, Params]:
        """Multiply the Hessian of the step's loss with K tangents, whose primal they share.

        Args:
            state: s_t.
            tangents: Δ, K of them stacked; their slots do not matter.

        Returns:
            ∇L at w = 1; HΔ_k; and the tangents of the running statistics after the step.
        """
        if self._backwards:
            return self._products_backwards(state, tangents)
        ones = self.ones()
        at = (state.params, state.statistics)

        def product(tangent: State) -> tuple[Params, tuple[Params, Params]]:
            along = (tangent.params, tangent.statistics)
            (gradient, _), moved = _jvp(lambda p, b: self._evaluate(p, b, ones), at, along)
            return gradient, moved

        if self.tangents == "vectorized" and self.vectorize:
            shared = vmap(product, out_dims=_SHARED_PRIMAL, randomness="same")
            gradient, (curved, statistics) = shared(tangents)
            return gradient, curved, statistics
        gradients, (curved, statistics) = self._one_by_one(product, tangents)
        return {name: value[0] for name, value in gradients.items()}, curved, statistics

    def _products_backwards(self, state: State, tangents: State) -> tuple[Params, Params, Params]:
        """The same by plain autograd."""
        gradients, products = [], []
        for loss, part in zip(self.losses, self._split(self.ones()), strict=True):
            found, curved, statistics = plain_autograd.gradient_and_products(
                partial(_at, loss, part), state, self.used, tangents, loss.held
            )
            tangents = tangents._replace(statistics=statistics)
            gradients.append(found)
            products.append(curved)
        return _sum_up(gradients), _sum_up(products), tangents.statistics

    def removed_gradients(self, params: Params, removed: Tensor) -> Params:
        """What leaving out k adds to the gradient: -g_k/|m|.

        Args:
            params: θ_t.
            removed: ``[K]`` sample numbers.

        Returns:
            K of them stacked, for the parameters in use.
        """
        found = self.gradients(params, self.removal_weights(removed) - 1.0)
        if not self.penalty:
            return found
        constant = self.gradient(params, torch.zeros_like(self.ones()))
        return {name: value - constant[name] for name, value in found.items()}

    def leaving_out(
        self, params: Params, tangents: Params, removed: Tensor
    ) -> tuple[Params, Params]:
        """What leaving out k adds to the gradient, -g_k/|m|, and to HΔ_k, -H_kΔ_k/|m|.

        Args:
            params: θ_t.
            tangents: Δ, K of them stacked, for all parameters.
            removed: ``[K]`` sample numbers.

        Returns:
            Both, K of them stacked, for the parameters in use.
        """
        change = self.removal_weights(removed) - 1.0
        nothing = torch.zeros_like(self.ones())
        if self._backwards:
            found = [
                self._effect_backwards(params, {n: t[k] for n, t in tangents.items()}, change[k])
                for k in range(len(removed))
            ]
            firsts, seconds = zip(*found, strict=True)
            return _stack(firsts), _stack(seconds)

        def effect(tangent: Params, v: Tensor) -> tuple[Params, Params]:
            def removed_part(p: Params) -> Params:  # the loss is affine in w: take R out again
                part = self.gradient(p, v)
                if not self.penalty:
                    return part
                constant = self.gradient(p, nothing)
                return {name: value - constant[name] for name, value in part.items()}

            return _jvp(removed_part, (params,), (tangent,))

        if self.tangents == "vectorized":
            return self._over_rows(effect, tangents, change)
        return self._one_by_one(effect, tangents, change)

    def _effect_backwards(
        self, params: Params, tangent: Params, v: Tensor
    ) -> tuple[Params, Params]:
        """The same for one sample, by plain autograd."""
        one = State({name: value[None] for name, value in tangent.items()}, {})
        found = []
        for loss, part in zip(self.losses, self._split(v), strict=True):
            if not bool(part.any()):
                continue

            def removed_part(
                p: Params, b: Params, loss: MicroLoss = loss, part: Tensor = part
            ) -> tuple[Tensor, Params]:
                value, _ = loss.functional(p, part, b)
                return value - loss.functional(p, 0.0 * part, b)[0] if self.penalty else value, {}

            found.append(
                plain_autograd.gradient_and_products(
                    removed_part, State(params, {}), self.used, one, loss.held
                )
            )
        products = _sum_up([products for _, products, _ in found])
        return _sum_up([g for g, *_ in found]), {n: value[0] for n, value in products.items()}

    def _push_update(
        self, state: State, gradient: Params, tangents: State, curved: Params, shift: Params
    ) -> State:
        """Carry Δ_k and the change of the gradient through U."""
        if self.update.linear:  # then the bracket is U's derivative too
            return self.update.push(state, gradient, tangents, curved)
        base = self.update(state, gradient)

        def general(tangent: State, curve: Params, move: Params) -> State:
            at = {name: gradient[name] + move[name] for name in gradient}
            new, moved = _jvp(self.update, (state, at), (tangent, curve))
            leaves = zip(new.leaves(), base.leaves(), moved.leaves(), strict=True)
            return unflatten_like(base, [(n - b) + m for n, b, m in leaves])

        return vmap(general)(tangents, curved, shift)

    # ------------------------------------------------------------------ backwards: SGD-IE

    def vjp(self, state: State, cotangent: State) -> tuple[State, Tensor]:
        """Pull λ_{t+1} back through F_t at (s_t, 1); the module must be bound to ``state``.

        Args:
            state: s_t.
            cotangent: λ_{t+1}.

        Returns:
            λ_t, and γ_t ``[N]`` with γ_t[i] = ⟨λ_{t+1}, ∂F_t/∂w_i⟩.
        """
        if not self.losses:
            return self.update.vjp(state, {}, cotangent)[0], torch.zeros(0)
        if self.update.linear:  # U's derivative does not depend on the gradient
            back, mu = self.update.vjp(state, self._placeholder(state), cotangent)
            products = self._pulled(state, mu, back.statistics)
        elif len(self.losses) == 1 and self.product == "double-backward":
            tape = self._tape(self.losses[0], state.statistics)
            back, mu = self.update.vjp(state, tape.detached(), cotangent)
            products = [tape.product(mu, back.statistics)]
        else:  # the whole gradient first, then one graph at a time
            back, mu = self.update.vjp(state, self.plain_gradient(), cotangent)
            products = self._pulled(state, mu, back.statistics)
        params = dict(back.params)
        for hessian_product, *_ in products:
            for name, value in hessian_product.items():
                params[name] = params[name] + value
        by_weights = torch.cat([gamma for _, gamma, _ in products])
        return State(params, back.slots, products[0][2]), by_weights

    def gradient_for_vjp(self, state: State) -> Params:
        """The gradient as `vjp` of U needs it.

        Args:
            state: s_t; the module must be bound to it.

        Returns:
            The gradient by parameter name; something of its shape where its values do not matter.
        """
        if not self.losses:
            return {}
        return self._placeholder(state) if self.update.linear else self.plain_gradient()

    def pull_loss(
        self,
        loss: MicroLoss,
        state: State,
        along: Sequence[tuple[Params, Params]],
        *,
        batched: bool,
    ) -> list[Pulled]:
        """Pull the cotangents of several queries back through one micro-batch.

        Args:
            loss: one of ``losses``.
            state: s_t; the module must be bound to it.
            along: of each query, μ of the gradient and ν of the running statistics.
            batched: see `Tape.products`.

        Returns:
            For each query, what `Tape.product` gives.
        """
        if self.product == "double-backward":
            return self._tape(loss, state.statistics).products(along, batched=batched)
        return [self._product(loss, state, mu, nu) for mu, nu in along]

    def without_tapes(self) -> StepMap:
        """The same step, whose graphs are made anew.

        Returns:
            A copy; the graphs that the walk kept stay for the original.
        """
        losses = [copy(loss) for loss in self.losses]
        for loss in losses:
            loss.tape = None
        return replace(self, losses=losses)

    def hessian_product(self, state: State, direction: Params) -> Params:
        """Multiply the Hessian of the step's loss, by the way that ``product`` names.

        Args:
            state: s_t; the module must be bound to it.
            direction: μ, for the parameters in use.

        Returns:
            Hμ by parameter name.
        """
        return _sum_up([products for products, *_ in self._pulled(state, direction, {})])

    def _pulled(self, state: State, mu: Params, nu: Params) -> list[Pulled]:
        """What `_product` gives for every micro-batch; ν goes through them from the last one on."""
        products: list[Pulled] = []
        for loss in reversed(self.losses):
            products.append(self._product(loss, state, mu, nu))
            nu = products[-1][2]
        return products[::-1]

    def vjp_without_curvature(self, state: State, cotangent: State) -> tuple[State, Tensor]:
        """Pull λ_{t+1} back with the loss's Hessian left out, as TracIn does.

        Args:
            state: s_t.
            cotangent: λ_{t+1}.

        Returns:
            λ_t (for SGD without weight decay: λ_{t+1}), and γ_t ``[N]``. What running statistics
            owe to θ is left out too.
        """
        if not self.losses:
            return self.update.vjp(state, {}, cotangent)[0], torch.zeros(0)
        back, mu = self.update.vjp(state, self._gradient_for_update(state), cotangent)
        direction = {n: mu.get(n, torch.zeros_like(p)) for n, p in state.params.items()}
        if self._backwards:
            return back, torch.cat([self._tape(loss).product(direction)[1] for loss in self.losses])
        return back, torch.cat([_slopes(loss, state.params, direction) for loss in self.losses])

    def plain_gradient(self) -> Params:
        """The gradient at the bound parameters and weights 1, by plain autograd.

        Returns:
            The gradient by parameter name.
        """
        return self._total([self._gradient_of(loss) for loss in self.losses])

    def _gradient_of(self, loss: MicroLoss) -> Params:
        tape = loss.tape or Tape.of(loss, self.used, create_graph=False)
        return tape.detached()

    def _placeholder(self, state: State) -> Params:
        """A gradient of the right shapes, where its values do not matter."""
        return {name: state.params[name] for name in self.used}

    def _tape(self, loss: MicroLoss, statistics: Params | None = None) -> Tape:
        return loss.tape if loss.tape is not None else Tape.of(loss, self.used, statistics)

    def _product(self, loss: MicroLoss, state: State, mu: Params, nu: Params) -> Pulled:
        """Of one micro-batch, the gradient of ⟨μ, ∇_θL(θ, w)⟩ + ⟨ν, b'(θ, b)⟩ in θ, w and b."""
        if self.product == "double-backward":
            return self._tape(loss, state.statistics).product(mu, nu)
        params = state.params
        direction = {n: mu.get(n, torch.zeros_like(p)) for n, p in params.items()}

        def slope(p: Params, w: Tensor, b: Params) -> Tensor:
            def value(q: Params) -> tuple[Tensor, Params]:
                return loss.functional(q, w, b)

            (_, after), (tangent, _) = _jvp(value, (p,), (direction,))
            return reduce(add, [(nu[name] * after[name]).sum().to(tangent) for name in nu], tangent)

        return grad(slope, argnums=(0, 1, 2))(params, loss.ones(), state.statistics)


def _jvp(function: Callable[..., Any], at: tuple[Any, ...], along: tuple[Any, ...]) -> Any:
    """`torch.func.jvp` without auxiliary output: the value and its tangent."""
    return jvp(function, at, along)


def _slopes(loss: MicroLoss, params: Params, direction: Params) -> Tensor:
    """⟨∇_θ ∂L/∂w_i, direction⟩ for every sample of a micro-batch, by one forward-mode derivative."""
    by_weights = grad(lambda p, w: loss.functional(p, w, {})[0], argnums=1)
    return _jvp(lambda p: by_weights(p, loss.ones()), (params,), (direction,))[1]


def _at(
    loss: MicroLoss, weights: Tensor, params: Params, statistics: Params
) -> tuple[Tensor, Params]:
    """The loss as a function of the state alone."""
    return loss.functional(params, weights, statistics)


def _sum_up(parts: Sequence[Params]) -> Params:
    return {name: reduce(add, [part[name] for part in parts]) for name in parts[0]}


def _stack(parts: Sequence[Params]) -> Params:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def total_gradient(parts: Sequence[tuple[int, Params]], names: Iterable[str]) -> Params:
    """Add up gradients as training does: over the micro-batches of a rank, then over the ranks.

    Args:
        parts: the rank and the gradient of every micro-batch, in the order of `Step`.
        names: the parameters wanted.

    Returns:
        The sums by parameter name; a parameter that no micro-batch used has none.
    """
    total: Params = {}
    for name in names:
        by_rank: dict[int, Tensor] = {}
        for rank, part in parts:
            if name in part:
                have = by_rank.get(rank)
                by_rank[rank] = part[name] if have is None else have + part[name]
        if by_rank:
            total[name] = reduce(add, by_rank.values())
    return total
