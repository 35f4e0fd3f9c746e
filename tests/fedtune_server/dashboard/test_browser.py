"""The page in a real browser: on a desk and on a phone, in light and in dark, with hostile names.

Set FEDTUNE_SCREENSHOTS to a folder to keep what the browser shows.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.homes import CoordinatorHome

from .conftest import HOSTILE, TOKEN, FakeDesk
from .test_serving import free_port, serve, settings

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
_DRIVER = shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(not (_CHROMIUM and _DRIVER), reason="needs chromium, chromedriver")

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--ignore-certificate-errors",
)  # fmt: skip
_WAIT_S = 15.0

_LOW_CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !node.getClientRects().length || node.closest("title")) continue;
  const style = getComputedStyle(node);
  const ink = parse(node instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) found.push([node.outerHTML.slice(0, 90), contrast]);
}
return found;
"""
"""Texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.2, 1.4.3)."""

_UNNAMED = """
const named = (node) => node.textContent.trim() || node.getAttribute("aria-label")
  || (node.id && document.querySelector(`label[for="${node.id}"]`)) || node.type === "hidden";
const all = "a, button, input:not([hidden]), [role=img], section, [tabindex='0']";
return [...document.querySelectorAll(all)]
  .filter((node) => !named(node) && !node.getAttribute("aria-labelledby"))
  .map((node) => node.outerHTML.slice(0, 90));
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[[int, str], Any]]:
    """Opens a browser of a width, in `light` or `dark`."""
    opened: list[Any] = []

    def open_one(width: int, scheme: str) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = _CHROMIUM
        for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(_DRIVER))
        opened.append(driver)
        scheme_now = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme_now})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        return driver

    yield open_one
    for driver in opened:
        driver.quit()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_shows_hostile_names_as_text_and_can_be_read_by_everyone(
    width: int,
    scheme: str,
    told: FakeDesk,
    home: CoordinatorHome,
    browser: Callable[[int, str], Any],
) -> None:
    told.tell("spring", "warning", 335, text=f"</script><script>{HOSTILE}</script>")
    dashboard = serve(told, settings(free_port()), home)
    try:
        page = browser(width, scheme)
        page.get(dashboard.address)
        page.find_element(By.ID, "token").send_keys(TOKEN + "\n")
        wait(lambda: "spring running" in text_of(page, "announce"))
        wait(lambda: page.find_elements(By.CSS_SELECTOR, "#round svg"))
        _keep(page, f"board-{width}-{scheme}")

        text = page.find_element(By.TAG_NAME, "body").text
        assert text.count(HOSTILE) >= 3
        assert page.title == "spring running, fedtune"
        assert not page.find_elements(By.CSS_SELECTOR, "main img, main script, body > script")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script(_LOW_CONTRAST) == []
        assert page.execute_script(_UNNAMED) == []

        page.find_element(By.CSS_SELECTOR, "#round summary").click()
        numbers = page.find_element(By.CSS_SELECTOR, "#round details").text
        assert "late: the round closed without it" in numbers
        told.tell("spring", "device_reported", 336, round=3, device="south", staleness=0)
        wait(lambda: "at work" not in text_of(page, "round"))
        assert page.find_element(By.CSS_SELECTOR, "#round details").get_attribute("open")
        assert page.execute_script("return document.activeElement.tagName") == "SUMMARY"

        assert [e for e in page.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
        assert _hosts(page) == {f"localhost:{dashboard.port}"}
    finally:
        dashboard.stop()


def wait(holds: Callable[[], object]) -> None:
    until = time.monotonic() + _WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def text_of(page: Any, name: str) -> str:
    found = page.find_elements(By.ID, name)
    return str(found[0].get_attribute("textContent")) if found else ""


def _hosts(page: Any) -> set[str]:
    """Every host that the browser asked."""
    messages = (json.loads(e["message"])["message"] for e in page.get_log("performance"))
    sent = (m for m in messages if m["method"] == "Network.requestWillBeSent")
    urls = [str(m["params"]["request"]["url"]) for m in sent]
    return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("FEDTUNE_SCREENSHOTS")
    if folder:
        shot = page.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
        )
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
