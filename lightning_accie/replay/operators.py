"""Operators of torch that have no second derivative, or none under `torch.func`, in a form that has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Differentiable(TorchFunctionMode):
    """Makes operators behave under `torch.func` as they do without it, derivatives included.

    Attention goes through its maths kernel: the fused ones have no forward mode and no double
    backward. Weight normalisation is written out: torch's own operator has no forward mode, and its
    double backward is wrong in the direction (seen in torch 2.13). So are distances: `torch.cdist` has
    neither. So is normalisation by running statistics that are differentiated for; running statistics
    are not updated in place. Dropout draws its mask in the order of its input's memory, and on a GPU by
    the kernel that training draws it with, as plain torch does; `torch.func` would draw in the order of
    the dimensions, and on a GPU by another kernel, and so another mask.
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
        if func is torch.cdist:
            return _cdist(*args, **(kwargs or {}))
        if func in _EVALUATED and _running_differentiated(*args, **(kwargs or {})):
            return _normalize(*args, **(kwargs or {}))
        if func is F.instance_norm:
            return _instance_norm(*args, **(kwargs or {}))
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _multi_head_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.scaled_dot_product_attention` by its maths kernel."""
    device = query.device.type
    with sdpa_kernel(SDPBackend.MATH):
        if not torch.is_autocast_enabled(device):
            return F.scaled_dot_product_attention(query, *args, **kwargs)
        # Under `torch.func` autocast would reach the operators inside the kernel too, whose
        # derivatives then meet in two precisions. So cast here what it casts, and leave it out.
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if fits and value.dtype != torch.float64 else value

        given = [cast(value) for value in (query, *args)]
        named = {name: cast(value) for name, value in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return F.scaled_dot_product_attention(*given, **named)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` by the maths kernel, or where that fails, written out."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    wanted = bound.arguments["need_weights"]
    # What is inside cannot be reached, but asked for its weights it is written out in operators.
    if torch.is_autocast_enabled(bound.arguments["query"].device.type):
        bound.arguments["need_weights"] = True
    with sdpa_kernel(SDPBackend.MATH):
        output, weights = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
    return output, weights if wanted else None


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """`torch.cdist` written out; where two points meet the derivative is 0, as torch has it."""
    apart = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 0.0:
        return (apart != 0).to(apart.dtype).sum(-1)
    if p == 1.0:
        return apart.abs().sum(-1)
    if p == float("inf"):
        return apart.abs().amax(-1)
    powers = apart.square().sum(-1) if p == 2.0 else apart.abs().pow(p).sum(-1)
    met = powers == 0.0
    root = torch.where(met, 1.0, powers)
    return torch.where(met, 0.0, root.sqrt() if p == 2.0 else root.pow(1.0 / p))


_EVALUATED = (F.batch_norm, F.instance_norm)


def _running_differentiated(
    input: Tensor, running_mean: Tensor | None = None, *args: Any, **kwargs: Any
) -> bool:
    return running_mean is not None and running_mean.requires_grad


def _normalize(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *rest: Any,
    eps: float = 1e-5,
    **others: Any,
) -> Tensor:
    """Normalise by running statistics, as batch and instance normalisation do in evaluation mode."""
    eps = rest[2] if len(rest) > 2 else eps  # after the mode and the momentum
    shape = (1, -1, *[1] * (input.dim() - 2))
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    *rest: Any,
    **others: Any,
) -> Tensor:
    """Instance normalisation, which by its own statistics updates no running ones."""
    given = (None, None) if use_input_stats else (running_mean, running_var)
    return F.instance_norm(input, *given, weight, bias, use_input_stats, *rest, **others)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0 or (input.is_contiguous() and input.is_cpu):
        return F.dropout(input, p, training)
    strides = input.stride()
    order = sorted(range(input.dim()), key=lambda dim: -strides[dim])
    sizes = [input.shape[dim] for dim in order]
    # Off the CPU dropout is one kernel, in place of which `vmap` would call ``bernoulli_``.
    with torch._C._DisableFuncTorch():
        mask = F.dropout(torch.ones(sizes, dtype=input.dtype, device=input.device), p)
    return input * mask.permute([order.index(dim) for dim in range(input.dim())])
