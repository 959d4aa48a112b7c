"""TracIn (Pruthi et al. 2020, arXiv 2002.08484), summed over every step.

    λ_T = ∇q(θ_T);   λ_t = λ_{t+1} through U alone (no Hessian);   influence_i = -Σ_t γ_t[i]

For SGD without weight decay λ stays ∇q(θ_T), and the influence is Σ_t η_t ⟨∇q(θ_T), ∇ℓ_i(θ_t)⟩/|m|.
With momentum, weight decay or Adam, λ follows the optimiser's own state, and only the loss's
curvature is left out.
"""

from __future__ import annotations

from lightning_accie.estimators.sgd_ie import SgdIE


class TracIn(SgdIE):
    """SGD-IE without curvature: a rank of every sample, the least faithful. A baseline."""

    name = "tracin"
    curvature = False

    def _description(self) -> str:
        return "TracIn: every sample"
