"""What a replay needs of a trajectory's header, looked at before anything uses it.

The store keeps the header as it got it and knows nothing of its meaning. A trajectory that another
program made, or that was changed by hand, may lack a part, though its checksums are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_accie.errors import TrajectoryError
from lightning_accie.replay.precision import PRECISIONS

_Fits = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _all(fits: _Fits) -> _Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _record(**parts: _Fits) -> _Fits:
    """A mapping that has these entries; others may stand beside them."""
    return lambda value: (
        isinstance(value, dict) and all(k in value and fits(value[k]) for k, fits in parts.items())
    )


def _is_parameter(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) == 3
    return fits and _is_text(value[0]) and _all(_is_count)(value[1]) and _is_text(value[2])


def _is_clip(value: Any) -> bool:
    return value is None or _record(
        algorithm=lambda name: name in ("norm", "value"),
        value=lambda limit: isinstance(limit, float),
    )(value)


def _is_splice(value: Any) -> bool:
    return _record(
        step=_is_count,
        global_step=_is_count,
        trainer=_record(),
        buffers=lambda other: isinstance(other, bool),
    )(value)


def _is_layout(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) == 4
    return fits and all(map(_is_count, value[:2])) and _is_text(value[2])


def _is_loss_form(value: Any) -> bool:
    fits = _record(
        hand_written=lambda level: isinstance(level, (bool, str)),
        excluded=_all(_is_count),
        penalty=lambda there: isinstance(there, bool),
    )
    return fits(value) and _all(_is_layout)(value.get("layouts", []))


_NEEDED: dict[str, _Fits] = {
    "module": _is_text,
    "parameters": _all(_is_parameter),
    "groups": _all(_all(_is_text)),
    "frozen": _all(_is_text),
    "optimizer": _is_text,
    "clip": _is_clip,
    "precision": lambda name: name in PRECISIONS,
    "eval_modules": _all(_is_text),
    "step_arguments": _all(_is_text),
    "trainer": _record(),
    "loaders": _all(_record(samples=_is_count)),
    "monitor": _is_text,
}
_OPTIONAL: dict[str, _Fits] = {
    "best": lambda best: best is None or _record(step=_is_count)(best),
    "resumed": _all(_is_splice),
    "loss_form": _is_loss_form,
    "overridden_hooks": _all(_is_text),
    "written": _is_count,
}
"""Those that earlier releases, or runs that broke off, have not."""


def check_header(header: Mapping[str, Any], directory: Path) -> None:
    """Refuse a header that lacks what a replay needs, or has something else there.

    Args:
        header: a trajectory's header.
        directory: the trajectory's.

    Raises:
        TrajectoryError: naming the entries.
    """
    wrong = [key for key, fits in _NEEDED.items() if key not in header or not fits(header[key])]
    wrong += [key for key, fits in _OPTIONAL.items() if key in header and not fits(header[key])]
    if not wrong:
        known = {name for name, *_ in header["parameters"]}
        optimised = [name for group in header["groups"] for name in group]
        if len(set(optimised)) < len(optimised) or not known.issuperset(optimised):
            wrong.append("groups")
        if not known.issuperset(header["frozen"]):
            wrong.append("frozen")
    if wrong:
        named = ", ".join(f"`{key}`" for key in wrong)
        raise TrajectoryError(
            f"The header of the trajectory {directory} lacks {named}, or has something there that "
            "InfluenceCallback does not write, so the run cannot be replayed: another program wrote "
            "it, or changed it. Record the run again."
        )
