"""The documentation site in a browser. `make docs` builds it; what Python blocks print is tested here as well."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokcredit as tc

pytest.importorskip("selenium", reason="selenium is not installed: the site is not tested in a browser")

import chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).parents[1] / "build/site"
pytestmark = [
    chromium.needs_chromium,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site: run make docs"),
]
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = chromium.started(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def errors(driver):
    return [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_no_page_is_wider_than_a_phone_or_has_errors(driver, address):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for page in PAGES:
            driver.get(f"{address}/{page}")
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390, page
            broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
            assert driver.execute_script(broken) == [], page
        assert errors(driver) == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_pages_follow_the_scheme_of_the_system(driver, address, scheme, dark):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(f"{address}/index.html")
    driver.execute_script("localStorage.clear()")  # the choice of an earlier visit
    driver.refresh()
    color = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    WebDriverWait(driver, 30).until(lambda d: (max(d.execute_script(color)) < 128) is dark)


def test_the_methods_can_be_filtered(driver, address):
    driver.get(f"{address}/methods.html")
    field = WebDriverWait(driver, 30).until(lambda d: d.find_element(By.ID, "method-filter"))
    count, shown = driver.find_element(By.ID, "method-count"), "article table tbody tr:not([hidden])"
    total = len(tc.methods.names())
    first = "return document.querySelector('article table').tBodies[0].querySelectorAll('tr:not([hidden])').length"
    assert driver.execute_script(first) == total and count.text == f"{total} of {total} methods"
    field.send_keys("2605.07331 ctpo")
    assert driver.execute_script(first) == 1 and count.text == f"1 of {total} methods"
    assert "CTPO" in driver.find_element(By.CSS_SELECTOR, shown).text
    field.send_keys(" no such word")
    assert driver.execute_script(first) == 0


def test_the_reference_has_signatures_and_arguments(driver, address):
    driver.get(f"{address}/api/rows.html")
    text = driver.find_element(By.TAG_NAME, "article").text
    assert "generalized_advantages" in text and "discount" in text and "[N]" in text
