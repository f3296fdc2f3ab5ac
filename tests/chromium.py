"""Chromium without a screen, driven by selenium."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
needs_chromium = pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="chromium or chromium-driver is not installed")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,1000",
)


def started(profile):
    """A driver whose console can be read."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Browser:
    """A report in Chromium: opened, looked at, and free of errors."""

    def __init__(self, profile):
        self.driver = started(profile)

    def open(self, path, view="run"):
        self.driver.get("about:blank")
        self.driver.get(f"{path.as_uri()}#{view}")
        self.wait(lambda: self.js("return document.body.dataset.ready") == view.split("-")[0])
        return self

    def wait(self, condition):
        return WebDriverWait(self.driver, 90, 0.02).until(lambda _: condition())

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element):
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        self.js("return new Promise(requestAnimationFrame)")
        ActionChains(self.driver).move_to_element(element).perform()

    def shown(self):
        """Numbers of the rollouts that are not filtered out."""
        return sorted(int(a.get_attribute("data-row")) for a in self.all("article:not([hidden])"))

    def card(self):
        cells = self.js(
            "return [...document.querySelectorAll('#card:not([hidden]) [data-field]')]"
            ".map(c => [c.dataset.field, c.dataset.method || '', c.textContent])"
        )
        return {(field, method): text for field, method, text in cells}

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
