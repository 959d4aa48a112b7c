"""`report.html` in a headless Chromium: it renders, sorts, filters, and everyone can use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from lightning_accie import InfluenceScores, write_report
from lightning_accie.agreement import measure
from tests.reports import browser as room
from tests.reports.browser import Browser
from tests.score_examples import small_scores

pytestmark = pytest.mark.skipif(
    room.CHROMIUM is None or room.DRIVER is None,
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
MANY = 60_000


def scores_of(n: int) -> InfluenceScores:
    """Like a real run: heavy tails, some replayed, some doubtful, columns of every kind."""
    g = torch.Generator().manual_seed(0)
    estimate = torch.randn(n, generator=g, dtype=torch.float64) ** 3 * 1e-4
    exact = torch.full_like(estimate, torch.nan)
    replayed = torch.randperm(n, generator=g)[:30]
    exact[replayed] = estimate[replayed] * 1.1
    known = ~exact.isnan()
    labels = torch.randint(0, 10, (n,), generator=g).tolist()
    return InfluenceScores(
        index=torch.arange(n),
        influence=torch.where(known, exact, estimate),
        estimate=estimate,
        visits=torch.full((n,), 3),
        exact=exact,
        estimator=tuple("leave-one-out" if one else "sgd-ie" for one in known),
        trusted=known | (torch.rand(n, generator=g) > 0.1),
        agreement=(measure(estimate, exact, estimator="sgd-ie"),),
        columns={
            "loss": torch.rand(n, generator=g).tolist(),
            "label": labels,
            "path": [f"images/{label}/picture_{i:06d}.png" for i, label in enumerate(labels)],
            "flipped": [i % 10 == 0 for i in range(n)],
        },
        info={"query": "val_loss", "query_value": 0.5, "steps": 100, "samples": n},
    )


def sample(index: int) -> Any:
    return {"image": torch.rand(3, 16, 16), "text": f"text of {index}", "values": torch.rand(20)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    scores_of(400).save(directory)
    return write_report(scores_of(400), directory / "report.html", sample=sample, top_k=5)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(scores_of(MANY), tmp_path_factory.mktemp("large") / "report.html")


def rows(browser: Browser) -> list[list[str]]:
    lines = "[...document.querySelectorAll('#rows tbody tr')]"
    return browser.run(f"return {lines}.map(line => [...line.cells].map(cell => cell.textContent))")


def column(browser: Browser, name: str) -> list[str]:
    script = "return [...document.querySelectorAll('#rows thead th')].map(h => h.textContent)"
    place = browser.run(script).index(name)
    return [row[place] for row in rows(browser)]


def status(browser: Browser) -> str:
    return browser.driver.find_element(By.ID, "status").text


def wait_for(browser: Browser, text: str) -> None:
    WebDriverWait(browser.driver, 10).until(lambda _: status(browser) == text, status(browser))


def header(browser: Browser, name: str) -> Any:
    return browser.driver.find_element(By.XPATH, f"//table[@id='rows']//button[text()='{name}']")


# ---------------------------------------------------------------------- what is there


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_renders_without_a_complaint(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report, dark=dark)
    assert browser.driver.title == "Influence on val_loss"
    assert status(browser) == "Examples 1 to 50 of 400"
    assert len(rows(browser)) == 50
    images = "return [...document.images].map(i => i.complete && i.naturalWidth)"
    assert browser.run(images) == [64] * 10
    for chart in ("histogram", "scatter"):
        # Something is drawn: not all pixels are alike.
        pixels = (
            f"const c = document.getElementById('{chart}');"
            "return new Set(new Uint32Array(c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert browser.run(pixels) > 10, chart
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everyone_can_use_it(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    header(browser, "loss").click()
    assert browser.violations() == []


def test_the_charts_follow_a_change_of_colours(browser: Browser, report: Path) -> None:
    browser.open(report)
    script = "return Chart.getChart('histogram').data.datasets[0].backgroundColor.at(-1)"
    assert browser.run(script) == "#116b3a"
    browser.media("prefers-color-scheme", "dark")
    WebDriverWait(browser.driver, 5).until(lambda _: browser.run(script) == "#72d99a")


def test_the_charts_show_the_figures(browser: Browser, report: Path) -> None:
    browser.open(report)
    counts = browser.run("return Chart.getChart('histogram').data.datasets[0].data")
    assert sum(count or 0 for count in counts) == 400
    points = browser.run("return Chart.getChart('scatter').data.datasets[0].data")
    scores = scores_of(400)
    assert len(points) == 30
    for point in points:
        assert point["x"] == pytest.approx(scores.estimate[point["index"]].item())
        assert point["y"] == pytest.approx(scores.exact[point["index"]].item())


# ---------------------------------------------------------------------- the table


def test_rows_are_those_of_the_scores(browser: Browser, report: Path) -> None:
    browser.open(report)
    top = scores_of(400).ranked().to_dict()
    assert column(browser, "rank") == [str(n) for n in range(1, 51)]
    assert column(browser, "example") == list(map(str, top["index"][:50]))
    assert column(browser, "influence") == [f"{value:+.2e}" for value in top["influence"][:50]]
    exact = zip(top["exact_influence"][:50], top["trusted"][:50], strict=True)
    expected = ["" if trusted else "?" for _, trusted in exact]
    for place, value in enumerate(top["exact_influence"][:50]):
        expected[place] = f"{value:+.2e}" if value == value else expected[place]
    assert column(browser, "exact") == expected
    assert "?" in expected
    assert any("e" in text for text in expected)
    assert column(browser, "flipped") == list(map(str, top["flipped"][:50]))


def test_it_sorts_both_ways(browser: Browser, report: Path) -> None:
    browser.open(report)
    losses = sorted(scores_of(400).columns["loss"])
    header(browser, "loss").click()
    found = column(browser, "loss")
    assert list(map(float, found)) == pytest.approx(losses[:50], rel=1e-5)
    sorts = (
        "return [...document.querySelectorAll('#rows th')].map(h => h.getAttribute('aria-sort'))"
    )
    assert [sort for sort in browser.run(sorts) if sort] == ["ascending"]
    header(browser, "loss").send_keys(Keys.ENTER)  # by the keyboard
    found = column(browser, "loss")
    assert list(map(float, found)) == pytest.approx(losses[::-1][:50], rel=1e-5)
    assert [sort for sort in browser.run(sorts) if sort] == ["descending"]
    header(browser, "exact").click()  # unknown ones last, whichever the way
    assert all("e" in value for value in column(browser, "exact")[:30])
    assert not any("e" in value for value in column(browser, "exact")[30:])
    header(browser, "exact").click()
    assert all("e" in value for value in column(browser, "exact")[:30])


def test_it_searches(browser: Browser, report: Path) -> None:
    browser.open(report)
    field = browser.driver.find_element(By.ID, "search")
    field.send_keys("PICTURE_00012")
    wait_for(browser, "Examples 1 to 10 of 10, out of 400")
    assert all("picture_00012" in path for path in column(browser, "path"))
    field.clear()
    field.send_keys("nothing of the kind")
    wait_for(browser, "Examples 0, out of 400")
    assert rows(browser) == []
    browser.driver.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    wait_for(browser, "Examples 1 to 50 of 400")


def test_it_filters(browser: Browser, report: Path) -> None:
    browser.open(report)
    scores = scores_of(400)
    labels = scores.columns["label"]
    select = browser.driver.find_element(By.XPATH, "//label[starts-with(., 'label')]/select")
    select.send_keys("3")
    many = labels.count(3)
    wait_for(browser, f"Examples 1 to {min(50, many)} of {many}, out of 400")
    assert set(column(browser, "label")) == {"3"}
    show = browser.driver.find_element(By.ID, "show")
    show.send_keys("harmful")
    some = sum(v < 0 and label == 3 for v, label in zip(scores.influence, labels, strict=True))
    wait_for(browser, f"Examples 1 to {some} of {some}, out of 400")
    assert all(value.startswith("-") for value in column(browser, "influence"))
    low = browser.driver.find_element(By.XPATH, "//label[starts-with(., 'loss from')]/input")
    low.send_keys("0.9")
    few = sum(
        v < 0 and label == 3 and loss >= 0.9
        for v, label, loss in zip(scores.influence, labels, scores.columns["loss"], strict=True)
    )
    wait_for(browser, f"Examples 1 to {few} of {few}, out of 400")


@pytest.mark.parametrize(
    ("choice", "count"),
    [("replayed", 30), ("not to be", int((~scores_of(400).trusted).sum()))],
)
def test_it_shows_what_was_replayed_and_what_is_doubtful(
    browser: Browser, report: Path, choice: str, count: int
) -> None:
    browser.open(report)
    browser.driver.find_element(By.ID, "show").send_keys(choice)
    wait_for(browser, f"Examples 1 to {count} of {count}, out of 400")


def test_it_has_pages(browser: Browser, report: Path) -> None:
    browser.open(report)
    press = "document.querySelector(`#pages [data-page=${arguments[0]}]`).click()"
    browser.run(press, "next")
    assert status(browser) == "Examples 51 to 100 of 400"
    browser.run(press, "last")
    assert status(browser) == "Examples 351 to 400 of 400"
    disabled = (
        "return [...document.querySelectorAll('#pages button:disabled')].map(b => b.textContent)"
    )
    assert browser.run(disabled) == ["Next", "Last"]
    field = browser.driver.find_element(By.ID, "page")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("3", Keys.ENTER)
    assert status(browser) == "Examples 101 to 150 of 400"
    browser.driver.find_element(By.ID, "size").send_keys("250")
    assert status(browser) == "Examples 1 to 250 of 400"


def test_a_row_leads_to_its_picture(browser: Browser, report: Path) -> None:
    browser.open(report)
    link = browser.driver.find_element(By.CSS_SELECTOR, "#rows tbody a")
    link.click()
    assert browser.driver.current_url.endswith(f"#example-{link.text}")
    assert browser.run("return document.querySelector(':target h3').textContent").startswith("1 ")


# ---------------------------------------------------------------------- what may go wrong


def test_texts_of_the_users_do_nothing(browser: Browser, tmp_path: Path) -> None:
    columns = {HOSTILE: [HOSTILE] * 7, "label": [HOSTILE, *"bcdefg"]}
    scores = small_scores(columns=columns, info={"query": HOSTILE})
    path = write_report(scores, tmp_path / "r.html", sample=lambda index: [HOSTILE, HOSTILE])
    browser.open(path)
    assert column(browser, "label")[3] == HOSTILE
    assert browser.run("return window.hacked") is None
    assert browser.complaints() == []


def test_the_smallest_scores(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(small_scores(), tmp_path / "small.html"))
    assert column(browser, "influence")[-1] == "unknown"
    header(browser, "influence").click()
    header(browser, "influence").click()
    assert column(browser, "example") == ["1", "7", "0", "9", "2", "4", "5"]
    assert browser.violations() == []
    browser.open(write_report(small_scores().top_harmful(0), tmp_path / "none.html"))
    assert status(browser) == "Examples 0"
    assert browser.complaints() == []


# ---------------------------------------------------------------------- sixty thousand


def test_many_rows_do_not_freeze_it(browser: Browser, large: Path) -> None:
    assert large.stat().st_size < 8e6
    browser.open(large)
    assert status(browser) == f"Examples 1 to 50 of {MANY}"
    paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert WebDriverWait(browser.driver, 5).until(lambda _: browser.run(paint)) < 2000
    timed = (
        "return [...document.querySelectorAll('#rows th button')].flatMap(button => [1, 2].map(() => {"
        " const start = performance.now(); button.click();"
        " document.getElementById('rows').offsetHeight; return performance.now() - start; }))"
    )
    assert max(browser.run(timed)) < 500
    assert len(rows(browser)) == 50
    assert browser.complaints() == []
