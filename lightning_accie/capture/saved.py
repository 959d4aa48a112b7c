"""At which step each of Lightning's checkpoints was saved, and which of them is the best.

A run can be analysed up to its best checkpoint: the weights that people keep. So the trajectory's
header names, for the checkpoints that the Trainer still knows, the steps that were taken when they
were saved, and the best one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_accie.capture.patch import Patch
from lightning_accie.errors import UnsupportedError


class SavedSteps:
    """Watches a strategy save checkpoints.

    Args:
        trainer: the Trainer.
        monitor: the query's name; a ModelCheckpoint that monitors the same is asked first.
        steps: tells how many steps are recorded now.
        changed: gets what belongs into the trajectory's header, before each checkpoint is saved.
    """

    def __init__(
        self,
        trainer: Any,
        monitor: str,
        steps: Callable[[], int],
        changed: Callable[[dict[str, Any]], None],
    ) -> None:
        self._trainer = trainer
        self._monitor = monitor
        self._steps = steps
        self._changed = changed
        self._saved: dict[str, int] = {}
        self._patch = Patch(trainer.strategy, "save_checkpoint", self._watching)

    def detach(self) -> None:
        """Undo the patch; may be called twice."""
        self._patch.undo()

    def begin(self, steps: int, saved: Mapping[str, int]) -> None:
        """Recording begins: what was saved until now has the state that it begins with.

        Args:
            steps: how many steps an earlier part of the run has taken.
            saved: the checkpoints of that part: their steps by path.
        """
        self._saved = {**saved, **dict.fromkeys(self._saved, steps)}

    def header(self) -> dict[str, Any]:
        """Say what belongs into the trajectory's header now.

        Returns:
            The steps of the checkpoints, and the best one, or None.
        """
        return {"saved": dict(self._saved), "best": self._best()}

    def _watching(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(checkpoint: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
            if self._patch.active:
                self._note(_absolute(filepath))
            return save(checkpoint, filepath, *args, **kwargs)

        return save_checkpoint

    def _note(self, path: str) -> None:
        known = {path, *_known_paths(self._trainer)}
        self._saved[path] = self._steps()
        self._saved = {name: step for name, step in self._saved.items() if name in known}
        self._changed(self.header())

    def _best(self) -> dict[str, Any] | None:
        saver = _saver(self._trainer, self._monitor)
        path = _absolute(saver.best_model_path) if saver and saver.best_model_path else ""
        if path not in self._saved:
            return None
        score = saver.best_model_score
        return {
            "step": self._saved[path],
            "path": path,
            "monitor": saver.monitor,
            "score": None if score is None else float(score),
        }


def check_saver(trainer: Any, monitor: str) -> None:
    """Refuse ``at="best"`` where nothing will say which checkpoint is the best.

    Args:
        trainer: the Trainer.
        monitor: the query's name.

    Raises:
        UnsupportedError: saying what to add.
    """
    if trainer.fast_dev_run:
        rank_zero_info(
            "`fast_dev_run` saves no checkpoint: influence will be that at its last step."
        )
    elif _saver(trainer, monitor) is None:
        raise UnsupportedError(
            '`at="best"` needs to know the best checkpoint, but no ModelCheckpoint of this Trainer '
            f'keeps one. Add `ModelCheckpoint(monitor="{monitor}")` to its callbacks (with a '
            '`save_top_k` other than 0), or use `at="last"`.'
        )


def _saver(trainer: Any, monitor: str) -> Any:
    """The ModelCheckpoint whose best counts: one of the same monitor, else the first with any."""
    savers = [
        callback
        for callback in trainer.checkpoint_callbacks
        if getattr(callback, "monitor", None) and getattr(callback, "save_top_k", 0) != 0
    ]
    same = [callback for callback in savers if callback.monitor == monitor]
    return next(iter(same + savers), None)


def _known_paths(trainer: Any) -> set[str]:
    names = ("best_model_path", "last_model_path", "best_k_models")
    found: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        for value in (getattr(callback, name, None) or () for name in names):
            found |= {_absolute(path) for path in ([value] if isinstance(value, str) else value)}
    return found


def _absolute(path: Any) -> str:
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)
