import json
import re

import derivations
import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")
pytest.importorskip("selenium", reason="selenium is not installed: the page is not tested in a browser")

import chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from tokcredit import report
from tokcredit.report import packing
from tokcredit.report.page import render

METHODS = ("tempo", "ctpo")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    derivations.write(folder, groups=4, rollouts=8, length=70)
    data = report.compute(report.read(folder), METHODS)
    page = folder / "page.html"
    page.write_text(render(data), encoding="utf-8")
    return data, page


def number(text):
    return float(text.replace("−", "-"))


def agrees(text, x):
    """Whether the text is the number, rounded to the decimals it shows."""
    if text == "–":
        return not np.isfinite(x)
    decimals = len(text.partition(".")[2])
    return abs(number(text) - x) <= 0.5000001 * 10.0**-decimals + 1e-6 * abs(x)


# -- the packed file, read back without a browser --------------------------------------------------------------------


def unpacked(blob):
    """A second decoder, slow and plain: the manifest, and a function from a column's number to its values."""
    import base64
    import zlib

    raw = zlib.decompress(base64.b64decode(blob))
    size = int.from_bytes(raw[:4], "little")
    manifest, body = json.loads(raw[4 : 4 + size]), raw[4 + size :]
    lengths = [row["length"] for row in manifest["rows"]]
    tokens = sum(lengths)

    def column(index):
        entry = manifest["columns"][index]
        unit = 10.0 ** -entry["decimals"]
        scale = lambda x: np.nan if x is None else x * unit  # noqa: E731
        if "all" in entry:
            return [scale(entry["all"])] * tokens
        if "row" in entry:
            return [scale(x) for x, n in zip(entry["row"], lengths, strict=True) for _ in range(n)]
        out, total, width = [], 0, entry["bytes"]
        for i in range(tokens):
            digits = bytes(body[entry["at"] + plane * tokens + i] for plane in range(width))
            x = int.from_bytes(digits, "little", signed=True)
            if entry["delta"]:
                total = (total + x + 2 ** (8 * width - 1)) % 2 ** (8 * width) - 2 ** (8 * width - 1)
                x = total
            out.append(np.nan if x == -(2 ** (8 * width - 1)) else x * unit)
        return out

    return manifest, column


def blob_of(page, group):
    return re.search(rf'id="group-{group}">([^<]*)<', page.read_text()).group(1)


def test_packed_numbers_are_the_computed_ones(example):
    data, page = example
    for group in range(4):
        manifest, column = unpacked(blob_of(page, group))
        rows = np.flatnonzero(data.rollouts["group"] == group)
        take = np.isin(data.tokens["rollout"], rows)
        assert column(manifest["log_prob"]) == pytest.approx(data.tokens["log_prob"][take], abs=0.00051)
        for name, packed in manifest["methods"].items():
            table = data.methods[name]
            for field, step in [("advantage", 1e-3), ("ratio", 1e-3), ("low", 1e-3), ("high", 1e-3), ("weight", 1e-3)]:
                assert column(packed[field]) == pytest.approx(table[field][take], abs=0.51 * step, nan_ok=True), field
            flags = np.array(column(packed["flags"])).astype(int)
            assert np.array_equal(flags & 2 > 0, data.tokens["branch"][take])
            assert np.array_equal(flags & 4 > 0, table["trains"][take])
            assert np.array_equal(flags // 8, table["clipped"][take])


@pytest.mark.parametrize(
    "x, decimals",
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5], 1),
        ([1.0, 1.0, -2.0, -2.0, -2.0], 0),
        ([np.nan, 1.0, -127.0, 127.0, np.nan], 0),
        ([-32767.0, 32767.0, -32767.0, 0.0, 1.0], 0),
        ([2.0**31, -np.inf, 1e12, -5.0, 0.0], 0),
        ([22026.4, 1.0, 0.5, 2.0, 3.0], 5),
    ],
)
def test_columns(x, decimals):
    columns = packing._Columns(np.array([0, 0, 1, 1, 1]))
    index = columns.put(np.array(x), decimals)
    head = json.dumps({"rows": [{"length": 2}, {"length": 3}], "columns": columns.entries}).encode()
    _, column = unpacked(packing.blob(len(head).to_bytes(4, "little") + head + b"".join(columns.parts)))
    expected = np.clip(np.where(np.isfinite(x), x, np.nan), -(2**31) + 1, 2**31 - 1)
    assert column(index) == pytest.approx(expected, nan_ok=True)


