"""One callback class for both of Lightning's namespaces.

`lightning.pytorch` and `pytorch_lightning` each have a `Callback` base of their own and accept no
other; a class with both bases is a callback in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback as _Callback

if TYPE_CHECKING:
    CallbackBase = _Callback
else:
    try:
        from pytorch_lightning import Callback as _OtherCallback
    except ImportError:
        _bases = (_Callback,)
    else:
        _bases = (_Callback, _OtherCallback)
    CallbackBase = type(
        "CallbackBase", _bases, {"__doc__": "Base of callbacks in both namespaces."}
    )

__all__ = ["CallbackBase"]
