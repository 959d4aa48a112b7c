"""Many cotangents pulled back through one step, which share its forward pass and its gradient's graph.

SGD-IE of Q queries at once: λ_{t+1} of each query becomes λ_t, and

    γ_t[q, i] = ⟨λ^q_{t+1}, ∂F_t/∂w_i⟩

The results are those of `StepMap.vjp`, query by query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accie.replay.state import State
from lightning_accie.replay.step import StepMap


def vjp_many(
    step: StepMap, state: State, cotangents: Sequence[State], *, batched: bool = False
) -> tuple[list[State], Tensor]:
    """Pull Q cotangents back through F_t at (s_t, 1); the module must be bound to ``state``.

    Args:
        step: F_t.
        state: s_t.
        cotangents: λ_{t+1}, one a query.
        batched: whether the backward passes run side by side (`torch.func.vmap`), or one by one.

    Returns:
        λ_t, one a query, and γ_t ``[Q, N]``.
    """
    gradient = step.gradient_for_vjp(state)
    pulled = [step.update.vjp(state, gradient, one) for one in cotangents]
    params = [dict(back.params) for back, _ in pulled]
    along = [(mu, back.statistics) for back, mu in pulled]
    by_weight: list[Tensor] = []
    for loss in reversed(step.losses):
        found = step.pull_loss(loss, state, along, batched=batched)
        along = [(mu, nu) for (mu, _), (*_, nu) in zip(along, found, strict=True)]
        by_weight.append(torch.stack([gamma for _, gamma, _ in found]))
        for total, (curved, *_) in zip(params, found, strict=True):
            for name, value in curved.items():
                total[name] = total[name] + value
    states = [
        State(total, back.slots, nu)
        for total, (back, _), (_, nu) in zip(params, pulled, along, strict=True)
    ]
    gammas = by_weight[::-1] or [torch.zeros(len(states), 0)]
    return states, torch.cat(gammas, 1)


def may_batch(step: StepMap, state: State, cotangents: Sequence[State]) -> bool:
    """Find out whether the backward passes of a module can run side by side.

    Args:
        step: a step whose losses were not pulled back yet.
        state: s_t.
        cotangents: two queries' at least.

    Returns:
        Whether the results are the same as one by one. An operator may have no such rule, and a wrong
        one has been seen.
    """
    if not (step.vectorize and step.transforms) or step.product != "double-backward":
        return False
    step = step.without_tapes()
    one_by_one, plain = vjp_many(step, state, cotangents)
    try:
        side_by_side, batched = vjp_many(step, state, cotangents, batched=True)
    except (RuntimeError, NotImplementedError):
        return False
    leaves = zip(
        [plain, *(leaf for one in one_by_one for leaf in one.leaves())],
        [batched, *(leaf for one in side_by_side for leaf in one.leaves())],
        strict=True,
    )
    return all(_alike(one, other) for one, other in leaves)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equality to rounding, measured by the size of the whole tensor."""
    return float((one - other).norm()) <= 1e3 * torch.finfo(one.dtype).eps * float(one.norm())
