"""Writes the tables of docs/evidence.md and its plots from docs/evidence/*.json: ``python docs/evidence.py``.

``python docs/evidence.py runs/study-tiny`` first takes over the results of a study from its folder.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from tokcredit.train import study_report

HERE = Path(__file__).parent
PAGE = HERE / "evidence.md"


def filled(text: str) -> str:
    """Return the page with the tables of each study between its marks.

    Args:
        text: The page.
    """
    for path in sorted((HERE / "evidence").glob("*.json")):
        mark, made = f"<!-- {path.stem} -->", study_report.markdown(json.loads(path.read_text()), plots(path.stem))
        text = re.sub(f"{mark}.*?{mark}", lambda _, m=mark, x=made: f"{m}\n{x}\n{m}", text, flags=re.S)
    return text


def plots(study: str) -> str:
    """Return the place of the plots of a study, with ``{}`` for the experiment.

    Args:
        study: Name of the study.
    """
    return f"assets/evidence-{study}-{{}}.svg"


def main() -> None:
    """Write the page and the plots."""
    for folder in map(Path, sys.argv[1:]):
        shutil.copy(folder / "results.json", HERE / "evidence" / f"{folder.name.removeprefix('study-')}.json")
    for path in (HERE / "evidence").glob("*.json"):
        results = json.loads(path.read_text())
        for name in results["experiments"]:
            study_report.draw(results, name, HERE / plots(path.stem).format(name))
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
