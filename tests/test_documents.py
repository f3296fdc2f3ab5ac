"""The Python blocks of README, CONTRIBUTING and two pages run as they are printed, and print what they say."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import derivations
import pytest

ROOT = Path(__file__).parents[1]


def blocks(document, language="python"):
    """Code blocks of a document, those in lists included."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / document).read_text(), re.M | re.S)
    return [textwrap.dedent(block) for kind, block in found if kind == language]


def run(code, folder):
    """What a script prints."""
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme(tmp_path):
    own = [block for block in blocks("README.md") if "CreditGRPOTrainer" not in block]
    assert len(own) == 5
    printed = run("\n".join(own), tmp_path)
    (shown,) = (block for block in blocks("README.md", "") if block.startswith("tensor("))
    assert printed.startswith(shown)
    comments = re.findall(r"# ((?:loss|tensor\().*)$", "".join(own), re.M)
    assert printed == shown + "".join(f"{line}\n" for line in comments) and len(comments) == 2


def test_methods_page(tmp_path):
    run("\n".join(blocks("docs/methods.md")), tmp_path)


def test_report_page(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("transformers")
    derivations.write(tmp_path / "runs/tiny-ctpo", groups=2, rollouts=4, length=40)
    (block,) = blocks("docs/inspect.md")
    *columns, mean = run(block, tmp_path).splitlines()
    assert columns == re.findall(r"^# (\[.*\])$", block, re.M)
    assert abs(float(mean)) < 3


def test_tasks_page(tmp_path):
    pytest.importorskip("transformers")
    (function,) = blocks("docs/tasks.md")
    run(function, tmp_path)
    (lines,) = (block for block in blocks("docs/tasks.md", "") if block.startswith("{"))
    (tmp_path / "file.jsonl").write_text(lines)
    from tokcredit.train import tasks

    problems = tasks.load([f"jsonl({str(tmp_path / 'file.jsonl')!r})"], 0.5)
    text, chat = sorted([*problems.held_out, *problems.train[0]], key=lambda p: len(p.messages))
    assert text.answer == "42" and text.messages == () and chat.answer == "\\frac{5}{6}"
    assert [m.role for m in chat.messages] == ["system", "user"]


def test_contributing(tmp_path):
    """The method of the recipe passes its own test, and the stage of the recipe passes its own."""
    method, of_method, stage, of_stage = blocks("CONTRIBUTING.md")
    code = f"""
import sys, types
import tokcredit as tc
module = types.ModuleType("tokcredit.methods.signed")
sys.modules[module.__name__] = module
exec({method!r}, vars(module))
tc.methods.signed = module.signed
exec({of_method!r})
test_formula(), test_by_hand(), test_defaults()
from tokcredit.stages import ratio
exec({stage!r}, vars(ratio))
import pytest, torch
from stages.test_ratio import SPANS
exec({of_stage!r})
test_decayed()
"""
    run(code, tmp_path)
