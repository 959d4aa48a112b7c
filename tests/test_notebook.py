"""What a ranking looks like in a notebook: tables and figures."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from lightning_accie import InfluenceScores
from lightning_accie.agreement import measure

NAN = float("nan")


def ranking(n: int = 40, *, replayed: int = 6, **columns: Any) -> InfluenceScores:
    torch.manual_seed(0)
    estimate = torch.randn(n, dtype=torch.float64)
    exact = torch.full((n,), NAN, dtype=torch.float64)
    exact[:replayed] = 1.1 * estimate[:replayed]
    known = ~exact.isnan()
    found = measure(estimate[known], exact[known], estimator="sgd-ie") if replayed else None
    return InfluenceScores(
        index=torch.arange(n),
        influence=torch.where(known, exact, estimate),
        estimate=estimate,
        visits=torch.full((n,), 3),
        exact=exact,
        estimator=tuple("leave-one-out" if is_known else "sgd-ie" for is_known in known.tolist()),
        trusted=torch.arange(n) != n - 1,
        agreement=(found,) if found else (),
        columns=columns,
        info={"query": "val_loss"},
    )


def test_a_table_of_both_ends() -> None:
    scores = ranking(label=[f"<b>{number}</b>" for number in range(40)])
    html = scores._repr_html_()
    assert html.count("<tr>") == 2 * (1 + 5)
    for index in scores.top_harmful(5).index.tolist() + scores.top_helpful(5).index.tolist():
        assert f"<td>{index}</td>" in html
        assert f"&lt;b&gt;{index}&lt;/b&gt;" in html
    assert "<b>" not in html
    assert "val_loss would be lower without it" in html
    assert "Kendall τ 1.00" in html
    assert "40 samples on val_loss" in html


def test_rows_of_a_ranking_are_shown_as_they_are() -> None:
    scores = ranking()
    html = scores.top_harmful(7)._repr_html_()
    assert html.count("<tr>") == 1 + 7
    marks = {"exact", "not to be relied on"}
    shown = scores.ranked().index.tolist()
    last = int((scores.index == 39).nonzero())
    assert shown.index(39) >= 0
    assert bool(~scores.trusted[last])
    whole = scores._rows(torch.tensor([0, 39]))._repr_html_()
    assert all(mark in whole for mark in marks)


def test_without_exact_replay_it_says_so() -> None:
    html = ranking(replayed=0)._repr_html_()
    assert "how far to trust this is not known" in html


def test_the_histogram_has_every_sample() -> None:
    figure = ranking().plot()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert sum(patch.get_height() for patch in axes.patches) == 40
    assert axes.get_xlabel() == "influence on val_loss"


def test_a_notebook_shows_figures_without_being_told_to() -> None:
    shown, _ = DisplayFormatter().format(ranking().plot())
    assert shown["image/png"].startswith(b"\x89PNG")


def test_the_scatter_has_every_replay() -> None:
    scores = ranking()
    (axes,) = scores.plot("agreement").axes
    points = torch.from_numpy(axes.collections[0].get_offsets().data)
    torch.testing.assert_close(points[:, 0], scores.estimate[:6])
    torch.testing.assert_close(points[:, 1], scores.exact[:6])
    assert "6 samples: τ 1.00" in axes.get_title()
    with pytest.raises(ValueError, match="`verify=` above 0"):
        ranking(replayed=0).plot("agreement")


def test_images_of_the_strongest(tmp_path: Any) -> None:
    scores = ranking(label=list(range(40)))
    figure = scores.plot(
        "examples", sample=lambda index: (torch.full((1, 8, 8), index / 40), 0), k=7
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 14
    first = int(scores.top_harmful(1).index)
    assert shown[0].get_title().startswith(f"{first} · {first}\n")
    figure.savefig(tmp_path / "examples.png")
    assert (tmp_path / "examples.png").stat().st_size > 1000


def test_texts_and_values_of_the_strongest(tmp_path: Any) -> None:
    scores = ranking()

    def texts(**settings: Any) -> list[str]:
        figure = scores.plot("examples", k=3, **settings)
        figure.savefig(tmp_path / "examples.png")
        return [axes.texts[0].get_text() for axes in figure.axes if axes.texts]

    first = int(scores.top_harmful(1).index)
    found = texts(sample=lambda index: ("it costs $5 or $6 " * 40, index))
    assert len(found) == 6
    assert found[0].startswith("it costs $5 or $6 it\ncosts $5 or $6")
    assert found[0].endswith("\n…")
    assert texts(sample=lambda index: {"age": index, "rate": 0.5})[0] == f"age: {first}\nrate: 0.5"
    found = texts(sample=lambda index: index, render=lambda sample: f"number {sample}")
    assert found[0] == f"number {first}"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = ranking()
    with pytest.raises(ValueError, match="`kind` must be one of 'histogram'"):
        scores.plot("pie")
    with pytest.raises(ValueError, match="needs the samples"):
        scores.plot("examples")
    with pytest.raises(ValueError, match="hold nothing to show"):
        scores.plot("examples", sample=lambda index: ())
    monkeypatch.delitem(sys.modules, "lightning_accie.notebook_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightning_accie\[plot\]"):
        scores.plot()
