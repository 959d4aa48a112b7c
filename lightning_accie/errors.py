"""The errors a user can meet. Each message says what happened and what to do."""

from __future__ import annotations


class InfluenceError(RuntimeError):
    """Base of the errors of this package."""


class UnsupportedError(InfluenceError):
    """Something in the module, the trainer or the data cannot be captured or replayed."""


class TrajectoryError(InfluenceError):
    """A trajectory on disk is missing, damaged, too new, or belongs to something else."""


class ReplayMismatchError(InfluenceError):
    """The replayed run departs from the recorded one."""


class QueryError(InfluenceError):
    """The query (``monitor=``) cannot be found, or cannot be differentiated."""


class DescribeError(InfluenceError, ValueError):
    """The user's ``describe=`` failed, or returned what makes no columns."""


class RenderError(InfluenceError, ValueError):
    """The user's ``render=`` failed, or returned what cannot be shown."""


def first_line(error: BaseException) -> str:
    """Shorten an error of torch's to what it says first.

    Returns:
        The first line of its message, or its type where it has none.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