def test_prompts_are_left_out_where_all_do_not_fit(example):
    data, page = example
    limit = len(page.read_bytes()) - 4 * len(blob_of(page, 0)) // 3
    small = render(data, limit=limit)
    assert len(small.encode()) <= limit
    kept = re.findall(r'id="group-(\d+)"', small)
    assert 1 < len(kept) < 4 and kept[0] == "0" and kept[-1] == "3"
    assert f"{len(kept)} of 4 prompts are shown, evenly spread" in small
    assert '"rollouts": 32' in small  # the figures of the run count all


# -- in a browser ----------------------------------------------------------------------------------------------------


@chromium.needs_chromium
def test_the_run(browser, example):
    _, page = example
    browser.open(page)
    text = browser.js("return document.body.innerText")
    assert "Step 10" in text and "tempo" in text and "4 rollouts" not in text
    assert len(browser.all("figure svg")) == 9
    unnamed = """return [...document.querySelectorAll("button, input, select, a, svg")]
        .filter(e => !(e.ariaLabel || e.textContent.trim() || e.ariaHidden)).length"""
    assert browser.js(unnamed) == 0
    # Nothing is asked of any network.
    assert browser.js("return performance.getEntriesByType('resource').length") == 0


@chromium.needs_chromium
def test_hover_shows_the_computed_numbers(browser, example):
    data, page = example
    browser.open(page, "2")
    rows = np.flatnonzero(data.rollouts["group"] == 2)
    checked = branches = 0
    for number_, position in [(0, 0), (0, 7), (1, 3), (3, 20), (5, 30), (7, 12), (2, 1)]:
        row = rows[number_]
        starts = np.flatnonzero(data.tokens["branch"][data.rollouts["begin"][row] :][: data.rollouts["length"][row]])
        for at in (position, int(starts[-1])):
            article = browser.all(f'article[data-row="{number_}"]')[0]
            browser.js("arguments[0].scrollIntoView({block: 'center'})", article)
            span = "return [...arguments[0].querySelectorAll('.text span')].find(s => s.position === arguments[1])"
            token_span = browser.wait(lambda span=span, article=article, at=at: browser.js(span, article, at))
            card = browser.wait(lambda token_span=token_span: browser.hover(token_span) or browser.card())
            token = data.rollouts["begin"][row] + at
            node = data.tokens["node"][token]
            before = data.nodes["before" if at == data.nodes["depth"][node] else "value"][node]
            was, now = re.findall(r"[−\d.]+", card["value", ""])
            assert agrees(card["log_prob", ""], data.tokens["log_prob"][token])
            assert agrees(was, before) and agrees(now, data.nodes["value"][node])
            branches += data.tokens["branch"][token]
            assert card["value", ""].startswith("branch") == data.tokens["branch"][token]
            for method in METHODS:
                table = data.methods[method]
                for field in ("advantage", "ratio", "weight"):
                    assert agrees(card[field, method], table[field][token]), (field, method, card)
                low, high = re.findall(r"[\d.]+", card["bounds", method].replace("…", " "))
                assert agrees(low, table["low"][token]) and agrees(high, table["high"][token])
                assert card["clip", method] == ("inside", "no gradient", "ratio bounded")[table["clipped"][token]]
            checked += 1
    assert checked == 14 and branches >= 7


@chromium.needs_chromium
def test_colours(browser, example):
    data, page = example
    browser.open(page, "1")
    ground = "return getComputedStyle(arguments[0]).backgroundColor"
    rows = np.flatnonzero(data.rollouts["group"] == 1)
    for name, sign in (("reward", 1), ("reward", -1)):
        row = rows[np.argmax(sign * data.rollouts[name][rows])]
        article = browser.all(f'article[data-row="{list(rows).index(row)}"]')[0]
        browser.js("arguments[0].scrollIntoView({block: 'center'})", article)
        span = browser.wait(lambda article=article: article.find_elements(By.CSS_SELECTOR, ".text span"))[2]
        red, _, blue = map(int, re.findall(r"\d+", browser.js(ground, span))[:3])
        assert (blue > red) == (sign > 0)
    # Zero is the page: no colour class, so no ground of its own.
    assert browser.js("return shade(0, 1)") == "" and browser.js("return shade(-1e-9, 1)") == "n1"
    assert browser.js("return [shade(9, 1), shade(-9, 1), shade(.5, 1)]") == ["p12", "n12", "p6"]


