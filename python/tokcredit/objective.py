"""A training objective: one choice at each stage, prepared once per batch and evaluated per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokcredit import aggregation, clip, credit, gain, loss, ops, ratio, sampling, weights
from tokcredit.choice import Choice
from tokcredit.prepared import Prepared, product
from tokcredit.rollouts import Rollouts

__all__ = ["Objective", "Prepared"]


@dataclass(frozen=True)
class Objective(Choice):
    """One choice per stage; the defaults are those of :func:`tokcredit.methods.grpo`.

    ``variable`` names the per-token quantity that :meth:`loss` is given and differentiates: ``log_probs`` of the
    sampled tokens, or, to be minimised as it is, another one such as ``reverse_kl``.
    """

    credit: credit.Credit = field(default_factory=credit.group_normalized)
    weights: tuple[weights.Weight, ...] = ()
    ratio: ratio.Ratio = field(default_factory=ratio.token)
    clip: clip.Clip = field(default_factory=clip.ppo)
    aggregation: aggregation.Aggregation = field(default_factory=aggregation.sequence_mean)
    kl: loss.Penalty | None = None
    gain: gain.Gain | None = None
    sampling: sampling.Sampling | None = None
    variable: str = "log_probs"

    def __post_init__(self) -> None:
        if self.kl is not None and self.variable != "log_probs":
            raise ValueError(f"kl: expected None because the loss is given {self.variable}, not log_probs")

    def prepare(
        self,
        batch: Rollouts,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
        progress: float | None = None,
    ) -> Prepared:
        """Credit, selection and weights of a batch of whole groups.

        On CUDA this waits for the device: credit stages count their groups, and a packed batch its longest row.

        Args:
            batch: the rollouts; groups must be complete. An objective that ``spans_groups`` must see the rows of all
                ranks: each rank then takes its own by :meth:`Prepared.select`.
            batch_num_tokens: training tokens over all ranks. These and the next are counted when there is one rank.
            global_batch_size: rows over all ranks.
            dp_size: ranks whose gradients the host averages; the loss is scaled so that the average is the whole.
            global_num_groups: groups over all ranks.
            progress: 0 at the first step of training, 1 at the last, for objectives whose settings change.

        Raises:
            ValueError: evidence is missing, ``dp_size > 1`` without the counts over all ranks, no ``progress`` for an
                objective that ``is_scheduled``, or only this rank's rows for one that ``spans_groups``.
        """
        if progress is not None:
            self = self.at(progress)
        elif self.is_scheduled:
            raise ValueError("progress: expected a number from 0 to 1 because settings change with it, got None")
        if self.spans_groups and global_batch_size is not None and global_batch_size > batch.num_rows:
            raise ValueError(
                f"batch: expected the rows of all ranks because the objective compares rows of different groups, "
                f"got {batch.num_rows} of {global_batch_size}"
            )
        for name in sorted(self.needs):
            batch.evidence(name)
        mask, multiplier = batch.response_mask, None
        if self.sampling is None:
            advantages, signs = self.credit(batch), credit.outcome(batch).sign()
        else:
            sampled = self.sampling(batch)
            part = batch.among(sampled)
            mask, advantages = part.response_mask, self.credit(part)
            chosen = sampled.nonzero()[:, 0]
            if advantages.dim() == 2:
                advantages = advantages.new_zeros(batch.num_rows, 1).index_put((chosen,), advantages)
            signs = torch.zeros_like(batch.rewards).index_put((chosen,), credit.outcome(part).sign())
        if advantages.dim() == 2:
            signs = advantages[:, 0].sign()
        kept = batch
        for weight in self.weights:
            if kept.response_mask is not mask:
                kept = replace(kept, response_mask=mask)
            w = weight(kept, advantages)
            if w.dtype == torch.bool:
                mask = mask & w if w.dim() == 1 else ops.spread(w[:, 0], kept.rows, mask)
            else:
                multiplier = w if multiplier is None else product(multiplier, w, batch)
        window = self.clip(batch)
        prepared = Prepared(
            self,
            batch,
            advantages,
            mask,
            multiplier,
            signs[:, None],
            window=window,
            signal=None if self.gain is None else self.gain.signal(batch, window),
        )
        return prepared.aggregated(batch_num_tokens, global_batch_size, dp_size, global_num_groups)

    def loss(self, prepared: Prepared, log_probs: Tensor) -> loss.Loss:
        """Loss of a batch or of a part of it, with its gradient to ``log_probs`` (layout of the batch).

        An objective of another ``variable`` is given that in place of ``log_probs``. With ``old_log_probs`` absent the
        ratio is exactly 1 (on policy), with the gradient it has there. On CUDA nothing here waits for the device, so
        that it can be captured in a graph together with its backward pass.
        """
        return _evaluate(prepared, prepared.batch.flat(log_probs, "log_probs"))


def _evaluate(prepared: Prepared, log_probs: Tensor) -> loss.Loss:
    objective, batch, rows = prepared.objective, prepared.batch, prepared.rows
    current = log_probs.detach()
    old = current if batch.old_log_probs is None else batch.old_log_probs
    log_ratio, window = objective.ratio(batch.rows, current, old), prepared.window
    advantages = prepared.credits
    if objective.gain is not None:
        window = window.spelled_out(batch.rows, batch.num_tokens)
        factor = objective.gain(log_ratio.per_token(batch.rows, current), window, prepared.signal)
        advantages = product(advantages, factor, batch)

    def number(x: float | Tensor | None) -> Tensor | None:
        return torch.full((), x, device=current.device) if isinstance(x, float) else x

    weight = prepared.row_weights
    if prepared.multiplier is not None:
        weight = product(prepared.multiplier, weight, batch)
    # Along a row, tokens that do not train are summed and counted all the same.
    along = log_ratio.cumulative or window.power != 0
    value, stats = ops.policy_loss(
        log_probs,
        batch.rows if along else rows,
        window.surrogate,
        reference=log_ratio.reference,
        log_ratio=log_ratio.log_ratio,
        advantages=advantages,
        weights=weight,
        trains=prepared.mask if along and (objective.weights or objective.sampling is not None) else None,
        low=number(window.low),
        high=number(window.high),
        cap=number(window.cap),
        cumulative=log_ratio.cumulative,
        bound=log_ratio.bound,
        power=window.power,
        clamp=log_ratio.clamp,
    )
    totals = stats.sum(0)
    tokens = totals[ops.LOSS_STATS.index("tokens")]
    rates = dict(zip(ops.LOSS_STATS, totals / tokens.clamp(min=1), strict=True))
    metrics = {
        "policy_loss": value.detach(),
        "ratio": rates["ratio"],
        "approx_kl": rates["divergence"],
        "clip_low": rates["below"],
        "clip_high": rates["above"],
        "clip_cap": rates["capped"],
        "tokens": tokens,
    }
    if objective.kl is not None:
        penalty, _ = ops.policy_loss(
            log_probs,
            rows,
            objective.kl.surrogate,
            reference=batch.ref_log_probs,
            weights=prepared.penalty_weights * objective.kl.beta,
            clamp=(-20.0, 20.0),
        )
        value = value + penalty
        metrics["kl"] = penalty.detach()
    metrics["loss"] = value.detach()
    return loss.Loss(value, metrics)
