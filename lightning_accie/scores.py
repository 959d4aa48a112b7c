"""`InfluenceScores`: what is known of every training sample, ranked, exported and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_accie.agreement import Agreement
from lightning_accie.groups import GroupScores, summed_by
from lightning_accie.images import ReadSample
from lightning_accie.notebook import html_of
from lightning_accie.plots import plot
from lightning_accie.rendered import Render
from lightning_accie.scores_files import (
    JSON_FILE,
    ScoresError,
    csv_text,
    data_frame,
    read_scores,
    write_scores,
    write_table,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

CSV_HEADER = ("rank", "index", "influence", "visits", "estimator", "exact_influence")

_TABLE = (*CSV_HEADER, "estimate", "trusted")
_DTYPES = {
    "index": torch.int64,
    "influence": torch.float64,
    "estimate": torch.float64,
    "visits": torch.int64,
    "exact": torch.float64,
    "trusted": torch.bool,
}


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceScores:
    """The influence of training samples on one query.

    Influence is q(without the sample) − q, in units of the query, where lower is better.
    **Positive: without the sample the query would be higher, so it helps. Negative: it harms.**

    Attributes:
        index: ``[n]`` int64, the dataset indices of the samples; over several datasets, the later
            ones are numbered after the earlier ones.
        influence: ``[n]`` float64, the best figure known: the exact one where the sample was
            replayed exactly, else the estimate.
        estimate: ``[n]`` float64, what the estimator said before an exact replay replaced it.
        visits: ``[n]`` int64, how often training drew the sample.
        exact: ``[n]`` float64, the influence by exact replay; NaN where there was none.
        estimator: ``[n]`` which estimator gave ``influence``: ``"leave-one-out"`` where exact.
        trusted: ``[n]`` bool, False where the estimate is not to be relied on (the estimator said
            so itself) and no exact replay replaced it.
        agreement: how far the estimators agree with the exact replays, the most refined first.
        columns: the user's own columns by name, and ``"loss"`` where it was asked for. Values are
            None, bool, int, float or str; tensors and NumPy scalars of one element, and paths, are
            turned into these.
        info: JSON values about the analysis: the query's name and value, steps, settings, …
        rank: ``[n]`` int64, in `ranked`, `top_harmful` and `top_helpful`: the place in the whole
            ranking, 1 for the strongest harm. None where rows stand in no such order.

    Raises:
        ValueError: if the fields do not fit together, naming the one that does not.
        TypeError: if a field has a wrong type, or a column holds what is not a single value, naming it.

    Examples:
        >>> scores = InfluenceScores(
        ...     index=torch.tensor([0, 1, 2]),
        ...     influence=torch.tensor([0.5, -1.0, -2.0], dtype=torch.float64),
        ...     estimate=torch.tensor([0.4, -1.0, -2.0], dtype=torch.float64),
        ...     visits=torch.tensor([3, 3, 3]),
        ...     exact=torch.tensor([0.5, torch.nan, torch.nan], dtype=torch.float64),
        ...     estimator=("leave-one-out", "sgd-ie", "sgd-ie"),
        ...     trusted=torch.tensor([True, True, True]),
        ... )
        >>> scores
        InfluenceScores(3 samples: 2 harmful, 1 helpful, 1 replayed exactly)
        >>> scores.top_harmful(1).index
        tensor([2])
        >>> [(row["index"], row["influence"]) for row in scores.top_harmful(2)]
        [(2, -2.0), (1, -1.0)]
        >>> list(scores.cleaned(["a", "b", "c"], k=2))
        ['a']
    """

    index: Tensor
    influence: Tensor
    estimate: Tensor
    visits: Tensor
    exact: Tensor
    estimator: tuple[str, ...]
    trusted: Tensor
    agreement: tuple[Agreement, ...] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    rank: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"`{name}` must be a tensor, got {tensor!r}.")
        self._check_others()
        count = len(self.index) if self.index.dim() else -1
        for name, tensor in self._tensors().items():
            dtype = _DTYPES.get(name, torch.int64)
            if tensor.shape != (count,) or tensor.dtype != dtype:
                raise ValueError(
                    f"`{name}` must be [{count}] {dtype}, got {list(tensor.shape)} {tensor.dtype}."
                )
        if len(self.index.unique()) < count or bool((self.index < 0).any()):
            raise ValueError("`index` must hold distinct indices from 0.")
        if len(self.estimator) != count:
            raise ValueError(f"`estimator` must name {count}, got {len(self.estimator)}.")
        replayed = ~self.exact.isnan()
        if not torch.equal(self.influence[replayed], self.exact[replayed]):
            raise ValueError("`influence` must be the exact figure where `exact` has one.")
        columns = {name: checked_column(name, self.columns[name], count) for name in self.columns}
        object.__setattr__(self, "columns", columns)

    def _check_others(self) -> None:
        kinds: dict[str, tuple[Any, Any, str]] = {
            "estimator": ((tuple, list), str, "texts"),
            "agreement": ((tuple, list), Agreement, "agreements"),
            "columns": (Mapping, object, "names"),
            "info": (Mapping, str, "texts"),
        }
        for name, (kind, inner, words) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not all(isinstance(item, inner) for item in value):
                what = f"a mapping from {words}" if kind is Mapping else f"a tuple of {words}"
                raise TypeError(f"`{name}` must be {what}, got {value!r}.")

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One row of `to_dict` a sample, by column name, in the order of ``index``."""
        rows = self if self.rank is not None else self._rows(torch.arange(len(self)))
        table = rows.to_dict()
        return (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))

    def __repr__(self) -> str:
        query = f" on {self.info['query']}" if "query" in self.info else ""
        whole = f" of {self.info['part_of']}" if "part_of" in self.info else ""
        return (
            f"{type(self).__name__}({len(self)}{whole} samples{query}: {len(self._harmful())} harmful, "
            f"{len(self._helpful())} helpful, {self.replayed} replayed exactly{self._trust()})"
        )

    def _trust(self) -> str:
        main = self.main_agreement
        if main is None:
            return ""
        told = f"; Kendall τ {main.kendall_tau:.2f}"
        for found in self.agreement:  # the strongest, which are easy to order, raise the other
            if found.sample == "random" and found.estimator == main.estimator and found.count > 1:
                told += f", at random {found.kendall_tau:.2f}"
        return told + (" of them all" if "part_of" in self.info else "")

    def _repr_html_(self) -> str:
        """The ends of the ranking as tables, for notebooks."""
        return html_of(self)

    @property
    def replayed(self) -> int:
        """How many samples were replayed exactly."""
        return int((~self.exact.isnan()).sum())

    @property
    def main_agreement(self) -> Agreement | None:
        """The most refined estimator's agreement over all replayed samples, if there is one."""
        return next((found for found in self.agreement if found.sample == "verified"), None)

    # ------------------------------------------------------------------ rankings

    def ranked(self) -> InfluenceScores:
        """Sort by influence.

        Returns:
            All samples, strongest harm first; equal ones by index, non-finite ones last.
        """
        return self._rows(self._ranking())

    def top_harmful(self, k: int = 25) -> InfluenceScores:
        """The samples without which the query would be lowest.

        Args:
            k: how many at most.

        Returns:
            Samples of negative influence, strongest harm first.

        Raises:
            ValueError: if ``k`` is negative.
        """
        return self._rows(self._harmful()[: _count(k)])

    def top_helpful(self, k: int = 25) -> InfluenceScores:
        """The samples without which the query would be highest.

        Args:
            k: how many at most.

        Returns:
            Samples of positive influence, strongest help first.

        Raises:
            ValueError: if ``k`` is negative.
        """
        return self._rows(self._helpful()[: _count(k)])

    def cleaned(self, dataset: Dataset[Any], k: int) -> Subset[Any]:
        """Leave out the most harmful samples.

        Args:
            dataset: the training dataset that ``index`` counts in.
            k: how many to leave out. Only samples of negative influence can be.

        Returns:
            The rest of the dataset in its order, with samples that training never drew.

        Raises:
            ValueError: if ``k`` is negative or more than there are harmful samples, if given a
                DataLoader, if the dataset is not as long as the one that was trained on, or if
                samples are named by ``sample_id``.
        """
        if "sample_id" in self.columns:
            raise ValueError(
                "These samples are named by `sample_id`, and `index` counts them in order of "
                "appearance: it is no index of a dataset. Drop them by their ids: "
                '`scores.top_harmful(k).columns["sample_id"]`.'
            )
        if isinstance(dataset, DataLoader):
            raise ValueError("Pass the dataset itself, not a DataLoader: `loader.dataset`.")
        length = len(dataset)  # type: ignore[arg-type]
        trained = self.info.get("samples")
        trained = length if trained is None else trained
        if length != trained or bool((self.index >= length).any()):
            raise ValueError(
                f"The dataset has {length} samples, which does not fit these scores (of "
                f"{self.info.get('samples', 'more')}). Pass the dataset that the model was trained "
                "on."
            )
        harmful = self._harmful()
        if _count(k) > len(harmful):
            raise ValueError(
                f"`k` is {k}, but only {len(harmful)} samples are harmful: `k` may be up to that."
            )
        dropped = set(self.index[harmful[:k]].tolist())
        return Subset(dataset, [number for number in range(length) if number not in dropped])

    def by(self, column: str) -> GroupScores:
        """Add influences up by the user's own groups: a class, an annotator, a source.

        Args:
            column: of ``columns``, or ``"estimator"``.

        Returns:
            The sum of the members' influences; `InfluenceEngine.groups` replays the run without each
            group at once, which is another figure.

        Raises:
            KeyError: if there is no such column, with those there are.
            TypeError: if ``column`` is no name.
        """
        if not isinstance(column, str):
            raise TypeError(
                f"`column` must be a column's name, got {type(column).__name__}. For sets of samples "
                "use `InfluenceEngine.groups`."
            )
        if column != "estimator" and column not in self.columns:
            there = ", ".join(map(repr, self.columns)) or "none; `describe=` makes them"
            raise KeyError(f"There is no column {column!r}. The columns are: {there}.")
        values = self.estimator if column == "estimator" else self.columns[column]
        return summed_by(values, self.influence, str(self.info.get("query", "")))

    def _ranking(self, sign: int = 1) -> Tensor:
        # Positions by ascending sign · influence, then by index; non-finite ones last.
        by_index = torch.argsort(self.index)
        key = torch.where(self.influence.isfinite(), sign * self.influence, torch.inf)
        return by_index[torch.argsort(key[by_index], stable=True)]

    def _harmful(self) -> Tensor:
        order = self._ranking()
        values = self.influence[order]
        return order[(values < 0) & values.isfinite()]

    def _helpful(self) -> Tensor:
        order = self._ranking(sign=-1)
        values = self.influence[order]
        return order[(values > 0) & values.isfinite()]

    def _rows(self, rows: Tensor) -> InfluenceScores:
        rank = self.rank
        if rank is None:
            rank = torch.empty_like(self.index)
            rank[self._ranking()] = torch.arange(1, len(self) + 1)
        picked = rows.tolist()
        fields: dict[str, Any] = {name: values[rows] for name, values in self._tensors().items()}
        fields["rank"] = rank[rows]
        fields["estimator"] = tuple(self.estimator[row] for row in picked)
        fields["columns"] = {
            name: [column[row] for row in picked] for name, column in self.columns.items()
        }
        if len(picked) < len(self):
            fields["info"] = {"part_of": len(self), **self.info}
        return replace(self, **fields)

    # ------------------------------------------------------------------ tables

    def with_columns(self, **columns: Any) -> InfluenceScores:
        """Add columns, or replace those of the same name.

        Args:
            columns: ``[n]`` values each, a sequence, array or tensor, in the order of ``index``.

        Returns:
            The same scores with these columns.

        Raises:
            ValueError: if a column has another length or a reserved name.
            TypeError: if a column holds what is not a single value.
        """
        return replace(self, columns={**self.columns, **columns})

    def to_dict(self) -> dict[str, list[Any]]:
        """The table as plain Python.

        Returns:
            Columns by name: ``rank``, ``index``, ``influence``, ``visits``, ``estimator``,
            ``exact_influence`` (NaN where there was no exact replay), ``estimate``, ``trusted``,
            then the user's. One row per sample; a ranking's rows in its order, otherwise strongest
            harm first.
        """
        rows = self if self.rank is not None else self.ranked()
        values = {name: tensor.tolist() for name, tensor in rows._tensors().items()}
        values["exact_influence"] = values.pop("exact")
        values["estimator"] = list(rows.estimator)
        own = {name: list(column) for name, column in rows.columns.items()}
        return {**{name: values[name] for name in _TABLE}, **own}

    def to_pandas(self) -> pandas.DataFrame:
        """The table of `to_dict` as a data frame.

        Returns:
            One row per sample.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame(self.to_dict())

    def plot(
        self,
        kind: str = "histogram",
        *,
        sample: ReadSample | None = None,
        k: int = 10,
        render: Render | None = None,
    ) -> Figure:
        """Draw a figure with matplotlib.

        Args:
            kind: ``"histogram"`` of all influences; ``"agreement"``, estimates against exact replay;
                ``"examples"``, the pictures, texts or values of the strongest samples.
            sample: reads a training sample by its index, for ``"examples"``:
                ``dataset.__getitem__``, or `InfluenceEngine.sample`.
            k: how many samples on each side, for ``"examples"``.
            render: how a sample is shown there; see `InfluenceCallback`.

        Returns:
            The figure; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: if matplotlib is not installed.
            RenderError: if ``render`` fails, or returns something else than it should.
            ValueError: if there is no such kind, no exact replay to compare with, or nothing to show.
        """
        return plot(self, kind, sample, _count(k), render)

    def to_csv(self, file: str | os.PathLike[str] | TextIO) -> None:
        """Write the table as CSV (RFC 4180, UTF-8).

        The columns are ``rank,index,influence,visits,estimator,exact_influence``, then the user's.
        ``exact_influence`` is empty where there was no exact replay. Numbers are written so that
        reading them gives the same float. Texts are written as they are: a spreadsheet takes one
        that begins with ``=``, ``+``, ``-`` or ``@`` for a formula.

        Args:
            file: a path, or a text file opened with ``newline=""``. One row per sample; a ranking's
                rows in its order, otherwise strongest harm first.
        """
        if isinstance(file, (str, os.PathLike)):
            write_table(Path(file), self._csv_text())
        else:
            file.write(self._csv_text())

    def _csv_text(self) -> str:
        table = self.to_dict()
        exact = [None if math.isnan(figure) else figure for figure in table["exact_influence"]]
        shown = {name: table[name] for name in (*CSV_HEADER, *self.columns)}
        return csv_text({**shown, "exact_influence": exact})

    # ------------------------------------------------------------------ disk

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``scores.safetensors`` and ``scores.json``, which `load` reads, and ``scores.csv``.

        Args:
            directory: where to; made if it is not there. Scores that are there are replaced.

        Raises:
            TypeError: if ``info`` holds what is no JSON value.
            OSError: where the file system refuses.
        """
        names = sorted(set(self.estimator))
        codes = {"estimator": torch.tensor([names.index(name) for name in self.estimator]).long()}
        content = {
            "estimators": names,
            "agreement": [asdict(found) for found in self.agreement],
            "columns": self.columns,
            "info": self.info,
        }
        write_scores(Path(directory), self._tensors() | codes, content, self._csv_text())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> InfluenceScores:
        """Read what `save` wrote.

        Args:
            directory: where it is.

        Returns:
            The same scores; ``info`` as JSON keeps it (tuples as lists, keys as texts).

        Raises:
            ScoresError: where a file is missing, damaged or too new, or the two do not belong
                together; the message names it and says what to do.
        """
        tensors, content = read_scores(Path(directory))
        try:
            names = content["estimators"]
            codes = tensors.pop("estimator").tolist()
            return cls(
                **tensors,
                estimator=tuple(names[code] for code in codes),
                agreement=tuple(Agreement(**found) for found in content["agreement"]),
                columns=content["columns"],
                info=content["info"],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            path = Path(directory) / JSON_FILE
            raise ScoresError(f"{path} and its tensors do not hold scores: {error!r}.") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in _DTYPES}
        return tensors if self.rank is None else {**tensors, "rank": self.rank}


def _count(k: int) -> int:
    if type(k) is not int:
        raise ValueError(f"`k` must be an integer, got {k!r}.")
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k}.")
    return k


def checked_column(name: Any, values: Any, count: int) -> list[Any]:
    """Check a column of the user's.

    Args:
        name: its name.
        values: its values.
        count: how many samples there are.

    Returns:
        ``[n]`` plain values.

    Raises:
        TypeError: if one is not a single value.
        ValueError: if the name is taken or the length is another.
    """
    if not isinstance(name, str) or name in _TABLE:
        raise ValueError(
            f"A column cannot be called {name!r}: names are texts, other than {', '.join(_TABLE)}."
        )
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or len(values) != count:
        raise ValueError(f"The column {name!r} must hold {count} values, one a sample.")
    return [_scalar(name, value) for value in values]


def _scalar(name: str, value: Any) -> Any:
    # Plain Python, so that JSON, CSV and loggers all take it.
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None:
        return None
    for kind in (bool, int, float, str):  # bool before int, whose subclass it is
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"The column {name!r} holds a {type(value).__name__}; a column's values are single numbers "
        "or texts. Turn it into one in `describe=`, or leave it out."
    )
