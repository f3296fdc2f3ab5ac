"""Train GRPO and a model that imitates itself with the answer in its prompt (OPSD), and draw docs/assets/distilled.svg.

``python docs/distilled.py tiny`` takes ten minutes of one core, ``python docs/distilled.py smollm2`` an hour.
After an interruption the same command continues. Each writes its rewards into docs/distilled.json and draws all that
are there; ``python docs/distilled.py`` only draws.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from tokcredit.files import write
from tokcredit.train import OptimizerSettings, PrivilegedSettings, SamplingSettings, Settings, compare, models, tiny
from tokcredit.train.record import read_metrics

HERE = Path(__file__).parent
RESULTS = HERE / "distilled.json"
METHODS = {"grpo": "GRPO", "opsd": "OPSD, told the answer"}
METRICS = {
    "reward_mean": "reward of sampled responses",
    "held_out_reward_mean": "reward of greedy responses, held-out problems",
}
SEEDS = 3
SMOLLM2_TASKS = ("chain_sum", "products")
GREY = "#808080"  # read on white and on black
COLORS = {"grpo": "#d97b29", "opsd": "#2a7fba"}


def text(generator: random.Random, noise: float) -> str:
    """Return the text of the warm-up of ``tiny``, half of the time with the sum before it and without mistakes.

    Args:
        generator: Source of randomness.
        noise: Probability of a wrong column sum where the sum is not told.
    """
    if generator.random() < 0.5:
        return tiny.addition(generator, noise)
    right = tiny.addition(generator, 0.0)
    return f"({right.partition('>')[2]}){right}"


def start(folder: Path) -> Path:
    """Return the folder of ``tiny`` after further warm-up on texts half of which have the sum before them.

    Args:
        folder: Folder to make it in, unless it is there.
    """
    if not folder.exists():
        network, words = models.load("tiny")
        tiny.warm(network, words, steps=400, noise=0.4, text=text, batch=32)
        words.save_pretrained(folder.with_suffix(".new"))
        network.save_pretrained(folder.with_suffix(".new"))
        folder.with_suffix(".new").rename(folder)
    return folder


def settings(model: str) -> Settings:
    """Return the settings of all runs of a model.

    Args:
        model: ``tiny`` or ``smollm2``.
    """
    folder = Path("runs") / f"distilled-{model}"
    if model == "smollm2":
        told = PrivilegedSettings("answer", "{question}\nThe answer is {told}.")
        return Settings(
            model=model,
            tasks=tuple(f"{name}(min_terms=2, max_terms=2, min_digits=1, max_digits=1)" for name in SMOLLM2_TASKS),
            teacher="initial",
            privileged=told,
            sampling=SamplingSettings(prompts=8),
            optimizer=OptimizerSettings(lr=2e-5),
            steps=30,
            eval_every=5,
            output=folder,
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Settings(
        model=str(start(folder / "start")),
        tasks=("addition(digits=2)",),
        teacher="initial",
        privileged=PrivilegedSettings("answer", "({told}){question}"),
        sampling=SamplingSettings(prompts=16, max_tokens=28),
        optimizer=OptimizerSettings(lr=3e-4, precision="no"),
        steps=24,
        eval_every=4,
        eval_problems=200,
        output=folder / "runs",
    )


def measured(folder: Path) -> dict[str, dict[str, list[list[list[float]]]]]:
    """Return step and value of each measurement of each run, by metric and method.

    Args:
        folder: Folder of the comparison.
    """
    lines = {m: [read_metrics(folder / f"{m}-seed{seed}") for seed in range(SEEDS)] for m in METHODS}
    return {
        name: {
            method: [[[line["step"], round(line[name], 4)] for line in run if name in line] for run in runs]
            for method, runs in lines.items()
        }
        for name in METRICS
    }


def draw(results: dict[str, dict[str, dict[str, list[list[list[float]]]]]]) -> None:
    """Draw the mean over the seeds, and the range of the runs.

    Args:
        results: What :func:`measured` returns, by model.
    """
    matplotlib.rcParams |= {"svg.hashsalt": "tokcredit", "font.family": "DejaVu Sans"}
    size = (11, 3.4 * len(results))
    figure, axes = plt.subplots(len(results), len(METRICS), figsize=size, layout="constrained", squeeze=False)
    for row, (model, of_metrics) in zip(axes, results.items(), strict=True):
        for one, (name, title) in zip(row, METRICS.items(), strict=True):
            for method, runs in of_metrics[name].items():
                steps = [step for step, _ in runs[0]]
                columns = list(zip(*([value for _, value in run] for run in runs), strict=True))
                color = COLORS[method]
                one.plot(steps, [sum(x) / len(x) for x in columns], color=color, label=METHODS[method])
                one.fill_between(steps, *([f(x) for x in columns] for f in (min, max)), color=color, alpha=0.2)
            one.set_title(f"{model}: {title}", color=GREY, fontsize=11)
            one.set_xlabel("step", color=GREY)
            one.tick_params(colors=GREY)
            one.legend(frameon=False, labelcolor=GREY)
            for side in one.spines.values():
                side.set_color(GREY)
    figure.savefig(HERE / "assets/distilled.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Train, where a model is named, and draw."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in sys.argv[1:]:
        if model not in ("tiny", "smollm2"):
            raise SystemExit(f"model: expected tiny or smollm2, got {model}")
        folder = compare(tuple(METHODS), settings(model), SEEDS)
        if folder is None:
            return
        known[model] = measured(folder)
        write(RESULTS, json.dumps(known) + "\n")
    draw(known)


if __name__ == "__main__":
    main()
