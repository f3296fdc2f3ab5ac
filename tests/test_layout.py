"""Who may include and import whom."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "ops": ("ops/",),
    "math": ("math/", "ops/"),
    "cpu": ("ops/", "math/", "cpu/"),
    "cuda": ("ops/", "math/", "cuda/"),
    "bind": ("ops/", "bind/", "emulation/"),  # the last under tests/, in builds for it
}
FLOW = [
    *("ops", "rollouts", "sampling", "tree", "values", "credit", "score", "weights", "ratio", "clip", "gain"),
    *("aggregation", "loss", "prepared", "objective"),
]
OUTSIDE = {"methods", "adapters", "train", "inspect", "analyze"}  # no stage imports these
# Open to every stage; each is built on ops, rollouts and the ones before it.
BLOCKS = [
    *("arguments", "schedule", "choice", "evidence", "scan", "segment", "select", "policy"),
    *("temperature", "divergence", "matching", "length"),
]


@pytest.mark.parametrize("folder", ALLOWED)
def test_native_includes(folder):
    for path in (ROOT / "csrc" / folder).iterdir():
        text = path.read_text()
        for name in re.findall(r'#include "([^"]+)"', text):
            assert name.startswith(ALLOWED[folder]), f"{path.name} includes {name}"
        if folder == "ops":
            assert set(re.findall(r"#include <([^>]+)>", text)) <= {"cstdint"}, path.name


def files(module):
    """A module is one file, or a folder of them."""
    path = ROOT / "python/tokcredit" / module
    return sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(module):
    text = "\n".join(path.read_text() for path in files(module))
    names = re.findall(r"^from tokcredit\.(\w+)", text, re.M)
    for one, several in re.findall(r"^from tokcredit import (?:([\w ,]+)|\(([\w\s,]+)\))", text, re.M):
        names += re.findall(r"\w+", one or several)
    return set(names)


@pytest.mark.parametrize("stage", [*FLOW, *BLOCKS])
def test_stages_import_earlier_ones(stage):
    earlier = (
        FLOW[: FLOW.index(stage)] + BLOCKS if stage in FLOW else ["ops", "rollouts", *BLOCKS[: BLOCKS.index(stage)]]
    )
    assert imports(stage) - {"_C", stage} <= set(earlier)


def test_inspect_knows_neither_trainer_nor_hosts():
    assert not imports("inspect") & {"train", "adapters", "cli"}


def test_analyze_stands_on_the_trainer():
    assert not imports("analyze") & {"adapters", "inspect", "cli"}
    assert "analyze" not in imports("train") | imports("inspect")


def test_every_module_has_its_place():
    modules = {p.stem for p in (ROOT / "python/tokcredit").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert modules - {"__init__", "__main__", "__pycache__", "cli", *OUTSIDE} == {*FLOW, *BLOCKS}
    for path in ROOT.glob("python/tokcredit/**/*.py"):
        assert path.stem not in {"utils", "helpers", "common", "misc"}


def test_import_is_light():
    code = "import sys, tokcredit, torch; print(torch.cuda.is_initialized(), *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "False"
    assert not {
        "transformers",
        "accelerate",
        "trl",
        "verl",
        "vllm",
        "jinja2",
        "pyarrow",
        "rich",
        "tokcredit.inspect",
        "tokcredit.cli",
    } & set(out)
