"""A real browser for pages: headless Chromium, with what it printed on its console and what it asked the network for.

from browser import chromium, console_errors, requested

with chromium(width=390) as page:
    page.get(url)
    assert not console_errors(page)
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _found() -> tuple[str, str]:
    """Paths of the browser and its driver; skips the test with the reason where one is missing."""
    pytest.importorskip("selenium", reason="browser: selenium is not installed (pip install 'diffaccel[dev]')")
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("browser: no Chromium with its driver here (apt-get install chromium chromium-driver)")
    return browser, driver


@contextmanager
def chromium(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator:
    """A selenium driver with an empty profile and a window of that size, a phone's where it is narrow."""
    browser, driver = _found()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # in a container, as root
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        if width < 500:  # no window is that narrow
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        if dark:
            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        yield page
    finally:
        page.quit()


def console_errors(page) -> list[str]:
    """What the page complained of since it was asked last."""
    return [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]


def requested(page) -> list[str]:
    """Every address that the page asked for since it was asked last."""
    events = (json.loads(entry["message"])["message"] for entry in page.get_log("performance"))
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def overflow(page) -> int:
    """Pixels by which the page is wider than its window."""
    # not window.innerWidth: a phone zooms out until the page fits, and says so
    return page.execute_script("const d = document.documentElement; return d.scrollWidth - d.clientWidth")
