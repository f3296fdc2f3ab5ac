"""The policy-gradient objective, from batch to loss: one stage of each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.from_hidden import FromHidden
from tokcredit.prepared import PreparedTokens, filtered, multiplied, training_tokens
from tokcredit.protocol import Denominators, Loss, Metrics, check_variables
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State, resolver
from tokcredit.selection import Section, Selection
from tokcredit.spans import Spans
from tokcredit.stages import aggregation as aggregations
from tokcredit.stages import clip as clips
from tokcredit.stages import credit as credits
from tokcredit.stages import filters as filter_stages
from tokcredit.stages import ratio as ratios
from tokcredit.stages import scale as scales
from tokcredit.stages import term as term_stages
from tokcredit.stages import token_weights as weight_stages
from tokcredit.stages.base import part, parts
from tokcredit.stages.credit.group import chosen_tokens, per_token, product
from tokcredit.trajectories import Part


@dataclass(frozen=True)
class Objective(FromHidden):
    """A policy-gradient objective: one stage of each kind. The defaults are those of ``tokcredit.methods.grpo``.

    ``prepare`` decides everything that does not depend on the current policy; ``loss`` is evaluated per micro-batch::

        prepared = objective.prepare(batch)
        for rows in micro_batches:
            part = prepared.select(rows)
            objective.loss(part, log_probs_of(part.batch)).loss.backward()

    Args:
        credit: The advantage of each token.
        filters: Which rows and tokens train. Others are not counted in any denominator.
        token_weights: Factors of the token losses.
        ratio: The importance ratio of each token.
        clip: How far the ratio may move.
        scales: Factors of the advantages that depend on the current policy.
        aggregation: How token losses become one number.
        terms: What is added to the policy loss, such as a KL term.

    Raises:
        TypeError: A stage is of the wrong kind.
        ValueError: Two stages do not fit together; both are named.
    """

    credit: credits.Credit = part(credits.Credit, credits.group_normalized)
    filters: tuple[filter_stages.Filter, ...] = parts(filter_stages.Filter)
    token_weights: tuple[weight_stages.TokenWeight, ...] = parts(weight_stages.TokenWeight)
    ratio: ratios.Ratio = part(ratios.Ratio, ratios.token)
    clip: clips.Clip = part(clips.Clip, clips.ppo)
    scales: tuple[scales.Scale, ...] = parts(scales.Scale)
    aggregation: aggregations.Aggregation = part(aggregations.Aggregation, aggregations.sequence_mean)
    terms: tuple[term_stages.Term, ...] = parts(term_stages.Term)

    def __post_init__(self) -> None:
        super().__post_init__()
        for scale in self.scales:
            if scale.needs_bounds and not self.clip.has_bounds:
                raise ValueError(
                    f"clip: expected a stage with bounds because of {scale!r}, got {self.clip!r}; "
                    "use clip.ppo or clip.growing"
                )
        metrics = [term.metric for term in self.terms]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"terms: expected at most one of each kind, got {self.terms!r}")

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """``log_probs``, then the further variables that terms differentiate."""
        further = sorted(frozenset().union(*(term.variables for term in self.terms)))
        return ("log_probs", *further)

    @property
    def couples_rows(self) -> bool:
        """Whether a part must have whole groups, because a scale compares current log-probs of a group's rows."""
        return any(scale.couples_rows for scale in self.scales)

    def separable(self, prepared: Prepared) -> bool:
        """Return whether the derivative of the loss at a token depends on the log-prob and entropy of that token alone.

        In a batch without ``old_log_probs`` every ratio is 1, so ratios of several tokens do not prevent this.

        Args:
            prepared: A prepared batch of this objective.
        """
        objective = prepared.objective
        ratio = () if _on_policy(objective, prepared.batch) else (objective.ratio,)
        stages = (*objective.scales, *objective.terms, *ratio)
        return not any(stage.couples_tokens for stage in stages)

    def prepare(
        self,
        batch: Rollouts,
        *,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        global_num_groups: int | None = None,
        dp_size: int = 1,
        progress: float | None = None,
        state: State | None = None,
    ) -> Prepared:
        """Return the batch with advantages, training mask, weights and bounds.

        On CUDA this waits for the device: groups are counted, and some stages count rows.

        Args:
            batch: The rollouts, with whole groups. An objective that ``compares_groups`` must see the rows of all
                ranks; each rank then takes its own with :meth:`Prepared.select`.
            batch_num_tokens: Training tokens over all ranks. This and the next two are counted when there is one rank.
            global_batch_size: Trajectories with a training token over all ranks; those without one do not count.
            global_num_groups: Groups with such a trajectory over all ranks.
            dp_size: Number of ranks whose gradients the host averages. The loss is multiplied by it, so that the
                average is the gradient of the whole batch.
            progress: From 0 at the first step of training to 1 at the last, for an objective with schedules.
            state: State of the controllers, for an objective with controllers.

        Raises:
            TypeError: An argument or an input has the wrong type.
            ValueError: An input is missing or wrong, a number is missing or too small, only this rank's rows are given
                to an objective that ``compares_groups``, or several rows of a trajectory to one that reads contexts.
        """
        denominators = Denominators(batch_num_tokens, global_batch_size, global_num_groups, dp_size)
        objective = self.resolved(resolver(progress, state))
        rows, batch = batch, self.trajectories_of(batch)
        if self.couples_rows and rows.trajectories is not None:
            raise ValueError(
                f"trajectory_ids: expected one row in each trajectory because {self.scales!r} compare the rows "
                "of a group, got several"
            )
        if self.compares_groups and global_batch_size is not None and global_batch_size > batch.num_rows:
            raise ValueError(
                f"batch: expected the rows of all ranks because the objective compares rows of different groups, "
                f"got {batch.num_rows} of {global_batch_size}"
            )
        kept, advantages = objective._credit(batch)
        signs = None
        if objective.aggregation.reads_signs:
            signs = advantages.sign() if advantages.dim() == 2 else credits.outcome(kept)[:, None].sign()
        kept = filtered((stage for stage in objective.filters if not stage.before_credit), kept, advantages)
        multiplier = multiplied(objective.token_weights, kept, advantages)
        window = objective.clip(batch, advantages)
        masks = tuple(objective._mask(term, batch, kept.spans, advantages) for term in objective.terms)
        prepared = Prepared(
            objective,
            batch,
            advantages,
            kept.spans,
            multiplier,
            signs,
            window,
            tuple(scale.signal(batch, window) for scale in objective.scales),
            torch.where(batch.nonempty, batch.group_index, -1).cpu().numpy() if objective.couples_rows else None,
            **objective._weights(batch, masks, kept.lengths, signs, denominators, whole=True),
        )
        return prepared.divided(rows)

    def _credit(self, batch: Rollouts) -> tuple[Rollouts, Tensor]:
        """Return the batch in the mask of the filters that come before credit, and advantages in its layout."""
        taken = None
        for stage in self.filters:
            if stage.before_credit:
                rows = stage(batch, None)[:, 0]
                taken = rows if taken is None else taken & rows
        if taken is None:
            return batch, self.credit(batch)
        part = batch.keeping(taken)
        advantages = self.credit(part)
        if advantages.dim() == 2:
            advantages = advantages.new_zeros(batch.num_rows, 1).masked_scatter_(taken[:, None], advantages)
        return batch.with_mask(part.response_mask), advantages

    def _mask(self, term: term_stages.Term, batch: Rollouts, spans: Spans, advantages: Tensor) -> Tensor | None:
        """Return the tokens that a term acts on, or None for those that train."""
        if term.where is None:
            return None
        within = spans if term.after_filters and spans.mask is not None else batch.spans
        assert within.mask is not None
        seen = batch if within.mask is batch.response_mask else batch.with_mask(within.mask)
        return chosen_tokens(term.where(seen, advantages), within)

    def _weights(
        self,
        batch: Rollouts,
        masks: tuple[Tensor | None, ...],
        lengths: Tensor,
        signs: Tensor | None,
        denominators: Denominators,
        whole: bool = False,
    ) -> dict[str, Any]:
        """Return the weights of rows and terms for these denominators; ``whole`` in the batch of all groups."""
        if not self.compares_groups:
            denominators.require(self.aggregation)
        weights = denominators.row_weights(self.aggregation, batch, lengths, signs)
        terms = []
        for term, mask in zip(self.terms, masks, strict=True):
            aggregation = term.aggregation or self.aggregation.for_terms
            own, own_lengths = denominators, lengths
            if mask is not None and not term.over_all:
                if aggregation.counts and denominators.dp_size > 1 and not (whole and self.compares_groups):
                    raise ValueError(
                        f"terms: expected over_all=True or an aggregation without counts, because dp_size is "
                        f"{denominators.dp_size} and the tokens of other ranks that {term!r} acts on are not known"
                    )
                own_lengths = ops.count(batch.spans.with_mask(mask))
                own = Denominators(dp_size=denominators.dp_size)
            elif not self.compares_groups:
                own.require(aggregation)
            same = aggregation is self.aggregation and own is denominators
            terms.append((mask, weights if same else own.row_weights(aggregation, batch, own_lengths, signs)))
        return {"lengths": lengths, "row_weights": weights, "terms": tuple(terms)}

    def loss(self, prepared: Prepared, log_probs: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of a prepared batch, or of a part of it, with its gradient to ``log_probs``.

        Without ``old_log_probs`` in the batch the ratio is exactly 1 (on policy), with the gradient it has there. On
        CUDA nothing here waits for the device, so that the loss can be captured in a graph with its backward pass.

        Args:
            prepared: From :meth:`prepare` or :meth:`Prepared.select`.
            log_probs: float, in the layout of ``prepared.batch``: ``(B, T)`` or ``[N]``.
            variables: Further variables by name, in the same layout; see :attr:`variables`.

        Raises:
            TypeError: A variable is missing, not needed, or not a float tensor.
            ValueError: A shape is wrong.
        """
        check_variables(prepared.objective.variables, log_probs, variables)
        return _evaluate(prepared, log_probs, variables)


@dataclass(frozen=True, eq=False)
class Prepared(PreparedTokens):
    """A batch with everything that does not depend on the current policy.

    Attributes:
        objective: The objective, its schedules and controllers replaced by numbers.
        batch: The rollouts.
        credit: Advantages as the credit stage returned them, float ``[R, 1]`` or ``[N]``.
        spans: The rows, with the mask of the tokens that train.
        multiplier: Product of the token weights, ``[R, 1]`` or ``[N]``, or None.
        signs: Sign of each row's outcome advantage, ``[R, 1]``, for aggregations that read it.
        window: Surrogate and bounds.
        signals: For each scale what it needs beside the current policy, ``[N]`` or ``[R, 1]``, or None.
        coupled: Group of each row on the host, -1 for rows without a token that the policy chose; None if parts may
            have any rows.
        lengths: int64 ``[R]``, training tokens of each row.
        row_weights: float64 ``[R, 1]`` or 0-d, from the aggregation.
        terms: For each term its token mask, or None for the tokens that train, and its row weights.
    """

    objective: Objective
    batch: Rollouts
    credit: Tensor
    spans: Spans
    multiplier: Tensor | None
    signs: Tensor | None
    window: clips.Window
    signals: tuple[Tensor | None, ...]
    coupled: NDArray[np.int64] | None
    lengths: Tensor
    row_weights: Tensor
    terms: tuple[tuple[Tensor | None, Tensor], ...]

    @property
    def couples_tokens(self) -> bool:
        """Whether a ratio, a scale or bounds depend on other tokens of the trajectory, which must then be whole."""
        return self.window.power != 0 or not self.objective.separable(self)

    @property
    def advantages(self) -> Tensor:
        """Advantage of each token, in the layout of the batch; 0 where the policy did not choose the token."""
        return self.batch.shaped(per_token(self.credit, self.batch.spans))

    @property
    def has_gradient(self) -> Tensor:
        """Rows that can have a gradient; bool ``[R]``. The others need neither a forward nor a backward pass.

        All rows of a trajectory are needed if one of them is and the loss couples its tokens.
        """
        if self.batch.trajectories is not None and self.couples_tokens:
            return self.batch.trajectories.divided.of_rows(self.joined.has_gradient)
        trains = self.lengths > 0
        acting = [mask for term, (mask, _) in zip(self.objective.terms, self.terms, strict=True) if term.coefficient]
        if any(mask is None for mask in acting):
            return trains
        size = self.credit if self.multiplier is None else product(self.credit, self.multiplier, self.batch.spans)
        moves = size != 0
        moves = moves[:, 0] if moves.dim() == 2 else segment.maximum(moves.float(), self.spans) > 0
        found = trains & moves & (self.row_weights != 0).expand(len(trains), 1)[:, 0]
        for mask in acting:
            found = found | (ops.count(self.spans.with_mask(mask)) > 0)
        if self.objective.couples_rows:  # all rows of a group are needed if one of them is
            groups = self.batch.groups
            found = self.batch.nonempty & (groups.per_row(segment.sum(found.float(), groups)) > 0)
        return found

    def _with(self, denominators: Denominators) -> Prepared:
        masks = tuple(mask for mask, _ in self.terms)
        weights = self.objective._weights(self.batch, masks, self.lengths, self.signs, denominators)
        return dataclasses.replace(self, **weights)

    def by_token(self) -> Prepared:
        """Return the same with the bounds of each token in place of bounds that grow along the row."""
        whole = self.joined
        return dataclasses.replace(whole, window=whole.window.per_token(whole.batch.spans)).divided(self.batch)

    def _part(self, chosen: Part, part: Rollouts) -> Prepared:
        coupled = None
        if self.coupled is not None:
            assert isinstance(chosen, Selection | Section), "rows are trajectories"
            coupled = _whole_groups(self.coupled, chosen.numbers)
        whole = self.mask is self.batch.response_mask

        def pick(x: Tensor | None) -> Any:
            if x is None or x.dim() == 0:
                return x
            return chosen.of_tokens(x) if x.dim() == 1 else chosen.of_rows(x)

        spans = part.spans if whole else part.spans.with_mask(chosen.of_tokens(self.mask))
        return Prepared(
            self.objective,
            part,
            pick(self.credit),
            spans,
            pick(self.multiplier),
            pick(self.signs),
            self.window.take(chosen),
            tuple(
                _numbered(coupled, part.device) if coupled is not None and scale.couples_rows else pick(signal)
                for scale, signal in zip(self.objective.scales, self.signals, strict=True)
            ),
            coupled,
            training_tokens(chosen, self.lengths, spans),
            pick(self.row_weights),
            tuple((pick(mask), pick(weights)) for mask, weights in self.terms),
        )


def _whole_groups(groups: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups of some rows after checking that each is there as a whole, each row once."""
    own = groups[rows]
    counts = np.bincount(own[own >= 0], minlength=groups.max(initial=-1) + 1)
    sizes = np.bincount(groups[groups >= 0], minlength=len(counts))
    if cut := np.flatnonzero((counts > 0) & (counts != sizes)).tolist():
        raise ValueError(
            f"rows: expected whole groups, each row once, because the objective compares the rows of a group, got "
            f"{counts[cut[0]]} of the {sizes[cut[0]]} rows of a group"
        )
    return own


def _numbered(groups: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return groups numbered from 0 and below the number of rows, int64 ``[R, 1]``."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return torch.from_numpy(numbers).to(device, non_blocking=True)[:, None]


def _divisor(objective: Objective) -> str:
    """Return the name of the input with the log-probs that the ratio divides by."""
    return getattr(objective.ratio, "to", "old_log_probs")


def _on_policy(objective: Objective, batch: Rollouts) -> bool:
    """Return whether every ratio is 1, because the batch has no log-probs to divide by."""
    return _divisor(objective) == "old_log_probs" and batch.old_log_probs is None


def _evaluate(prepared: Prepared, log_probs: Tensor, further: Mapping[str, Tensor]) -> Loss:
    trajectories = prepared.batch.trajectories
    if trajectories is not None and prepared.couples_tokens:
        joined, rows = trajectories.joined, prepared.batch
        log_probs = joined.of_tokens(rows.flat(log_probs, "log_probs"))
        further = {name: joined.of_tokens(rows.flat(x, name)) for name, x in further.items()}
        prepared = prepared.joined
    objective, batch = prepared.objective, prepared.batch
    current = batch.flat(log_probs.detach(), "log_probs")
    reference = current if _on_policy(objective, batch) else batch.input(_divisor(objective))
    log_ratio, window = objective.ratio(batch.spans, current, reference, prepared.credit), prepared.window
    compared = log_ratio.reference
    if compared is None and window.gate.get("on", "ratio") != "ratio":  # a gate may look at what a ratio leaves out
        compared = reference
    advantages = prepared.credit
    if any(scale.needs_bounds for scale in objective.scales):
        window = window.per_token(batch.spans)
    for scale, signal in zip(objective.scales, prepared.signals, strict=True):
        advantages = scale.scaled(advantages, current, log_ratio, prepared.credit, batch.spans, window, signal)
    weights = prepared.row_weights
    if prepared.multiplier is not None:
        wide = torch.promote_types(prepared.multiplier.dtype, ops.accumulated(log_probs.dtype))
        weights = product(prepared.multiplier, weights.to(wide), batch.spans)
    # Along a row, tokens that do not train still count in sums and positions.
    along = (log_ratio.cumulative or window.power != 0) and prepared.spans.mask is not batch.response_mask
    total, stats = ops.policy_loss(
        log_probs,
        batch.spans if along else prepared.spans,
        window.surrogate,
        reference=compared,
        log_ratio=log_ratio.log_ratio,
        advantages=advantages,
        weights=weights,
        trains=prepared.mask if along else None,
        low=window.low,
        high=window.high,
        cap=window.cap,
        cumulative=log_ratio.cumulative,
        bound=log_ratio.bound,
        power=window.power,
        clamp=log_ratio.clamp,
        total=True,
        **window.gate,
    )
    policy_loss = total.detach()
    values: dict[str, tuple[Tensor, float]] = {}
    if objective.terms:
        variables = {name: batch.flat(x, name) for name, x in {"log_probs": log_probs, **further}.items()}
        for term, (mask, term_weights) in zip(objective.terms, prepared.terms, strict=True):
            spans = prepared.spans if mask is None else prepared.spans.with_mask(mask)
            value = term(variables, batch, spans, term_weights)
            values[term.metric] = value.detach(), term.metric_sign
            total = torch.add(total, value, alpha=term.coefficient)
    loss = total.detach() if objective.terms else policy_loss

    def metrics() -> dict[str, Tensor]:
        totals = dict(zip(ops.LOSS_STATS, stats.sum(0), strict=True))
        tokens = totals["tokens"]
        count = tokens.clamp(min=1)
        return {
            "loss": loss,
            "policy_loss": policy_loss,
            **{name: sign * value for name, (value, sign) in values.items()},
            "ratio_mean": totals["ratio"] / count,
            "kl_k3_mean": totals["divergence"] / count,
            "clip_low_fraction": totals["below"] / count,
            "clip_high_fraction": totals["above"] / count,
            "clip_cap_fraction": totals["capped"] / count,
            "nonfinite_log_probs": totals["nonfinite"],
            "tokens": tokens,
        }

    return Loss(total, Metrics(metrics))
