"""TRL: ``GRPOTrainer`` with any objective.

Everything that sees whole groups happens once per generation batch, before TRL shuffles its rows; a micro-batch finds
its rows again by number. Tested with TRL 1.16; 1.10 is the first version with the hooks that are used.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer

from tokcredit.blocks import segment
from tokcredit.stages import aggregation, term
from tokcredit.adapters.capabilities import chosen, given, require, untouched
from tokcredit.objective import Objective, Prepared
from tokcredit.rollouts import Rollouts

_EVIDENCE = {
    "old_log_probs": "old_per_token_logps",
    "rollout_log_probs": "sampling_per_token_logps",
    "ref_log_probs": "ref_per_token_logps",
    "entropies": "entropies",
}
_CLIP = "the objective's clip stage bounds the ratio"
_NO_ENTROPY = "no stage of an objective carries an entropy bonus"
_DECIDED = {
    "loss_type": "the objective's clip and aggregation stages make the loss",
    "importance_sampling_level": "the objective's ratio stage makes the ratio",
    "scale_rewards": "the objective's credit stage scales rewards",
    "multi_objective_aggregation": "the objective's credit stage is paid one reward per row",
    "epsilon": _CLIP,
    "epsilon_high": _CLIP,
    "delta": _CLIP,
    "sapo_temperature_pos": _CLIP,
    "sapo_temperature_neg": _CLIP,
    "vespo_k_pos": _CLIP,
    "vespo_k_neg": _CLIP,
    "vespo_lambda_pos": _CLIP,
    "vespo_lambda_neg": _CLIP,
    "top_entropy_quantile": "the objective's weights stage selects tokens",
    "off_policy_mask_threshold": "the objective's weights stage selects rows",
    "entropy_coef": _NO_ENTROPY,
    "use_adaptive_entropy": _NO_ENTROPY,
}
_METRICS = {
    "entropy": "entropy",
    "kl": "kl",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "region": "clip_ratio/region_mean",
}
_HOOKS = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
)


def _resolved(objective: Objective, args: GRPOConfig) -> Objective:
    """The objective with what only the trainer's configuration knows; raises on what TRL cannot carry."""
    untouched(args, GRPOConfig, _DECIDED, "TRL")
    aggregate = objective.aggregation
    if isinstance(aggregate, aggregation.sequence_sum) and aggregate.length is None:
        # The widest row differs between ranks and batches; the limit of generation does not.
        objective = replace(objective, aggregation=aggregation.sequence_sum(args.max_completion_length))
    if args.beta and getattr(args, "use_bias_correction_kl", False):
        raise ValueError("use_bias_correction_kl: expected False, because the kl stage has no ratio, got True")
    if args.beta and objective.kl is None:
        objective = replace(objective, kl=term.k3(args.beta))  # type: ignore[arg-type]
    beta = objective.kl.beta if objective.kl is not None else 0.0
    if args.beta != beta:
        raise ValueError(f"beta: expected {beta}, the weight of the objective's kl stage, got {args.beta}")
    carries = {"old_log_probs", "entropies"}
    if args.beta:
        carries.add("ref_log_probs")
    if args.use_vllm:
        carries.add("rollout_log_probs")
        if args.vllm_importance_sampling_correction:
            if "rollout_log_probs" in objective.required_inputs:
                raise ValueError(
                    "vllm_importance_sampling_correction: expected False, because the objective's weights stage "
                    "corrects for the engine, got True"
                )
            carries.add("importance_sampling_ratio")
            objective = replace(objective, weights=(*objective.weights, given("importance_sampling_ratio")))
    require(objective, carries, "TRL with these settings")
    return objective


class CreditGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` whose credit, weights, ratio, clip and aggregation are those of an objective.

    Generation, rewards, vLLM and its importance-sampling correction, the reference model, accumulation, evaluation and
    logging stay TRL's. The loss is the objective's alone: settings of ``GRPOConfig`` that it decides must be left at
    their defaults. ``beta`` adds :class:`tokcredit.term.k3` to an objective without a kl stage, and
    ``max_completion_length`` is the length of :class:`tokcredit.aggregation.sequence_sum` where that has none. Rows
    without a training token leave the mean over rows, where TRL counts them; a completion that no reward function
    scored is paid nothing.

    Args:
        model: as in TRL.
        reward_funcs: as in TRL; ``reward_weights`` sum them to the row's reward.
        args: as in TRL.
        method: name of a published method, with its defaults.
        objective: or any objective.
        host: everything else that ``GRPOTrainer`` takes.

    Raises:
        TypeError: both of ``method`` and ``objective`` are given, or neither.
        ValueError: a setting contradicts the objective, or a stage needs evidence that TRL does not have.
        RuntimeError: this version of TRL is not known to work.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        method: str | None = None,
        objective: Objective | None = None,
        **host: Any,
    ) -> None:
        if missing := [name for name in _HOOKS if not hasattr(GRPOTrainer, name)]:
            raise RuntimeError(f"trl: expected a version from 1.10 on with {missing[0]}, got {trl.__version__}")
        if args is None:
            raise ValueError("args: expected a GRPOConfig, got None")
        self.credit_objective = _resolved(chosen(method, objective), args)
        self._prepared: dict[str, Prepared] = {}
        self._rewards_per_func: Tensor | None = None
        super().__init__(model, reward_funcs, args, **host)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _calculate_rewards(self, *arguments: Any, **keywords: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*arguments, **keywords)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        for name in ("completion_ids", "completion_mask", "advantages"):
            if name not in batch:
                raise RuntimeError(f"trl {trl.__version__}: expected {name} in the batch, got {', '.join(batch)}")
        self._collect(batch)
        prepared = self._prepare(batch)
        self._prepared[self._mode] = prepared
        advantages = prepared.advantages[:, : batch["completion_ids"].shape[1]]
        batch["advantages"] = advantages
        batch["rollout"] = torch.arange(len(advantages), device=advantages.device)
        self._log_advantages(prepared)
        return batch

    def _collect(self, batch: dict[str, Any]) -> None:
        """Adds evidence that a forward pass of the policy gives and that TRL had no use for."""
        wanted = {"old_log_probs", "entropies"} & self.credit_objective.required_inputs
        if all(_EVIDENCE[name] in batch for name in wanted):
            return
        with torch.no_grad():
            log_probs, entropies, _ = self._forward(
                self.model, batch, batch_size=self.args.per_device_train_batch_size, compute_entropy=True
            )
        if "old_log_probs" in wanted:
            batch.setdefault("old_per_token_logps", log_probs)
        if "entropies" in wanted:
            batch["entropies"] = entropies

    def _prepare(self, batch: dict[str, Any]) -> Prepared:
        """Credit and weights of this rank's rows, from whole groups, with denominators over all ranks."""
        accelerator, ids = self.accelerator, batch["completion_ids"]
        ranks, rank, rows = accelerator.num_processes, accelerator.process_index, len(ids)
        generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        straddling = ranks > 1 and (self.credit_objective.compares_groups or rows % generations != 0)

        def whole(x: Tensor) -> Tensor:
            if not straddling:
                return x
            padded: Tensor = accelerator.pad_across_processes(x, dim=1) if x.dim() > 1 else x
            return accelerator.gather(padded)

        real = whole(batch["completion_mask"])
        response = real * whole(batch["tool_mask"]) if "tool_mask" in batch else real
        first = 0 if straddling else rank * rows
        numbers = torch.arange(first, first + len(real), device=ids.device)
        rewards, scored = self._row_rewards(generations)
        # A row without a score is a group of its own, without reward: it is paid 0 and moves no baseline.
        groups = torch.where(scored[numbers], numbers // generations, len(rewards) + numbers)
        extras = {}
        if given("importance_sampling_ratio") in self.credit_objective.weights:
            ratio = whole(batch["importance_sampling_ratio"])
            extras["importance_sampling_ratio"] = ratio if ratio.shape[1] == 1 else ratio.reshape(-1)
        rollouts = Rollouts.from_padded(
            whole(ids),
            response,
            groups,
            rewards[numbers],
            real,
            extras=extras,
            **{name: whole(batch[key]) for name, key in _EVIDENCE.items() if key in batch},
        )
        state = self.state
        done = min(state.global_step / max(state.max_steps, 1), 1.0)
        prepared = self.credit_objective.prepare(
            rollouts, progress=done if self.credit_objective.is_scheduled else None
        )
        tokens = segment.count(rollouts.tokens, prepared.spans)
        present = rollouts.group_index[tokens > 0].unique().numel()
        counts = torch.stack([tokens.sum(), (tokens > 0).sum(), tokens.new_tensor(present)]).double()
        if not straddling:
            counts = accelerator.reduce(counts, reduction="sum")
        prepared = prepared.aggregated(int(counts[0]), int(counts[1]), ranks, int(counts[2]))
        if straddling:
            prepared = prepared.select(torch.arange(rank * rows, (rank + 1) * rows, device=ids.device))
        return prepared

    def _row_rewards(self, generations: int) -> tuple[Tensor, Tensor]:
        """Reward of each row of all ranks, and whether it counts: some function scored it, and others of its group."""
        if self._rewards_per_func is None:
            raise RuntimeError(f"trl {trl.__version__}: expected _calculate_rewards to be called, and it was not")
        per_function, self._rewards_per_func = self._rewards_per_func, None
        scored = ~per_function.isnan().all(1)
        scored = scored & (scored.view(-1, generations).sum(1) > 1).repeat_interleave(generations)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        return torch.where(scored, rewards, 0), scored

    def _forward(self, model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies ``(B, C)`` of the completions, and the router's loss, as TRL computes them."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        names = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        carried = {name: batch[name] for name in names if name in batch}
        out = self._get_per_token_logps_and_entropies(
            model, ids, attention, batch["completion_ids"].shape[1], **carried, **options
        )
        if len(out) != 3:
            raise RuntimeError(f"trl {trl.__version__}: expected log-probs, entropies and aux loss, got {len(out)}")
        return out

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = self._mode
        prepared = self._prepared[mode].select(inputs["rollout"])
        log_probs, entropies, aux = self._forward(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        # Where rows of all ranks were prepared together, they are as wide as the widest rank's.
        surplus = (0, prepared.mask.numel() // len(log_probs) - log_probs.shape[1])
        out = self.credit_objective.loss(prepared, pad(log_probs, surplus))
        # The weights of the rows are those of the whole generation batch, of which an optimizer step may be a part.
        parts = self.args.steps_per_generation if mode == "train" else 1
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        total = out.loss * (parts / accumulated)
        if aux is not None and self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * aux / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux.detach()).mean().item())
        self._log_metrics(mode, out.metrics, prepared, pad(entropies.detach(), surplus).reshape(-1), parts)
        return total

    def _log_metrics(
        self, mode: str, metrics: dict[str, Tensor], prepared: Prepared, entropies: Tensor, parts: int
    ) -> None:
        """Appends to TRL's metrics, under TRL's names where it has one: means over the tokens of all ranks.

        The policy loss is scaled to the whole generation batch; the KL is a mean with the weights it has in the loss.
        """
        rows, metrics = prepared.spans, {name: value.double() for name, value in metrics.items()}
        del metrics["loss"]
        tokens, policy_loss = metrics.pop("tokens"), metrics.pop("policy_loss")
        sums = {"policy_loss": (policy_loss * parts, tokens.new_tensor(1.0))}
        sums["entropy"] = (segment.sum(entropies, rows).sum(), tokens)
        penalty = prepared.objective.kl
        if penalty is not None:
            weight = prepared.penalty_weights.expand(prepared.batch.num_rows, 1)[:, 0]
            share = (weight * segment.count(prepared.batch.tokens, rows)).sum() * penalty.beta
            sums["kl"] = (metrics.pop("kl"), share)
        sums |= {name: (value * tokens, tokens) for name, value in metrics.items()}
        local = torch.stack([torch.stack([x.double() for x in pair]) for pair in sums.values()])
        totals = self.accelerator.reduce(local, reduction="sum").tolist()
        means = {name: total / (count or 1.0) for name, (total, count) in zip(sums, totals, strict=True)}
        means["region"] = means["clip_low"] + means["clip_high"]
        for name, mean in means.items():
            self._metrics[mode][_METRICS.get(name, f"tokcredit/{name}")].append(mean)

    def _log_advantages(self, prepared: Prepared) -> None:
        """Replaces TRL's advantages in its table of completions by the mean over each row's tokens of what is paid."""
        paid = segment.mean(prepared.advantages.reshape(-1), prepared.spans)
        values, table = self.accelerator.gather(paid).tolist(), self._logs["advantages"]
        for _ in range(min(len(values), len(table))):
            table.pop()
        table.extend(values)
