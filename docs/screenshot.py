"""Make docs/report.png: one prompt of a report, with the numbers of a branch token, in headless Chromium.

Run ``python docs/screenshot.py [RUN_FOLDER] [PROMPT]``. Without a run it shows the seeded example of the tests. It
needs the extras ``report`` and ``test``, and Debian's packages chromium and chromium-driver.
"""

import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1.5"
# Of the rollouts in view, the token whose advantage differs most from the median of its rollout.
TOKEN = """
const order = view.form.elements.order;
order.value = "number";
order.dispatchEvent(new Event("change"));
const method = METHODS[0], bottom = innerHeight - 260;
const distance = (s, t) => Math.abs(t.advantage(method, s.position) - t.group.methods[method].median[t.row.number]);
const spans = view.texts.flatMap(t => [...t.article.querySelectorAll(".text span")].map(s => [distance(s, t), s]));
return spans.filter(([, s]) => s.getBoundingClientRect().bottom < bottom).sort((a, b) => b[0] - a[0])[0]?.[1];
"""


def example(folder: Path) -> Path:
    """Write the seeded example into a folder and return the folder."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import derivations

    derivations.write(folder, groups=8, rollouts=12, length=90)
    return folder


def main(run: str | None = None, prompt: str = "4") -> None:
    """Make the picture.

    Args:
        run: Run folder, or None for the seeded example.
        prompt: Number of the prompt, from 1.
    """
    from tokcredit import report

    with tempfile.TemporaryDirectory() as work:
        folder = Path(run) if run else example(Path(work) / "example")
        page = report.run(folder, output=Path(work) / "report.html")
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in [*FLAGS.split(), f"--user-data-dir={work}/profile", "--window-size=1440,1420"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            driver.get(f"{page.as_uri()}#{int(prompt) - 1}")
            span = WebDriverWait(driver, 30).until(lambda d: d.execute_script(f"if (view) {{ {TOKEN} }}"))
            ActionChains(driver).move_to_element(span).perform()
            driver.save_screenshot(str(HERE / "report.png"))
        finally:
            driver.quit()
    print(f"{HERE / 'report.png'}: {(HERE / 'report.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
