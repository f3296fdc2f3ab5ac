"""``GRPOTrainer`` with any policy-gradient objective.

Everything that needs whole groups is computed once per generation batch, before TRL shuffles its rows; a micro-batch
finds its rows by number. Reward functions may return rewards of tokens or turns. Tested with TRL 1.16; 1.10 is the
first version with the hooks that are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer

from tokcredit.adapters.capabilities import (
    arguments,
    chosen,
    given_weights,
    host_fields,
    require,
    require_constant,
    require_defaults,
    require_independent_rows,
    with_length,
)
from tokcredit.adapters.trl.progress import progress
from tokcredit.adapters.trl.token_rewards import listed, token_rewards, with_lists
from tokcredit.blocks import segment
from tokcredit.objective import Objective, Prepared
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Adjustable, target_entropy
from tokcredit.stages.aggregation import token_mean
from tokcredit.stages.term import Term, entropy, kl

FIELDS = host_fields(
    old_log_probs="old_per_token_logps",
    rollout_log_probs="sampling_per_token_logps",
    ref_log_probs="ref_per_token_logps",
    entropies="entropies",
)
"""TRL's field of each input that it can carry."""
_CORRECTION = "importance_sampling_ratio"
_CLIP = "the objective's clip stage bounds the ratio"
_DECIDED = {
    "loss_type": "the objective's clip and aggregation stages make the loss",
    "importance_sampling_level": "the objective's ratio stage makes the ratio",
    "scale_rewards": "the objective's credit stage normalizes rewards",
    "multi_objective_aggregation": "the objective's credit stage takes one reward per row",
    "epsilon": _CLIP,
    "epsilon_high": _CLIP,
    "delta": _CLIP,
    "sapo_temperature_pos": _CLIP,
    "sapo_temperature_neg": _CLIP,
    "vespo_k_pos": _CLIP,
    "vespo_k_neg": _CLIP,
    "vespo_lambda_pos": _CLIP,
    "vespo_lambda_neg": _CLIP,
    "top_entropy_quantile": "the objective's filters and token weights choose tokens",
    "off_policy_mask_threshold": "the objective's filters and scales choose rows",
}
_METRICS = {
    "entropy": "entropy",
    "kl": "kl",
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
    "region": "clip_ratio/region_mean",
}
_HOOKS = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
)


def _resolved(objective: Objective, args: GRPOConfig) -> Objective:
    """Return the objective with what only the trainer's configuration knows; raise on what TRL cannot carry."""
    require_defaults(args, GRPOConfig, _DECIDED, "TRL")
    require_constant(objective, "TRL", schedules=True)
    require_independent_rows(objective, "TRL")
    # The widest row differs between ranks and batches; the limit of generation does not.
    length = args.max_completion_length
    objective = replace(
        objective,
        aggregation=with_length(objective.aggregation, length),
        terms=tuple(_with_length(term, length) for term in objective.terms),
    )
    objective = _with_entropy(_with_reference(objective, args), args)
    carries = {"old_log_probs", "entropies", "token_rewards"}
    if args.beta:
        carries.add("ref_log_probs")
    if args.use_vllm:
        carries.add("rollout_log_probs")
        if args.vllm_importance_sampling_correction:
            if "rollout_log_probs" in objective.required_inputs:
                raise ValueError(
                    "vllm_importance_sampling_correction: expected False, because the objective corrects for the "
                    "engine itself, got True"
                )
            carries.add(_CORRECTION)
            weights = (*objective.token_weights, given_weights(_CORRECTION))
            objective = replace(objective, token_weights=weights)
    require(objective, carries, "TRL with these settings", ("log_probs", "entropies"))
    return objective


def _with_length(term: Term, length: int) -> Any:
    if term.aggregation is None:
        return term
    return replace(term, aggregation=with_length(term.aggregation, length))  # type: ignore[type-var]


