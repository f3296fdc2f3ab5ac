import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("selenium", reason="selenium is not installed: the page is not tested in a browser")

import chromium
from tokcredit import report
from tokcredit.report import attributions

RECORD = {
    "model": "tiny",
    "method": "gradient",
    "prompt": "a<b>",
    "prompt_tokens": [1, 2],
    "prompt_texts": ["a", "<b>"],
    "response_tokens": [3, 4],
    "response_texts": ["x", "</script>"],
    "class": None,
    "scores": [[0.5, -0.25], [-1.0, 0.75]],
    "importance": [0.75, 0.5],
}
OF_CLASS = {
    **RECORD,
    "response_tokens": [],
    "response_texts": [],
    "class": 1,
    "scores": [[-2.0, 1.0]],
    "importance": [2.0, 1.0],
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_refused(tmp_path):
    path = lines(tmp_path / "x.jsonl", [RECORD])
    assert len(attributions.read(path)) == 1 and attributions.read(tmp_path) is None
    with pytest.raises(ValueError, match=r"output: expected an HTML file because .* holds scores of an attribution"):
        report.run(path)
    with pytest.raises(ValueError, match=r"step: expected none because .* holds scores of an attribution, got 3"):
        report.run(path, output=tmp_path / "x.html", step=3)
    for change, message in (
        ({"scores": [[0.5, 1.0]]}, "scores: expected 2 lists of 2 finite numbers in row 1 of"),
        ({"importance": [float("nan"), 1.0]}, "importance: expected 2 finite numbers in row 1 of"),
        ({"prompt_texts": "ab"}, "prompt_texts: expected a list of texts in row 1 of"),
    ):
        with pytest.raises(ValueError, match=message):
            attributions.read(lines(tmp_path / "y.jsonl", [RECORD, {**RECORD, **change}]))
    assert attributions.read(lines(tmp_path / "z.jsonl", [{"prompt": "p", "tokens": [1], "reward": 1}])) is None


def test_command(tmp_path, capsys):
    from tokcredit.cli import main

    path, page = lines(tmp_path / "x.jsonl", [RECORD]), tmp_path / "x.html"
    main(["inspect", str(path), "-o", str(page)])
    assert capsys.readouterr().out == f"report  {page}\n"
    with pytest.raises(SystemExit, match=r"--output: expected an HTML file because .* holds scores of an attribution"):
        main(["inspect", str(path)])


@chromium.needs_chromium
def test_scores_colour_the_prompt(browser, tmp_path):
    page = tmp_path / "x.html"
    assert report.run(lines(tmp_path / "x.jsonl", [RECORD, OF_CLASS]), output=page) == page
    browser.driver.get(page.as_uri())
    shown = "return [...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.text span')]" + (
        ".map(s => [s.textContent, s.className]))"
    )
    assert browser.js(shown) == [[["a", "p12"], ["<b>", "p8"]], [["a", "n12"], ["<b>", "p6"]]]
    # The importance, then each token of the response.
    importance, first, second = browser.all("article button")
    assert [b.text for b in (importance, first, second)] == ["importance", "x", "</script>"]
    first.click()
    assert browser.js(shown)[0] == [["a", "p12"], ["<b>", "n6"]]
    second.click()
    assert browser.js(shown)[0] == [["a", "n12"], ["<b>", "p9"]]
    assert second.get_attribute("aria-pressed") == "true" and importance.get_attribute("aria-pressed") == "false"
    browser.hover(browser.all("article .text span")[0])
    text = browser.wait(lambda: browser.js("return card.hidden ? '' : card.textContent"))
    assert text == "ascore −1, 57.1% of the absolute scores"
    assert "tiny" in browser.all("article header")[0].text and "class 1" in browser.all("article header")[1].text
