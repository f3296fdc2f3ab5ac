import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("selenium", reason="selenium is not installed: the page is not tested in a browser")

import chromium
from tokcredit import report

SHARED = {"group": 0, "prompt": "p"}
ROWS = [
    {
        **SHARED,
        "tokens": [1, 2, 9, 3, 9, 5],
        "response_mask": [1, 1, 0, 1, 0, 1],
        "turn_ids": [0, 0, 0, 1, 1, 2],
        "anchor_ids": [7, 0, 0, 8, 0, 7],
        "turn_rewards": [0, 0.5, 0, 0, 0, -1.0],
        "reward": 1,
        "answers": ["⟨9⟩", "⟨9⟩", "<b>the end</b>"],
    },
    {
        **SHARED,
        "tokens": [6, 9, 6, 6],
        "response_mask": [1, 0, 1, 1],
        "turn_ids": [0, 0, 1, 1],
        "anchor_ids": [6, 0, 7, 0],
        "turn_rewards": [0, 0, 0, 0.25],
        "reward": 0,
        "answers": ["⟨9⟩", ""],
    },
]


@pytest.fixture
def page(tmp_path):
    source, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    report.run(source, ["gigpo", "grpo"], page)
    return page


def opened(browser, page):
    browser.open(page, "0")
    browser.js("view.sort('number')")
    browser.wait(lambda: len(browser.all("article .text span")) == 10)


@chromium.needs_chromium
def test_turns_with_their_rewards(browser, page):
    opened(browser, page)
    headings = [[h.text for h in a.find_elements("css selector", "h5")] for a in browser.all("article")]
    tool = "tool or environment"
    first, second, third = (
        "Turn 1 · reward 0.500 · state 1, also",
        "Turn 2 · reward 0.000",
        "Turn 3 · reward −1.000 · state 1",
    )
    expected = [first, tool, second, tool, third, tool]
    assert [h[: len(x)] for h, x in zip(headings[0], expected, strict=True)] == expected
    assert headings[0][2] == second and headings[1][0] == "Turn 1 · reward 0.000"
    answers = browser.js("return [...document.querySelectorAll('.text .answer')].map(d => d.textContent)")
    # Tokens where the rollout has them, else the text.
    assert answers == ["⟨9⟩", "⟨9⟩", "<b>the end</b>", "⟨9⟩"]
    assert ["3 turns" in a.text for a in browser.all("article header")] == [True, False]


@chromium.needs_chromium
def test_links_to_the_same_state(browser, page):
    opened(browser, page)
    links = browser.js(
        "return [...document.querySelectorAll('h5[data-turn]')]"
        ".map(h => [...h.querySelectorAll('button')].map(b => b.textContent))"
    )
    assert links == [
        ["rollout 1, turn 3", "rollout 2, turn 2"],
        [],
        ["rollout 2, turn 2", "rollout 1, turn 1"],
        [],
        ["rollout 1, turn 1", "rollout 1, turn 3"],
    ]
    # A filter hides the other rollout until a link goes there.
    browser.driver.find_element("name", "reward-low").send_keys("1")
    assert browser.shown() == [0]
    browser.all("h5[data-turn='0'] button")[1].click()
    cursor = "return [view.current.row.number, view.current.cursor]"
    browser.wait(lambda: browser.js(cursor) == [1, 2])
    assert browser.shown() == [0, 1]
    browser.wait(lambda: "token 3 of 4, rollout 2" in browser.js("return card.hidden ? '' : card.textContent"))


@chromium.needs_chromium
def test_keys_of_turns(browser, page):
    opened(browser, page)
    seen = []
    for key in ("n", "n", "n", "N"):
        browser.press(key)
        seen.append(browser.js("return view.current.cursor"))
    assert seen == [0, 3, 5, 3]
    browser.press("m", "m")  # side by side: a heading in each column
    assert len(browser.all("article[data-row='0'] h5[data-turn]")) == 6
