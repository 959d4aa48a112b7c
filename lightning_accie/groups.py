"""The influence of groups of training samples: a class, an annotator, a source, a cluster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_accie.agreement import Agreement, measure
from lightning_accie.estimators.acc_sgd_ie import AccSgdIE
from lightning_accie.estimators.base import Replay
from lightning_accie.estimators.leave_one_out import LeaveOneOut
from lightning_accie.estimators.sets import leave_out
from lightning_accie.estimators.sgd_ie import SgdIE
from lightning_accie.scores_files import data_frame

if TYPE_CHECKING:
    import pandas

Groups = Mapping[Any, Any] | Sequence[Any] | Tensor | np.ndarray | Callable[[Any], Any]
"""Names to sample indices; a name for every sample of the dataset; or ``callable(sample) -> name``."""


@dataclass(frozen=True, eq=False, repr=False)
class GroupScores:
    """What leaving out each group of training samples at once does to the query.

    Influence is q(without the group) − q, in units of the query, where lower is better. **Positive:
    the group helps. Negative: it harms.**

    Attributes:
        name: ``[K]`` the groups' names.
        count: ``[K]`` int64, how many samples of each the run drew.
        summed: ``[K]`` float64, the sum of the members' single influences.
        acc: ``[K]`` float64, by ACC-SGD-IE of the whole group; NaN where it was not asked for.
        exact: ``[K]`` float64, by replaying the run without the group; NaN where it was not asked for,
            or the run without the group is no longer finite.
        trusted: ``[K]`` bool, False where ACC-SGD-IE said itself that it is not to be relied on.
        agreement: how far the sums, and ACC-SGD-IE, agree with the exact figures.
        query: the query's name.
    """

    name: tuple[Any, ...]
    count: Tensor
    summed: Tensor
    acc: Tensor
    exact: Tensor
    trusted: Tensor
    agreement: tuple[Agreement, ...] = ()
    query: str = ""

    def __len__(self) -> int:
        return len(self.name)

    @property
    def influence(self) -> Tensor:
        """``[K]`` float64, the best figure known: exact, else ACC-SGD-IE, else the sum."""
        estimate = torch.where(self.acc.isnan(), self.summed, self.acc)
        return torch.where(self.exact.isnan(), estimate, self.exact)

    @property
    def excess(self) -> Tensor:
        """``[K]`` float64, how far the sum of single influences is off: summed − exact."""
        return self.summed - self.exact

    def __repr__(self) -> str:
        on = f" on {self.query}" if self.query else ""
        lines = [f"GroupScores({len(self)} groups{on}, the most harmful first)"]
        order = torch.argsort(self.influence, stable=True).tolist()
        for place in order[:10]:
            parts = [f"{float(self.influence[place]):+.4g}", f"{int(self.count[place])} samples"]
            if not bool(self.exact[place].isnan()):
                parts.append(f"sum of single influences {float(self.summed[place]):+.4g}")
            lines.append(f"  {self.name[place]}: " + ", ".join(parts))
        if len(self) > 10:
            lines.append(f"  and {len(self) - 10} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, list[Any]]:
        """The table as plain Python.

        Returns:
            ``group``, ``samples``, ``influence``, ``exact``, ``acc``, ``summed``, ``excess`` and
            ``trusted``, one row a group, the most harmful first.
        """
        order = torch.argsort(self.influence, stable=True)
        columns = {
            "influence": self.influence,
            "exact": self.exact,
            "acc": self.acc,
            "summed": self.summed,
            "excess": self.excess,
            "trusted": self.trusted,
        }
        return {
            "group": [self.name[place] for place in order.tolist()],
            "samples": self.count[order].tolist(),
            **{name: values[order].tolist() for name, values in columns.items()},
        }

    def to_pandas(self) -> pandas.DataFrame:
        """The table of `to_dict` as a data frame.

        Returns:
            One row a group.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame(self.to_dict())


def group_scores(
    replay: Replay, names: Sequence[Any], sets: Tensor, *, exact: bool, acc: bool
) -> GroupScores:
    """Estimate the influence of groups.

    Args:
        replay: the run and the query.
        names: ``[K]``.
        sets: ``[K, span]`` bool, the members.
        exact: whether to replay the run without each group.
        acc: whether to carry ACC-SGD-IE of each group.

    Returns:
        The scores, in the order of ``names``.
    """
    single = SgdIE().estimate(replay)
    members = sets[:, replay.samples]
    summed = members.double() @ single.influence
    unknown = torch.full_like(summed, float("nan"))
    truth, noise, agreement = unknown, float("nan"), []
    if exact:
        found = leave_out(LeaveOneOut(), replay, sets)
        truth, noise = found.influence.where(found.influence.isfinite(), unknown), found.noise
    carried, trusted = unknown, torch.ones(len(sets), dtype=torch.bool)
    if acc:
        accumulated = leave_out(AccSgdIE(), replay, sets)
        carried, trusted = accumulated.influence, accumulated.trusted
    for estimate, estimator in ((carried, AccSgdIE.name), (summed, f"sum of {SgdIE.name}")):
        if exact and not bool(estimate.isnan().all()):
            agreement.append(measure(estimate, truth, estimator=estimator, noise_floor=noise))
    return GroupScores(
        tuple(names),
        members.sum(1),
        summed,
        carried,
        truth,
        trusted,
        tuple(agreement),
        replay.query.name,
    )


