"""Modules that a host imports and that are not here: packages of CUDA code, and what has no say in its hook."""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from unittest.mock import MagicMock


class _Absent(ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    names: ClassVar[set[str]] = set()

    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        prefixes = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        return ModuleSpec(name, self, is_package=True) if prefixes & self.names else None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


def pretend(*names):
    """Lets these modules be imported; whatever is taken from them does nothing."""
    if not _Finder.names:
        sys.meta_path.insert(0, _Finder())
    _Finder.names |= set(names)


def without_init(*names):
    """Lets the modules of these packages be imported without what the packages' ``__init__`` imports."""
    for name in names:
        root, *rest = name.split(".")
        folder = Path(importlib.util.find_spec(root).origin).parent if not rest else None
        module = ModuleType(name)
        module.__path__ = [str(folder or Path(sys.modules[root].__path__[0]).joinpath(*rest))]
        sys.modules[name] = module
