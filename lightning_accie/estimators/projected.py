"""What a step's samples are in R's coordinates: their gradients, and the curvature of the step's loss.

With ℓ_i the samples' losses, of which the step's is the mean, σ_i = c_m/|m| their shares in it, and
g_i = σ_i ∇ℓ_i:

| ``curvature`` | H_t ≈ | takes |
|---|---|---|
| ``"empirical"`` (Wang et al. 2024, arXiv 2412.09538) | Σ_i σ_i ∇ℓ_i∇ℓ_iᵀ | one backward pass |
| ``"fisher"`` | Σ_i J_iᵀS_iJ_i, Gauss-Newton | one backward pass for each output |

The empirical form takes the step's loss as the mean of the ℓ_i. Of a loss that is a sum over the batch
it would be too large by the batch's size; Gauss-Newton is the same for both.

J_i is the Jacobian of sample i's outputs and S_i the Hessian of its share of the loss in them. Where
the loss is their log-likelihood (cross-entropy, squared error), this is the Fisher information: the
mean of the empirical form over labels that the model itself would draw.

Parameters of linear, convolutional and embedding layers go by the layers' factors
(`replay.factors`); others, such as those of recurrent layers, by their own per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accie.errors import UnsupportedError, first_line
from lightning_accie.estimators.projection import Projection
from lightning_accie.replay.factors import Call, Calls, slopes_of, watched
from lightning_accie.replay.gauss_newton import curved, errors, outputs_along
from lightning_accie.replay.outputs import Outputs
from lightning_accie.replay.part import part_of
from lightning_accie.replay.step import MicroLoss
from lightning_accie.replay.tape import Tape, saved_bytes
from lightning_accie.replay.walker import Visit

CURVATURES = ("fisher", "empirical")
_COPIES = 6
"""How often what a graph holds is held at once, for each direction that goes through it."""
_SLOPES = 4
"""How often the outputs of layers are held at once for each: as slopes, and half projected."""
_ROWS = 4
"""How often a step's rows are held at once."""
_SMALL = 1e-2
"""The part of the whole gradient beside which a parameter's own is rounding."""


class StepGradients(NamedTuple):
    """A step in R's coordinates; its N places, and M rows of curvature."""

    samples: Tensor
    """``[N]`` sample numbers."""
    slopes: Tensor
    """``[N, k]``: R g_i."""
    shares: Tensor
    """``[N]``: c_m/|m|, by which g_i is ∇ℓ_i."""
    left: Tensor
    """``[M, k]``: X."""
    right: Tensor
    """``[M, k]``: Y, with R H_t Rᵀ ≈ XᵀY."""

    def curved(self, vectors: Tensor) -> Tensor:
        """The curvature times vectors.

        Args:
            vectors: ``[K, k]``.

        Returns:
            ``[K, k]``.
        """
        rows, size = self.left.shape
        if size * (rows + len(vectors)) < 2 * len(vectors) * rows:  # fewer products that way
            return vectors @ (self.left.T @ self.right)
        return (vectors @ self.left.T) @ self.right


