"""The implicit process reward model of PRIME, which learns from outcomes beside the policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit.methods.prime import implicit_process, outcome_loss
from tokcredit.rollouts import Rollouts
from tokcredit.stages.filters import Filter
from tokcredit.train import adapter, collectors
from tokcredit.train.micro_batches import micro_batches
from tokcredit.train.policy import another
from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import Settings
from tokcredit.train.side_optimizer import SideOptimizer


class RewardModel:
    """A model whose log-probs, minus those of its first weights, are rewards of tokens.

    It learns from the outcomes of a step, of trajectories that the filters choose, and then rewards all tokens of the
    same step.

    Args:
        model: Causal language model, on its device. With an adapter only that is trained.
        beta: Factor of its rewards.
        filters: Filters of trajectories that come before credit.
        settings: Settings of the run.
        accelerator: Devices and precision.
    """

    def __init__(
        self, model: Any, beta: float, filters: Sequence[Filter], settings: Settings, accelerator: Accelerator
    ) -> None:
        self._model, self._beta, self._accelerator, self._ranks = model, beta, accelerator, Ranks(accelerator)
        self._filters = filters
        self._reference = model if adapter.has_one(model) else copy.deepcopy(model)
        o = settings.optimizer
        self._optimizer = SideOptimizer(model, settings.reward_model_lr, o, self._ranks)
        self._size, self._temperature = o.micro_batch, settings.sampling.temperature

    def __call__(self, batch: Rollouts) -> tuple[Rollouts, dict[str, float]]:
        """Return the batch with ``implicit_rewards``, after learning from its outcomes, and metrics over all processes.

        If the loss or a gradient is not finite the model stays as it is, and the loss is NaN. There are no metrics if
        the filters choose nothing.

        Args:
            batch: The rollouts of this process, whose trajectories have total rewards from 0 to 1.

        Raises:
            ValueError: A reward is not from 0 to 1.
        """
        first, chosen = self._ranks.together(
            lambda: (self._collected(batch, "ref_log_probs", reference=self._reference), self._chosen(batch))
        )
        metrics = self._learn(batch.with_inputs(ref_log_probs=first), chosen)
        now = self._ranks.together(lambda: self._collected(batch, "aligned_log_probs", aligned=self._model))
        return batch.with_inputs(implicit_rewards=now - first), metrics

    def _collected(self, batch: Rollouts, name: str, **model: Any) -> Tensor:
        with self._accelerator.autocast():
            found = collectors.collect({name}, batch, self._size, None, temperature=self._temperature, **model)
        return found.input(name)

    def _chosen(self, batch: Rollouts) -> Tensor:
        """Return which trajectories it learns from."""
        chosen = batch.whole.nonempty
        for stage in self._filters:
            chosen = chosen & stage(batch.whole, None)[:, 0]
        return chosen

    def _learn(self, batch: Rollouts, chosen: Tensor) -> dict[str, float]:
        count = self._ranks.sum({"count": chosen.sum()})["count"]
        if not count:
            return {}
        total = self._ranks.together(lambda: self._add_gradient(batch, chosen, count))
        norm = self._optimizer.clip()
        value = self._ranks.sum({"loss": total})["loss"]
        if finite := math.isfinite(norm + value):
            self._optimizer.step()
        self._optimizer.forget()
        return {"reward_model_loss": value if finite else math.nan, "reward_model_grad_norm": norm}

    def _add_gradient(self, batch: Rollouts, chosen: Tensor, count: float) -> Tensor:
        """Add the gradient of the loss over the chosen trajectories of this process, and return their part of it.

        Args:
            batch: The rollouts of this process, with ``ref_log_probs``.
            chosen: bool, which trajectories count.
            count: Number of chosen trajectories in all processes.
        """
        if batch.trajectories is not None:
            chosen = batch.trajectories.divided.of_rows(chosen)
        rows = (chosen & batch.nonempty).nonzero()[:, 0]
        total = torch.zeros((), dtype=torch.float64, device=batch.device)
        for part in micro_batches(rows, batch, self._size):
            some = batch.select(part)
            whole = some.whole
            with self._accelerator.autocast():
                forward = collectors.ForwardPass({"log_probs"}, some, self._model, temperature=self._temperature)
                ratio = forward.log_probs - some.input("ref_log_probs")
            if some.trajectories is not None:
                ratio = some.trajectories.joined.of_tokens(ratio)
            loss = outcome_loss(ratio, whole.spans, whole.rewards, self._beta) * (whole.num_rows / count)
            (loss * self._ranks.count).backward()
            total += loss.detach()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are trained, and the state of the optimizer, for a checkpoint."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self._optimizer.load_state_dict(state)


def made(
    settings: Settings, objective: Any, policy: Any, tokenizer: Any, accelerator: Accelerator
) -> RewardModel | None:
    """Return the reward model that the settings say, or None without one.

    Args:
        settings: Settings of the run.
        objective: The objective, whose stages say the factor of the rewards and which trajectories are left out.
        policy: The policy before the first step, on its device.
        tokenizer: Tokenizer of the policy.
        accelerator: Devices and precision.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    text = settings.reward_model
    if text is None:
        return None
    model = another("reward_model", text, settings, policy, tokenizer)
    beta = next((x.beta for x in objective.stages() if isinstance(x, implicit_process)), implicit_process().beta)
    filters = [x for x in objective.filters if x.before_credit]
    return RewardModel(model, beta, filters, settings, accelerator)
