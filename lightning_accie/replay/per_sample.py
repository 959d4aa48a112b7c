"""Per-sample weights inside the user's own loss.

A training step ends in some reduction over the batch, ``F.cross_entropy(logits, y)`` say. While
`WeightedReduction` is active, such a reduction takes its elements without reduction, weights those of
sample i by w_i, and adds them up over the **same denominator** (method: section 2): the step's loss
becomes Σ_i w_i ℓ_i(θ)/|m| + R(θ), affine in w, with one pass over the whole batch. Dropout masks and
batch statistics are therefore the batch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accie.errors import UnsupportedError
from lightning_accie.replay.loss_form import BY_HAND, ROWS, Layout, LossForm
from lightning_accie.replay.operators import Differentiable
from lightning_accie.replay.outputs import Outputs


def _count(elements: Tensor, arguments: Mapping[str, Any]) -> Tensor | float:
    """The denominator of a plain mean."""
    return float(elements.numel())


def _class_weight_sum(elements: Tensor, arguments: Mapping[str, Any]) -> Tensor | float:
    """The denominator of ``cross_entropy`` and ``nll_loss``: the weights of the targets' classes."""
    target = arguments["target"]
    if target.is_floating_point():  # class probabilities: a plain mean over the targets
        return float(elements.numel())
    kept = target != arguments["ignore_index"]
    weight = arguments["weight"]
    if weight is None:
        return kept.sum()
    return weight[torch.where(kept, target, 0)].mul(kept).sum()


def _batch_size(elements: Tensor, arguments: Mapping[str, Any]) -> Tensor | float:
    """The denominator of ``kl_div(reduction="batchmean")``."""
    return float(elements.shape[0])


def _weight_sum(elements: Tensor, arguments: Mapping[str, Any]) -> Tensor | float:
    """The denominator of ``mse_loss``: its weights' sum, where it has some."""
    weight = arguments.get("weight")
    return float(elements.numel()) if weight is None else weight.sum()


_Denominator = Callable[[Tensor, Mapping[str, Any]], "Tensor | float"]

_LOSSES: dict[Callable[..., Tensor], _Denominator] = {
    F.cross_entropy: _class_weight_sum,
    F.nll_loss: _class_weight_sum,
    F.mse_loss: _weight_sum,
    **dict.fromkeys(
        [
            F.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
            F.cosine_embedding_loss,
            F.ctc_loss,
            F.gaussian_nll_loss,
            F.hinge_embedding_loss,
            F.huber_loss,
            F.kl_div,
            F.l1_loss,
            F.margin_ranking_loss,
            F.multi_margin_loss,
            F.multilabel_margin_loss,
            F.multilabel_soft_margin_loss,
            F.poisson_nll_loss,
            F.smooth_l1_loss,
            F.soft_margin_loss,
            F.triplet_margin_loss,
            F.triplet_margin_with_distance_loss,
        ],
        _count,
    ),
}
_CURVED = {
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.mse_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
}
"""Losses that are convex and curved in their ``input``. Others leave all of the curvature to what comes
before them (``nll_loss`` is linear), or are not convex in it."""
_SIGNATURES = {loss: inspect.signature(loss) for loss in _LOSSES}
_HAND_WRITTEN = {torch.Tensor.mean, torch.mean, torch.Tensor.sum, torch.sum}


@dataclass(frozen=True)
class Reduction:
    """A reduction in the user's step that sample weights might go into.

    Attributes:
        name: the function's name.
        elements: what it reduces.
        own: the reduction as the user wrote it.
        along: the same over other elements of that shape.
        dims: the dimensions that it reduces; None for all.
        outputs: what enters the loss, where that is one that is convex and curved in it.
    """

    name: str
    elements: Tensor
    own: Callable[[], Tensor]
    along: Callable[[Tensor], Tensor]
    dims: tuple[int, ...] | None = None
    outputs: Tensor | None = None

    def weighted(self, weights: Tensor, layout: Layout) -> Tensor:
        """Reduce with a factor for each sample.

        Args:
            weights: ``[B]``.
            layout: which elements are whose.

        Returns:
            The reduction of w_i times the elements of sample i, over the user's own denominator.
        """
        elements = _wide(self.elements)
        return self.along(elements * layout.spread(weights.to(elements), elements.shape))


@dataclass(frozen=True)
class _Sum(Reduction):
    """A sum of all elements over a denominator."""

    denominator: Tensor | float = 1.0

    def weighted(self, weights: Tensor, layout: Layout) -> Tensor:
        per_sample = layout.per_sample(_wide(self.elements), len(weights))
        return torch.dot(per_sample, weights.to(per_sample.dtype)) / self.denominator


def _wide(elements: Tensor) -> Tensor:
    """At least 32 bits: a weighted sum in 16 would round the weights away."""
    return elements.to(torch.promote_types(elements.dtype, torch.float32))


