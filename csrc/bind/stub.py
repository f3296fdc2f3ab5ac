"""Prints the type stub of the native module: names and constants from the module, parameters from the sources here.

python csrc/bind/stub.py > python/tokcredit/_C.pyi
"""

from __future__ import annotations

import re
from keyword import iskeyword
from pathlib import Path
from types import ModuleType

TYPES = {
    "py::object": "Tensor | None",
    "py::handle": "Tensor | None",
    "py::list": "list[Tensor | None]",
    "py::tuple": "tuple[int, ...]",
    "py::dict": "dict[str, Any]",
    "py::function": "Callable[[int, str], Tensor]",
    "std::vector<int>": "Sequence[int]",
    "std::vector<double>": "Sequence[float]",
    "double": "float",
    "bool": "bool",
    "int": "int",
    "int64_t": "int",
    "void": "None",
}
RESULTS = {"py::object": "Tensor", "py::list": "list[Tensor]"}
HEAD = '''"""Native operations; contracts in ``csrc/ops``. Made by ``csrc/bind/stub.py``."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
'''


def _type(cpp: str) -> str:
    return re.sub(r"\bconst\b|&", "", cpp).strip()


def _functions() -> dict[str, str]:
    """Return the Python signature of every function that the sources bind, by name."""
    found = {}
    folder = Path(__file__).parent
    headers = "\n".join(path.read_text() for path in sorted(folder.parent.rglob("*.hpp")))
    for path in sorted(folder.glob("*.cpp")):
        text = path.read_text() + headers
        for name, function in re.findall(r'm\.def\("(\w+)", &([\w:]+)\)', text):
            match = re.search(rf"^([\w:]+) {function.split('::')[-1]}\(([^)]*)\)", text, re.M)
            if match is None:
                raise ValueError(f"{name}: expected the definition of {function} in {path.name}, found none")
            parameters = []
            for parameter in filter(None, (p.strip() for p in match[2].split(","))):
                cpp, own = parameter.rsplit(maxsplit=1)
                own = own.lstrip("&")
                parameters.append(f"{own}{'_' * iskeyword(own)}: {TYPES[_type(cpp)]}")
            listed = ", ".join([*parameters, *("/" if parameters else "")])
            found[name] = f"def {name}({listed}) -> {RESULTS.get(match[1], TYPES[match[1]])}: ..."
    return found


def _constant(value: object) -> str:
    if isinstance(value, dict):
        return "dict[str, float]"
    return "tuple[str, ...]" if isinstance(value, tuple) else type(value).__name__


def stub(module: ModuleType) -> str:
    """Return the text of the stub of the built module."""
    functions = _functions()
    names = [name for name in dir(module) if not name.startswith("_")]
    constants = [f"{name}: {_constant(getattr(module, name))}" for name in names if not callable(getattr(module, name))]
    bound = [functions[name] for name in names if callable(getattr(module, name))]
    return HEAD + "\n" + "\n".join([*constants, "", *bound]) + "\n"


if __name__ == "__main__":
    from tokcredit import _C

    print(stub(_C), end="")
