"""``make test-emulated``: the "cuda" parameters of the suite on the emulator, then the instrumented fuzz."""

import argparse
import os
import re
import subprocess
import sys

from .build import FLAVOURS, ROOT, build


def run(*command):
    """The exit status and the output, which is shown as it comes."""
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return process.wait(), lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the fuzz")
    a = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for flavour in FLAVOURS:
        build(flavour)
    # In order: the schedules that are drawn depend on how many calls went before.
    options = ["-p", "no:randomly", "-p", "tests.emulation.plugin", "-m", "gpu", "-q", "-r", "fE"]
    tests, shown = run("pytest", *options, "tests")
    fuzz, found = run("tests.emulation.fuzz", "--seconds", str(a.seconds))
    calls = next((line for line in shown if line.startswith("emulated: ")), "emulated: no calls")
    outcome = re.sub(r", \d+ deselected| in .*", "", shown[-1]) if shown else "no tests"
    print(f"{calls}; tests: {outcome}; {found[-1] if found else 'no fuzz'}")
    raise SystemExit(tests or fuzz)


if __name__ == "__main__":
    main()
