"""A training objective: one choice at each stage, prepared once per batch and evaluated per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokcredit import aggregation, clip, credit, loss, ops, ratio, segment, weights
from tokcredit.ops import Rows
from tokcredit.rollouts import Rollouts, row_indices


@dataclass(frozen=True)
class Objective:
    """One choice per stage; the defaults are those of :func:`tokcredit.methods.grpo`."""

    credit: credit.Credit = field(default_factory=credit.group_normalized)
    weights: tuple[weights.Weight, ...] = ()
    ratio: ratio.Ratio = field(default_factory=ratio.token)
    clip: clip.Clip = field(default_factory=clip.ppo)
    aggregation: aggregation.Aggregation = field(default_factory=aggregation.sequence_mean)
    kl: loss.Penalty | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Names of the evidence a batch must carry."""
        needs = self.credit.needs.union(*(w.needs for w in self.weights))
        return needs | {"ref_log_probs"} if self.kl else needs

    def prepare(
        self,
        batch: Rollouts,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
    ) -> Prepared:
        """Credit, selection and weights of a batch of whole groups.

        On CUDA this waits for the device where group sizes are counted and, in a packed batch, for its longest row.

        Args:
            batch: the rollouts; groups must be complete.
            batch_num_tokens: training tokens over all ranks. These and the next are counted when there is one rank.
            global_batch_size: rows over all ranks.
            dp_size: ranks whose gradients the host averages; the loss is scaled so that the average is the whole.
            global_num_groups: groups over all ranks.

        Raises:
            ValueError: evidence is missing, or ``dp_size > 1`` without the counts over all ranks.
        """
        for name in sorted(self.needs):
            if getattr(batch, name, None) is None and name not in batch.extras:
                raise ValueError(f"{name}: expected in the batch because the objective needs it, got None")
        advantages = self.credit(batch)
        mask, multiplier = batch.response_mask, None
        for weight in self.weights:
            w = weight(batch, advantages)
            if w.dtype == torch.bool:
                mask = mask & _per_token(w, batch)
            else:
                multiplier = w if multiplier is None else _product(multiplier, w, batch)
        prepared = Prepared(self, batch, advantages, mask, multiplier)
        return prepared.aggregated(batch_num_tokens, global_batch_size, dp_size, global_num_groups)

    def loss(self, prepared: Prepared, log_probs: Tensor) -> loss.Loss:
        """Loss of a batch or of a part of it, with its gradient to ``log_probs`` (layout of the batch).

        With ``old_log_probs`` absent the ratio is exactly 1 (on policy), with the gradient it has there. On CUDA
        nothing here waits for the device, so that it can be captured in a graph together with its backward pass.
        """
        return _evaluate(prepared, prepared.batch.flat(log_probs, "log_probs"))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch with everything that does not depend on the current policy.

    Attributes:
        objective: what to evaluate.
        batch: the rollouts.
        credits: advantages as the credit stage gave them, ``[R, 1]`` or ``[N]``.
        mask: bool ``[N]``, the tokens that train.
        multiplier: ``[R, 1]``, ``[N]`` or None.
        row_weights: ``[R, 1]`` or 0-d, from the aggregation; ``penalty_weights`` for the KL term.
    """

    objective: Objective
    batch: Rollouts
    credits: Tensor
    mask: Tensor
    multiplier: Tensor | None
    row_weights: Tensor = None  # type: ignore[assignment]
    penalty_weights: Tensor = None  # type: ignore[assignment]

    @property
    def rows(self) -> Rows:
        """Spans, and the mask of the tokens that train."""
        return Rows(self.batch.begin, self.batch.end, self.mask)

    @property
    def advantages(self) -> Tensor:
        """What each token is paid, in the layout of the batch; 0 where the policy did not choose."""
        return self.batch.shaped(_per_token(self.credits, self.batch))

    @property
    def has_credit(self) -> Tensor:
        """Rows that can move the policy; bool ``[R]``. The others need neither forward nor backward."""
        trains = segment.count(self.batch.tokens, self.rows) > 0
        if self.objective.kl is not None and self.objective.kl.beta:
            return trains
        paid = self.credits
        if self.multiplier is not None:
            paid = _product(paid, self.multiplier, self.batch)
        paid = paid != 0
        paid = paid[:, 0] if paid.dim() == 2 else segment.maximum(paid.float(), self.rows) > 0
        return trains & paid & (self.row_weights != 0).expand(len(trains), 1)[:, 0]

    def aggregated(
        self,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
    ) -> Prepared:
        """The same with row weights for these denominators, counted here where there is one rank."""
        if dp_size < 1:
            raise ValueError(f"dp_size: expected at least 1, got {dp_size}")
        given = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        if isinstance(self.objective.aggregation, aggregation.balanced):
            given["global_num_groups"] = global_num_groups
        for name, value in given.items():
            if dp_size > 1 and value is None:
                raise ValueError(f"{name}: expected the count over all ranks because dp_size is {dp_size}, got None")
        batch = self.batch
        lengths = segment.count(batch.tokens, self.rows).long()
        trained = lengths > 0
        present = segment.sum(trained.double(), segment.Ids(batch.group_index, batch.num_groups)) > 0

        def count(number: int | None, counted: Tensor) -> Tensor:
            return counted if number is None else torch.full_like(counted, number)

        outcome = self.credits[:, 0] if self.credits.dim() == 2 else credit.outcome(batch)
        counts = aggregation.Counts(
            tokens=count(batch_num_tokens, lengths.sum()),
            rows=count(global_batch_size, trained.sum()),
            groups=count(global_num_groups, present.sum()),
            dp_size=dp_size,
            width=batch.shape[1] if batch.shape else int((batch.end - batch.begin).max()) if batch.num_rows else 0,
            lengths=lengths,
            signs=outcome.sign(),
            group_index=batch.group_index,
            num_groups=batch.num_groups,
        )
        return replace(
            self,
            row_weights=self.objective.aggregation(counts),
            penalty_weights=self.objective.aggregation.penalty(counts),
        )

    def minibatch(
        self,
        rows: Tensor,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        dp_size: int = 1,
        global_num_groups: int | None = None,
    ) -> Prepared:
        """These rows as an optimizer step of their own: the same credit, denominators over these rows only."""
        return self.select(rows).aggregated(batch_num_tokens, global_batch_size, dp_size, global_num_groups)

    def select(self, rows: Tensor) -> Prepared:
        """These rows as a micro-batch: the losses of a partition of the rows add up to the whole."""
        rows = row_indices(rows, self.batch.num_rows, self.mask.device)
        take, _, _ = self.batch.token_positions(rows)

        def pick(x: Tensor) -> Tensor:
            return x if x.dim() == 0 else x[take if x.dim() == 1 else rows]

        return replace(
            self,
            batch=self.batch.select(rows),
            credits=pick(self.credits),
            mask=self.mask[take],
            multiplier=None if self.multiplier is None else pick(self.multiplier),
            row_weights=pick(self.row_weights),
            penalty_weights=pick(self.penalty_weights),
        )


def _per_token(x: Tensor, batch: Rollouts) -> Tensor:
    """A stage's result, ``[R, 1]`` or ``[N]``, as ``[N]``."""
    return x if x.dim() == 1 else ops.spread(x[:, 0], batch.rows, batch.tokens)