@chromium.needs_chromium
def test_click_on_a_node_keeps_its_rollouts(browser, example):
    data, page = example
    browser.open(page, "0")
    assert browser.shown() == list(range(8))
    nodes = np.flatnonzero(data.nodes["group"] == 0)
    rows = np.flatnonzero(data.rollouts["group"] == 0)

    def through(v):
        ids = data.tokens["node"]
        return sorted(list(rows).index(r) for r in set(data.tokens["rollout"][ids == nodes[v]]))

    inner = [v for v in range(len(nodes)) if 1 < data.nodes["count"][nodes[v]] < 8]
    assert inner
    for v in inner:
        band = browser.all(f'path.node[data-node="{v}"]')[0]
        browser.js("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", band)
        assert browser.shown() == through(v)
        text = "".join(data.run.vocabulary.texts(data.tokens["token"][data.tokens["node"] == nodes[v]].tolist()))
        length = int(data.nodes["length"][nodes[v]])
        first = np.flatnonzero(data.tokens["node"] == nodes[v])[:length]
        text = "".join(data.run.vocabulary.texts(data.tokens["token"][first].tolist()))
        assert browser.js("return document.querySelector('.chosen pre').textContent") == text
        assert band.get_attribute("aria-pressed") == "true"
    browser.press(Keys.ESCAPE)
    assert browser.shown() == list(range(8))
    # By keyboard: root, its first child, Enter.
    root = browser.all('path.node[data-node="0"]')[0]
    browser.js("arguments[0].focus()", root)
    browser.press(Keys.ARROW_RIGHT)
    v = int(browser.js("return document.activeElement.dataset.node"))
    assert data.nodes["parent"][nodes[v]] == nodes[0]
    browser.press(Keys.ENTER)
    assert browser.shown() == through(v)


@chromium.needs_chromium
def test_filters_and_search(browser, example):
    data, page = example
    browser.open(page, "3")
    rows = np.flatnonzero(data.rollouts["group"] == 3)
    reward, length = data.rollouts["reward"][rows], data.rollouts["length"][rows]
    largest = data.methods["tempo"]["largest"][rows]

    def fill(name, value):
        box = browser.driver.find_element(By.NAME, name)
        box.clear()
        box.send_keys(str(value))

    middle = int(np.median(length))
    # In the middle of the widest gap, where no rounding matters.
    levels = np.sort(largest)
    widest = int(np.diff(levels).argmax())
    least = round(float(levels[widest] + levels[widest + 1]) / 2, 3)
    for name, value, passes in [
        ("reward-low", 0.5, reward >= 0.5),
        ("reward-high", 0.5, reward <= 0.5),
        ("length-low", middle, length >= middle),
        ("length-high", middle, length <= middle),
        ("advantage-low", least, largest >= least),
    ]:
        fill(name, value)
        assert browser.shown() == np.flatnonzero(passes).tolist(), name
        browser.press(Keys.ESCAPE)
    texts = [
        "".join(data.run.vocabulary.texts(data.tokens["token"][data.tokens["rollout"] == r].tolist())) for r in rows
    ]
    browser.press("/")
    browser.press("MULTIPLY")
    wanted = [i for i, text in enumerate(texts) if "multiply" in text.lower()]
    assert 0 < len(wanted) < 8 and browser.shown() == wanted
    browser.press(Keys.ENTER)
    browser.wait(lambda: browser.all(".text .cursor"))
    hit = browser.js(
        "const piece = document.querySelector('.text .cursor').parentElement;"
        "return [...piece.querySelectorAll('.hit')].map(s => s.textContent).join('')"
    )
    assert "Multiply" in hit


