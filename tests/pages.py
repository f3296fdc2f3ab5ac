"""Code blocks of the documentation."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "bench", "examples")
    for path in (ROOT / folder).glob("*.md")
)


def blocks(page, language="python"):
    """The code blocks of a page in a language."""
    return blocks_of((ROOT / page).read_text(), language)


def blocks_of(text, language="python"):
    """The code blocks of a text in a language, those in lists included."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(block) for kind, block in found if kind == language]
