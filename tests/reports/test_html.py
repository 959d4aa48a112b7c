"""`report.html` without a browser: what stands in it, what does not, and what it is made of."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_accie import (
    InfluenceCallback,
    InfluenceEngine,
    InfluenceScores,
    rendered,
    write_report,
)
from lightning_accie.rendered import render_samples
from lightning_accie.reports.html import figures, page
from lightning_accie.reports.html.samples import (
    ExamplesError,
    Shown,
    in_a_page,
    read_examples,
    write_examples,
)
from lightning_accie.reports.html.table import own_column, table
from tests.problems import Classifier, classification, quiet_trainer, sgd, smooth_net
from tests.score_examples import INF, NAN, doubles, small_scores

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>'


class Reader(HTMLParser):
    """Collects the elements, and the texts outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(tmp_path: Path, scores: InfluenceScores, **settings: Any) -> Reader:
    path = write_report(scores, tmp_path / "report.html", **settings)
    return Reader(path.read_text(encoding="utf-8"))


def data_of(found: Reader) -> Any:
    return json.loads(found.scripts["data"], parse_constant=lambda name: pytest.fail(name))


# ---------------------------------------------------------------------- the page


def test_it_says_what_was_found_and_how_far_to_trust_it(tmp_path: Path) -> None:
    text = read(tmp_path, small_scores()).text
    assert "Influence of 7 training samples on val_loss = 0.75 over 12 training steps" in text
    assert "Most harmful: val_loss would be lower without it" in text
    assert "acc-sgd-ie against exact replay of 2 samples: Kendall τ 1.00" in text
    assert "Negative: it harms." in text
    assert "Do not rely" not in text


def test_its_reserves_come_first(tmp_path: Path) -> None:
    info = {"query": "val_loss", "noise_floor": 5.0}
    text = read(tmp_path, small_scores(info=info)).text
    assert text.index("Do not rely on this ranking") < text.index("The influence of a training")


def test_the_strongest_are_shown_with_everything_known(tmp_path: Path) -> None:
    text = read(tmp_path, small_scores(), top_k=1).text
    harmful = text[text.index("Most harmful: val_loss") : text.index("Most helpful: val_loss")]
    assert "example 4 -3.00e+00 exact influence -3.00e+00 estimate -2.50e+00 visits 2" in harmful
    assert "rank 1 of 7 label d" in harmful
    assert harmful.count("visits") == 1
    helpful = text[text.index("Most helpful: val_loss") :]
    assert "example 1 +2.00e+00 exact influence not replayed" in helpful
    assert "estimate +2.00e+00 by sgd-ie ? not to be relied on" in helpful