class ProjectedGradients:
    """Computes `StepGradients`.

    Args:
        projection: R.
        curvature: one of `CURVATURES`.
        memory_budget: bytes that a step's rows may take.
    """

    def __init__(self, projection: Projection, curvature: str, memory_budget: int) -> None:
        self._projection = projection
        self._curvature = curvature
        self._budget = memory_budget
        self._by_factors: dict[tuple[str, ...], frozenset[str]] = {}
        self._rows = 0

    def __call__(self, visit: Visit) -> StepGradients:
        """Compute a step's.

        Args:
            visit: the step, which has a loss; the module is bound to its state.

        Returns:
            Its gradients and curvature.

        Raises:
            UnsupportedError: if the step's loss has no such parts, or they do not fit the memory.
        """
        used = visit.map.used
        if used not in self._by_factors:
            self._by_factors[used] = self._checked(visit)
        return self._of(visit, self._by_factors[used])

    # ------------------------------------------------------------------ which way

    def _checked(self, visit: Visit) -> frozenset[str]:
        """The parameters whose samples' gradients the layers' factors give, found by comparing."""
        if visit.map.penalty:
            raise UnsupportedError(
                "Data value embeddings approximate the curvature by that of the samples' losses, "
                "and a part of this training_step's loss belongs to no sample, such as a penalty on "
                "the weights. Use the optimiser's `weight_decay=` for it, or "
                '`estimator="sgd-ie"`.'
            )
        names = frozenset(name for name in visit.map.used if name in self._projection.parts)
        exact = self._mixed_exactly(visit)
        factored = names
        for _ in range(2):  # what is off by its factors may be right without them
            off = self._off(visit, factored, exact)
            if not off:
                return factored
            factored = factored - off
        raise UnsupportedError(
            f"The samples' gradients of {', '.join(f'`{name}`' for name in sorted(off))} are not those "
            "that the outputs of the network give: the loss depends on the weights in other ways "
            f"than by what enters its losses. {_INSTEAD}"
        )

    def _mixed_exactly(self, visit: Visit) -> dict[str, Tensor]:
        """Σ_i v_i R g_i by differentiating the weighted loss, by parameter."""
        part = part_of(visit, self._projection.names)
        weights = _mixture(visit)[None].to(visit.map.ones())
        gradient = part.map.gradients(part.state.params, weights)
        return self._projection.split(self._projection.whole(gradient)[0])

    def _off(
        self, visit: Visit, factored: frozenset[str], exact: dict[str, Tensor]
    ) -> frozenset[str]:
        """The parameters whose samples' gradients do not add up to the step's."""
        slopes = self._of(visit, factored).slopes
        found = self._projection.split(_mixture(visit).to(slopes) @ slopes)
        whole = torch.stack([value.norm() for value in exact.values()]).norm()
        tolerance = visit.map.losses[0].program.analysis.tolerances.gradient  # type: ignore[attr-defined]
        return frozenset(
            name
            for name, value in exact.items()
            if name in visit.map.used
            and float((found[name] - value).norm())
            > tolerance * float(torch.maximum(value.norm(), _SMALL * whole))
        )

    # ------------------------------------------------------------------ a step

    def _of(self, visit: Visit, factored: Collection[str]) -> StepGradients:
        way = self._fisher if self._curvature == "fisher" else self._empirical
        parts = [way(visit, loss, factored) for loss in visit.map.losses]
        return StepGradients(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _empirical(self, visit: Visit, loss: MicroLoss, factored: Collection[str]) -> StepGradients:
        size = len(loss.samples)
        self._check_memory(visit, loss, 1)
        with loss.held(), torch.enable_grad():
            with _watched(loss, factored) as calls:
                bound = loss.bound(loss.ones(), {})
            one = torch.ones_like(bound.loss)[None]
            parts = self._by_name(calls, [bound.loss], [one], rows=1)
        found = {name: value[0] for name, value in parts.items()}
        found |= self._own_gradients(visit, loss, self._others(visit, found))
        slopes = self._projection.joined(found, loss.ones()).detach()
        shares = slopes.new_full((size,), _share(loss))
        return StepGradients(loss.samples, slopes, shares, slopes, slopes / shares[:, None])

    def _fisher(self, visit: Visit, loss: MicroLoss, factored: Collection[str]) -> StepGradients:
        size = len(loss.samples)
        with _watched(loss, factored) as calls:
            tape = _taped(loss, ())
        units = _units(tape.outputs)
        self._check_memory(visit, loss, len(units))
        rows = self._at_once(visit, loss, calls)
        try:
            bent = curved(tape, units, rows=rows)  # S_i, a row for each output
            error = errors(tape)
            own = self._own_jacobians(visit, loss, self._others(visit, calls.names()), rows)
            parts = []
            for start in range(0, len(units), rows):
                some = units[start : start + rows]
                found = self._along_units(tape, calls, some, loss)
                found |= {name: value[start : start + rows] for name, value in own.items()}
                parts.append(self._projection.joined(found, some).detach())
        except (RuntimeError, NotImplementedError) as problem:
            raise UnsupportedError(
                '`curvature="fisher"` does not go with this training_step: '
                f"{first_line(problem).rstrip('.')}. {_INSTEAD}"
            ) from problem
        along = torch.cat(parts)  # [D, B, k]
        slopes = torch.einsum("bd,dbk->bk", error.to(along), along)
        pushed = torch.einsum("dbo,dbk->obk", bent.to(along), along)
        shares = slopes.new_full((size,), _share(loss))
        return StepGradients(
            loss.samples, slopes, shares, along.flatten(0, 1), pushed.flatten(0, 1)
        )

    def _along_units(
        self, tape: Tape, calls: Calls, units: Tensor, loss: MicroLoss
    ) -> dict[str, Tensor]:
        """R of the outputs' derivatives, ``[K, B, size]`` for each parameter that the calls make up."""
        values = [one.value for one in tape.outputs]
        given = zip(tape.outputs, units.split(_sizes(tape.outputs), -1), strict=True)
        vectors = [one.from_rows(part).to(one.value) for one, part in given]
        with loss.held():
            return self._by_name(calls, values, vectors, rows=len(units))

    # ------------------------------------------------------------------ by factors, and without

    def _by_name(
        self, calls: Calls, outputs: list[Tensor], vectors: list[Tensor], *, rows: int
    ) -> dict[str, Tensor]:
        """``[K, B, size]`` for each parameter that the calls make up."""
        names = calls.names()
        made = [call for call in calls.made if {call.weight, call.bias} & names]
        found: dict[str, Tensor] = {}
        if not made:
            return found
        for call, slopes in zip(made, slopes_of(outputs, made, vectors, rows=rows), strict=True):
            for name, value in self._of_call(call, slopes, names):
                found[name] = found[name] + value if name in found else value
        return found

    def _of_call(self, call: Call, slopes: Tensor, names: set[str]) -> list[tuple[str, Tensor]]:
        """R of a call's share in the gradients, ``[K, B, size]``, from its factors."""
        found = []
        if call.weight in names:
            part = self._projection.parts[call.weight]
            if call.padding is not None:
                slopes = slopes * (call.inputs != call.padding)[None, :, :, None]
            if call.kind is torch.nn.Embedding:  # a row of the weight for each position
                left, right = part.picked(call.inputs).to(slopes), part.columns(slopes)
                left = left[None].expand(len(slopes), -1, -1, -1)
            else:
                left, right = part.rows(slopes), part.columns(call.inputs.to(slopes))
                right = right[None].expand(len(slopes), -1, -1, -1)
            found.append((call.weight, torch.einsum("kbto,kbti->kboi", left, right).flatten(2)))
        if call.bias in names:
            found.append((call.bias, self._projection.parts[call.bias].rows(slopes.sum(2))))
        return found

    def _others(self, visit: Visit, found: Collection[str]) -> list[str]:
        """The parameters that the calls of a micro-batch do not make up."""
        return [n for n in self._projection.names if n in visit.map.used and n not in found]

    def _own_gradients(self, visit: Visit, loss: MicroLoss, names: list[str]) -> dict[str, Tensor]:
        """``[B, size]`` for parameters, from their samples' gradients."""
        if not names:
            return {}
        one = replace(visit, map=replace(visit.map, losses=[loss]))
        part = part_of(one, names)
        params = part.state.params
        whole = sum(params[name].nbytes for name in names)
        rows = max(1, self._budget // (2 * whole))
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for weights in torch.diag(loss.ones()).split(rows):
            gradients = part.map.gradients(params, weights)
            for name, parts in found.items():
                parts.append(self._projection.parts[name].whole(gradients[name]))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _own_jacobians(
        self, visit: Visit, loss: MicroLoss, names: list[str], rows: int
    ) -> dict[str, Tensor]:
        """``[D, B, size]`` for parameters, from derivatives along the rows of R."""
        found = {}
        for name in names:
            like, part = visit.state.params[name], self._projection.parts[name]
            if (need := part.size * like.nbytes) > self._budget:
                raise UnsupportedError(
                    f"`{name}` belongs to no linear, convolutional or embedding layer, and the "
                    f"{part.size} directions that it is projected to take {need / 1e6:.0f} MB, where "
                    f"`memory_budget` leaves {self._budget / 1e6:.0f} MB. Take a smaller "
                    f'`dimension=`, or `curvature="empirical"`.'
                )
            tape, directions = _taped(loss, (name,)), part.directions(like)
            if name in tape.grads and tape.grads[name].requires_grad:
                along = outputs_along(tape, {name: directions}, rows=rows)
                found[name] = along.permute(2, 1, 0)
        return found

    # ------------------------------------------------------------------ memory

    def _at_once(self, visit: Visit, loss: MicroLoss, calls: Calls) -> int:
        """How many directions go through the graph side by side, and are projected."""
        if not visit.map.vectorize or not visit.map.transforms:
            return 1
        if not self._rows:
            held = saved_bytes(lambda: loss.bound(loss.ones(), {}))
            slopes = sum(call.output.nbytes for call in calls.made)
            each = _COPIES * held + _SLOPES * slopes
            self._rows = max(1, self._budget // max(1, each))
        return self._rows

    def _check_memory(self, visit: Visit, loss: MicroLoss, rows: int) -> None:
        size = len(loss.samples) * rows * self._projection.size * _ROWS
        need = size * next(iter(visit.state.params.values())).element_size()
        if need > self._budget:
            less = (
                f"The {rows} outputs of each sample are many: {_INSTEAD}"
                if rows > 1
                else "Take a smaller `dimension=`, or fewer `layers=`."
            )
            raise UnsupportedError(
                f"A step of {len(loss.samples)} samples takes {need / 1e6:.0f} MB in the "
                f"{self._projection.size} coordinates of the embeddings, and `memory_budget` leaves "
                f"{self._budget / 1e6:.0f} MB for it. Raise `memory_budget=`. {less}"
            )


_INSTEAD = 'Use `curvature="empirical"`, which needs the loss alone.'


def _watched(loss: MicroLoss, names: Collection[str]) -> AbstractContextManager[Calls]:
    """Note what the layers of some parameters are called with."""
    program = loss.program  # type: ignore[attr-defined]
    chosen = {name: program.parameters[name] for name in names}
    return watched(program.module, chosen, len(loss.samples))


def _share(loss: MicroLoss) -> float:
    """c_m/|m|."""
    return 1.0 / (len(loss.samples) * loss.micro.divisor)  # type: ignore[attr-defined]


def _mixture(visit: Visit) -> Tensor:
    """``[N]`` weights at random, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(visit.map.samples), generator=generator, dtype=torch.float64)


def _taped(loss: MicroLoss, names: tuple[str, ...]) -> Tape:
    """The derivative of the loss in the outputs and some parameters, with its graph."""
    tape = Tape.of(loss, names)
    if not tape.outputs:
        raise UnsupportedError(_NO_OUTPUTS)
    return tape


_NO_OUTPUTS = (
    '`curvature="fisher"` does not go with this training_step: its loss is none that is convex in the '
    f"rows of what enters it, such as `F.cross_entropy` or `F.mse_loss`. {_INSTEAD}"
)


def _sizes(outputs: Collection[Outputs]) -> list[int]:
    return [one.value.numel() // one.batch for one in outputs]


def _units(outputs: Collection[Outputs]) -> Tensor:
    """``[D, B, D]``: each output of every sample in turn."""
    first = next(iter(outputs))
    dtype = torch.promote_types(first.value.dtype, torch.float32)
    size = sum(_sizes(outputs))
    eye = torch.eye(size, dtype=dtype, device=first.value.device)
    return eye[:, None, :].expand(size, first.batch, size)
