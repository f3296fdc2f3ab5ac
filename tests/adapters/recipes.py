"""The Python blocks of ``docs/hosts.md``, run as printed."""

import re

from pages import ROOT, blocks_of

HOSTS = ROOT / "docs/hosts.md"


def sections():
    """The text of each section, by heading."""
    _, *parts = re.split(r"^## (.*)\n", HOSTS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(section):
    """The code of the Python blocks of a section."""
    return blocks_of(sections()[section])


def run(section, number=None):
    """The names that a block of a section defines. It gets no names: the block imports what it uses."""
    (code,) = blocks(section) if number is None else blocks(section)[number : number + 1]
    names = {"__name__": section}
    exec(compile(code, f"{HOSTS}: {section}", "exec"), names)
    return names
