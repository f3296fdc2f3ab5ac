"""What ruff's rules leave open: every public parameter and field is described, also where there is no Args section."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/tokcredit"
# Private: users do not call these.
PRIVATE = {"ops"}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in PRIVATE]
SECTION = re.compile(r"^\s*(Args|Attributes|Returns|Raises|References|Example|Cost|Differences[\w ]*|Note):", re.M)


def described(docstring):
    """Names in the Args and Attributes sections."""
    found = set()
    pieces = SECTION.split(docstring or "")
    for title, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if title in ("Args", "Attributes"):
            found |= set(re.findall(r"^\s+\*{0,2}(\w+)(?: \([^)]*\))?: ", text, re.M))
    return found


def public(name):
    return not name.startswith("_")


def parameters(function):
    a = function.args
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return {x.arg for x in every if x.arg not in ("self", "cls") and public(x.arg)}


def decorators(node):
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def fields(node, classes):
    """Fields that the constructor of a dataclass or a named tuple takes."""
    made = "dataclass" in decorators(node) or "NamedTuple" in {ast.unparse(b) for b in node.bases}
    return {
        x.target.id
        for x in node.body
        if made and isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name) and public(x.target.id)
        if ast.unparse(x.annotation) not in classes
        if "ClassVar" not in ast.unparse(x.annotation) and "init=False" not in (ast.unparse(x.value) if x.value else "")
    }


def missing(tree):
    """Yield what a module does not describe, as ``name: what``.

    Not asked for: fields that hold another class of settings of the same module, which describes itself; and methods of
    protocols, which the classes that follow them describe.
    """
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        function = isinstance(node, ast.FunctionDef) and public(node.name) and "overload" not in decorators(node)
        if function and (rest := parameters(node) - described(ast.get_docstring(node))):
            yield f"{node.name}: {', '.join(sorted(rest))}"
        if not isinstance(node, ast.ClassDef) or not public(node.name):
            continue
        text = described(ast.get_docstring(node))
        commented = {  # a string below a field documents it, as the command line reads it
            a.target.id
            for a, b in zip(node.body, node.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(a.target, ast.Name)
        }
        if rest := fields(node, classes) - text - commented:
            yield f"{node.name}: {', '.join(sorted(rest))}"
        protocol = any("Protocol" in ast.unparse(b) for b in node.bases)
        for method in node.body:
            if not isinstance(method, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(method)
            if method.name == "__init__":
                if rest := parameters(method) - text - described(docstring):
                    yield f"{node.name}.__init__: {', '.join(sorted(rest))}"
            elif method.name == "__call__" or public(method.name):
                # A method of a base says what its overrides take and return.
                overrides = bool(node.bases) and method.name == "__call__"
                if docstring is None and not overrides:
                    yield f"{node.name}.{method.name}: no docstring"
                elif docstring is not None and not protocol and (rest := parameters(method) - described(docstring)):
                    yield f"{node.name}.{method.name}: {', '.join(sorted(rest))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_parameters_and_fields_are_described(path):
    assert list(missing(ast.parse(path.read_text()))) == []


def test_what_is_missing_is_found():
    source = '''
def f(a, b=1, *, c):
    """Return something.

    Args:
        a: First.
    """

class g:
    """A class."""

    def __init__(self, x): ...
    def h(self): ...
    def __call__(self, y):
        """Return y."""

@dataclass(frozen=True)
class stage(Base):
    """A stage.

    Args:
        low: A bound.
    """
    low: float
    high: float
    reads: ClassVar[int]
    def __call__(self, batch): ...
'''
    assert list(missing(ast.parse(source))) == [
        "f: b, c",
        "g.__init__: x",
        "g.h: no docstring",
        "g.__call__: y",
        "stage: high",
    ]
