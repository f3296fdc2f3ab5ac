"""Run the Python blocks of a page in order, and write what each prints into the plain block that follows it.

Run ``python docs/outputs.py`` after a change of a page or of what it shows.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = ("index", "tutorial", "credit", "mixing")
_BLOCKS = re.compile(r"(```python\n(.*?)```\n)(?:\n```\n.*?```\n)?", re.S)


def filled(text: str) -> str:
    """Return a page with the outputs of its Python blocks, which run in one namespace.

    Args:
        text: The page.
    """
    namespace: dict[str, Any] = {}

    def run(found: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(found[2], namespace)
        output = printed.getvalue()
        return found[1] + (f"\n```\n{output}```\n" if output else "")

    return _BLOCKS.sub(run, text)


if __name__ == "__main__":
    for name in PAGES:
        path = HERE / f"{name}.md"
        path.write_text(filled(path.read_text()))
