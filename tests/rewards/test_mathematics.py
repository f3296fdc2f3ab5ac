import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from tokcredit.rewards import answers, mathematics
from tokcredit.rewards.bounded import BoundedCalls

TABLE = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().split("\n") if line]


@pytest.fixture(scope="module")
def judge():
    """Judges all rows at once, without a limit that a slow machine would reach."""
    calls = BoundedCalls(Path(mathematics.__file__), "reward", seconds=300.0)
    yield calls
    calls.close()


def test_the_table_is_judged_without_a_false_right_or_a_false_wrong(judge):
    results = judge([(row["gold"], answers.judged(row["reply"])) for row in TABLE])
    wrong = [(row["gold"], row["reply"]) for row, x in zip(TABLE, results, strict=True) if x != float(row["right"])]
    assert wrong == []


def test_the_table_is_large_and_even():
    kinds = Counter((row["kind"], row["right"]) for row in TABLE)
    assert len(TABLE) >= 200 and len({(row["gold"], row["reply"]) for row in TABLE}) == len(TABLE)
    assert 0.4 < sum(row["right"] for row in TABLE) / len(TABLE) < 0.6
    for kind in ("number", "latex", "set", "interval", "equation", "choice", "unit", "text", "matrix", "prose"):
        assert min(kinds[kind, True], kinds[kind, False]) >= 4


def test_a_text_is_judged_alike_wherever_it_stands(judge):
    """The same answer, bare, in tags, in a formula, in a box, after a phrase and after earlier numbers."""
    golds = {
        r"\sqrt{2}": r"\sqrt{3}",
        "134": "13,4",
        "-5": "5",
        r"\frac{1}{3}": "0.3",
        r"\{1,2\}": r"\{1,3\}",
        "[1,2)": "(1,2]",
        "x^2+2x+1": "x^2+2x",
        "y=2x+1": "y=2x-1",
        "B": "C",
    }
    places = ("{}", "<answer>{}</answer>", "<answer>${}$</answer>", "${}$", r"\boxed{{{}}}", r"$\boxed{{{}}}$")
    places += ("The answer is ${}$.", "Answer: {}", "First 7, then 8.\nThe answer is {}", "Final answer:\n\\[{}\\]")
    calls = [
        (gold, answers.judged(p.format(x))) for gold, other in golds.items() for x in (gold, other) for p in places
    ]
    expected = [float(right) for _ in golds for right in (True, False) for _ in places]
    results = judge(calls)
    assert [call for call, x, y in zip(calls, results, expected, strict=True) if x != y] == []


def test_a_gold_answer_is_right_for_itself(judge):
    """Also gold answers that no parser understands, and with the typographic minus on either side."""
    golds = sorted({row["gold"] for row in TABLE} | {r"\oint_C \vec F\, d\vec r", "f: A \\to B"})
    assert judge([(gold, gold) for gold in golds]) == [1.0] * len(golds)
    dashed = [gold.replace("-", "\u2212") for gold in golds if "\\" not in gold]
    assert judge([(gold.replace("\u2212", "-"), gold) for gold in dashed]) == [1.0] * len(dashed)
    assert judge([(gold, gold.replace("\u2212", "-")) for gold in dashed]) == [1.0] * len(dashed)


def test_an_answer_that_cannot_be_read_is_never_right(judge):
    for gold in ("7", r"\oint_C f", "B", "yes"):
        assert judge([(gold, reply) for reply in ("", " ", "\\frac{", "$$", "\\boxed{}", "?", "<answer>")]) == [0.0] * 7
