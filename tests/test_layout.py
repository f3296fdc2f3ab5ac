"""Who may include and import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokcredit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/tokcredit"
ALLOWED = {
    "ops": ("ops/",),
    "math": ("math/", "ops/"),
    "cpu": ("ops/", "math/", "cpu/"),
    "cuda": ("ops/", "math/", "cuda/"),
    "bind": ("ops/", "bind/"),
}
# Each layer imports its own modules and those of earlier layers.
LAYERS = {
    "data": (
        *("arguments", "spans", "layout", "groups", "pairing", "selection", "trajectories", "turns"),
        *("inputs", "settings", "schedule", "ops", "rollouts"),
    ),
    "blocks": ("blocks",),
    "stages": ("stages",),
    "objectives": ("protocol", "from_hidden", "prepared", "objective", "preference", "supervised"),
    "methods": ("expression", "methods", "mixing", "rollout_correction"),
    "public": ("attribution", "decoding", "environments", "kernels", "packing", "rewards"),
    "applications": ("files", "train", "report", "pairs", "analyze", "adapters", "options", "exits", "cli"),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}


@pytest.mark.parametrize("folder", ALLOWED)
def test_native_includes(folder):
    for path in (ROOT / "csrc" / folder).glob("*.[ch]*"):
        # What only the emulator's build reads is not part of the layers.
        text = re.sub(r"#ifdef TOKCREDIT_EMULATED.*?#endif", "", path.read_text(), flags=re.S)
        for name in re.findall(r'#include "([^"]+)"', text):
            assert name.startswith(ALLOWED[folder]), f"{path.name} includes {name}"
        if folder == "ops":
            assert set(re.findall(r"#include <([^>]+)>", text)) <= {"cstdint"}, path.name


def files(module):
    """Files of a module, which is one file or a folder of them."""
    path = PACKAGE / module
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(path):
    """Modules of the package that a file imports anywhere, by the first name after ``tokcredit``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokcredit":
            assert node.level == 0
            names = node.module.split(".")
            found |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tokcredit.")}
    return found - {"_C"}


@pytest.mark.parametrize("module", LAYER_OF)
def test_modules_import_earlier_layers(module):
    layers = list(LAYERS)
    below = layers[: layers.index(LAYER_OF[module]) + 1]
    allowed = {name for layer in below for name in LAYERS[layer]}
    # Applications read the public names of the package; nothing else may, or it would import what comes after it.
    public = set(tokcredit.__all__) | {"__version__"} if LAYER_OF[module] == "applications" else set()
    for path in files(module):
        assert imports(path) <= allowed | public, path.relative_to(PACKAGE)


def test_data_modules_do_not_import_each_other_in_circles():
    for module in LAYER_OF:
        order = list(LAYER_OF)
        if LAYER_OF[module] in ("data", "objectives", "methods"):
            later = set(order[order.index(module) + 1 :]) - {"ops"}
            assert not set().union(*map(imports, files(module))) & later, module


def test_the_report_knows_neither_trainer_nor_hosts():
    assert not set().union(*map(imports, files("report"))) & {"train", "adapters", "cli"}


def test_analysis_uses_the_trainer_and_not_the_other_way_round():
    assert not set().union(*map(imports, files("analyze"))) & {"adapters", "report", "cli"}
    for module in ("train", "report", "adapters"):
        assert "analyze" not in set().union(*map(imports, files(module)))


def test_every_module_has_its_place():
    modules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert modules - {"__init__", "__main__"} == set(LAYER_OF)


def test_names_of_modules():
    """A file named like a standard module shadows it for whoever runs Python inside its folder.

    ``tokcredit.select`` and ``tokcredit.methods.trace`` are public names; their folders hold no script.
    """
    for path in PACKAGE.rglob("*.py"):
        for name in (path.stem, *path.relative_to(PACKAGE).parts[:-1]):
            assert name not in {"utils", "helpers", "common", "misc"}, path
            assert name not in sys.stdlib_module_names - {"select", "trace"}, path


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
        "tokcredit.report",
        "tokcredit.cli",
        "torch._dynamo",
    } & set(out)