def test_a_side_without_samples_says_so(tmp_path: Path) -> None:
    none = small_scores(influence=doubles(*[0.0] * 7), exact=doubles(*[NAN] * 7))
    text = read(tmp_path, none).text
    assert text.count("There is no such example.") == 2
    assert "No example has a finite influence other than 0." in text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    shown = {4: Shown(picture=picture_of(torch.rand(3, 8, 8)), text="a text")}
    found = read(tmp_path, small_scores(), shown=shown)
    for tag, attributes in found.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, attributes)
    (policy,) = [a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = re.search(r"script-src ([^;]*)", policy)
    assert script is not None
    assert len(script[1].split()) == 2
    assert "unsafe" not in script[1]
    assert "sourceMappingURL" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_texts_of_the_users_stay_texts(tmp_path: Path) -> None:
    shown = {4: Shown(text=HOSTILE, values=((HOSTILE, HOSTILE),))}
    info = {"query": HOSTILE, "module": HOSTILE, "optimizer": HOSTILE, "estimator": HOSTILE}
    info |= {"trajectory": HOSTILE, "precision": HOSTILE}
    columns = {HOSTILE: [HOSTILE] * 6 + ["x"], "label": [HOSTILE, *"bcdefg"]}
    plain = read(tmp_path, small_scores())
    found = read(tmp_path, small_scores(columns=columns, info=info), shown=shown)
    count = {tag: sum(t == tag for t, _ in plain.tags) for tag in ("script", "img")}
    assert {tag: sum(t == tag for t, _ in found.tags) for tag in count} == count
    assert HOSTILE in found.text
    assert data_of(found)["table"]["columns"][-1]["levels"][0] == HOSTILE


def test_what_is_no_text_can_be_written(tmp_path: Path) -> None:
    found = read(tmp_path, small_scores(columns={"path": ["\udcff\x00\x1b[31m"] * 6 + ["b"]}))
    assert "\ufffd\ufffd\ufffd[31m" in found.text


def test_the_csv_file_is_linked_where_it_is(tmp_path: Path) -> None:
    assert ("a", {"href": "scores.csv"}) not in read(tmp_path, small_scores()).tags
    small_scores().save(tmp_path)
    assert ("a", {"href": "scores.csv"}) in read(tmp_path, small_scores()).tags


def test_the_lines_that_make_it_again_are_python(tmp_path: Path) -> None:
    info = {"query": "it's", "estimator": "auto", "at": "best", "top_k": 3, "verify": 4, "seed": 5}
    info["trajectory"] = str(tmp_path / "trajectory")
    found = page.commands.of(small_scores(info=info), tmp_path)
    assert found[0][1].splitlines()[0] == "lightning-accie show ."
    for _, lines in found[1:]:
        compile(lines, "report", "exec")
    again = found[2][1]
    assert "InfluenceEngine('trajectory', model, datamodule)" in again
    assert "estimate(\"it's\", estimator='auto', at='best', top_k=3, verify=4, seed=5)" in again
    elsewhere = page.commands.of(small_scores(info=info), tmp_path / "other")
    assert repr(str(tmp_path / "trajectory")) in elsewhere[2][1]


def test_part_of_a_ranking_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part of a ranking"):
        write_report(small_scores().top_helpful(1), tmp_path / "report.html")
    with pytest.raises(ValueError, match="`k` must be at least 0"):
        write_report(small_scores(), tmp_path / "report.html", top_k=-1)
    assert not list(tmp_path.iterdir())


def test_no_samples_at_all(tmp_path: Path) -> None:
    nothing = small_scores().top_harmful(0)
    assert "Influence of 0 training samples" in read(tmp_path, nothing).text


# ---------------------------------------------------------------------- the table


def test_the_table_has_every_row_in_order() -> None:
    found = {column["name"]: column for column in table(small_scores().ranked())["columns"]}
    assert found["rank"]["values"] == [1, 2, 3, 4, 5, 6, 7]
    assert found["sample"]["values"] == [4, 2, 9, 0, 7, 1, 5]
    assert found["influence"]["values"] == [-3.0, -1.0, -1.0, 0.0, 0.5, 2.0, None]
    assert found["exact"]["values"] == [-3.0, None, None, None, 0.5, None, None]
    trust = found["trust"]
    assert [trust["levels"][code] for code in trust["codes"]] == ["", "", "", "", "", "?", ""]
    label = found["label"]
    assert [label["levels"][code] for code in label["codes"]] == [*"dcgafbe"]


def test_columns_of_the_users() -> None:
    numbers = own_column("n", [1, None, 3.25, NAN, INF])
    assert numbers["values"] == [1, None, 3.25, None, None]
    assert "groups" not in numbers
    assert own_column("n", [2, 1, 2])["groups"]
    assert "groups" not in own_column("n", list(range(61)))
    mixed = own_column("m", [1, "a", None, True])
    assert mixed["levels"] == ["1", "True", "a"]
    assert mixed["codes"] == [0, 2, -1, 1]
    # A browser would round it.
    assert own_column("id", [2**53 + 1])["levels"] == [str(2**53 + 1)]
    assert len(own_column("long", ["x" * 500])["levels"][0]) == 201
    assert own_column("nothing", [None, None])["codes"] == [-1, -1]


# ---------------------------------------------------------------------- figures


def test_the_histogram_counts_every_finite_influence() -> None:
    scores = small_scores(influence=doubles(0, 2, -1, -3, NAN, 0.5, -1))
    found = figures.histogram(scores)
    assert found is not None
    edges, counts = found["edges"], found["counts"]
    assert sum(counts) == 6
    assert len(edges) == len(counts) + 1
    assert 0.0 in edges
    assert edges[0] == -3.0
    expected, _ = np.histogram([0, 2, -1, -3, 0.5, -1], np.linspace(-3, 3, 51))
    assert counts == expected[: len(counts)].tolist()
    assert counts[-1] == 1  # the bar that holds the 2


def test_the_scatter_has_what_was_replayed() -> None:
    found = figures.scatter(small_scores())
    assert found == {"points": [(-2.5, -3.0, 4), (0.25, 0.5, 7)], "count": 2}
    assert figures.scatter(small_scores(agreement=())) is None


def test_groups_sum_up_by_column() -> None:
    columns = {
        "source": [*"xxyyyyx"],
        "label": [1, 1, 2, 2, None, 2, 1],
        "loss": [1.0, 3.0, 2.0, NAN, 5.0, 6.0, 2.0],
        "id": list(range(7)),
    }
    first, second = figures.groups(small_scores(columns=columns))
    assert (first.column, second.column) == ("label", "source")
    assert first.strongest == 1  # a twentieth of seven, rounded up
    assert [(g.value, g.count, g.strongest) for g in first.groups] == [
        ("2", 3, 1),
        ("1", 3, 0),
        ("(none)", 1, 0),
    ]
    two = first.groups[0]  # samples 2, 4 and 7
    assert two.mean == pytest.approx((-1 - 3 + 0.5) / 3)
    assert two.harmful == pytest.approx(2 / 3)
    assert two.loss == pytest.approx(4.0)
    assert np.isnan(first.groups[2].mean)


# ---------------------------------------------------------------------- samples


def shown_of(sample: Any, indices: list[int]) -> dict[int, Shown]:
    return in_a_page(render_samples(sample, indices))


def picture_of(image: Any) -> str:
    return shown_of(lambda index: image, [0])[0].picture


def test_a_picture_with_its_label() -> None:
    shown = shown_of(lambda index: (torch.rand(1, 8, 8), torch.tensor(index)), [7])[7]
    assert shown.picture.startswith("data:image/png;base64,")
    assert shown.text == ""
    assert shown.values == (("[1]", "7"),)


def test_large_pictures_are_kept_small() -> None:
    noise = torch.rand(3, 500, 400, generator=torch.Generator().manual_seed(0))
    found = picture_of(noise)
    assert found.startswith("data:image/jpeg;base64,")
    assert len(found) < 60_000


def test_texts_vectors_and_everything_else() -> None:
    sample = {
        "text": "two\nlines\x00",
        "tokens": torch.arange(40),
        "nested": ({"a": 1.23456}, [1, 2, 3, 4, 5]),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "title": "t",
        "thing": object(),
    }
    shown = shown_of(lambda index: sample, [0])[0]
    assert shown.text == "two\nlines\ufffd"
    values = dict(shown.values)
    assert values["tokens"].startswith("0, 1, 2,")
    assert values["tokens"].endswith("15, … (40 numbers)")
    assert values["nested[0].a"] == "1.235"
    assert values["nested[1]"] == "1, 2, 3, 4, 5"
    assert values["mask"] == "Tensor [2, 3] bool"
    assert values["title"] == "t"
    assert values["thing"] == "object"


def test_long_samples_are_cut_and_say_so() -> None:
    shown = shown_of(lambda index: ["x" * 5000, *[None] * 100], [0])[0]
    assert len(shown.text) == 2001
    assert shown.values[-1] == ("…", "76 more")


def test_reading_samples_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    shown_of(lambda index: torch.rand(3), [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_pillow_there_are_no_pictures_and_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendered, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"lightning_accie\[report\]"):
        assert picture_of(torch.rand(3, 8, 8)) == ""


def test_examples_are_read_back(tmp_path: Path) -> None:
    shown = {3: Shown(picture_of(torch.rand(3, 8, 8)), "é\n", (("a", "b"),)), 12: Shown()}
    write_examples(tmp_path, shown)
    assert read_examples(tmp_path) == shown
    assert read_examples(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "format version 2.*Upgrade"),
        (lambda d: d.update(format="x"), "is damaged"),
        (lambda d: d.pop("examples"), "is damaged"),
        (lambda d: d["examples"].update(a=d["examples"]["3"]), "is damaged"),
        (lambda d: d["examples"]["3"].update(picture="https://example.org/x.png"), "is damaged"),
        (
            lambda d: d["examples"]["3"].update(picture="data:image/svg+xml;base64,AAAA"),
            "is damaged",
        ),
        (lambda d: d["examples"]["3"].update(picture=5), "is damaged"),
        (lambda d: d["examples"]["3"].update(text=None), "is damaged"),
        (lambda d: d["examples"]["3"].update(values=[["a", 1]]), "is damaged"),
    ],
)
def test_other_examples_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write_examples(tmp_path, {3: Shown(text="a")})
    path = tmp_path / "examples.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ExamplesError, match=message):
        read_examples(tmp_path)


