"""The documentation's site in a headless Chromium: formulae, pictures, narrow screens, no network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By

from tests.reports import browser as room
from tests.reports.browser import Browser

pytest.importorskip("mkdocs", reason="needs `pip install -e '.[docs]'`")
pytest.importorskip("mkdocstrings", reason="needs `pip install -e '.[docs]'`")
pytestmark = pytest.mark.skipif(
    room.CHROMIUM is None or room.DRIVER is None,
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)
ROOT = Path(__file__).parents[1]
WIDTH = 400
FINDINGS = """
const article = document.querySelector("article");
const unset = [...document.querySelectorAll(".arithmatex")].filter((e) => !e.querySelector(".katex"));
return {
  unset: unset.map((e) => e.textContent),
  raw: (article.innerText.match(/.*(\\$\\$|\\\\[([]).*/g) || []),
  broken: [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src),
  fonts: article.querySelector(".katex") && !document.fonts.check("16px KaTeX_Main") ? ["KaTeX"] : [],
  wider: document.body.scrollWidth > innerWidth ? [document.body.scrollWidth] : [],
};
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


def pages(site: Path) -> list[str]:
    found = [page.relative_to(site).as_posix() for page in sorted(site.rglob("*.html"))]
    return [page for page in found if page != "404.html"]


def test_every_page_is_whole_without_a_network_on_a_telephone(
    site: Path, address: str, browser: Browser
) -> None:
    size = {"width": WIDTH, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    found = {}
    for page in pages(site):
        browser.driver.get(f"{address}/{page}")
        deadline = time.monotonic() + 10
        while (seen := browser.run(FINDINGS))["unset"] and time.monotonic() < deadline:
            time.sleep(0.1)
        found[page] = seen | {"complaints": browser.complaints()}
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert {"index.html", "method/index.html", "how-to/large-runs/index.html"} <= set(found)
    wrong = {
        page: {what: found for what, found in seen.items() if found} for page, seen in found.items()
    }
    assert {page: what for page, what in wrong.items() if what} == {}


def test_set_ups_are_folded_and_open_to_highlighted_code(address: str, browser: Browser) -> None:
    browser.driver.get(f"{address}/how-to/explain-predictions/")
    summary = browser.driver.find_element(By.CSS_SELECTOR, "article details > summary")
    code = browser.driver.find_element(By.CSS_SELECTOR, "article details pre code")
    assert (summary.text, code.is_displayed()) == ("The module and the data", False)
    summary.click()
    assert code.is_displayed()
    assert code.text.startswith("import torch\n")
    assert code.find_elements(By.TAG_NAME, "span")


@pytest.mark.parametrize("dark", [False, True])
def test_figures_take_their_ink_from_the_page(address: str, browser: Browser, dark: bool) -> None:
    """The reader has chosen a scheme by hand, against the system's own."""
    browser.media("prefers-color-scheme", "light" if dark else "dark")
    browser.driver.get(f"{address}/concepts/")
    scheme = "slate" if dark else "default"
    browser.run("document.body.dataset.mdColorScheme = arguments[0]", scheme)
    figure = browser.driver.find_element(By.CSS_SELECTOR, "img[src$='influence.svg']")
    lightness = np.asarray(Image.open(BytesIO(figure.screenshot_as_png)).convert("L")) / 255
    # The page's own, and what is written on it.
    darkest, lightest = lightness.min(), lightness.max()
    assert (darkest < 0.2, lightest > 0.75) == (True, True)
    assert np.median(lightness) == pytest.approx(darkest if dark else lightest, abs=0.05)
