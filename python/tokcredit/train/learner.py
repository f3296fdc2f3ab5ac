"""From rewarded rollouts to a better policy."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective, Prepared
from tokcredit.rollouts import Rollouts
from tokcredit.train import evidence
from tokcredit.train.clock import Clock
from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import OptimizerSettings, Settings

_PER_STEP = ("loss", "policy_loss", "kl")
_PER_TOKEN = ("ratio", "approx_kl", "clip_low", "clip_high", "clip_cap", "entropy")


class Learnt(NamedTuple):
    """What a step did.

    Attributes:
        prepared: the rollouts with their evidence and credit.
        log_probs: ``[N]``, at the last pass over the rollout; NaN where it was paid nothing.
        metrics: numbers by name, over all processes.
    """

    prepared: Prepared
    log_probs: Tensor
    metrics: dict[str, float]


class Learner:
    """Pays rollouts by an objective and updates the model.

    Args:
        settings: of the run.
        objective: what is optimized.
        model: the policy, on its device.
        teacher: for methods that distil, or None.
        accelerator: devices and precision.
    """

    def __init__(self, settings: Settings, objective: Objective, model: Any, teacher: Any, accelerator: Accelerator):
        o = settings.optimizer
        self._settings, self._accelerator, self._ranks = settings, accelerator, Ranks(accelerator)
        self._objective, self._model, self._teacher = objective, model, teacher
        self._reference = copy.deepcopy(model) if "ref_log_probs" in objective.required_inputs else None
        self._optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
        )

    def learn(self, batch: Rollouts, number: int, clock: Clock) -> Learnt:
        """The update of step ``number``, counted from 1, by rollouts with the evidence that the objective needs."""
        with clock("credit"):
            prepared = self._over_ranks(self._prepare(batch, (number - 1) / max(self._settings.steps - 1, 1)))
        lr = learning_rate(self._settings.optimizer, number, self._settings.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        metrics, log_probs = self._update(prepared, number, clock)
        return Learnt(prepared, log_probs, metrics | {"lr": lr})

    def with_evidence(self, batch: Rollouts, others: frozenset[str] = frozenset()) -> Rollouts:
        """The rollouts with what forward passes tell: what the objective needs, and ``others``."""
        required_inputs, o = self._objective.required_inputs | others, self._settings.optimizer
        if o.epochs * o.minibatches > 1:
            required_inputs |= {"old_log_probs"}
        models = (self._model, self._reference, self._teacher)
        with self._accelerator.autocast():
            return evidence.collect(required_inputs, batch, o.micro_batch, *models, self._settings.sampling.temperature)

    def score(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies under the policy at temperature 1, each ``[N]``, without gradient."""
        wanted = frozenset({"old_log_probs", "entropies"})
        with self._accelerator.autocast():
            scored = evidence.collect(wanted, batch, self._settings.optimizer.micro_batch, self._model)
        return scored.input("old_log_probs"), scored.input("entropies")

    def _prepare(self, batch: Rollouts, progress: float) -> Prepared:
        if self._ranks.count == 1 or not self._objective.compares_groups:
            return self._objective.prepare(batch, progress=progress)
        everything, mine = self._ranks.gather(batch, self._objective.required_inputs)
        return dataclasses.replace(self._objective.prepare(everything, progress=progress).select(mine), batch=batch)

    def _update(self, prepared: Prepared, number: int, clock: Clock) -> tuple[dict[str, float], Tensor]:
        o, batch = self._settings.optimizer, prepared.batch
        log_probs = torch.full((batch.num_tokens,), torch.nan, device=batch.tokens.device)
        totals = dict.fromkeys((*_PER_STEP, *_PER_TOKEN, "tokens"), torch.zeros((), dtype=torch.float64))
        steps, norms = 0, 0.0
        for epoch in range(o.epochs):
            order = np.random.default_rng([self._settings.seed, number, epoch]).permutation(batch.num_rows)
            for chosen in torch.from_numpy(order).to(batch.tokens.device).tensor_split(o.minibatches):
                whole = o.minibatches == 1
                part = prepared if whole else self._over_ranks(prepared.select(chosen))
                paid = part.has_gradient.nonzero()[:, 0]
                if not self._ranks.any(len(paid) > 0):
                    continue
                # The rows of a group side by side: they share their prompt.
                for rows in paid[part.batch.group_index[paid].argsort(stable=True)].split(o.micro_batch):
                    if not len(rows):
                        continue
                    drawn, metrics = self._backward(part.select(rows), clock)
                    log_probs[batch.token_positions(rows if whole else chosen[rows])[0]] = drawn
                    for name, value in metrics.items():
                        totals[name] = totals[name] + value * (metrics["tokens"] if name in _PER_TOKEN else 1)
                self._ranks.average_gradients(self._model)
                norms += float(self._accelerator.clip_grad_norm_(self._model.parameters(), o.max_grad_norm))
                self._optimizer.step()
                self._optimizer.zero_grad()
                steps += 1
        sums = self._ranks.sum(totals)
        means = {name: sums[name] / (max(steps, 1) * self._ranks.count) for name in _PER_STEP}
        means |= {name: sums[name] / max(sums["tokens"], 1.0) for name in _PER_TOKEN}
        if self._objective.kl is None:
            del means["kl"]
        return means | {"grad_norm": norms / max(steps, 1)}, log_probs

    def _backward(self, part: Prepared, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of a micro-batch; its log-probs, and its metrics on the CPU."""
        temperature = self._settings.sampling.temperature
        with self._accelerator.autocast():
            current, log_probs, entropies = evidence.variable(
                self._objective.variable, part.batch, self._model, self._teacher, temperature
            )
        with clock("credit"):
            out = self._objective.loss(part, current)
        out.loss.backward()
        metrics = out.metrics | {"entropy": entropies[part.batch.response_mask].mean()}
        return log_probs.detach(), {name: x.detach().double().cpu() for name, x in metrics.items()}

    def _over_ranks(self, part: Prepared) -> Prepared:
        """These rows as an optimizer step of their own, with denominators over all processes."""
        if self._ranks.count == 1:
            return part.aggregated()
        lengths = segment.count(part.batch.tokens, part.spans)
        trained = lengths > 0
        counts = self._ranks.sum(
            {
                "batch_num_tokens": lengths.sum(),
                "global_batch_size": trained.sum(),
                "global_num_groups": torch.tensor(part.batch.group_ids[trained].unique().numel()),
            }
        )
        return part.aggregated(**{name: int(x) for name, x in counts.items()}, dp_size=self._ranks.count)


def learning_rate(settings: OptimizerSettings, number: int, steps: int) -> float:
    """Of step ``number``, counted from 1: rises over the warm-up, then stays or falls, to reach 0 after the last."""
    if number <= settings.warmup:
        return settings.lr * number / settings.warmup
    left = (steps - number + 1) / max(steps - settings.warmup, 1)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.schedule]
    return settings.lr * factor
