"""Replacing a method of one instance, so that several callbacks can do it and undo it in any order."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


class Patch:
    """A method of an object, replaced on the instance alone.

    Args:
        owner: the object.
        name: the method's name.
        make: given the method as it is now, gives what to call instead. It stays in place after `undo`
            where another patch lies on top: it must only pass calls on then (``active`` is False).
    """

    def __init__(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._owner, self._name = owner, name
        self._before = vars(owner).get(name)
        self.active = True
        original = getattr(owner, name)
        method: Any = wraps(original)(make(original))
        method._patch = self
        setattr(owner, name, method)

    def undo(self) -> None:
        """Put the method back. Where another patch lies on top, this one passes on until it goes."""
        self.active = False
        while (patch := self._top()) is not None and not patch.active:
            delattr(self._owner, self._name)
            if patch._before is not None:
                setattr(self._owner, self._name, patch._before)

    def _top(self) -> Patch | None:
        return getattr(vars(self._owner).get(self._name), "_patch", None)
