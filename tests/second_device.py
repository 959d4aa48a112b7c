"""A second device on a machine that has none: tensors that say so, and whose numbers are on the CPU.

torch lets a backend be written in Python (`torch.utils.backend_registration`). This one computes
everything by torch's CPU kernels and, as CUDA does, refuses an operator that meets tensors of two
devices; numbers without a dimension, and indices, may come from the CPU. Its dropout is one kernel that
draws otherwise than ``bernoulli_``, as CUDA's is. So what holds here holds for CUDA as far as the
package's own arithmetic goes: no tensor is left behind, and nothing depends on where it is computed.

It changes its process for good, so that `tests.second_device_runs` alone imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

_aten = torch.ops.aten
_COPY = _aten.copy_.default
_BY_INDEX = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)
_FACTORIES = {
    "empty.memory_format": _aten.empty.memory_format,
    "empty_strided": _aten.empty_strided.default,
    "eye": _aten.eye.default,
    "eye.m": _aten.eye.m,
    "arange": _aten.arange.default,
    "arange.start": _aten.arange.start,
    "arange.start_step": _aten.arange.start_step,
}


class Elsewhere(Tensor):
    """A tensor on the second device; ``raw`` has its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Elsewhere) -> None:
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.raw = value.raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, and put the result where its operands are."""
    if func is not _COPY and func is not _aten._to_copy.default:
        _refuse_mixed(func, args, kwargs)
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Elsewhere)]
    here, named = pytree.tree_map_only(Elsewhere, lambda tensor: tensor.raw, (args, kwargs))
    target = kwargs.get("device")
    if target is not None and torch.device(target).type == NAME:
        named["device"] = torch.device("cpu")
    dropout = func is _aten.native_dropout.default and here[2] is not False
    found = _dropout(*here[:2]) if dropout else func(*here, **named)
    if target is not None and torch.device(target).type != NAME:
        return found
    if torch.Tag.inplace_view in func.tags:  # its own shape is to change as well
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            func(*args, **kwargs)
    for tensor in given:
        if tensor.shape != tensor.raw.shape:
            raise NotImplementedError(f"{func} resized a tensor, which this device does not follow")
    known = {id(tensor.raw): tensor for tensor in given}
    if func is _COPY:
        return args[0]

    def wrapped(raw: Tensor) -> Tensor:
        return known[id(raw)] if id(raw) in known else Elsewhere(raw)

    return pytree.tree_map_only(Tensor, wrapped, found)


def _refuse_mixed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    operands: Any = (args[0], args[2:]) if func in _BY_INDEX else args
    for leaf in pytree.tree_leaves((operands, kwargs)):
        if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere) and leaf.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got one of shape "
                f"{tuple(leaf.shape)} on the CPU and another on {DEVICE}"
            )


def _dropout(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    kept = torch.rand(values.shape, dtype=torch.float64) >= p
    return values * kept / (1.0 - p), kept


def _factory(op: Any) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return _run(op, args, {**kwargs, "device": DEVICE})

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _run(_COPY, (target, source), {})
    return target


def _zeros(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return Elsewhere(torch.zeros(size, dtype=dtype))


_library = torch.library.Library("aten", "IMPL")
for _name, _op in _FACTORIES.items():
    _library.impl(_name, _factory(_op), "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_efficientzerotensor", _zeros, "PrivateUse1")
