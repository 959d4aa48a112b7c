"""Which parameters an estimator follows: ``layers=``."""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from lightning_accie.errors import UnsupportedError

Layers = str | Sequence[str] | Callable[[str], bool] | None


class Layered(Protocol):
    """An estimator that follows some layers only."""

    layers: Layers


_E = TypeVar("_E", bound=Layered)


def check_layers(layers: Layers) -> Layers:
    """Validate a ``layers=`` argument.

    Args:
        layers: see `chosen_names`.

    Returns:
        The argument; globs as a tuple.

    Raises:
        ValueError: if it is neither None, globs, nor a callable.
    """
    if layers is None or callable(layers):
        return layers
    globs = (layers,) if isinstance(layers, str) else layers
    if not isinstance(globs, Iterable) or not (globs := tuple(globs)):
        raise ValueError(_WANTED.format(layers))
    if not all(isinstance(one, str) and one for one in globs):
        raise ValueError(_WANTED.format(layers))
    return globs


_WANTED = (
    '`layers` must be a glob of module or parameter names such as "head" or "encoder.layers.1*", '
    "several of them, or a callable(parameter_name) -> bool, got {!r}."
)


def chosen_names(layers: Layers, params: Sequence[str]) -> tuple[str, ...] | None:
    """Find the parameters that ``layers=`` names.

    Args:
        layers: globs, each of a parameter's name or of a module that holds it, at any depth;
            or a predicate on a parameter's name; None for all.
        params: the names of the trained parameters.

    Returns:
        Those chosen, in the order of ``params``; None for all.

    Raises:
        ValueError: if it names none, or a glob matches nothing, with the names there are.
    """
    if layers is None:
        return None
    if callable(layers):
        chosen = {name for name in params if layers(name)}
    else:
        globs = (layers,) if isinstance(layers, str) else layers
        chosen = set()
        for pattern in globs:
            matched = {name for name in params if _matches(pattern, name)}
            if not matched:
                raise ValueError(f"`layers` has {pattern!r}, which matches no {_among(params)}")
            chosen |= matched
    if not chosen:
        raise ValueError(f"`layers` chooses no {_among(params)}")
    return tuple(name for name in params if name in chosen)


def followed(layers: Layers, params: Sequence[str]) -> tuple[str, ...] | None:
    """The same for a recorded run.

    Args:
        layers: see `chosen_names`.
        params: the names of the parameters that it trained.

    Returns:
        Those chosen; None for all.

    Raises:
        UnsupportedError: where `chosen_names` raises.
    """
    try:
        return chosen_names(layers, params)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def layers_to_json(layers: Layers) -> dict[str, Any]:
    """Describe a ``layers=`` argument for reports.

    Args:
        layers: see `chosen_names`.

    Returns:
        The globs, or the predicate's name, under ``"layers"``; nothing for None.
    """
    if layers is None:
        return {}
    if callable(layers):
        return {"layers": getattr(layers, "__qualname__", repr(layers))}
    return {"layers": [layers] if isinstance(layers, str) else list(layers)}


def with_names(estimator: _E, params: Sequence[str]) -> _E:
    """Turn a predicate into the names it chooses, which can be written down and sent elsewhere.

    Args:
        estimator: whose ``layers`` it is.
        params: the names of the trained parameters.

    Returns:
        The estimator, or a copy of it with names instead.

    Raises:
        UnsupportedError: where `chosen_names` raises.
    """
    if not callable(estimator.layers):
        return estimator
    explicit = copy.copy(estimator)
    explicit.layers = [glob.escape(name) for name in followed(estimator.layers, params) or ()]
    return explicit


def _matches(pattern: str, name: str) -> bool:
    """Whether a glob names a parameter or a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _among(params: Sequence[str]) -> str:
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name in params)
    shown = ", ".join(list(modules)[:12]) + (", …" if len(modules) > 12 else "")
    return f"parameter that is trained. They are in: {shown}."
