import pytest

from .build import ROOT
from .seeded_bugs import BUGS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_has_its_place(bug):
    """A list whose places are gone proves nothing; the bugs themselves are run by hand."""
    text = (ROOT / "csrc/cuda" / bug.file).read_text()
    assert text.count(bug.old) == 1
    assert bug.old != bug.new and bug.sources