def _with_reference(objective: Objective, args: GRPOConfig) -> Objective:
    """Return the objective with the KL term that ``beta`` asks for; raise where the two contradict each other."""
    terms = [term for term in objective.terms if "ref_log_probs" in term.required_inputs]
    if not terms:
        if not args.beta:
            return objective
        estimator = "k3_corrected" if getattr(args, "use_bias_correction_kl", False) else "k3"
        return replace(objective, terms=(*objective.terms, kl(args.beta, estimator)))
    # TRL loads the reference model where beta is not 0.
    coefficient: Any = terms[0].coefficient
    if isinstance(coefficient, Adjustable):
        if not args.beta:
            raise ValueError(f"beta: expected a number other than 0, because of {terms[0]!r}, got {args.beta}")
    elif args.beta != coefficient:
        raise ValueError(f"beta: expected {coefficient}, the coefficient of {terms[0]!r}, got {args.beta}")
    return objective


def _with_entropy(objective: Objective, args: GRPOConfig) -> Objective:
    """Return the objective with the entropy bonus that ``entropy_coef`` asks for: a mean over the training tokens."""
    coefficient, adaptive = getattr(args, "entropy_coef", 0.0), getattr(args, "use_adaptive_entropy", False)
    if not coefficient and not adaptive:
        return objective
    for term in objective.terms:
        if isinstance(term, entropy):
            raise ValueError(f"entropy_coef: expected 0 and no use_adaptive_entropy, because of {term!r}")
    return replace(objective, terms=(*objective.terms, entropy(coefficient, token_mean())))


class CreditGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` with the advantages and the loss of an objective.

    Generation, rewards, vLLM and its importance-sampling correction, the reference model, gradient accumulation,
    evaluation and logging stay TRL's. Settings of ``GRPOConfig`` that the objective decides must have their defaults.

    ``beta`` adds :class:`tokcredit.term.kl` to an objective without it, in the form that ``use_bias_correction_kl``
    says; ``entropy_coef`` and ``use_adaptive_entropy`` add :class:`tokcredit.term.entropy`. ``max_completion_length``
    is the length of :class:`tokcredit.aggregation.sequence_sum` where that has none. A completion that no reward
    function scored has advantage 0.

    Differences from TRL:
        - A row without a training token does not count in the mean over rows.
        - The entropy bonus is a mean over the training tokens of the generation batch, not of the micro-batch.
        - The corrected KL term has the ratio of the token, also with ratios of whole rows.
        - Such a row does not count in group statistics either, unless the credit stage has ``count_empty=True``.

    Args:
        model: As in TRL.
        reward_funcs: As in TRL. The reward of a row is their sum, weighted by ``reward_weights``. In place of the
            reward of a completion a function may return a list: one number per token, or one per turn, a run of tokens
            that the policy chose. These are ``token_rewards``; TRL sees and logs their sums.
        args: As in TRL.
        method: Name of a published method, with its default settings.
        objective: Any objective, in place of ``method``.
        host: Everything else that ``GRPOTrainer`` takes.

    Raises:
        TypeError: Both ``method`` and ``objective`` are given, or neither.
        ValueError: A setting contradicts the objective, or a stage reads an input that TRL does not have.
        RuntimeError: This version of TRL lacks a hook.
    """

    reward_funcs: list[Any]
    # State of the adaptive entropy bonus, which TRL makes and saves.
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None

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
        self.reward_funcs = [with_lists(function) for function in self.reward_funcs]

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
        batch["rollout"] = torch.arange(len(advantages))  # on the host, where rows are selected
        self._log_advantages(prepared)
        return batch

    def _collect(self, batch: dict[str, Any]) -> None:
        """Add the inputs that a forward pass of the policy gives, where TRL had no use for them."""
        wanted = {"old_log_probs", "entropies"} & self.credit_objective.required_inputs
        if all(FIELDS[name] in batch for name in wanted):
            return
        with torch.no_grad():
            log_probs, entropies, _ = self._forward(
                self.model, batch, batch_size=self.args.per_device_train_batch_size, compute_entropy=True
            )
        if "old_log_probs" in wanted:
            batch.setdefault(FIELDS["old_log_probs"], log_probs)
        if "entropies" in wanted:
            batch[FIELDS["entropies"]] = entropies

    def _prepare(self, batch: dict[str, Any]) -> Prepared:
        """Return this rank's rows, prepared from whole groups, with denominators over all ranks."""
        accelerator, ids = self.accelerator, batch["completion_ids"]
        ranks, rank, rows = accelerator.num_processes, accelerator.process_index, len(ids)
        generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        gathers = ranks > 1 and (self.credit_objective.compares_groups or rows % generations != 0)

        def whole(x: Tensor) -> Tensor:
            if not gathers:
                return x
            padded: Tensor = accelerator.pad_across_processes(x, dim=1) if x.dim() > 1 else x
            return accelerator.gather(padded)

        tokens, real = whole(ids), whole(batch["completion_mask"])
        response = real * whole(batch["tool_mask"]) if "tool_mask" in batch else real
        first = 0 if gathers else rank * rows
        numbers = torch.arange(first, first + len(real), device=ids.device)
        rewards, scored, dense = self._row_rewards(generations)
        # A row without a score is a group of its own with reward 0, so that it has advantage 0 and moves no baseline.
        groups = torch.where(scored[numbers], numbers // generations, len(rewards) + numbers)
        named = {name: whole(batch[field]) for name, field in FIELDS.items() if field in batch}
        of_tokens = None
        if dense:
            own = batch["completion_mask"] * batch.get("tool_mask", 1)
            of_tokens = token_rewards(self.reward_funcs, self.reward_weights, batch["completion_mask"], own)
            of_tokens = torch.where(scored[numbers, None], whole(of_tokens), 0)
        if given_weights(_CORRECTION) in self.credit_objective.token_weights:
            named[_CORRECTION] = whole(batch[_CORRECTION]).expand(tokens.shape)  # (B, 1) where it is per row
        rollouts = Rollouts.from_padded(tokens, response, groups, rewards[numbers], real, **arguments(named))
        if of_tokens is not None:
            # Lists and numbers were told apart, also where both have the same sum.
            rollouts = rollouts.with_inputs(token_rewards=of_tokens)
        objective = self.credit_objective
        prepared = objective.prepare(rollouts, progress=progress(objective, self.state))
        trained = prepared.lengths > 0
        present = rollouts.group_index[trained].unique().numel()
        counts = torch.stack([prepared.lengths.sum(), trained.sum(), trained.new_tensor(present, dtype=torch.long)])
        if not gathers:
            counts = accelerator.reduce(counts.double(), reduction="sum")
        num_tokens, num_rows, num_groups = (int(x) for x in counts.tolist())
        prepared = prepared.with_denominators(
            batch_num_tokens=num_tokens, global_batch_size=num_rows, global_num_groups=num_groups, dp_size=ranks
        )
        return prepared.select(range(rank * rows, (rank + 1) * rows)) if gathers else prepared

    def _row_rewards(self, generations: int) -> tuple[Tensor, Tensor, bool]:
        """Return the outcome of each row of all ranks, whether it counts, and whether tokens of any have rewards.

        A row counts if a function scored it and another row of its group.
        """
        if self._rewards_per_func is None:
            raise RuntimeError(f"trl {trl.__version__}: expected _calculate_rewards to be called, and it was not")
        per_function, self._rewards_per_func = self._rewards_per_func, None
        scored = ~per_function.isnan().all(1)
        scored = scored & (scored.view(-1, generations).sum(1) > 1).repeat_interleave(generations)
        own = listed(self.reward_funcs, len(per_function) // self.accelerator.num_processes)
        dense = self.accelerator.gather(own.to(per_function.device))
        outcomes = per_function.masked_fill(dense, 0) * self.reward_weights.to(per_function.device)
        return torch.where(scored, outcomes.nansum(1), 0), scored, bool(dense.any())

    def _forward(self, model: Any, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probs and entropies ``(B, C)`` of the completions, and the router's loss, as TRL computes them."""
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
        surplus = (0, prepared.batch.width - log_probs.shape[1])
        adapts = getattr(self.args, "use_adaptive_entropy", False)
        if adapts:
            prepared = self._with_current_bonus(prepared)
        further = {"entropies": pad(entropies, surplus)} if "entropies" in prepared.objective.variables else {}
        out = self.credit_objective.loss(prepared, pad(log_probs, surplus), **further)
        # The weights of the rows are those of the whole generation batch, of which an optimizer step may be a part.
        parts = self.args.steps_per_generation if mode == "train" else 1
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        total = out.loss * (parts / accumulated)
        if aux is not None and self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * aux / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux.detach()).mean().item())
        entropies = pad(entropies.detach(), surplus).reshape(-1)
        self._log_metrics(mode, out.metrics, prepared, entropies, parts)
        if adapts and mode == "train":
            self._adapt_bonus(entropies, prepared)
        return total

    def _with_current_bonus(self, prepared: Prepared) -> Prepared:
        """Return the micro-batch with TRL's present coefficient, which is 0 above the target entropy."""
        used = self.entropy_coef if self._last_world_entropy <= self.args.entropy_target else 0.0
        terms = tuple(
            replace(term, coefficient=used) if isinstance(term, entropy) else term for term in prepared.objective.terms
        )
        return replace(prepared, objective=replace(prepared.objective, terms=terms))

    def _adapt_bonus(self, entropies: Tensor, prepared: Prepared) -> None:
        """Move the coefficient after an optimizer step. Its state is TRL's own, so that TRL saves it."""
        sums = torch.stack([segment.sum(entropies.double(), prepared.spans).sum(), prepared.lengths.sum().double()])
        before = self._entropy_window_stats
        self._entropy_window_stats = sums if before is None else before + sums
        if not self.accelerator.sync_gradients:
            return
        args, total = self.args, self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
        rule = target_entropy(
            args.entropy_target, args.entropy_coef_delta, low=args.entropy_coef_min, high=args.entropy_coef_max
        )
        state = (self.entropy_coef, self._last_world_entropy)
        self.entropy_coef, self._last_world_entropy = rule.updated(state, float(total[0] / total[1].clamp(min=1)))
        self._entropy_window_stats = None
        self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

    def _log_metrics(
        self, mode: str, found: Mapping[str, Tensor], prepared: Prepared, entropies: Tensor, parts: int
    ) -> None:
        """Append to TRL's metrics, under TRL's names where it has one.

        These are means over the tokens of all ranks, with three exceptions: the policy loss is scaled to the whole
        generation batch, terms are means with the weights that they have in the loss, and ``nonfinite_log_probs`` is a
        sum.
        """
        metrics = {name: value.double() for name, value in found.items() if name != "loss"}
        tokens = metrics.pop("tokens")
        one = torch.ones_like(tokens)
        sums = {
            "policy_loss": (metrics.pop("policy_loss") * parts, one),
            "nonfinite_log_probs": (metrics.pop("nonfinite_log_probs"), one / self.accelerator.num_processes),
            "entropy": (segment.sum(entropies, prepared.spans).sum(), tokens),
        }
        for term, (mask, weights) in zip(prepared.objective.terms, prepared.terms, strict=True):
            spans = prepared.spans if mask is None else prepared.spans.with_mask(mask)
            lengths = segment.sum(torch.ones_like(entropies, dtype=torch.double), spans)
            share = (weights.expand(len(lengths), 1)[:, 0] * lengths).sum()
            sums[term.metric] = (metrics.pop(term.metric), share)
        sums |= {name: (value * tokens, tokens) for name, value in metrics.items()}
        local = torch.stack([torch.stack([x.double() for x in pair]) for pair in sums.values()])
        totals = self.accelerator.reduce(local, reduction="sum").tolist()
        means = {name: total / (count or 1.0) for name, (total, count) in zip(sums, totals, strict=True)}
        means["region"] = means["clip_low_fraction"] + means["clip_high_fraction"]
        for name, mean in means.items():
            self._metrics[mode][_METRICS.get(name, f"tokcredit/{name}")].append(mean)

    def _log_advantages(self, prepared: Prepared) -> None:
        """Replace TRL's advantages in its table of completions by the mean advantage over each row's tokens."""
        of_rows = segment.mean(prepared.advantages.reshape(-1), prepared.spans)
        values, table = self.accelerator.gather(of_rows).tolist(), self._logs["advantages"]
        for _ in range(min(len(values), len(table))):
            table.pop()
        table.extend(values)
