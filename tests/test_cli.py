import subprocess
import sys

import pytest
import tokcredit as tc
from tokcredit.cli import main


def test_info(capsys):
    main(["info"])
    out = capsys.readouterr().out
    for word in (
        tc.__version__,
        "built with CUDA",
        "compiler",
        "torch",
        "threads",
        "trl",
        "verl",
        "vllm",
        *tc.methods.names(),
    ):
        assert word in out


def test_methods_come_with_a_line_each():
    run = subprocess.run([sys.executable, "-m", "tokcredit", "methods"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(tc.methods.names())
    assert all(len(line.split()) > 4 for line in run.stdout.splitlines())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit):
        main(["infos"])
    assert "invalid choice" in capsys.readouterr().err