class ReductionMode(Differentiable):
    """Meets every reduction of the user's step that sample weights might go into.

    Args:
        hand_written: which reductions by hand to meet, one of `BY_HAND`.
    """

    def __init__(self, hand_written: str) -> None:
        super().__init__()
        level = BY_HAND.index(hand_written)
        self._whole, self._partial = level > 0, level > 1

    def meet(self, reduction: Reduction) -> Tensor:
        """Take a reduction's place.

        Returns:
            The value that the step goes on with.
        """
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Meet a reduction, or call ``func`` in its differentiable form.

        Returns:
            What takes the place of its result.
        """
        if func in _LOSSES:
            return self._loss(func, args, kwargs or {})
        if self._whole and func in _HAND_WRITTEN:
            return self._by_hand(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def _loss(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        reduction = _reduction(arguments)
        if reduction == "none":
            return func(*args, **kwargs)
        arguments |= {"reduction": "none"}
        arguments |= {key: None for key in ("size_average", "reduce") if key in arguments}
        elements = func(*bound.args, **bound.kwargs)
        if reduction == "sum":
            denominator: Tensor | float = 1.0
        elif reduction == "batchmean":
            denominator = _batch_size(elements, arguments)
        else:
            denominator = _LOSSES[func](elements, arguments)
            if func is F.ctc_loss:  # a mean over the samples of what is already one by length
                elements = elements / _lengths(arguments["target_lengths"], elements)
        return self.meet(
            _Sum(
                func.__name__,
                elements,
                partial(func, *args, **kwargs),
                lambda other: other.sum() / denominator,
                outputs=arguments["input"] if func in _CURVED else None,
                denominator=denominator,
            )
        )

    def _by_hand(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        value, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
        others = {key: item for key, item in kwargs.items() if key != "input"}
        dims = _dims(value, rest, others)
        own = partial(func, *args, **kwargs)
        if not value.is_floating_point() or (dims is not None and not self._partial):
            return own()
        name = func.__name__

        def along(elements: Tensor) -> Tensor:
            return func(elements, *rest, **others)

        if dims is not None:
            return self.meet(Reduction(f"{name}(dim=…)", value, own, along, dims))
        mean = func in (torch.mean, torch.Tensor.mean)
        count = float(value.numel()) if mean else 1.0
        return self.meet(_Sum(name, value, own, along, denominator=count))


class WeightedReduction(ReductionMode):
    """Weights each sample's terms in every loss reduction that runs inside.

    Args:
        weights: ``[B]``, one weight a sample of the batch; 1 in the real run.
        form: where the weights go.
        spans: where each training loader's samples lie in ``weights``, where there are several.
        around: compute a reduction as the user's own, plus Σ_i (w_i - 1) ℓ_i/|m|. At w = 1 value
            and gradient are then those of the unweighted run, bit for bit. Without it the
            reduction is Σ_i w_i ℓ_i/|m| alone.
    """

    def __init__(
        self,
        weights: Tensor,
        form: LossForm,
        *,
        spans: Mapping[int, slice] | None = None,
        around: bool = True,
    ) -> None:
        super().__init__(form.hand_written)
        self.weights = weights
        self.form = form
        self.spans = spans or {}
        self.around = around
        self.met = 0
        self.outputs: list[Outputs] = []
        """What entered the weighted losses, where its rows are the samples' own."""

    def meet(self, reduction: Reduction) -> Tensor:
        """Weight a reduction.

        Returns:
            Its weighted form, or its own value where it carries no weights.

        Raises:
            UnsupportedError: if its rows cannot be told apart by sample.
        """
        place, self.met = self.met, self.met + 1
        if place in self.form.excluded:
            return reduction.own()
        layout = self.form.layouts.get(place, ROWS)
        weights, shape = self.weights, tuple(reduction.elements.shape)
        if layout.source is not None:
            if layout.source not in self.spans:  # none of that loader's samples: nobody's term
                return reduction.own()
            weights = weights[self.spans[layout.source]]
        if not layout.fits(shape, len(weights)):
            raise UnsupportedError(
                f"`{reduction.name}` in training_step reduces a tensor of shape {shape}, but the "
                f"batch has {len(weights)} samples: its rows cannot be told apart by sample. Pass "
                "`sample_losses=` to InfluenceCallback."
            )
        entered = reduction.outputs
        if entered is not None and layout.axis == 0 and layout.source is None:
            self.outputs.append(Outputs(entered, layout, len(weights)))
        if not self.around:
            return reduction.weighted(weights, layout)
        own = reduction.own()
        return own + reduction.weighted(weights - 1.0, layout).to(own.dtype)


@dataclass(frozen=True)
class Met:
    """A reduction and the value it had."""

    reduction: Reduction
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it reduces."""
        return tuple(self.reduction.elements.shape)


class ReductionScout(ReductionMode):
    """Lists the reductions that `WeightedReduction` would meet, and changes none.

    Args:
        hand_written: see there.
    """

    def __init__(self, hand_written: str) -> None:
        super().__init__(hand_written)
        self.found: list[Met] = []
        self.scalars: dict[str, None] = {}
        """The functions that made a scalar out of a tensor in any other way."""

    def meet(self, reduction: Reduction) -> Tensor:
        """Note a reduction.

        Returns:
            Its own value.
        """
        self.found.append(Met(reduction, reduction.own()))
        return self.found[-1].value

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Meet a reduction, and note what else reduces.

        Returns:
            The result.
        """
        value = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if not name.startswith("__") and func not in _LOSSES and func not in _HAND_WRITTEN:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            reduces = isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad
            if reduces and any(tensor.dim() > 0 for tensor in tensors):
                self.scalars[name] = None
        return value


def _dims(
    value: Tensor, rest: tuple[Any, ...], others: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The dimensions that a sum or mean by hand reduces; None for all of them."""
    dims = rest[0] if rest else others.get("dim", others.get("axis"))
    if dims is None or isinstance(dims, torch.dtype) or value.dim() == 0:
        return None
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(sorted(dim % value.dim() for dim in dims)) or None


def _lengths(lengths: Any, like: Tensor) -> Tensor:
    """The targets' lengths as ``ctc_loss`` divides by them."""
    return torch.as_tensor(lengths, device=like.device).clamp_min(1).to(like.dtype)


def _reduction(arguments: Mapping[str, Any]) -> str:
    """The reduction in force, with the deprecated ``size_average`` and ``reduce`` resolved."""
    if arguments.get("reduce") is False:
        return "none"
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        return "sum" if arguments.get("size_average") is False else "mean"
    return str(arguments["reduction"])