@chromium.needs_chromium
def test_keyboard(browser, example):
    data, page = example
    browser.open(page)
    browser.press("]")
    browser.wait(lambda: browser.js("return document.body.dataset.ready") == "0")
    browser.press("]")
    browser.wait(lambda: browser.js("return document.body.dataset.ready") == "1")
    browser.press("[")
    browser.wait(lambda: browser.js("return document.body.dataset.ready") == "0")
    browser.press("j")
    first = browser.js("return document.activeElement.dataset.row")
    browser.press("j")
    second = browser.js("return document.activeElement.dataset.row")
    assert first is not None and second != first
    browser.press("k")
    assert browser.js("return document.activeElement.dataset.row") == first
    row = np.flatnonzero(data.rollouts["group"] == 0)[int(first)]
    begin = data.rollouts["begin"][row]
    branch = np.flatnonzero(data.tokens["branch"][begin : begin + data.rollouts["length"][row]])
    browser.press("b", "b")
    browser.wait(lambda: f"token {branch[1] + 1} of" in browser.js("return card.hidden ? '' : card.textContent"))
    browser.press(Keys.ARROW_RIGHT)
    browser.wait(lambda: f"token {branch[1] + 2} of" in browser.js("return card.hidden ? '' : card.textContent"))
    assert agrees(browser.card()["advantage", "tempo"], data.methods["tempo"]["advantage"][begin + branch[1] + 1])
    browser.press("m")
    assert browser.js("return document.querySelector('.switch [aria-pressed=true]').textContent") == "ctpo"
    browser.press("m")
    assert [h.text for h in browser.all("article h4")[:2]] == ["tempo", "ctpo"]
    browser.press("?")
    assert browser.js("return document.getElementById('help').open")
    browser.press(Keys.ESCAPE, "o")
    browser.wait(lambda: browser.js("return document.body.dataset.ready") == "run")


@chromium.needs_chromium
def test_light_and_dark(browser, example):
    _, page = example
    ground = "return getComputedStyle(document.body).backgroundColor"
    for scheme, colour in (("dark", "rgb(19, 21, 24)"), ("light", "rgb(255, 255, 255)")):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.open(page)
        assert browser.js(ground) == colour
    browser.press("t")
    assert browser.js(ground) == "rgb(19, 21, 24)"


HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "{{ 7 * 7 }} ${window.hacked=1} \\u003c &lt;",
    "right \u202e to left \u2066 and \u200f back",
    "\x00\x07\x1b[31m\x7f \u2028 \u2029 \ufeff",
    "👩‍🔬 🧪 é ﷽ नमस्ते",
]


@chromium.needs_chromium
def test_untrusted_text_stays_text(browser, tmp_path):
    words = derivations.tokenizer(["The product of 2 and 2 is 4"])
    words.add_tokens(["x" * 5000])
    words.save_pretrained(tmp_path / "tokenizer")
    invalid = [words.convert_tokens_to_ids(c) for c in ("ð", "ÿ", "À")]
    rows = [
        {"group": 0, "prompt": said, "tokens": words.encode(said), "reward": i % 2} for i, said in enumerate(HOSTILE)
    ]
    rows.append(
        {"group": 0, "prompt": "", "tokens": [*invalid, 10**6, words.convert_tokens_to_ids("x" * 5000)], "reward": 1}
    )
    rows += [
        {"group": 1 + i, "prompt": said + "\ud800", "tokens": [1, 2 + i], "reward": 0} for i, said in enumerate(HOSTILE)
    ]
    source = tmp_path / "</script><b>.jsonl".replace("/", "_")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.html"
    assert report.run(source, ["tempo"], page) == page
    html = page.read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script") == 2 + 1 + (1 + len(HOSTILE))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00\x1b]", html)

    browser.open(page, "0")
    texts = browser.wait(lambda: len(browser.all("article .text span")) > 20) and [
        browser.js(f"return document.querySelector('article[data-row=\"{i}\"] .text').textContent")
        for i in range(len(rows) - 7)
    ]
    assert [texts[i] for i in range(4)] == HOSTILE[:4]
    assert texts[4] == "right ⟨e2⟩⟨80⟩⟨ae⟩ to left ⟨e2⟩⟨81⟩⟨a6⟩ and ⟨e2⟩⟨80⟩⟨8f⟩ back"
    assert texts[5].startswith("\\u{0}\\u{7}\\u{1b}[31m\\u{7f} ⟨e2⟩")
    assert texts[7].startswith("⟨f0⟩⟨ff⟩⟨c0⟩⟨1000000⟩xxx") and texts[7].endswith("… (5000 characters)")
    for group in range(1, 1 + len(HOSTILE)):
        browser.js(f"location.hash = '#{group}'")
        browser.wait(lambda group=group: browser.js("return document.body.dataset.ready") == str(group))
    assert browser.js("return window.hacked") is None
    assert browser.all("img, b:not(header b, .chosen b), main script, nav script") == []
    # A token of thousands of characters does not widen the page.
    assert browser.js("return document.documentElement.scrollWidth <= innerWidth")


