"""What is shown of a sample, by itself and by the user's own ``render=``."""

from __future__ import annotations

import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_accie import InfluenceCallback, RenderError, rendered, write_report
from lightning_accie.rendered import Rendered, render_samples
from lightning_accie.reports.html.samples import read_examples
from lightning_accie.reports.report import Report
from tests.problems import Classifier, classification, fit, sgd, smooth_net
from tests.score_examples import small_scores

Row = namedtuple("Row", ["age", "job", "weights"])


def shown(sample: Any, render: Any = None) -> Rendered:
    return render_samples(lambda index: sample, [3], render)[3]


# ---------------------------------------------------------------------- by what is there


def test_a_picture_a_text_and_values() -> None:
    found = shown({"x": torch.ones(3, 64, 64), "caption": "a cat", "label": torch.tensor(2)})
    assert found.image is not None
    assert found.image.shape == (64, 64, 3)
    assert (found.image == 255).all()
    assert found.text == "a cat"
    assert found.values == (("label", 2),)


def test_a_row_keeps_its_names_and_types() -> None:
    found = shown(Row(31, 0.25, torch.tensor([1.0, 2.0])))
    assert found == Rendered(values=(("age", 31), ("job", 0.25), ("weights", "1, 2")))


def test_nothing_known() -> None:
    assert shown(()) == Rendered()


# ---------------------------------------------------------------------- by `render=`


@pytest.mark.parametrize(
    "picture",
    [
        torch.full((1, 64, 64), 7, dtype=torch.uint8),
        np.full((64, 64, 3), 7, dtype=np.uint8),
        torch.full((64, 64), 7 / 255),
        Image.new("L", (64, 64), 7),
    ],
    ids=["tensor", "array", "floats", "pillow"],
)
def test_render_may_return_a_picture(picture: Any) -> None:
    found = shown(None, lambda sample: picture)
    assert found.image is not None
    assert found.image.shape[:2] == (64, 64)
    assert (found.image == 7).all()
    assert (found.text, found.values) == ("", ())


def test_render_may_return_a_text_or_a_row() -> None:
    assert shown(5, lambda sample: f"five\nis {sample}") == Rendered(text="five\nis 5")
    row = {"age": np.int64(3), "job": "clerk", "p": torch.tensor(0.5), "v": [1, 2]}
    assert shown(None, lambda sample: row).values == (
        *(("age", 3), ("job", "clerk"), ("p", 0.5), ("v[0]", 1), ("v[1]", 2)),
    )


def test_render_gets_the_sample_and_its_draws_leave_no_trace() -> None:
    before = torch.get_rng_state(), random.getstate()
    found = render_samples(
        lambda index: (index, torch.rand(2)),
        [4, 9],
        lambda sample: f"{sample[0]} {random.random() > 2} {torch.rand(1).item() > 2}",
    )
    assert [one.text for one in found.values()] == ["4 False False", "9 False False"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "a NoneType for sample 3"),
        (torch.rand(64), r"a Tensor of shape \[64\] and torch.float32 for sample 3"),
        (torch.zeros(64, 64, dtype=torch.int64), r"of shape \[64, 64\] and torch.int64"),
        ((torch.rand(3, 64, 64), 1), "a tuple for sample 3"),
        (b"bytes", "a bytes for sample 3"),
        (7, "a int for sample 3"),
    ],
)
def test_what_render_may_not_return(returned: Any, what: str) -> None:
    with pytest.raises(RenderError, match=f"must return a picture .*a text .*a dict .*{what}"):
        shown(None, lambda sample: returned)


def test_a_render_that_fails_is_told_with_the_sample() -> None:
    with pytest.raises(RenderError, match=r"`render` failed on sample 3: KeyError: 'x'"):
        shown({}, lambda sample: sample["x"])


def test_without_pillow_the_rest_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'lightning_accie\[report\]'"):
        found = shown((torch.rand(64, 64), "a text"))
    assert found == Rendered(text="a text")


# ---------------------------------------------------------------------- in tables


