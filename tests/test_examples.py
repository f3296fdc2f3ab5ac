"""The plain loop runs as printed in its first lines, and learns; those of host trainers are in ``tests/adapters``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("method", ["tempo", "ctpo"])
def test_plain_loop_learns(method):
    command = [sys.executable, EXAMPLES / "grpo.py", "--method", method]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", out)]
    assert rewards[0] < 0.2 < 0.6 < rewards[-1]
