"""A headless Chromium without a network, for the tests of `report.html` and of the docs' site."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from axe_core_python.base import AXE_SCRIPT
from selenium import webdriver

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


class Browser:
    """One window, in which pages of the disk are opened."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, "--window-size=1280,1000", NO_NETWORK):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, page: Path, *, dark: bool = False) -> None:
        self.media("prefers-color-scheme", "dark" if dark else "light")
        self.driver.get(page.absolute().as_uri())

    def media(self, name: str, value: str) -> None:
        features = {"features": [{"name": name, "value": value}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the page logged, errors and warnings of the browser with it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def violations(self) -> list[tuple[str, list[str]]]:
        """What axe-core finds: rules, and the elements that break them."""
        self.run(AXE_SCRIPT)
        found = self.driver.execute_async_script("axe.run().then(arguments[0])")
        return [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]]

    def close(self) -> None:
        self.driver.quit()
