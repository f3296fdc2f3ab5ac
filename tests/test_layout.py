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
    "bind": ("ops/", "bind/"),
}
FLOW = ["ops", "rollouts", "tree", "values", "credit", "weights", "ratio", "clip", "aggregation", "loss", "objective"]
BLOCKS = ["scan", "segment", "select", "policy"]  # built on ops and rollouts alone, open to every stage


@pytest.mark.parametrize("folder", ALLOWED)
def test_native_includes(folder):
    for path in (ROOT / "csrc" / folder).iterdir():
        text = path.read_text()
        for name in re.findall(r'#include "([^"]+)"', text):
            assert name.startswith(ALLOWED[folder]), f"{path.name} includes {name}"
        if folder == "ops":
            assert set(re.findall(r"#include <([^>]+)>", text)) <= {"cstdint"}, path.name


def imports(path):
    text = path.read_text()
    names = re.findall(r"^from tokcredit\.(\w+)", text, re.M)
    for one, several in re.findall(r"^from tokcredit import (?:([\w ,]+)|\(([\w\s,]+)\))", text, re.M):
        names += re.findall(r"\w+", one or several)
    return set(names)


@pytest.mark.parametrize("stage", [*FLOW, *BLOCKS])
def test_stages_import_earlier_ones(stage):
    earlier = FLOW[: FLOW.index(stage)] + BLOCKS if stage in FLOW else ["ops", "rollouts", "segment"]
    assert imports(ROOT / f"python/tokcredit/{stage}.py") - {"_C"} <= set(earlier) - {stage}


def test_every_module_has_its_place():
    modules = {p.stem for p in (ROOT / "python/tokcredit").glob("*.py")} - {"__init__", "__main__", "cli"}
    assert modules == {*FLOW, *BLOCKS}
    for path in ROOT.glob("python/tokcredit/**/*.py"):
        assert path.stem not in {"utils", "helpers", "common", "misc"}


def test_import_is_light():
    code = "import sys, tokcredit, torch; print(torch.cuda.is_initialized(), *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "False"
    assert not {"transformers", "accelerate", "trl", "verl", "vllm", "tokcredit.cli"} & set(out)