def summed_by(names: Sequence[Any], influence: Tensor, query: str = "") -> GroupScores:
    """Add single influences up by group.

    Args:
        names: ``[n]`` each sample's group.
        influence: ``[n]``; those that are not finite are left out.
        query: the query's name.

    Returns:
        The sums, in order of appearance.
    """
    groups = {name: place for place, name in enumerate(dict.fromkeys(names))}
    of = torch.tensor([groups[name] for name in names], dtype=torch.int64)
    kept = influence.isfinite()
    summed = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, of[kept], influence[kept])
    unknown = torch.full_like(summed, float("nan"))
    count = torch.bincount(of[kept], minlength=len(groups))
    trusted = torch.ones(len(groups), dtype=torch.bool)
    return GroupScores(tuple(groups), count, summed, unknown, unknown, trusted, query=query)


def members_of(
    groups: Groups, replay: Replay, sample: Callable[[int], Any], length: int | None
) -> tuple[list[Any], Tensor]:
    """Turn a ``groups=`` argument into sets of sample numbers.

    Args:
        groups: see `Groups`.
        replay: the run.
        sample: reads a training sample by its number.
        length: how many samples the training data has, if that is known.

    Returns:
        K names, and ``[K, span]`` bool.

    Raises:
        ValueError: if a group has no name, a sample that the data do not have, or none that the run
            drew, or ``groups`` is none of what it may be.
    """
    if isinstance(groups, Mapping):
        indices = {name: _indices(name, given, length) for name, given in groups.items()}
    else:
        if callable(groups):
            known = {number: groups(sample(number)) for number in replay.samples.tolist()}
        else:
            known = dict(enumerate(_names(groups, length)))
        by_name: dict[Any, list[int]] = defaultdict(list)
        for number, name in known.items():
            by_name[name.item() if hasattr(name, "item") else name].append(number)
        indices = {name: torch.tensor(numbers) for name, numbers in by_name.items()}
    sets = torch.zeros(len(indices), replay.span, dtype=torch.bool)
    drawn = torch.zeros(replay.span, dtype=torch.bool)
    drawn[replay.samples] = True
    for row, (name, numbers) in zip(sets, indices.items(), strict=True):
        row[numbers[numbers < replay.span]] = True
        row &= drawn
        if not bool(row.any()) and isinstance(groups, Mapping):
            raise ValueError(
                f"The group {name!r} has no sample that the run drew: its influence is exactly 0. "
                "Leave it out."
            )
    kept = sets.any(1)
    names = [name for name, keep in zip(indices, kept.tolist(), strict=True) if keep]
    if not names:
        raise ValueError("`groups` names no group.")
    return names, sets[kept]


def _indices(name: Any, given: Any, length: int | None) -> Tensor:
    try:
        numbers = torch.as_tensor(sorted(given) if isinstance(given, (set, frozenset)) else given)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0)
    if numbers.dtype == torch.bool and numbers.dim() == 1:
        numbers = numbers.nonzero()[:, 0]
    whole = not numbers.is_floating_point() and not numbers.is_complex()
    if numbers.dim() != 1 or not whole or bool((numbers < 0).any()):
        raise ValueError(
            f"`groups[{name!r}]` must hold the indices of training samples, or be a mask over them, "
            f"got {given!r}."
        )
    if length is not None and bool((numbers >= length).any()):
        raise ValueError(
            f"`groups[{name!r}]` names sample {int(numbers.max())}, but the training data has {length} "
            f"samples, 0 to {length - 1}."
        )
    return numbers.long()


def _names(groups: Any, length: int | None) -> list[Any]:
    if isinstance(groups, (str, bytes)) or not hasattr(groups, "__len__"):
        raise ValueError(
            "`groups` must map names to sample indices, give a name for every sample of the training "
            f"data, or be a callable(sample) -> name, got {groups!r}."
        )
    if length is not None and len(groups) != length:
        raise ValueError(
            f"`groups` gives {len(groups)} names, but the training data has {length} samples. Give one "
            "for each, in the dataset's order, or map names to sample indices."
        )
    return groups.tolist() if hasattr(groups, "tolist") else list(groups)
