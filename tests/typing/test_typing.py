"""The typed use of the public API runs, the package says that it is typed, and the native stub is up to date."""

import ast
import importlib.util
import sys
from pathlib import Path

import tokcredit
from tokcredit import _C

ROOT = Path(__file__).parents[2]
USE = Path(__file__).with_name("use_of_the_public_api.py")


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_the_typed_use_of_the_public_api_runs():
    module_at(USE).main()


def test_it_uses_every_public_module():
    text = USE.read_text()
    unused = [name for name in tokcredit.__all__ if f"tc.{name}" not in text and f"import {name}" not in text]
    assert unused == []


def test_the_package_is_typed():
    folder = Path(tokcredit.__file__).parent
    assert (folder / "py.typed").exists() and (folder / "_C.pyi").exists()


def test_the_native_stub_has_the_names_of_the_module():
    """In a checkout the whole text is compared; an installed package has the names."""
    stub = (Path(tokcredit.__file__).parent / "_C.pyi").read_text()
    tree = ast.parse(stub)
    listed = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    listed |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert listed == {name for name in dir(_C) if not name.startswith("_")}
    generator = module_at(ROOT / "csrc/bind/stub.py")
    assert stub == generator.stub(_C), "run python csrc/bind/stub.py > python/tokcredit/_C.pyi"