def table(*shown: Rendered, **changes: Any) -> dict[str, list[Any]]:
    scores = small_scores(**changes)
    top = scores.top_harmful(len(shown))
    rendered = dict(zip(top.index.tolist(), shown, strict=True))
    return Report(scores, step=1, rendered=rendered).table(top)


def test_a_table_has_a_column_a_name() -> None:
    found = table(
        Rendered(text="one", values=(("age", 3), ("[1]", "x"))),
        Rendered(values=(("age", 4.5), ("", "1, 2"))),
    )
    assert found["text"] == ["one", None]
    assert found["data.age"] == [3, 4.5]
    assert found["data[1]"] == ["x", None]
    assert found["data"] == [None, "1, 2"]
    assert found["exact_influence"] == [-3.0, None]


def test_the_users_columns_keep_their_names() -> None:
    columns = {"text": ["mine"] * 7, "data.age": [1] * 7}
    found = table(Rendered(text="one", values=(("age", 3),)), columns=columns)
    assert (found["text"], found["text_"]) == (["mine"], ["one"])
    assert (found["data.age"], found["data.age_"]) == ([1], [3])


def test_cells_are_short_and_on_one_line() -> None:
    scores = small_scores()
    top = scores.top_harmful(2)
    rendered = {4: Rendered(text="a\nb " * 99, values=(("age", 1.23456), ("", "x")))}
    found = Report(scores, step=1, rendered=rendered).cells(top)
    assert found["data"] == ["age: 1.235; x", ""]
    assert len(found["text"][0]) == 120
    assert found["text"][0].startswith("a b a b")
    assert found["text"][0].endswith("…")
    assert Report(scores, step=1).cells(top) == {}


# ---------------------------------------------------------------------- in a fit


def run(root: Path, **settings: Any) -> InfluenceCallback:
    callback = {"run": "fit_end", "verify": 0, "top_k": 2, "estimator": "sgd-ie", **settings}
    train = torch.utils.data.DataLoader(classification(24), batch_size=6)
    valid = torch.utils.data.DataLoader(classification(11, seed=3), batch_size=7)
    module = Classifier(smooth_net(), sgd())
    return fit(root, module, train, valid, callback={"dirpath": root, **callback}, max_epochs=1)


def test_the_callbacks_render_is_what_the_report_and_the_examples_show(tmp_path: Path) -> None:
    influence = run(tmp_path, render=lambda sample: {"class": int(sample[1]), "x": sample[0]})
    strongest, _ = next(iter(read_examples(tmp_path).items()))
    x, y = classification(24)[strongest]
    values = ", ".join(f"{v:.4g}" for v in x.tolist())
    for shown in (read_examples(tmp_path)[strongest].values,):
        assert shown == (("class", str(int(y))), ("x", values))
    assert values in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert influence.scores is not None
    page = write_report(
        influence.scores, tmp_path / "again.html", top_k=1, sample=str, render=lambda s: f"No {s}!"
    )
    assert f"No {strongest}!" in page.read_text(encoding="utf-8")


def test_a_render_that_fails_ends_the_fit_at_its_first_step(tmp_path: Path) -> None:
    asked = []

    def broken(sample: Any) -> Any:
        asked.append(sample)
        return sample

    with pytest.raises(RenderError, match="`render` must return a picture"):
        run(tmp_path, render=broken)
    assert len(asked) == 1


def test_a_render_that_fails_later_costs_no_ranking(tmp_path: Path) -> None:
    asked = []

    def breaks(sample: Any) -> str:
        asked.append(sample)
        return "once" if len(asked) == 1 else sample["text"]

    with pytest.warns(UserWarning, match="no pictures or texts.*RenderError: `render` failed on"):
        influence = run(tmp_path, render=breaks)
    assert influence.scores is not None
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "examples.json").exists()


def test_a_capture_alone_never_asks_it(tmp_path: Path) -> None:
    run(tmp_path, run="manual", render=lambda sample: 1 / 0)
