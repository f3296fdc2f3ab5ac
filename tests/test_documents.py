"""The Python blocks of all pages run as they are printed, and print what they say; their commands have such options.

Blocks for a host trainer run in the tests of its adapter, in the environment of the host.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import derivations
import pytest
from pages import PAGES, ROOT, blocks

sys.path.insert(0, str(ROOT / "docs"))
import evidence
import outputs


def test_every_page_is_run():
    """No page has a Python block that no test runs, or one that is not marked as Python."""
    run_here = set(re.findall(r'blocks\("([\w./]+)"\)', Path(__file__).read_text()))
    run_here |= {f"docs/{name}.md" for name in outputs.PAGES}
    assert {page for page in PAGES if blocks(page)} == run_here | {"docs/hosts.md"}  # adapters/test_recipes.py
    for page in PAGES:
        for fence in re.findall(r"^ *(```.*|~~~.*)$", (ROOT / page).read_text(), re.M):
            assert fence in ("```", "```python"), page
        assert not any(re.search(r"^(import|from) ", block, re.M) for block in blocks(page, "")), page


def run(code, folder):
    """What a script prints."""
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme(tmp_path):
    (of_trl,) = (block for block in blocks("README.md") if "CreditGRPOTrainer" in block)
    assert '"CreditGRPOTrainer" in block' in (ROOT / "tests/adapters/test_trl.py").read_text()
    own = [block for block in blocks("README.md") if block != of_trl]
    printed = run("\n".join(own), tmp_path)
    (shown,) = (block for block in blocks("README.md", "") if block.startswith("tensor("))
    assert printed.startswith(shown)
    comments = re.findall(r"# ((?:loss|tensor\().*)$", "".join(own), re.M)
    assert printed == shown + "".join(f"{line}\n" for line in comments) and len(comments) == 2


@pytest.mark.parametrize("name", outputs.PAGES)
def test_what_pages_print(name):
    page = (ROOT / f"docs/{name}.md").read_text()
    assert outputs.filled(page) == page


def test_evidence_page():
    """Its tables are those of the committed results, and every plot that it shows is there."""
    text = evidence.PAGE.read_text()
    assert evidence.filled(text) == text
    for plot in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (ROOT / "docs" / plot).exists(), plot


def test_methods_page(tmp_path):
    run("\n".join(blocks("docs/methods.md")), tmp_path)


def test_distillation_page(tmp_path):
    shape = "print(list(objective.prepare(batch).advantages.shape), student_logits.grad.any().item())"
    printed = run("\n".join([*blocks("docs/distillation.md"), shape]), tmp_path)
    assert printed == "[4, 6] True\n"


def test_agents_page(tmp_path):
    found = blocks("docs/agents.md")
    assert len(found) == 3
    for block in found:
        (shown,) = re.findall(r"^print.*  # (.*)$", block, re.M)
        assert run(block, tmp_path) == f"{shown}\n"


def test_report_page(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("transformers")
    derivations.write(tmp_path / "runs/tiny-ctpo", groups=2, rollouts=4, length=40)
    (block,) = blocks("docs/inspect.md")
    *columns, mean = run(block, tmp_path).splitlines()
    assert columns == re.findall(r"^# (\[.*\])$", block, re.M)
    assert abs(float(mean)) < 3


def test_packing_page(tmp_path):
    pytest.importorskip("transformers")
    hosts = """
ids = torch.randint(1, 64, (3, 7))
ids[1, :5] = ids[0, :5]
real = torch.ones(3, 7, dtype=torch.bool)
real[0, 0] = real[2, 6] = False  # a shorter prompt, a shorter response
with torch.no_grad():
    logits = model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
expected = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, 2:, 0]
with torch.no_grad():
    found = verl_log_probs(model, {"prompts": ids[:, :3], "responses": ids[:, 3:], "attention_mask": real.long()})
torch.testing.assert_close(found, expected * real[:, 3:])
real[0, 0] = True
with torch.no_grad():
    expected = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    given = {"input_ids": ids, "token_mask": real.float(), "sample_mask": torch.tensor([1.0, 1.0, 0.0])}
    found = nemo_log_probs(model, given)
expected[2] = 0
torch.testing.assert_close(found[:, 1:], expected)
assert not found[:, 0].any()
"""
    printed = run("\n".join([*blocks("docs/packing.md"), hosts]), tmp_path)
    assert printed == blocks("docs/packing.md", "")[0]


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


def test_pairs_page(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("transformers")
    derivations.write(tmp_path / "runs/tiny-ctpo", groups=2, rollouts=4, length=40)
    (block,) = blocks("docs/pairs.md")
    assert run(block, tmp_path) == "".join(f"{said}\n" for said in re.findall("# (.*)$", block, re.M))
    (lines,) = (block for block in blocks("docs/pairs.md", "") if block.startswith("{"))
    (tmp_path / "file.jsonl").write_text(lines)
    from tokcredit.train import ChatSettings, examples
    from tokcredit.train.tiny import tokenizer

    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found, _ = examples.load(tmp_path / "file.jsonl", examples.PAIRS, words, ChatSettings())
    assert [(x.question, *(said.text for said in x.responses)) for x in found] == [
        ("2+2=", "4", "5"),
        ("2+3=", "5", "6"),
        ("2+4?", "6", "7"),
    ]


def test_attribution_page(tmp_path):
    pytest.importorskip("transformers")
    (block,) = blocks("docs/attribution.md")
    assert run(block, tmp_path) == "".join(f"{said}\n" for said in re.findall("# (.*)$", block, re.M))


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


def commands():
    """The commands of this package in the blocks of all pages, as lists of arguments."""
    printed = (line for page in PAGES for block in blocks(page, "") for line in block.splitlines())
    matched = (re.match(r"(?:accelerate launch -m )?tokcredit (.*)", line) for line in printed)
    return [shlex.split(found[1], comments=True) for found in matched if found]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_are_understood(arguments, monkeypatch):
    """Each reaches its function with settings of the right types, and objectives that can be made."""
    pytest.importorskip("tyro")
    from tokcredit import analyze, cli, pairs, report, train

    called = []
    functions = (
        (train, "run"),
        (train, "compare"),
        (train, "merge"),
        (train, "study"),
        (analyze, "run"),
        (analyze, "compress"),
        (pairs, "run"),
        (report, "run"),
    )
    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *given: called.extend(given) or {})
    cli.main(arguments)
    assert called
    for settings in called:
        if isinstance(settings, train.Settings):
            settings.objective.build()