def _product(a: Tensor, b: Tensor, batch: Rollouts) -> Tensor:
    """Of two results, each 0-d, ``[R, 1]`` or ``[N]``."""
    if a.dim() == b.dim() or a.dim() == 0 or b.dim() == 0:
        return a * b
    return _per_token(a, batch) * _per_token(b, batch)


def _evaluate(prepared: Prepared, log_probs: Tensor) -> loss.Loss:
    objective, batch, rows = prepared.objective, prepared.batch, prepared.rows
    current = log_probs.detach()
    old = current if batch.old_log_probs is None else batch.old_log_probs
    log_ratio = objective.ratio(rows, current, old)
    window = objective.clip(rows, batch.num_tokens)

    def number(x: float | None) -> Tensor | None:
        return None if x is None else torch.full((), x, device=current.device)

    weight = prepared.row_weights
    if prepared.multiplier is not None:
        weight = _product(prepared.multiplier, weight, batch)
    value, stats = ops.policy_loss(
        log_probs,
        rows,
        window.surrogate,
        reference=log_ratio.reference,
        log_ratio=log_ratio.log_ratio,
        advantages=prepared.credits,
        weights=weight,
        low=number(window.low),
        high=number(window.high),
        cap=number(window.cap),
        cumulative=log_ratio.cumulative,
        bound=log_ratio.bound,
        power=window.power,
        clamp=log_ratio.clamp,
    )
    totals = dict(zip(ops.LOSS_STATS, stats.sum(0), strict=True))
    tokens = totals["tokens"].clamp(min=1)
    metrics = {
        "policy_loss": value.detach(),
        "ratio": totals["ratio"] / tokens,
        "approx_kl": totals["divergence"] / tokens,
        "clip_low": totals["below"] / tokens,
        "clip_high": totals["above"] / tokens,
        "clip_cap": totals["capped"] / tokens,
        "tokens": totals["tokens"],
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
