"""Count the false rights and false wrongs of the table of answers, ours and those of math-verify, into docs/tasks.md.

Run ``python docs/answers.py`` after a change of ``tokcredit/rewards/mathematics.py`` or of the table.
"""

import json
import logging
import re
from pathlib import Path

from math_verify import parse, verify
from tokcredit.rewards import answers, mathematics
from tokcredit.rewards.bounded import BoundedCalls

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tasks.md"
ROWS = [json.loads(line) for line in (ROOT / "tests/rewards/answers.jsonl").read_text().split("\n") if line]


def plain(gold, reply):
    """math-verify as its readme uses it: the gold answer as a formula, the reply as it is."""
    return verify(parse(f"${gold}$"), parse(reply))


def wrapped(gold, reply):
    """The same, and a reply that is nothing but a formula is made one by dollar signs."""
    bare = not re.search(r"\$|\\boxed|\\\(|\\\[|[A-Za-z]{3,} [A-Za-z]", reply)
    return plain(gold, f"${reply}$" if bare else reply)


def ours():
    """Whether each reply of the table is right."""
    calls = BoundedCalls(Path(mathematics.__file__), "reward", seconds=300.0)
    return [x == 1.0 for x in calls([(row["gold"], answers.judged(row["reply"])) for row in ROWS])]


def table():
    """Markdown of the rates."""
    logging.disable(logging.CRITICAL)
    judges = {
        "tokcredit": ours(),
        "math-verify, gold answer in `$ $`": [plain(row["gold"], row["reply"]) for row in ROWS],
        "math-verify, bare formulas in `$ $` too": [wrapped(row["gold"], row["reply"]) for row in ROWS],
    }
    right = sum(row["right"] for row in ROWS)
    wrong = len(ROWS) - right
    lines = [f"| judge | false rights of {wrong} wrong responses | false wrongs of {right} right responses |"]
    lines.append("| --- | --- | --- |")
    for name, said in judges.items():
        pairs = [(x, row["right"]) for x, row in zip(said, ROWS, strict=True)]
        false_rights, false_wrongs = pairs.count((True, False)), pairs.count((False, True))
        cells = (f"{n} ({n / total:.1%})" for n, total in ((false_rights, len(ROWS) - right), (false_wrongs, right)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    made = table()
    print(made)
    head, _, tail = PAGE.read_text().split("<!-- answers -->\n")
    PAGE.write_text(f"{head}<!-- answers -->\n{made}\n<!-- answers -->\n{tail}")