def test_a_directory_in_place_of_the_examples_is_refused(tmp_path: Path) -> None:
    (tmp_path / "examples.json").mkdir()
    with pytest.raises(ExamplesError, match="cannot be read"):
        read_examples(tmp_path)


# ---------------------------------------------------------------------- the callback


def run(root: Path, **settings: Any) -> InfluenceCallback:
    influence = InfluenceCallback(
        dirpath=root, console=False, top_k=3, verify=4, **{"describe": describe, **settings}
    )
    module = Classifier(smooth_net(), sgd())
    trainer = quiet_trainer(root, callbacks=[influence])
    train, valid = classification(24), classification(11, seed=3)
    trainer.fit(module, DataLoader(train, 6, shuffle=True), DataLoader(valid, 7))
    return influence


def describe(sample: Any) -> dict[str, Any]:
    return {"label": int(sample[1])}


def test_the_callback_writes_the_report_beside_the_scores(tmp_path: Path) -> None:
    influence = run(tmp_path)
    found = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ("a", {"href": "scores.csv"}) in found.tags
    assert influence.scores is not None
    strongest = [
        *influence.scores.top_harmful(3).index.tolist(),
        *influence.scores.top_helpful(3).index.tolist(),
    ]
    shown = read_examples(tmp_path)
    assert list(shown) == strongest
    x, _ = classification(24)[strongest[0]]
    values = dict(shown[strongest[0]].values)
    assert values["[0]"] == ", ".join(f"{v:.4g}" for v in x.tolist())
    assert values["[0]"] in found.text
    assert "InfluenceEngine('trajectory', model, datamodule)" in found.text
    assert "top_k=3, verify=4, seed=0" in found.text


