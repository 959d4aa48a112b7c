"""Per-sample weights inside the user's own loss.

A training step ends in some reduction over the batch, ``F.cross_entropy(logits, y)`` say. While
`WeightedReduction` is active, such a reduction takes its elements without reduction, weights those of
sample i by w_i, and adds them up over the **same denominator** (method: section 2): the step's loss
becomes Σ_i w_i ℓ_i(θ)/|m| + R(θ), affine in w, with one pass over the whole batch. Dropout masks and
batch statistics are therefore the batch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_accie.errors import UnsupportedError


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


_Denominator = Callable[[Tensor, Mapping[str, Any]], "Tensor | float"]

_LOSSES: dict[Callable[..., Tensor], _Denominator] = {
    F.cross_entropy: _class_weight_sum,
    F.nll_loss: _class_weight_sum,
    **dict.fromkeys(
        [
            F.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
            F.cosine_embedding_loss,
            F.gaussian_nll_loss,
            F.hinge_embedding_loss,
            F.huber_loss,
            F.kl_div,
            F.l1_loss,
            F.margin_ranking_loss,
            F.mse_loss,
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
_SIGNATURES = {loss: inspect.signature(loss) for loss in _LOSSES}
_REGRESSION = (F.mse_loss, F.l1_loss, F.huber_loss)  # their `weight=` changes the denominator
_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
_HAND_WRITTEN = {torch.Tensor.mean, torch.mean, torch.Tensor.sum, torch.sum}


class Differentiable(TorchFunctionMode):
    """Makes operators behave under `torch.func` as they do without it, derivatives included.

    Attention goes through its maths kernel: the fused ones have no forward mode and no double
    backward. Dropout draws its mask in the order of its input's memory, as plain torch does;
    `torch.func` would draw in the order of the dimensions, and so another mask for a transposed
    input.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` in its differentiable form.

        Returns:
            What it returns.
        """
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}))
        if func in _ATTENTION:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0 or input.is_contiguous():
        return F.dropout(input, p, training)
    strides = input.stride()
    order = sorted(range(input.dim()), key=lambda dim: -strides[dim])
    sizes = [input.shape[dim] for dim in order]
    mask = F.dropout(torch.ones(sizes, dtype=input.dtype, device=input.device), p)
    return input * mask.permute([order.index(dim) for dim in range(input.dim())])


class WeightedReduction(Differentiable):
    """Weights each sample's terms in every loss reduction that runs inside.

    Args:
        weights: ``[B]``, one weight a sample of the batch; 1 in the real run.
        hand_written: also weight full reductions by hand, ``x.mean()`` and ``x.sum()``.
        excluded: ordinals of reductions that are left alone, because the probe found that they are
            no sum over the samples' losses (a penalty on the weights, a count).
        around: compute a reduction as the user's own, plus Σ_i (w_i - 1) ℓ_i/|m|. At w = 1 value
            and gradient are then those of the unweighted run, bit for bit. Without it the
            reduction is Σ_i w_i ℓ_i/|m| alone.

    Raises:
        UnsupportedError: at a reduction whose rows cannot be told apart by sample.
    """

    def __init__(
        self,
        weights: Tensor,
        *,
        hand_written: bool = False,
        excluded: frozenset[int] = frozenset(),
        around: bool = True,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.around = around
        self.hand_written = hand_written
        self.excluded = excluded
        self.contributions: list[Tensor] = []
        """The value of every reduction, in order."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace a reduction of per-sample terms by its weighted form.

        Returns:
            The weighted reduction, or what ``func`` returns.
        """
        if func in _LOSSES:
            return self._loss(func, args, kwargs or {})
        if self.hand_written and func in _HAND_WRITTEN:
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
        if func in _REGRESSION and arguments.get("weight") is not None:
            raise UnsupportedError(
                f"`{func.__name__}(weight=...)` divides by the weights' sum, which this package "
                "cannot split by sample. Pass `sample_losses=` to InfluenceCallback."
            )
        arguments |= {"reduction": "none"}
        arguments |= {key: None for key in ("size_average", "reduce") if key in arguments}
        elements = func(*bound.args, **bound.kwargs)
        if reduction == "sum":
            denominator: Tensor | float = 1.0
        elif reduction == "batchmean":
            denominator = _batch_size(elements, arguments)
        else:
            denominator = _LOSSES[func](elements, arguments)
        return self._weighted(func.__name__, elements, denominator, partial(func, *args, **kwargs))

    def _by_hand(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        value = args[0] if args else kwargs["input"]
        whole = len(args) <= 1 and not (kwargs.keys() - {"input", "dtype"})
        if not (whole and value.is_floating_point()):
            return func(*args, **kwargs)
        mean = func in (torch.mean, torch.Tensor.mean)
        own = partial(func, *args, **kwargs)
        return self._weighted(func.__name__, value, float(value.numel()) if mean else 1.0, own)

    def _weighted(
        self,
        name: str,
        elements: Tensor,
        denominator: Tensor | float,
        own: Callable[[], Tensor],
    ) -> Tensor:
        batch = len(self.weights)
        if len(self.contributions) in self.excluded:
            contribution = own()
        else:
            if not rows_are_samples(elements.shape, batch):
                raise UnsupportedError(
                    f"`{name}` in training_step reduces a tensor of shape {tuple(elements.shape)}, "
                    f"but the batch has {batch} samples: its rows cannot be told apart by sample. "
                    "Pass `sample_losses=` to InfluenceCallback."
                )
            per_sample = elements.reshape(batch, -1).sum(1)
            weights = self.weights - 1.0 if self.around else self.weights
            contribution = torch.dot(per_sample, weights.to(per_sample.dtype)) / denominator
            if self.around:
                contribution = own() + contribution
        self.contributions.append(contribution)
        return contribution


@dataclass(frozen=True)
class Reduction:
    """A reduction that sample weights might go into: its name, the shape it reduces, its value."""

    name: str
    shape: tuple[int, ...]
    value: Tensor


class ReductionScout(WeightedReduction):
    """Lists the reductions that `WeightedReduction` would weight, and changes none.

    Args:
        hand_written: see there.
    """

    def __init__(self, *, hand_written: bool) -> None:
        super().__init__(torch.zeros(0), hand_written=hand_written)
        self.found: list[Reduction] = []

    def _weighted(
        self,
        name: str,
        elements: Tensor,
        denominator: Tensor | float,
        own: Callable[[], Tensor],
    ) -> Tensor:
        value = own()
        self.found.append(Reduction(name, tuple(elements.shape), value))
        return value


def rows_are_samples(shape: Sequence[int], batch: int) -> bool:
    """Tell whether a tensor of this shape can have one row a sample.

    Returns:
        Whether it has ``batch`` rows; a batch of one sample has all there is.
    """
    return batch == 1 or (len(shape) > 0 and shape[0] == batch)


def _reduction(arguments: Mapping[str, Any]) -> str:
    """The reduction in force, with the deprecated ``size_average`` and ``reduce`` resolved."""
    if arguments.get("reduce") is False:
        return "none"
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        return "sum" if arguments.get("size_average") is False else "mean"
    return str(arguments["reduction"])
