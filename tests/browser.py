"""A headless Chromium, as Debian's packages chromium and chromium-driver install it, that asks no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which Chromium demands of root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # small in a container
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Selenium looks nothing up and speaks to chromedriver directly.
ENVIRONMENT = {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true", "no_proxy": "localhost,127.0.0.1"}
PATIENCE = 120  # seconds, for a machine that has other things to do


def missing_programs() -> list[str]:
    """The programs that are not installed."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


def open_browser(profile: Path) -> Chrome:
    """Start a browser with a profile of its own; the caller quits it."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    os.environ |= ENVIRONMENT
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
    browser.set_script_timeout(PATIENCE)
    return browser


def set_screen(browser: Chrome, *, width: int, height: int, dark: bool = False) -> None:
    """Give the page a screen of this size, in CSS pixels; a narrow one is a phone's."""
    phone = width < 600
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def show_frame(browser: Chrome, frame: int) -> None:
    """Pause the videos of a sweep's page on this frame, as its slider does."""
    script = "place.value = arguments[0]; place.dispatchEvent(new Event('input'))"
    browser.execute_script(script, frame)


def wait_until(browser: Chrome, script: str, *args: object, message: str) -> None:
    """Wait until a script, which gets `args`, returns something true."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, PATIENCE).until(lambda _: browser.execute_script(script, *args), message)