def test_a_report_without_samples_and_none_at_all(tmp_path: Path) -> None:
    run(tmp_path / "a", report="figures")
    assert not (tmp_path / "a" / "examples.json").exists()
    text = Reader((tmp_path / "a" / "report.html").read_text(encoding="utf-8")).text
    assert "[0]" not in text
    assert "label" in text
    run(tmp_path / "b", report="none")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        *("trajectory", "scores.csv", "scores.json", "scores.safetensors")
    }


def test_a_run_in_its_place_leaves_no_report_of_the_earlier_one(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, overwrite=True, report="none")
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "examples.json").exists()


def test_a_report_that_cannot_be_written_costs_no_ranking(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UserWarning, match=r"report.html was not written: IsADirectoryError"):
        influence = run(tmp_path)
    assert influence.scores is not None
    assert len(InfluenceScores.load(tmp_path)) == 24


def test_samples_that_cannot_be_read_cost_the_pictures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks:
        def __init__(self) -> None:
            self.left = 24 + 1  # `describe=` reads every sample, and one when `fit` starts

        def __call__(self, sample: Any) -> dict[str, Any]:
            self.left -= 1
            if not self.left:
                monkeypatch.setattr(InfluenceEngine, "sample", broken)
            return describe(sample)

    def broken(self: InfluenceEngine, index: int) -> Any:
        raise RuntimeError("no such disk")

    with pytest.warns(UserWarning, match="no pictures or texts.*no such disk"):
        influence = run(tmp_path, describe=Breaks())
    assert influence.scores is not None
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "examples.json").exists()


def test_the_package_ships_what_the_page_is_made_of() -> None:
    assets = Path(page.__file__).parent / "assets"
    licence = (assets / "vendor" / "LICENSE-chart.js.md").read_text()
    chart = (assets / "vendor" / "chart.umd.min.js").read_text(encoding="utf-8")
    assert "MIT License" in licence
    version = re.search(r"Chart\.js v([0-9.]+)", chart)
    assert version is not None
    root = Path(__file__).parents[2]
    assert f"Chart.js {version[1]}" in (root / "NOTICE").read_text()
    # Within the page a script would end there.
    assert "</script" not in chart.lower()
    assert "</script" not in (assets / "report.js").read_text(encoding="utf-8").lower()
    assert sys.modules["jinja2"]
