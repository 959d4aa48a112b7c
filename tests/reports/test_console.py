"""What is printed, at several widths."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from lightning_accie.agreement import measure
from lightning_accie.reports.console import print_report
from lightning_accie.reports.words import trust
from lightning_accie.scores import InfluenceScores
from tests.score_examples import NAN, doubles, small_scores


def printed(scores: InfluenceScores, width: int = 80, top_k: int = 25) -> list[str]:
    file = io.StringIO()
    print_report(scores, top_k, Console(file=file, width=width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def test_the_report_says_what_was_measured() -> None:
    assert printed(small_scores())[0] == (
        "Influence of 7 training samples on val_loss = 0.75 over 12 training steps"
    )
    assert printed(small_scores(info={}))[0] == "Influence of 7 training samples on the query"


def test_narrow_tables_stand_one_below_the_other() -> None:
    lines = printed(small_scores(), width=80)
    assert words(lines[1:]).startswith(
        "Most harmful: val_loss would be lower without it "
        "# sample influence exact visits label " + "─" * 43 + " "
        "1 4 -3.00e+00 ✓ 2 d "
        "2 2 -1.00e+00 3 c "
        "3 9 -1.00e+00 3 g "
        "Most helpful: val_loss would be higher without it "
        "# sample influence exact visits label " + "─" * 43 + " "
        "1 1 +2.00e+00 ? 3 b "
        "2 7 +5.00e-01 ✓ 3 f "
        "exact: ✓ = replayed without it, blank = an estimate, ? = one not to rely on"
    )


def test_tables_stand_side_by_side_where_there_is_room() -> None:
    lines = printed(small_scores(), width=90)
    rows = [line for line in lines if re.match(r"^\d ", line)]
    assert words(rows) == (
        "1 4 -3.00e+00 ✓ 2 d 1 1 +2.00e+00 ? 3 b 2 2 -1.00e+00 3 c 2 7 +5.00e-01 ✓ 3 f "
        "3 9 -1.00e+00 3 g"
    )


def test_top_k_limits_each_side() -> None:
    rows = [line for line in printed(small_scores(), width=80, top_k=1) if line[:2] == "1 "]
    assert len(rows) == 2
    assert not [line for line in printed(small_scores(), width=80, top_k=1) if line[:2] == "2 "]


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width: int) -> None:
    columns = {
        "path": [f"data/train/images/{number:09d}/picture.png" for number in range(7)],
        "语言": ["语" * 40] * 7,
        **{f"column {number}": [number * 1.5] * 7 for number in range(8)},
    }
    lines = printed(small_scores(columns=columns), width)
    assert max(cell_len(line) for line in lines) <= width
    for figure in ("-3.00e+00", "-1.00e+00", "+2.00e+00", "+5.00e-01"):
        assert figure in " ".join(lines)


def test_columns_that_do_not_fit_are_named_and_others_still_shown() -> None:
    columns = {"path": ["x" * 40] * 7, "wide": ["y" * 40] * 7, "n": list(range(7))}
    text = words(printed(small_scores(columns=columns), width=78))
    assert "Not shown, for lack of width: wide (to_csv() has all columns)." in text
    assert "visits path n " in text
    assert "Not shown" not in words(printed(small_scores(columns=columns), width=120))


def test_long_texts_keep_both_ends() -> None:
    columns = {"path": ["beginning/" + "x" * 40 + "/the_end.png"] * 7}
    text = words(printed(small_scores(columns=columns)))
    assert "beginning…xxxxxx/the_end.png" in text
    assert len("beginning…xxxxxx/the_end.png") == 28


def test_texts_are_neither_markup_nor_terminal_commands() -> None:
    label = ["[red]x[/red]", "\x1b[31mred", "two\nlines", "bad\udcff", "a", "b", "[/]"]
    columns = {"label": [label[place] for place in (0, 1, 2, 3, 4, 5, 6)], "[b]own[/b]": label}
    lines = printed(small_scores(columns=columns), width=120)
    text = words(lines)
    assert "\x1b" not in text
    assert "[b]own[/b]" in text
    assert "two lines" in text  # sample 2
    assert "bad\ufffd" in text  # sample 4
    assert "[/]" in text  # sample 9
    assert "\ufffd[31mred" in text  # sample 1


def test_a_side_without_samples_says_so() -> None:
    scores = small_scores(influence=doubles(*[1.0] * 7), exact=doubles(*[NAN] * 7))
    text = words(printed(scores, width=80))
    assert "no such sample" in text
    assert "No estimate was compared" not in text


def test_the_agreement_is_told_in_words() -> None:
    estimate, exact = doubles(-3, -2, 1, 4, 2, 0.5), doubles(-3, -2.5, 1, 5, 3, -0.5)
    parts = {"verified": slice(0, 6), "strongest": slice(0, 3), "random": slice(3, 6)}
    agreement = [
        measure(estimate[rows], exact[rows], estimator="acc-sgd-ie", sample=sample)
        for sample, rows in parts.items()
    ]
    scores = small_scores(agreement=tuple(agreement))
    text = words(printed(scores))
    # ‖estimate - exact‖ = √3.5 = 1.80, ‖exact‖ = √50.75
    assert (
        "acc-sgd-ie against exact replay of 6 samples (3 strongest, 3 at random): Kendall τ 1.00, "
        "Spearman 1.00, relative RMSE 0.25, same sign 83%. "
        "Those at random alone: Kendall τ 1.00, Spearman 1.00, relative RMSE 0.30, "
    ) in text
    one = measure(doubles(1), doubles(1), estimator="x")
    text = words(printed(small_scores(agreement=(one,))))
    assert "x against exact replay of 1 sample: too few to compare." in text


def test_the_order_is_told_as_a_share_of_pairs() -> None:
    exact = torch.arange(-50.0, 50.0).double()
    estimate = exact.clone()
    estimate[[0, 1]] = estimate[[1, 0]]  # one pair of 4950, one of 45 among ten
    agreement = (
        measure(estimate, exact, estimator="sgd-ie", sample="verified"),
        measure(estimate[:10], exact[:10], estimator="sgd-ie", sample="random"),
    )
    text = words(printed(small_scores(agreement=agreement)))
    assert "Of pairs drawn at random, sgd-ie orders 98% as exact replay does." in text
    assert "Jaccard@10 1.00" in text
    text = words(printed(small_scores(agreement=agreement[:1])))
    assert "Of pairs of these, sgd-ie orders 100% as exact replay does." in text


def test_every_reserve_is_told() -> None:
    text = words(printed(small_scores(info={"noise_floor": 2e-9, "interrupted": True})))
    assert "Exact replays are rounded to ±2e-09, and by more" in text
    assert "Do not rely" not in text
    assert "Estimates not to be relied on, and not replayed either: 1." in text
    assert "The analysis was interrupted" in text

    text = words(printed(small_scores(agreement=())))
    assert "No estimate was compared with an exact replay" in text
    for absent in ("rounded", "interrupted", "Every figure"):
        assert absent not in text

    replayed = {"exact": torch.ones(7).double(), "influence": torch.ones(7).double()}
    text = words(printed(small_scores(agreement=(), **replayed)))
    assert "Every figure comes from an exact replay." in text
    assert "No estimate" not in text


def test_influences_within_the_rounding_are_no_ranking() -> None:
    lines = printed(small_scores(info={"query": "val_loss", "noise_floor": 3.0}), width=200)
    assert lines[1].startswith(
        "Do not rely on this ranking: the strongest influence (3e+00) is no larger than the rounding "
        "of exact replays (±3e+00)."
    )


@pytest.mark.parametrize(
    ("count", "tau", "told"),
    [(8, 0.0, True), (8, -1.0, True), (8, 1.0, False), (7, 0.0, False), (30, 0.2, True),
     (30, 0.3, False)],
)  # fmt: skip
def test_an_order_by_chance_is_called_so(count: int, tau: float, told: bool) -> None:
    found = replace(
        measure(doubles(1, 2), doubles(1, 2), estimator="sgd-ie"), count=count, kendall_tau=tau
    )
    text = words(printed(small_scores(agreement=(found,))))
    advice = f"sgd-ie agrees with exact replay of {count} samples no better than chance may"
    assert (advice in text) == told
    # Where every figure is exact, or another estimator's, its order does not matter.
    exact = {"exact": torch.ones(7).double(), "influence": torch.ones(7).double()}
    assert advice not in words(printed(small_scores(agreement=(found,), **exact)))
    others = {"estimator": ("acc-sgd-ie",) * 7}
    assert advice not in words(printed(small_scores(agreement=(found,), **others)))


def test_a_terminal_without_unicode_gets_question_marks() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="cp1252", newline="")
    columns = {"label": ["Søren 语言"] * 7}
    print_report(small_scores(columns=columns), 5, Console(file=file, width=80))
    file.flush()
    text = raw.getvalue().decode("cp1252")
    assert "Kendall ? 1.00" in text
    assert "Søren ??" in text


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(small_scores(), 5)
    assert "Most harmful: val_loss" in capsys.readouterr().out


def test_the_layers_that_were_followed_are_named() -> None:
    for layers, named in ((["head", "net.2"], "head, net.2"), ("is_head", "is_head")):
        lines = trust(small_scores(info={"settings": {"layers": layers}}))
        assert any(f"follow `layers={named}` alone" in line for line in lines)
    assert not any("layers" in line for line in trust(small_scores(info={"settings": {}})))