@chromium.needs_chromium
def test_odd_rollouts(browser, tmp_path):
    rows = [
        {"group": 0, "prompt": "", "tokens": [], "reward": 0, "response_mask": []},
        {"group": 1, "prompt": "alone", "tokens": [4], "reward": -2.5, "response_mask": [1]},
        {"group": 2, "prompt": "masked", "tokens": [5, 6], "reward": 1, "response_mask": [0, 0]},
        {"group": 2, "prompt": "masked", "tokens": [5], "reward": 1, "response_mask": [1]},
        {"group": 3, "prompt": "empty and not", "tokens": [], "reward": 0, "response_mask": []},
        {"group": 3, "prompt": "empty and not", "tokens": [7, 8], "reward": 1, "response_mask": [1, 1]},
    ]
    source, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.run(source, ["tempo", "gspo"], page)
    browser.open(page)
    assert "ratios and clipping are unknown" in browser.js("return document.querySelector('.note').textContent")

    def tokens():
        """Of each text, which is filled in when it comes into view."""
        return sorted(len(a.find_elements(By.CSS_SELECTOR, ".text span")) for a in browser.all("article"))

    for group, lengths in enumerate([[0], [1], [1, 2], [0, 2]]):
        browser.open(page, str(group))
        browser.wait(lambda expected=lengths: tokens() == expected)
        browser.press("j", "b", Keys.ARROW_RIGHT, "x", "m", Keys.ESCAPE)
        assert browser.shown() == list(range(len(lengths)))
    browser.open(page, "2")
    browser.wait(lambda: tokens() == [1, 2])
    browser.hover(browser.all("article[data-row='0'] .text span")[1])
    card = browser.card()
    assert card["clip", "tempo"] == "does not train" and card["ratio", "gspo"] == "–"
    assert number(card["advantage", "tempo"]) == 0 == number(card["weight", "tempo"])


@chromium.needs_chromium
def test_objectives_without_a_ratio(browser, tmp_path):
    rows = [
        {
            "group": 0,
            "prompt": "p",
            "tokens": [5, token],
            "reward": reward,
            "ref_log_probs": [-1, -1],
            "old_log_probs": [-1, -1],
            "log_probs": [-0.5, -1.5],
            "advantages": [0, 0],
        }
        for token, reward in ((8, 1), (9, 0))
    ]
    source, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.run(source, ["dpo", "grpo"], page)
    browser.open(page)
    rows = [row.text for row in browser.all("table.methods tbody tr:not(.how)")]
    assert [row.split()[0] for row in rows] == ["dpo", "grpo"]
    # Clipped tokens and effective sample size of dpo; margins of grpo.
    assert [row.count("not applicable") for row in rows] == [2, 2]
    browser.open(page, "0")
    token = browser.wait(lambda: browser.all("article[data-row='1'] .text span"))[0]
    card = browser.wait(lambda: browser.hover(token) or browser.card())
    assert {card[field, "dpo"] for field in ("ratio", "bounds", "clip")} == {"not applicable"}
    assert number(card["advantage", "dpo"]) == -1 and number(card["weight", "dpo"]) == 4
    assert agrees(card["ratio", "grpo"], np.exp(-0.5)) and card["clip", "grpo"] == "no gradient"


@chromium.needs_chromium
@pytest.mark.slow
def test_a_large_run(browser, tmp_path):
    derivations.write(tmp_path, groups=64, rollouts=16, length=2000)
    data = report.compute(report.read(tmp_path), ["tempo", "grpo"])
    assert len(data.tokens["token"]) > 1_900_000
    page = tmp_path / "page.html"
    page.write_text(render(data), encoding="utf-8")
    assert page.stat().st_size < 5_000_000
    browser.open(page)
    assert len(browser.all("#prompts li")) == 64
    browser.js("location.hash = '#63'")
    browser.wait(lambda: browser.js("return document.body.dataset.ready") == "63")
    lanes = len(browser.all(".tree a"))
    assert lanes == 16
    # Only what is near the window is built, folded or not, wherever one scrolls.
    browser.js("view.texts.forEach(t => t.fold(false))")
    total, most = int(data.groups["tokens"][63]), 0
    for part in np.linspace(0, 1, 9):
        browser.js("scrollTo(0, arguments[0] * document.body.scrollHeight)", float(part))
        browser.js("return new Promise(done => setTimeout(done, 150))")
        most = max(most, browser.js("return document.querySelectorAll('.text span').length"))
        empty = """return [...document.querySelectorAll('.text > div')].filter(d => {
            const { top, bottom } = d.getBoundingClientRect();
            return bottom > 0 && top < innerHeight && !d.firstChild;
        }).length"""
        assert browser.js(empty) == 0
    assert 0 < most < total / 5
