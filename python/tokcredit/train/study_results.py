"""What a study has measured so far, read from its run folders."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from tokcredit import __version__
from tokcredit.blocks import tree
from tokcredit.rollouts import Rollouts
from tokcredit.train import checkpoint
from tokcredit.train.curve import REWARDS
from tokcredit.train.experiment import read_summary
from tokcredit.train.record import read_metrics
from tokcredit.train.settings import Settings
from tokcredit.train.study_plan import Study, with_rate

_STILL = 1e-30
"""Learning rate that changes no weight, so that all batches of a run are sampled from one policy."""
_BETA = 0.9
"""Decay of AdamW's mean of the gradient."""


class Results:
    """The runs of a study. Arms with equal settings are one arm, also in several experiments.

    Args:
        plan: The study.
        folder: Folder of the runs.

    Attributes:
        arms: Settings of each arm, without learning rate, seed and folder.
    """

    def __init__(self, plan: Study, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._named = {(experiment, name): made for experiment, name, made in plan.arms()}
        self.arms = list(dict.fromkeys(self._named.values()))

    def run(self, arm: Settings, lr: float, seed: int) -> Settings:
        """Return the settings of one run.

        Args:
            arm: Settings of its arm.
            lr: Learning rate.
            seed: Seed.
        """
        return with_rate(arm, lr, seed, self._folder)

    def tuning_runs(self) -> list[Settings]:
        """Return the runs that choose learning rates."""
        plan = self._plan
        return [self.run(arm, lr, n) for n in plan.tuning_seeds for arm in self.arms for lr in plan.lr]

    def gradient_runs(self) -> list[Settings]:
        """Return the runs that measure gradients. A critic would not be trained, so arms with one have none."""
        found = dict.fromkeys(map(self._gradient_run, self.arms))
        return [one for one in found if one is not None]

    def tuned_run(self, arm: Settings, seed: int) -> Settings:
        """Return a run with the learning rate whose mean held-out reward over the tuning seeds is best.

        Args:
            arm: Settings of its arm.
            seed: Seed.
        """
        scores = self._scores(arm)
        return self.run(arm, max(scores, key=lambda lr: scores[lr]), seed)

    def collected(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return all results as JSON values.

        Args:
            seeds: Seeds whose runs have finished.
        """
        names = {index: f"{arm.objective.method}-{index}" for index, arm in enumerate(self.arms)}
        numbers = {key: names[self.arms.index(made)] for key, made in self._named.items()}
        plan = dataclasses.asdict(self._plan)
        for name, experiment in plan["experiments"].items():
            experiment["arms"] = {
                arm: {"options": text, "runs": numbers[name, arm]} for arm, text in experiment["arms"].items()
            }
        return {
            "version": __version__,
            **(plan | {"seeds": list(seeds)}),
            "arms": {names[index]: self._arm(arm, seeds) for index, arm in enumerate(self.arms)},
        }

    def _arm(self, arm: Settings, seeds: Sequence[int]) -> dict[str, Any]:
        runs = [self.tuned_run(arm, seed) for seed in seeds]
        gradient = self._gradient_run(arm)
        return {
            "lr": runs[0].optimizer.lr,
            "tuning": [[lr, round(score, 4)] for lr, score in self._scores(arm).items()],
            "gradient": None if gradient is None else _gradient(gradient),
            "runs": [_run(one) for one in runs],
        }

    def _scores(self, arm: Settings) -> dict[float, float]:
        """Return the mean held-out reward after training over the tuning seeds, for each learning rate."""
        scores = {}
        for lr in self._plan.lr:
            folders = (self.run(arm, lr, n).output or Path() for n in self._plan.tuning_seeds)
            scores[lr] = statistics.mean((read_summary(folder) or {})["held_out_after"] for folder in folders)
        return scores

    def _gradient_run(self, arm: Settings) -> Settings | None:
        if not self._plan.gradient_steps or arm.critic.critic is not None:
            return None
        once = dataclasses.replace(arm.optimizer, epochs=1, minibatches=1, max_grad_norm=float("inf"))
        still = dataclasses.replace(arm, optimizer=once, steps=self._plan.gradient_steps, eval_every=0, eval_problems=1)
        return self.run(still, _STILL, self._plan.seeds[0])


def _run(one: Settings) -> dict[str, Any]:
    """Return the curve of a run, with the tokens that it has trained on.

    Beside it are the share of branch tokens at its end, and the mean over its steps of the divergence (k3) of the
    sampler from the policy, per token.
    """
    folder, name = one.output or Path(), REWARDS.held_out
    lines = read_metrics(folder)
    divergences = [line["mismatch_k3_kl"] for line in lines if "mismatch_k3_kl" in line]
    tokens = list(itertools.accumulate(line.get("tokens", 0.0) for line in lines))
    measured = [
        (line["step"], int(total), line[name]) for line, total in zip(lines, tokens, strict=True) if name in line
    ]
    return {
        "seed": one.seed,
        "steps": [step for step, _, _ in measured],
        "tokens": [total for _, total, _ in measured],
        "held_out": [round(reward, 4) for _, _, reward in measured],
        "branch_fraction": round(_branch_fraction(folder), 4),
        "sampler_divergence": float(f"{statistics.mean(divergences or [0.0]):.2g}"),
        "seconds": round(sum(line.get("seconds", 0.0) for line in lines), 1),
    }


def _branch_fraction(folder: Path) -> float:
    """Return the share of the tokens of the last step at which responses branch."""
    rows = pq.read_table(max(folder.glob("rollouts-*.parquet")), columns=["tokens", "group", "reward"]).to_pylist()
    batch = Rollouts(
        torch.tensor([token for row in rows for token in row["tokens"]]),
        torch.tensor([0, *(len(row["tokens"]) for row in rows)]).cumsum(0),
        torch.tensor([row["group"] for row in rows]),
        torch.tensor([row["reward"] for row in rows]),
    )
    return float(tree.build(batch).is_branch.double().mean())


def _gradient(one: Settings) -> dict[str, float] | None:
    """Return the squared norm of the mean gradient of a batch, and the total variance of that gradient.

    Steps without any gradient, in which AdamW does nothing, are left out; None if fewer than two are left.

    With weights ``w[t]`` of AdamW's mean ``m = sum(w * g)``, the weighted variance is ``sum(w * |g|^2) - |m|^2``, and
    ``1 - sum(w^2)`` of it is missing because ``m`` is a mean of the same gradients.
    """
    folder = one.output or Path()
    norms = [norm for line in read_metrics(folder)[1:] if (norm := line["grad_norm"])]
    if len(norms) < 2:
        return None
    weights = [(1 - _BETA) * _BETA**age / (1 - _BETA ** len(norms)) for age in reversed(range(len(norms)))]
    saved = torch.load(folder / f"checkpoint-{checkpoint.last(folder):06}" / "optimizer.bin", weights_only=True)
    corrected = 1 - _BETA ** len(norms)
    mean = sum(float((x["exp_avg"].double() / corrected).square().sum()) for x in saved["state"].values())
    squares = sum(w * norm**2 for w, norm in zip(weights, norms, strict=True))
    double = sum(w**2 for w in weights)
    variance = (squares - mean) / (1 - double)
    return {"mean_squared_norm": mean - double * variance, "variance": variance}
