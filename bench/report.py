"""Run every CPU script, with glibc's malloc as it is and tuned, and write the tables of ``bench/README.md``.

python bench/report.py [SCRIPT ...] [--quick | --tables] [--run RUN_FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tokcredit.train.record import read_metrics

HERE = Path(__file__).parent
SCRIPTS = ("tree", "scan", "credit", "loss", "pairs", "selection", "log_probs", "divergence", "head", "rollouts")
SCRIPTS += ("packing", "sampling", "end_to_end", "scaling")
ONCE = ("divergence", "head", "packing", "sampling", "end_to_end", "scaling")  # not repeated with tuned malloc
METHOD = "prepare + loss, "  # begins the names of the methods in the results of end_to_end
# With these settings memory that was freed stays with the process, so that a new result of the same size needs no new
# pages.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def measure(script: str, quick: bool, tuned: bool, folder: Path) -> dict:
    path = folder / f"{script}-{'tuned' if tuned else 'default'}.json"
    command = [sys.executable, str(HERE / f"{script}.py"), "--json", str(path)]
    command += ["--quick"] * quick + ["--impatient"] * tuned
    environment = {**os.environ, **(TUNED if tuned else {})}
    print(f"== {script}, {'tuned' if tuned else 'default'} malloc", flush=True)
    subprocess.run(command, check=True, env=environment)
    return json.loads(path.read_text())


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def verdict(result: dict) -> str:
    target = result["target"]
    return "" if target is None else "yes" if result["relative"] >= target else "**no**"


def operations_table(default: list[dict], tuned: list[dict]) -> list[str]:
    lines = [
        "| work | provider | ms | of copy rate | peak MiB | over ours | wanted | met | tuned: ms | over ours | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    again = {(r["operation"], r["shape"], r["provider"]): r for r in tuned}
    for a in default:
        b = again.get((a["operation"], a["shape"], a["provider"]))
        target, memory = a["target"], a["megabytes"]
        cells = [
            f"{a['operation']}, {a['shape']}",
            a["provider"],
            number(a["milliseconds"]),
            f"{a['share']:.0%}",
            "" if memory is None else number(memory),
            number(a["relative"]),
            "" if target is None else f"{target:g}",
            verdict(a),
            *(["", "", ""] if b is None else [number(b["milliseconds"]), number(b["relative"]), verdict(b)]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def methods_table(results: list[dict]) -> list[str]:
    """Return a row for each method, with four columns for each size; the slowest methods come last."""
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    ours = {(r["operation"], r["shape"]): r for r in results if r["provider"] == "tokcredit"}
    theirs = {(r["operation"], r["shape"]): r for r in results if r["provider"] != "tokcredit"}
    steps = ("prepare", "loss", "backward", "select")
    columns = ["method"]
    for shape in shapes:
        columns += [f"{shape}: ms", "eager GRPO over ours", "wanted", "met"]
    columns += [f"operations in {step}" for step in steps]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    names = list(dict.fromkeys(r["operation"] for r in results))
    methods = [name for name in names if name.startswith(METHOD)]
    for name in sorted(methods, key=lambda name: -theirs[name, shapes[-1]]["relative"]):
        cells = [name.removeprefix(METHOD)]
        for shape in shapes:
            target = theirs[name, shape]["target"]
            cells += [
                number(ours[name, shape]["milliseconds"]),
                number(theirs[name, shape]["relative"]),
                "" if target is None else f"{target:g}",
                verdict(theirs[name, shape]),
            ]
        dispatched = ours[name, shapes[-1]]["dispatched"]
        cells += [str(dispatched[step]) for step in steps]
        lines.append(f"| {' | '.join(cells)} |")
    for name in names:
        for shape in shapes if name not in methods else ():
            r = ours[name, shape]
            lines += ["", f"{name}, {shape}: {number(r['milliseconds'])} ms, {r['dispatched']['make']} operations."]
    return lines


def step_lines(default: dict[str, dict], runs: list[str]) -> list[str]:
    """Return what share of a training step credit and loss take, by a model of a 7B step and in given runs."""
    tree = next(r for r in default["tree"]["results"] if r["provider"] == "tokcredit")
    rows, length = map(int, tree["shape"].split(" x "))
    losses = {r["operation"]: r for r in default["loss"]["results"] if r["provider"] == "tokcredit"}
    loss_rows, loss_length = map(int, losses["policy loss"]["shape"].split(" x "))
    tokens = rows * length
    grpo = default["credit"]["results"][0]
    grpo_rows, grpo_length = map(int, grpo["shape"].split(" x "))
    seconds = {
        "GRPO": grpo["milliseconds"] / 1e3 * tokens / (grpo_rows * grpo_length),
        "TEMPO": tree["milliseconds"] / 1e3,
    }
    loss = losses["policy loss"]["milliseconds"] / 1e3 * tokens / (loss_rows * loss_length)
    # 8 parameters-times-tokens of arithmetic: 2 to sample, 6 to train; 8 GPUs of 1e15 operations/s at 40 %.
    step = 8 * 7e9 * tokens / (8 * 1e15 * 0.4)
    lines = [
        f"A 7B step on {rows:,} x {length:,} tokens takes at least {step:.0f} s on eight H100s: 8 operations for "
        "a parameter and a token, sampling and training, at 40 % of 10^15/s each. On this CPU, credit "
        "and loss take "
        + ", ".join(f"{s + loss:.3f} s ({(s + loss) / step:.2%}) for {name}" for name, s in seconds.items())
        + "."
    ]
    for run in runs:
        steps = read_metrics(Path(run))
        share = statistics.median(s["credit_seconds"] / s["seconds"] for s in steps if "credit_seconds" in s)
        lines += ["", f"In the run `{Path(run).name}` on this kind of machine, credit is {share:.2%} of a step."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"some of {', '.join(SCRIPTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs; nothing is written into the repository")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables anew")
    parser.add_argument("--run", nargs="+", default=[], help="run folders, for the share of their steps")
    options = parser.parse_args()
    if unknown := set(options.scripts) - set(SCRIPTS):
        parser.error(f"SCRIPT: expected some of {', '.join(SCRIPTS)}, got {', '.join(sorted(unknown))}")
    scripts = options.scripts or SCRIPTS
    folder = HERE / "results"
    if options.quick:
        with tempfile.TemporaryDirectory() as temporary:
            for script in scripts:
                measure(script, True, False, Path(temporary))
        return
    if not options.tables:
        folder.mkdir(exist_ok=True)
        for script in scripts:
            measure(script, False, False, folder)
            if script not in ONCE:
                measure(script, False, True, folder)
    write(folder, options.run)


def section(name: str, lines: list[str]) -> list[str]:
    return [f"### {name}", "", *lines, ""]


def write(folder: Path, runs: list[str]) -> None:
    def measured(kind: str) -> dict[str, dict]:
        paths = {s: folder / f"{s}-{kind}.json" for s in SCRIPTS}
        return {s: json.loads(path.read_text()) for s, path in paths.items() if path.exists()}

    default, tuned = measured("default"), measured("tuned")
    scripts = [s for s in default if s not in ("end_to_end", "scaling")]
    first = default["tree"]
    rows = [r for s in scripts for r in default[s]["results"]]
    wanted = [r for r in rows if r["target"] is not None]
    met = sum(r["relative"] >= r["target"] for r in wanted)
    lost = [r for r in rows if not r["provider"].startswith(("tokcredit", "memset", "tree")) and r["relative"] < 1]
    settings = " ".join(f"{k}={v}" for k, v in TUNED.items())
    lines = [
        f"{first['device']}, torch {first['torch']}, {first['date']}. "
        f"Copy rate {first['copy_gigabytes_per_second']:.1f} GB/s.",
        f"Tuned malloc is `{settings}`. {met} of {len(wanted)} targets met with default malloc.",
        "",
        *operations_table(rows, [r for script in tuned.values() for r in script["results"]]),
        "",
        "Where we lose, with default malloc: "
        + (
            "; ".join(f"{r['operation']}, {r['shape']}, to {r['provider']} ({r['relative']:.2f})" for r in lost)
            or "nowhere"
        )
        + ".",
        "",
        *(line for s in scripts for name, x in default[s].get("sections", {}).items() for line in section(name, x)),
        "### Whole methods",
        "",
        *methods_table(default["end_to_end"]["results"]),
        "",
        "### Share of a training step",
        "",
        *step_lines(default, runs),
    ]
    if (HERE / "scaling.png").exists():
        lines += ["", "### Scaling", "", "![time against tokens, group size and row length](scaling.png)"]
    readme = HERE / "README.md"
    head, _, rest = readme.read_text().partition("<!-- cpu -->\n")
    _, _, tail = rest.partition("<!-- /cpu -->\n")
    readme.write_text(head + "<!-- cpu -->\n" + "\n".join(lines) + "\n<!-- /cpu -->\n" + tail)


if __name__ == "__main__":
    main()
