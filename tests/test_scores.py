"""`InfluenceScores`: rankings, tables, files."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_accie.errors import InfluenceError
from lightning_accie.scores import InfluenceScores
from lightning_accie.scores_files import ScoresError
from tests.score_examples import INF, NAN, doubles, small_scores

HEADER = ["rank", "index", "influence", "visits", "estimator", "exact_influence"]


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def csv_of(scores: InfluenceScores) -> str:
    file = io.StringIO(newline="")
    scores.to_csv(file)
    return file.getvalue()


def same(left: InfluenceScores, right: InfluenceScores) -> bool:
    names = ("index", "influence", "estimate", "visits", "exact", "trusted", "rank")
    tensors = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(
        one is other if one is None else torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in tensors
    ) and (
        (left.estimator, left.columns, left.info, repr(left.agreement))
        == (right.estimator, right.columns, right.info, repr(right.agreement))
    )


# ---------------------------------------------------------------------- rankings


def test_ranked_is_strongest_harm_first() -> None:
    ranked = small_scores().ranked()
    assert ranked.index.tolist() == [4, 2, 9, 0, 7, 1, 5]
    assert ranked.rank.tolist() == [1, 2, 3, 4, 5, 6, 7]
    # Every other field goes along.
    assert ranked.visits.tolist() == [2, 3, 3, 3, 3, 3, 1]
    assert ranked.columns["label"] == ["d", "c", "g", "a", "f", "b", "e"]
    assert ranked.estimator[1] == "acc-sgd-ie"
    assert ranked.trusted.tolist() == [True] * 5 + [False, True]
    assert ranked.estimate.tolist()[0] == -2.5
    assert ranked.info == small_scores().info


def test_top_harmful_holds_only_what_harms() -> None:
    scores = small_scores()
    assert scores.top_harmful(2).index.tolist() == [4, 2]
    assert scores.top_harmful().index.tolist() == [4, 2, 9]
    assert scores.top_harmful().rank.tolist() == [1, 2, 3]
    assert len(scores.top_harmful(0)) == 0


def test_top_helpful_holds_only_what_helps() -> None:
    scores = small_scores()
    assert scores.top_helpful(1).index.tolist() == [1]
    assert scores.top_helpful().index.tolist() == [1, 7]
    assert scores.top_helpful().rank.tolist() == [6, 5]  # the places in the whole ranking


def test_ties_go_by_index_on_both_sides() -> None:
    count = 30
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    blank = {"estimator": ("x",) * count, "columns": {}, "exact": doubles(*[NAN] * count)}
    for influence, top in ((-1.0, "top_harmful"), (1.0, "top_helpful")):
        scores = small_scores(
            index=order,
            influence=doubles(*[influence] * count),
            estimate=doubles(*[influence] * count),
            visits=order,
            trusted=order > 3,
            **blank,
        )
        assert getattr(scores, top)(5).index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wild", [INF, -INF, NAN])
def test_what_is_not_finite_ranks_last_and_leads_nothing(wild: float) -> None:
    influence = doubles(0.0, 2.0, wild, -3.0, NAN, 0.5, -1.0)
    scores = small_scores(influence=influence)
    assert scores.ranked().index.tolist() == [4, 9, 0, 7, 1, 2, 5]
    assert scores.top_harmful().index.tolist() == [4, 9]
    assert scores.top_helpful().index.tolist() == [1, 7]


def test_a_ranking_of_a_ranking_keeps_its_places() -> None:
    harmful = small_scores().top_helpful().ranked()
    assert harmful.index.tolist() == [7, 1]
    assert harmful.rank.tolist() == [5, 6]


@pytest.mark.parametrize("method", ["top_harmful", "top_helpful"])
def test_negative_k_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="`k` must be at least 0, got -1"):
        getattr(small_scores(), method)(-1)


def test_repr_says_it_in_a_line() -> None:
    assert repr(small_scores()) == (
        "InfluenceScores(7 samples on val_loss: 3 harmful, 2 helpful, 2 replayed exactly; "
        "Kendall τ 1.00)"
    )


def test_a_part_of_a_ranking_says_whose_agreement_it_repeats() -> None:
    assert repr(small_scores().top_harmful(2)) == (
        "InfluenceScores(2 of 7 samples on val_loss: 2 harmful, 0 helpful, 1 replayed exactly; "
        "Kendall τ 1.00 of them all)"
    )
    assert "part_of" not in small_scores().ranked().info


def test_repr_tells_the_agreement_of_samples_at_random() -> None:
    scores = small_scores()
    whole = scores.main_agreement
    assert whole is not None
    at_random = replace(whole, sample="random", count=4, kendall_tau=0.25)
    other = replace(at_random, estimator="sgd-ie", kendall_tau=0.5)
    found = repr(small_scores(agreement=(*scores.agreement, at_random, other)))
    assert found.endswith("Kendall τ 1.00, at random 0.25)")


def test_the_main_agreement_is_the_first_over_all_replays() -> None:
    assert small_scores().main_agreement.estimator == "acc-sgd-ie"
    assert small_scores(agreement=()).main_agreement is None


# ---------------------------------------------------------------------- cleaned


@pytest.mark.parametrize(("k", "gone"), [(0, []), (1, [4]), (2, [4, 2]), (3, [4, 2, 9])])
def test_cleaned_leaves_out_the_most_harmful(k: int, gone: list[int]) -> None:
    dataset = TensorDataset(torch.arange(10))
    rest = [int(sample[0]) for sample in small_scores().cleaned(dataset, k)]
    assert rest == [number for number in range(10) if number not in gone]


def test_cleaned_of_a_ranking_is_the_same() -> None:
    dataset = TensorDataset(torch.arange(10))
    assert small_scores().ranked().cleaned(dataset, 2).indices == [0, 1, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("length", "k", "info", "message"),
    [
        (10, -1, {}, "at least 0, got -1"),
        (10, 4, {}, "`k` is 4, but only 3 samples are harmful: `k` may be up to that"),
        (9, 1, {}, "The dataset has 9 samples"),
        (11, 1, {"samples": 10}, "has 11 samples, .* these scores .of 10.*trained"),
    ],
)
def test_cleaned_refuses(length: int, k: int, info: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_scores(info=info).cleaned(TensorDataset(torch.arange(length)), k)


def test_cleaned_wants_the_dataset_itself() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10)))  # as long as the dataset
    with pytest.raises(ValueError, match=r"not a DataLoader: `loader\.dataset`"):
        small_scores().cleaned(loader, 2)


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"influence": doubles(1, 2)}, r"`influence` must be \[7\] torch.float64, got \[2\]"),
        ({"estimate": torch.zeros(7)}, r"`estimate` must be .*float64, got \[7\] torch.float32"),
        ({"visits": torch.zeros(7)}, "`visits` must be .*int64"),
        ({"trusted": torch.zeros(7, 1, dtype=torch.bool)}, "`trusted` must be"),
        ({"rank": torch.zeros(3, dtype=torch.int64)}, "`rank` must be"),
        ({"index": torch.tensor([0, 0, 2, 4, 5, 7, 9])}, "`index` must hold distinct"),
        ({"index": torch.tensor([-1, 0, 2, 4, 5, 7, 9])}, "`index` must hold distinct"),
        ({"estimator": ("sgd-ie",)}, "`estimator` must name 7, got 1"),
        ({"exact": doubles(*range(7))}, "`influence` must be the exact figure"),
        ({"columns": {"label": [1]}}, "column 'label' must hold 7 values"),
        ({"columns": {"label": "abcdefg"}}, "column 'label' must hold 7 values"),
        ({"columns": {"rank": [1] * 7}}, "cannot be called 'rank'"),
        ({"columns": {3: [1] * 7}}, "cannot be called 3"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_scores(**changes)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.1, 0.1),
        ("text", "text"),
        (torch.tensor(7), 7),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor(True), True),
        (np.float32(0.25), 0.25),
        (np.float64(0.25), 0.25),
        (np.int64(-2), -2),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (np.array(4), 4),
        (Path("a") / "b", str(Path("a") / "b")),
    ],
)
def test_column_values_become_plain(value: Any, plain: Any) -> None:
    column = small_scores(columns={"own": [value] * 7}).columns["own"]
    assert column == [plain] * 7
    assert type(column[0]) is type(plain)


@pytest.mark.parametrize(
    "value", [torch.zeros(3, 8, 8), np.zeros(2), [1, 2], {"a": 1}, b"bytes", 1j, torch.tensor(1j)]
)
def test_what_is_no_single_value_is_no_column(value: Any) -> None:
    with pytest.raises(TypeError, match=r"column 'picture' holds a .*describe="):
        small_scores(columns={"picture": [value] * 7})


def test_with_columns_adds_and_replaces() -> None:
    scores = small_scores().with_columns(loss=torch.arange(7.0), label=np.arange(7))
    assert scores.columns == {"label": list(range(7)), "loss": [float(i) for i in range(7)]}
    assert small_scores().columns == {"label": list("abcdefg")}


# ---------------------------------------------------------------------- tables


def test_csv_is_as_promised() -> None:
    rows = read(csv_of(small_scores()))
    assert rows[0] == [*HEADER, "label"]
    assert rows[1:] == [
        ["1", "4", "-3.0", "2", "leave-one-out", "-3.0", "d"],
        ["2", "2", "-1.0", "3", "acc-sgd-ie", "", "c"],
        ["3", "9", "-1.0", "3", "sgd-ie", "", "g"],
        ["4", "0", "0.0", "3", "sgd-ie", "", "a"],
        ["5", "7", "0.5", "3", "leave-one-out", "0.5", "f"],
        ["6", "1", "2.0", "3", "sgd-ie", "", "b"],
        ["7", "5", "nan", "1", "sgd-ie", "", "e"],
    ]


def test_csv_of_a_ranking_keeps_its_order() -> None:
    rows = read(csv_of(small_scores().top_helpful()))
    assert [row[:3] for row in rows[1:]] == [["6", "1", "2.0"], ["5", "7", "0.5"]]


def test_csv_of_nothing_is_a_header() -> None:
    assert read(csv_of(small_scores().top_harmful(0))) == [[*HEADER, "label"]]


def test_csv_floats_are_read_back_exactly() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=7) * 10.0 ** rng.integers(-300, 300, 7))
    scores = small_scores(influence=values, exact=doubles(*[NAN] * 7))
    rows = read(csv_of(scores))[1:]
    assert {int(row[1]): float(row[2]) for row in rows} == dict(
        zip(scores.index.tolist(), values.tolist(), strict=True)
    )


NASTY = ["a,b", 'say "hi"', "two\nlines", "two\r\nlines", "a\rb", "=1+1", "naïve 语言", ""]


def test_csv_texts_survive() -> None:
    column = NASTY[:7]
    rows = read(csv_of(small_scores(columns={"a,b": column, "n": [None, 1, True, 0.1, "", 2, 3]})))
    assert rows[0][-2:] == ["a,b", "n"]
    expected = dict(zip([0, 1, 2, 4, 5, 7, 9], column, strict=True))
    assert {int(row[1]): row[-2] for row in rows[1:]} == expected
    assert sorted(row[-1] for row in rows[1:]) == ["", "", "0.1", "1", "2", "3", "True"]


def test_csv_file_is_utf8_and_whole(tmp_path: Path) -> None:
    scores = small_scores(columns={"path": ["naïve", "bad\udcff", "c", "d", "e", "f", "g"]})
    scores.to_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert {row[-1] for row in rows} >= {"naïve", r"bad\udcff"}
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_pandas_has_the_same_table() -> None:
    frame = small_scores().to_pandas()
    assert list(frame.columns) == [*HEADER, "estimate", "trusted", "label"]
    assert frame["index"].tolist() == [4, 2, 9, 0, 7, 1, 5]
    assert frame["rank"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert frame["estimate"].tolist()[0] == -2.5
    assert frame["exact_influence"].notna().tolist() == [True, *[False] * 3, True, False, False]
    assert not frame["trusted"][5]
    assert frame["influence"].dtype == np.float64
    assert frame["visits"].dtype == np.int64


def test_rows_are_those_of_the_table() -> None:
    harmful = small_scores().top_harmful(2)
    assert [(row["rank"], row["index"], row["label"]) for row in harmful] == [
        (1, 4, "d"),
        (2, 2, "c"),
    ]
    first = next(iter(harmful))
    assert list(first) == list(harmful.to_dict())
    assert (first["exact_influence"], first["estimate"], first["estimator"]) == (
        -3.0,
        -2.5,
        "leave-one-out",
    )
    assert list(small_scores().top_harmful(0)) == []


def test_rows_of_what_is_not_ranked_stand_as_its_tensors_do() -> None:
    scores = small_scores()
    rows = list(scores)
    assert len(rows) == len(scores)
    assert [row["index"] for row in rows] == scores.index.tolist()
    assert [row["label"] for row in rows] == scores.columns["label"]
    assert [row["rank"] for row in rows] == [4, 6, 2, 1, 7, 5, 3]


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"lightning_accie\[pandas\]"):
        small_scores().to_pandas()


# ---------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    "make",
    [
        small_scores,
        lambda: small_scores().ranked(),
        lambda: small_scores().top_harmful(0),
        lambda: small_scores(agreement=(), columns={}, info={}),
        lambda: small_scores(info={"seconds": {"sgd-ie": 0.5}, "noise_floor": None, "τ": [1, "x"]}),
        lambda: small_scores(columns={"own": [None, True, 1, 0.1, "τ", "bad\udcff", ""]}),
        lambda: small_scores(influence=doubles(INF, -INF, 0, -3, NAN, 0.5, -1e-308)),
    ],
)
def test_saved_scores_are_loaded_as_they_were(
    make: Callable[[], InfluenceScores], tmp_path: Path
) -> None:
    scores = make()
    scores.save(tmp_path / "new" / "directory")
    loaded = InfluenceScores.load(tmp_path / "new" / "directory")
    assert same(loaded, scores)
    assert math.isnan(loaded.agreement[0].noise_floor) if loaded.agreement else True


def test_saving_writes_three_files_and_replaces_them(tmp_path: Path) -> None:
    small_scores().save(tmp_path)
    small_scores(columns={}).save(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"scores.csv", "scores.safetensors", "scores.json"}
    assert read((tmp_path / "scores.csv").read_text(encoding="utf-8"))[0] == HEADER
    assert InfluenceScores.load(str(tmp_path)).columns == {}


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    scores = small_scores()
    scores.save(tmp_path)
    tensors = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(tensors["visits"], scores.visits)
    document = json.loads((tmp_path / "scores.json").read_text(encoding="ascii"))
    assert document["content"]["info"]["query"] == "val_loss"
    assert document["content"]["agreement"][0]["estimator"] == "acc-sgd-ie"


def test_info_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        small_scores(info={"a": object()}).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["scores.json", "scores.safetensors"])
def test_a_changed_file_is_refused(tmp_path: Path, name: str) -> None:
    small_scores().save(tmp_path)
    content = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for place in [0, 8, len(content) - 1, *rng.integers(0, len(content), 30).tolist()]:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        for damaged in (bytes(changed), content[:place], content[:place] + content[place + 1 :]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ScoresError, match=f"{name}.*(damaged|not hold|format version)"):
                InfluenceScores.load(tmp_path)


def test_two_halves_of_different_scores_are_refused(tmp_path: Path) -> None:
    small_scores().save(tmp_path / "a")
    small_scores(visits=torch.ones(7, dtype=torch.int64)).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "scores.safetensors", tmp_path / "a" / "scores.safetensors")
    with pytest.raises(ScoresError, match=r"scores.safetensors is not the file that scores.json"):
        InfluenceScores.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["scores.json", "scores.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    small_scores().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ScoresError, match=rf"{name} is missing. Give the directory"):
        InfluenceScores.load(tmp_path)


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoresError, match="is missing"):
        InfluenceScores.load(tmp_path / "file")
    with pytest.raises(InfluenceError, match="is missing"):
        InfluenceScores.load(tmp_path / "nowhere")


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    small_scores().save(tmp_path)
    text = (tmp_path / "scores.json").read_text()
    (tmp_path / "scores.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ScoresError, match=r"version 2.*reads up to 1. Upgrade"):
        InfluenceScores.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": 1}', "{'"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    small_scores().save(tmp_path)
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ScoresError, match=r"scores.json is damaged"):
        InfluenceScores.load(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    small_scores().save(tmp_path)
    save_file({"index": torch.zeros(1)}, tmp_path / "scores.safetensors")
    with pytest.raises(ScoresError, match="not the file"):
        InfluenceScores.load(tmp_path)
