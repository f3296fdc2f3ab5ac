import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("selenium", reason="selenium is not installed: the page is not tested in a browser")

import chromium
from selenium.webdriver.common.by import By
from tokcredit import report

PAIR = {
    "prompt": "p",
    "chosen": "a",
    "rejected": "b",
    "chosen_ids": [4, 5, 8, 2],
    "chosen_ref_log_probs": [-1.0, -1.0, -1.0, -1.0],
    "chosen_log_probs": [-0.5, -0.1, -2.0, -0.1],
    "rejected_ids": [4, 5, 9],
    "rejected_ref_log_probs": [-1.0, -1.0, -1.0],
    "rejected_log_probs": [-0.5, -0.1, -0.5],
}
APART = {**PAIR, "rejected_ids": [7, 5, 9]}


@pytest.fixture
def page(tmp_path):
    """Two pairs, of which the second has nothing in common, under TAB-PO and GRPO."""
    source, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, {**APART, "prompt": "q"})))
    report.run(source, ["tab_po", "grpo"], page)
    return page


def spans(browser, name):
    found = f'article[data-part="{name}"] .text span'
    return browser.wait(lambda: browser.all(found))


def kinds(browser, name):
    return [set(span.get_attribute("class").split()) for span in spans(browser, name)]


@chromium.needs_chromium
def test_what_a_pair_shares_is_shown_once(browser, page):
    browser.open(page, "0")
    texts = {a.get_attribute("data-part"): a for a in browser.all("article")}
    assert list(texts) == ["Both begin with", "Chosen", "Rejected"]
    shown = {name: [span.text for span in spans(browser, name)] for name in texts}
    assert shown == {"Both begin with": ["⟨4⟩", "⟨5⟩"], "Chosen": ["⟨8⟩", "⟨2⟩"], "Rejected": ["⟨9⟩"]}
    top, left = ({name: a.rect[side] for name, a in texts.items()} for side in ("y", "x"))
    assert top["Both begin with"] < top["Chosen"] == top["Rejected"] and left["Chosen"] < left["Rejected"]
    # -0.5 + 1 and -0.1 + 1 are shared; then -1 and 0.9, and 0.5.
    assert "2 of 2 · margin −0.600" in browser.all("h2 .count")[0].text
    assert "score 1.300" in texts["Chosen"].text and "score 1.900" in texts["Rejected"].text
    assert "score" not in texts["Both begin with"].text
    assert not browser.driver.find_element(By.NAME, "order").is_displayed()
    browser.open(page, "1")
    assert [a.get_attribute("data-part") for a in browser.all("article")] == ["Chosen", "Rejected"]


@chromium.needs_chromium
def test_colours_of_weights_and_of_log_ratios(browser, page):
    browser.open(page, "0")
    assert [k & {"p12", "n12"} for k in kinds(browser, "Chosen")] == [{"p12"}, {"p12"}]
    assert [k & {"p12", "n12"} for k in kinds(browser, "Rejected")] == [{"n12"}]
    browser.js(
        "const form = document.querySelector('.tools');"
        "form.elements.colour.value = 'log_ratio';"
        "form.elements.colour.dispatchEvent(new Event('change'))"
    )
    first, second = kinds(browser, "Chosen")
    assert "n12" in first and second & {"p11", "p12"}
    assert [k & {"p6", "p7"} != set() for k in kinds(browser, "Rejected")] == [True]
    assert "log-ratio of the token" in browser.all(".legend")[0].text
    # GRPO has no log-ratios: its tokens keep the colour of their advantage.
    browser.js("view.use('grpo')")
    assert "advantage of the token" in browser.all(".legend")[0].text
    assert [k & {"p12", "n12"} for k in kinds(browser, "Rejected")] == [{"n12"}]


@chromium.needs_chromium
def test_barrier_tokens_are_marked(browser, page):
    browser.open(page, "0")
    # Chosen tokens below 0.66.
    marked = {
        name: ["barrier" in k for k in kinds(browser, name)] for name in ("Both begin with", "Chosen", "Rejected")
    }
    assert marked == {"Both begin with": [True, False], "Chosen": [True, False], "Rejected": [False]}
    assert "counts in the barrier" in browser.all(".legend")[0].text
    token = spans(browser, "Chosen")[0]
    card = browser.wait(lambda: browser.hover(token) or browser.card())
    assert card["log_ratio", "tab_po"] == "−1.000" and card["log_ratio", "grpo"] == "not applicable"
    assert card["barrier", "tab_po"] == "yes" and card["barrier", "grpo"] == "not applicable"


@chromium.needs_chromium
def test_keys_and_search_in_a_pair(browser, page):
    browser.open(page, "0")
    cursor = "return view.current && [view.current.name, view.current.cursor]"
    browser.js("view.move(view.texts[1], 2)")
    browser.press("\ue014")  # right
    browser.wait(lambda: browser.js(cursor) == ["Chosen", 3])
    browser.press("\ue014")
    assert browser.js(cursor) == ["Chosen", 3]
    browser.js("view.move(view.texts[1], 2)")
    browser.press("\ue012")  # left, where the part ends
    assert browser.js(cursor) == ["Chosen", 2]
    browser.press("/", "⟨9⟩")
    shown = [a.get_attribute("data-part") for a in browser.all("article:not([hidden])")]
    assert shown == ["Rejected"] and browser.all("h2 .count")[0].text.startswith("1 of 2")


@chromium.needs_chromium
def test_margins_of_the_run(browser, page):
    browser.open(page)
    head = [th.text for th in browser.all("table.methods th")]
    cells = [td.text for td in browser.all("table.methods tr:not(.how) td")]
    assert head[-2:] == ["mean margin", "margins above 0"]
    assert cells[len(head) - 2 : len(head)] == ["−0.600", "0.0%"] and cells[-2:] == ["not applicable"] * 2
