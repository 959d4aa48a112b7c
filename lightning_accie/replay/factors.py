"""The input and output factors of layers, of which every sample's gradient of a weight is made.

A linear layer z = Wa + b at positions τ (the pixels of a convolution, the tokens of a text) gives,
for a scalar L,

    ∂L/∂W = Σ_τ δ_τ a_τᵀ,     ∂L/∂b = Σ_τ δ_τ,     δ_τ = ∂L/∂z_τ,

and the rows of a_τ and δ_τ are the samples' own where no sample sees another. What is linear in a
gradient can therefore be computed of the factors, and the gradients themselves need not be made.

| symbol | name |
|---|---|
| a | ``Call.inputs``, ``[B, τ, in]`` |
| z | ``Call.output``, with its graph |
| δ | ``[K, B, τ, out]``, for K scalars at once |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        weight: the parameter's name; None where it is none of those looked for.
        bias: the same of the bias.
        kind: the layer's class.
        inputs: a, ``[B, τ, in]``; for an embedding, ``[B, τ]`` rows of its weight.
        output: z, with its graph.
        padding: of an embedding, the row that gets no gradient.
    """

    weight: str | None
    bias: str | None
    kind: type[nn.Module]
    inputs: Tensor
    output: Tensor
    padding: int | None = None

    def by_position(self, slopes: Tensor) -> Tensor:
        """Bring δ into the order of the inputs.

        Args:
            slopes: ``[K, …]``, K of the output's shape.

        Returns:
            ``[K, B, τ, out]``, in 32 bits at least.
        """
        slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
        if self.kind is nn.Conv2d:
            slopes = slopes.flatten(3).transpose(2, 3)
        return slopes.reshape(*slopes.shape[:2], -1, slopes.shape[-1])


@dataclass
class Calls:
    """What the layers of a module were called with.

    Attributes:
        made: the calls, in order.
        elsewhere: the names of parameters that were used in a call that has no such factors.
    """

    made: list[Call] = field(default_factory=list)
    elsewhere: set[str] = field(default_factory=set)

    def names(self) -> set[str]:
        """Whose gradients the calls make up.

        Returns:
            The names of the parameters.
        """
        found = {name for call in self.made for name in (call.weight, call.bias) if name}
        return found - self.elsewhere


@contextmanager
def watched(module: nn.Module, params: Mapping[str, Tensor], batch: int) -> Iterator[Calls]:
    """Note what linear, 2-d convolutional and embedding layers are called with.

    Args:
        module: the module, which runs inside.
        params: the parameters that it is bound to, those to look for.
        batch: B; a call whose input has another leading dimension has no factors of the samples.

    Yields:
        The calls; they fill up while the module runs.
    """
    names = {id(value): name for name, value in params.items()}
    calls = Calls()
    hooks = [
        part.register_forward_hook(partial(_note, calls, names, batch))
        for part in module.modules()
        if type(part) in (nn.Linear, nn.Conv2d, nn.Embedding)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _note(
    calls: Calls,
    names: Mapping[int, str],
    batch: int,
    layer: Any,
    arguments: tuple[Any, ...],
    output: Tensor,
) -> Tensor | None:
    """Note a call; what goes on is a copy, as the step may change it in place."""
    weight = names.get(id(layer.weight))
    bias = names.get(id(getattr(layer, "bias", None)))
    if not output.requires_grad or (weight is None and bias is None):
        return None
    inputs = arguments[0].detach() if arguments and isinstance(arguments[0], Tensor) else None
    if inputs is None or not _has_factors(layer, inputs, batch):
        calls.elsewhere |= {name for name in (weight, bias) if name}
        return None
    padding = layer.padding_idx if isinstance(layer, nn.Embedding) else None
    call = Call(weight, bias, type(layer), _by_position(layer, inputs), output, padding)
    calls.made.append(call)
    return output.clone()


def _has_factors(layer: nn.Module, inputs: Tensor, batch: int) -> bool:
    if inputs.dim() == 0 or len(inputs) != batch:
        return False
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return plain and inputs.dim() == 4 and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return not (layer.scale_grad_by_freq or layer.sparse or layer.max_norm is not None)
    return inputs.dim() > 1


def _by_position(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``[B, τ, in]``, or ``[B, τ]`` rows of an embedding."""
    if isinstance(layer, nn.Conv2d):
        given = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return F.unfold(inputs, *given).transpose(1, 2)  # type: ignore[arg-type]
    if isinstance(layer, nn.Embedding):
        return inputs.reshape(len(inputs), -1)
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])


def slopes_of(
    outputs: list[Tensor], calls: list[Call], vectors: list[Tensor], *, rows: int
) -> list[Tensor]:
    """δ of every call, for K directions in the space of some outputs; the graph stays.

    Args:
        outputs: what is differentiated.
        calls: for whose outputs z.
        vectors: K directions stacked, for each of ``outputs``.
        rows: how many go through the graph at once; 1 for one by one.

    Returns:
        ``[K, B, τ, out]`` for each call.
    """
    found: list[list[Tensor]] = []
    count = len(vectors[0])
    for start in range(0, count, rows):
        chunk = [vector[start : start + rows] for vector in vectors]
        size = len(chunk[0])
        many = size > 1
        slopes = torch.autograd.grad(
            outputs,
            [call.output for call in calls],
            chunk if many else [vector[0] for vector in chunk],
            retain_graph=True,
            is_grads_batched=many,
            allow_unused=True,  # torch would make zeros for them, but not K
        )
        shaped = [
            call.output.new_zeros(size, *call.output.shape)
            if slope is None
            else slope.reshape(size, *call.output.shape)
            for slope, call in zip(slopes, calls, strict=True)
        ]
        found.append([c.by_position(s) for s, c in zip(shaped, calls, strict=True)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
