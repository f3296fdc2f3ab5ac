"""The preference objective, from batch to loss: pairs of a chosen and a rejected row."""

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
from tokcredit.arguments import row_numbers
from tokcredit.blocks import segment
from tokcredit.from_hidden import FromHidden
from tokcredit.ops import Combine
from tokcredit.pairing import Pairing
from tokcredit.prepared import multiplied
from tokcredit.protocol import Denominators, Loss, Metrics, check_variables
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State, resolver
from tokcredit.stages import link as links
from tokcredit.stages import pair as pair_stages
from tokcredit.stages import token_weights as weight_stages
from tokcredit.stages.base import input_name, option, part, parts
from tokcredit.stages.credit.group import per_token, product


@dataclass(frozen=True)
class Preference(FromHidden):
    """Preference optimization of pairs: a score per row, and a link that makes a loss of the two scores of a pair.

    A pair is a group of two rows of which the one with the higher reward is chosen; see ``Rollouts.from_pairs``. With
    ``w`` the token weights::

        score[row] = sum over t of w[t] * (log_probs[t] - ref_log_probs[t])
        score[row] = transform(score[row]) / tokens[row]                          # with a transform; with "mean"
        score[row] += strength * sum over t of KL(reference || policy)[t]         # with a divergence
        loss = mean over pairs of link(score[chosen], score[rejected]) + sum of coefficient * term

    Args:
        token_weights: Factors of the tokens in the score.
        reference: Input with the log-probs of the reference policy, or None for a score of ``log_probs`` alone.
        normalization: ``sum`` over the row's tokens, or ``mean``: divided by their number.
        link: Loss of a pair.
        transform: Transform of the sum over the row's tokens, before it is divided by their number, or None.
        divergence: Divergence from the reference policy in the score, or None.
        pair_terms: What is added to the loss of a pair.
        learned_weights: Input that ``loss`` takes by name as a further factor of each token, with gradient, or None.
        pair_weights: Weights of the pairs in the mean, or None for equal ones.
    """

    token_weights: tuple[weight_stages.TokenWeight, ...] = parts(weight_stages.TokenWeight)
    reference: str | None = input_name("ref_log_probs", optional=True)
    normalization: str = option("sum", "mean")
    link: links.Link = part(links.Link, links.logistic)
    transform: pair_stages.Transform | None = part(pair_stages.Transform, None, optional=True)
    divergence: pair_stages.Divergence | None = part(pair_stages.Divergence, None, optional=True)
    pair_terms: tuple[pair_stages.PairTerm, ...] = parts(pair_stages.PairTerm)
    learned_weights: str | None = input_name(None, optional=True)
    pair_weights: pair_stages.PairWeight | None = part(pair_stages.PairWeight, None, optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pair_terms and self.pair_weights is not None and self.pair_weights.sizes != (2,):
            raise ValueError(f"pair_terms: expected none because of {self.pair_weights!r}, got {self.pair_terms!r}")

    @property
    def variables(self) -> tuple[str, ...]:
        """``log_probs``, and those of the learned weights, of the divergence and of the terms."""
        learned: list[str | None] = ["log_probs", self.learned_weights]
        if self.divergence is not None:
            learned += [self.divergence.variable, self.divergence.learned_weights]
        for term in self.pair_terms:
            learned += term.variables
        return tuple(dict.fromkeys(name for name in learned if name is not None))

    @property
    def couples_rows(self) -> bool:
        """True: the loss of a row depends on the other row of its pair."""
        return True

    @property
    def adds_log_probs(self) -> bool:
        """Whether a score is the weighted sum of log-ratios of the row's tokens, or their mean, and nothing else."""
        return self.transform is None and self.divergence is None and self.learned_weights is None

    @cached_property
    def required_inputs(self) -> frozenset[str]:
        """Those of the stages, and the reference."""
        own = frozenset[str]() if self.reference is None else frozenset({self.reference})
        return super().required_inputs | own

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
    ) -> PreparedPairs:
        """Return the batch with its pairs and token weights. On CUDA this waits for the device.

        Args:
            batch: Pairs: groups of two rows with different rewards.
            batch_num_tokens: Not read; part of the common interface.
            global_batch_size: Not read; part of the common interface.
            global_num_groups: Pairs over all ranks; counted when there is one rank.
            dp_size: Number of ranks whose gradients the host averages. The loss is multiplied by it, so that the
                average is the gradient of the whole batch.
            progress: From 0 at the first step of training to 1 at the last, for an objective with schedules.
            state: State of the controllers, for an objective with controllers.

        Raises:
            TypeError: An argument or an input has the wrong type.
            ValueError: A group is no pair, an input is missing or wrong, or the number of pairs is missing.
        """
        denominators = Denominators(batch_num_tokens, global_batch_size, global_num_groups, dp_size)
        objective = self.resolved(resolver(progress, state))
        rows = batch.detached()
        batch = self.trajectories_of(rows)
        weight_of_pairs = objective.pair_weights
        pairing = batch.pairing
        _check_pairs(pairing, (2,) if weight_of_pairs is None else weight_of_pairs.sizes)
        for term in objective.pair_terms:
            term.check(batch)
        of_divergence = () if objective.divergence is None else objective.divergence.token_weights
        weights = divergence_weights = None
        if objective.token_weights or of_divergence:
            signs = torch.ones_like(batch.outcome_rewards)[:, None]
            signs[pairing.rows[:, 1]] = -1
            weights = multiplied(objective.token_weights, batch, signs)
            divergence_weights = multiplied(of_divergence, batch, signs)
        return PreparedPairs(
            objective,
            rows,
            batch,
            pairing.pairs,
            pairing.rows,
            weights,
            _pair_weight(denominators, batch.num_groups),
            divergence_weights,
            pairing.group,
            None if weight_of_pairs is None else weight_of_pairs(batch).double(),
        )

    def loss(self, prepared: PreparedPairs, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of prepared pairs, with its gradient to ``per_token``.

        Args:
            prepared: From :meth:`prepare` or :meth:`PreparedPairs.select`.
            per_token: float, log-probs in the layout of ``prepared.batch``: ``(B, T)`` or ``[N]``.
            variables: The further variables by name, in the same layout.

        Raises:
            TypeError: A variable is missing, not needed, or not a float tensor.
            ValueError: A shape is wrong.
        """
        check_variables(prepared.objective.variables, per_token, variables)
        objective = prepared.objective
        log_probs = prepared.of_whole(prepared.batch.flat(per_token, "log_probs"))
        further = {name: prepared.of_whole(prepared.batch.flat(x, name)) for name, x in variables.items()}
        terms: dict[str, Tensor] = {}
        if objective.adds_log_probs and not objective.pair_terms and prepared.compares_pairs:
            value, table = prepared.sums(log_probs, prepared.linked)
        else:
            scores = prepared.scores_of_whole(log_probs, further)
            added, weights = prepared.added(scores, {"log_probs": log_probs, **further}, terms)
            value, table = prepared.linked_scores(scores, weights)
            value = value if added is None else value + added
        detached = value.detach()

        def metrics() -> dict[str, Tensor]:
            chosen, rejected = table[:, 1], table[:, 2]
            margins = chosen - rejected
            pairs = max(margins.numel(), 1)
            of_variables = {
                f"{name}_{word}_mean": segment.sum(x.detach(), prepared.whole.spans).index_select(0, own).sum() / pairs
                for name, x in further.items()
                for word, own in zip(("chosen", "rejected"), prepared.rows_of_pairs, strict=True)
            }
            return {
                "loss": detached,
                **of_variables,
                **{name: x.sum() / pairs for name, x in terms.items()},
                "score_chosen_mean": chosen.sum() / pairs,
                "score_rejected_mean": rejected.sum() / pairs,
                "margin_mean": margins.sum() / pairs,
                "accuracy_mean": (margins > 0).double().sum() / pairs,
                "pairs": torch.full((), float(margins.numel()), device=margins.device),
                "tokens": prepared.lengths.sum().double(),
            }

        return Loss(value, Metrics(metrics))


def _check_pairs(pairing: Pairing, sizes: tuple[int, ...]) -> None:
    """Check that groups have one of these sizes and that chosen rows have higher rewards than rejected ones."""
    if wrong := sorted(pairing.sizes.difference(sizes)):
        expected = "groups of two rows" if sizes == (2,) else f"groups of {' or '.join(map(str, sizes))} rows"
        raise ValueError(f"group_ids: expected pairs, {expected}, got a group of {wrong[0]}")
    if pairing.tied:
        raise ValueError("rewards: expected a higher reward for the chosen row of each pair, got equal ones")


def _pair_weight(denominators: Denominators, pairs: int) -> float:
    if denominators.dp_size > 1 and denominators.global_num_groups is None:
        raise ValueError(
            f"global_num_groups: expected the number of pairs over all ranks because dp_size is "
            f"{denominators.dp_size}, got None"
        )
    total = pairs if denominators.global_num_groups is None else denominators.global_num_groups
    return denominators.dp_size / max(total, 1)


@dataclass(frozen=True, eq=False)
class PreparedPairs:
    """Pairs with everything that does not depend on the current policy.

    Attributes:
        objective: The objective, its schedules and controllers replaced by numbers.
        batch: The rows.
        whole: The trajectories; the batch itself if each row is one.
        pairs: int64 ``[P, 2]`` on the host, the chosen and the rejected trajectory of each pair.
        rows: The same on the device of the batch.
        multiplier: Product of the token weights, ``[J, 1]``, or in the buffers of ``whole``, or None.
        pair_weight: Weight of each pair's loss.
        divergence_multiplier: Product of the token weights of the divergence, likewise.
        comparisons: int64 ``[P]`` on the host, ascending: scores of pairs with the same number are added.
        comparison_weights: float64, a further weight of each comparison, or None.
    """

    objective: Preference
    batch: Rollouts
    whole: Rollouts
    pairs: NDArray[np.int64]
    rows: Tensor
    multiplier: Tensor | None
    pair_weight: float
    divergence_multiplier: Tensor | None
    comparisons: NDArray[np.int64]
    comparison_weights: Tensor | None

    @property
    def mask(self) -> Tensor:
        """The tokens that train; bool ``[N]``."""
        return self.batch.response_mask

    @property
    def rows_of_pairs(self) -> tuple[Tensor, Tensor]:
        """Chosen and rejected trajectories, int64 ``[P]`` each."""
        chosen, rejected = self.rows.unbind(1)
        return chosen, rejected

    @property
    def compares_pairs(self) -> bool:
        """Whether each comparison is one pair."""
        return not len(self.comparisons) or self.comparisons[-1] + 1 == len(self.comparisons)

    def of_whole(self, x: Tensor) -> Tensor:
        """Return per-token numbers of the batch in the buffers of ``whole``.

        Args:
            x: ``[N]``.
        """
        return x if self.batch.trajectories is None else self.batch.trajectories.joined.of_tokens(x)

    def _of_rows(self, x: Tensor) -> Tensor:
        """Return each row's own trajectory's number."""
        return x if self.batch.trajectories is None else self.batch.trajectories.divided.of_rows(x)

    def of_comparisons(self, x: Tensor) -> Tensor:
        """Return the sum over the pairs of each comparison.

        Args:
            x: ``[P]``.
        """
        if self.compares_pairs:
            return x
        index = torch.from_numpy(self.comparisons).to(x.device, non_blocking=True)
        return x.new_zeros(int(self.comparisons[-1]) + 1).index_add(0, index, x)

    @property
    def advantages(self) -> Tensor:
        """Weight of each token in the score, negative in rejected rows, in the layout of the batch."""
        sign = torch.ones_like(self.whole.outcome_rewards).index_fill_(0, self.rows_of_pairs[1], -1)[:, None]
        x = sign if self.multiplier is None else product(sign, self.multiplier, self.whole.spans)
        x = torch.where(self.whole.response_mask, per_token(x, self.whole.spans), 0)
        return self.batch.shaped(x if self.batch.trajectories is None else self.batch.trajectories.divided.of_tokens(x))

    @property
    def lengths(self) -> Tensor:
        """Training tokens of each row; int64 ``[R]``."""
        return self.batch.lengths

    @property
    def row_weights(self) -> Tensor:
        """Weight of each row's tokens in its score and of its pair in the loss; float64 ``[R, 1]``."""
        weights = torch.full((self.whole.num_rows, 1), self.pair_weight, dtype=torch.float64, device=self.batch.device)
        if self.comparison_weights is not None:
            index = torch.from_numpy(self.comparisons).to(self.batch.device, non_blocking=True)
            of_pairs = self.comparison_weights.double().index_select(0, index)[:, None]
            for rows in self.rows_of_pairs:
                weights = weights.index_copy(0, rows, weights.index_select(0, rows) * of_pairs)
        return self._of_rows(weights / self.divisors[:, None])

    @property
    def divisors(self) -> Tensor:
        """What the sum over the tokens of each trajectory is divided by in its score; int64 ``[J]``."""
        lengths = self.whole.lengths.clamp(min=1)
        return lengths if self.objective.normalization == "mean" else torch.ones_like(lengths)

    @property
    def has_gradient(self) -> Tensor:
        """Rows that can have a gradient; bool ``[R]``. All rows of a pair are needed if one of them is."""
        groups = self.whole.groups
        trained = torch.zeros(groups.count, dtype=torch.int64, device=self.batch.device)
        return self._of_rows(groups.per_row(trained.index_add_(0, groups.index, self.whole.lengths) > 0))

    def scores(self, log_probs: Tensor, **variables: Tensor) -> Tensor:
        """Return the score of each trajectory, float ``[J]``, with gradient.

        Args:
            log_probs: float ``[N]``.
            variables: The further variables of the objective by name, float ``[N]`` each.
        """
        return self.scores_of_whole(self.of_whole(log_probs), {k: self.of_whole(x) for k, x in variables.items()})

    def scores_of_whole(self, log_probs: Tensor, variables: Mapping[str, Tensor]) -> Tensor:
        """Return the same for numbers in the buffers of ``whole``.

        Args:
            log_probs: As in :meth:`scores`.
            variables: As in :meth:`scores`.
        """
        spans, learned = self.whole.spans, self.objective.learned_weights
        if learned is None:
            scores, _ = self.sums(log_probs)
        else:
            weighing = pair_stages.weighing(spans, self.multiplier)
            wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
            reference = self._reference(log_probs)
            weighted = pair_stages.masked_product(wide - reference, variables[learned], weighing)
            scores = segment.weighted_sum(weighted, weighing, self.multiplier)
        if self.objective.transform is not None:
            scores = self.objective.transform(scores)
        if self.objective.normalization == "mean":
            scores = scores / self.divisors
        if (divergence := self.objective.divergence) is not None:
            scores = scores + divergence(variables, spans, self.divergence_multiplier, self.rows_of_pairs[0])
        return scores

    def _reference(self, log_probs: Tensor) -> Tensor:
        name = self.objective.reference
        return torch.zeros_like(log_probs, requires_grad=False) if name is None else self.whole.input(name)

    def sums(self, log_probs: Tensor, combine: Combine | None = None) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of log-ratios of each trajectory, or a function of these sums, with gradient.

        Args:
            log_probs: float ``[N]``, in the buffers of ``whole``.
            combine: The function, or None.

        Returns:
            float ``[J]``, or the function's loss, and further numbers.
        """
        weighing, reference = pair_stages.weighing(self.whole.spans, self.multiplier), self._reference(log_probs)
        return ops.policy_loss(log_probs, weighing, "k1", reference=reference, weights=self.multiplier, combine=combine)

    def linked(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of all pairs, its derivative to each sum, and loss and scores of each pair.

        Args:
            sums: float ``[J]``, whose means or which themselves are the scores.
        """
        divisors = self.whole.lengths if self.objective.normalization == "mean" else None
        return self.objective.link.total(sums, self.rows, divisors, self.comparison_weights, self.pair_weight)

    def linked_scores(self, scores: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of all comparisons with its gradient to the scores, and loss and scores of each comparison.

        Args:
            scores: float ``[J]``.
            weights: float64 ``[P]``, weights of the comparisons, or None.
        """
        rows = self.rows
        if not self.compares_pairs:
            both = (self.of_comparisons(scores.index_select(0, x)) for x in self.rows_of_pairs)
            scores = torch.stack(tuple(both), 1).view(-1)
            rows = torch.arange(scores.shape[0], device=scores.device).view(-1, 2)
        link, scale = self.objective.link, self.pair_weight
        return ops.combined(scores, lambda x: link.total(x, rows, None, weights, scale))

    def added(
        self, scores: Tensor, variables: Mapping[str, Tensor], values: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what the terms add to the loss, and the weights of the comparisons.

        A comparison has a weight of NaN where its loss with the terms is NaN, so that its whole gradient is.

        Args:
            scores: float ``[J]``.
            variables: The variables of the objective by name, float ``[N]`` each.
            values: The value of each term in each pair is added to it, by name of its metric.
        """
        weights, rows, link = self.comparison_weights, self.rows_of_pairs, self.objective.link
        if not self.objective.pair_terms:
            return None, weights
        of_pairs = scores.index_select(0, rows[0]), scores.index_select(0, rows[1])
        seen = pair_stages.Pairs(self.whole, variables, self.multiplier, self.divisors, rows, of_pairs, link)
        chosen, rejected = (self.of_comparisons(x.detach()) for x in of_pairs)
        losses = torch.zeros_like(chosen)
        for term in self.objective.pair_terms:
            x = term(seen)
            values[term.metric] = x.detach()
            if term.coefficient:  # 0 times an infinite term is NaN
                losses = losses + term.coefficient * self.of_comparisons(x)
        total = losses.detach() + link(chosen, rejected)
        undefined = torch.where(total.isnan(), total, 1)
        losses, undefined = losses * undefined, undefined.double()
        if weights is not None:
            losses, undefined = losses * weights.to(losses.dtype), undefined * weights
        return losses.sum() * self.pair_weight, undefined

    def with_denominators(
        self,
        *,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        global_num_groups: int | None = None,
        dp_size: int = 1,
    ) -> PreparedPairs:
        """Return the same with another number of pairs; counted from these rows if left out.

        Args:
            batch_num_tokens: Not read; part of the common interface.
            global_batch_size: Not read; part of the common interface.
            global_num_groups: Pairs over all ranks.
            dp_size: Ranks whose gradients the host averages.

        Raises:
            TypeError: A number is not a whole number.
            ValueError: A number is missing or too small.
        """
        denominators = Denominators(batch_num_tokens, global_batch_size, global_num_groups, dp_size)
        return dataclasses.replace(self, pair_weight=_pair_weight(denominators, len(np.unique(self.comparisons))))

    def minibatch(self, rows: Any, **denominators: int) -> PreparedPairs:
        """Return these pairs as an optimizer step of their own.

        Args:
            rows: Rows of whole pairs; see :meth:`select`.
            denominators: As in :meth:`with_denominators`.
        """
        return self.select(rows).with_denominators(**denominators)

    def select(self, rows: Any) -> PreparedPairs:
        """Return some pairs as a micro-batch. Losses of micro-batches of all pairs add up to the loss of the batch.

        Args:
            rows: Integers ``[M]`` or bool ``[R]``, all rows of each pair: a tensor, an array or a sequence; best on
                the host.

        Raises:
            TypeError: ``rows`` holds neither integers nor bool.
            ValueError: A row number is out of range, or a pair or a trajectory is cut.
        """
        numbers = row_numbers(rows, self.batch.num_rows)
        chosen = self.batch.selection(numbers)
        batch, trajectories = self.batch.take(chosen), self.batch.trajectories
        if trajectories is None:
            whole, kept = batch, numbers
        else:
            trajectories.require_whole(numbers)
            kept = np.unique(trajectories.dense[numbers])
            whole = batch.whole
        place = np.full(self.whole.num_rows, -1, dtype=np.int64)
        place[kept] = np.arange(len(kept))
        inside = place[self.pairs]
        both = ~np.isin(self.comparisons, self.comparisons[(inside < 0).any(1)])
        if both.sum() * 2 != len(kept) or len(np.unique(numbers)) != len(numbers):
            raise ValueError(f"rows: expected both rows of each pair once, got {numbers.tolist()[:8]}")

        def taken(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if x.dim() == 2:
                return self.whole.selection(kept).of_rows(x)
            if trajectories is None:
                return chosen.of_tokens(x)
            assert batch.trajectories is not None
            return batch.trajectories.joined.of_tokens(chosen.of_tokens(trajectories.divided.of_tokens(x)))

        own, numbers_of = np.unique(self.comparisons[both], return_inverse=True)
        weights = self.comparison_weights
        if weights is not None:
            weights = weights.index_select(0, torch.from_numpy(own).to(weights.device, non_blocking=True))
        return PreparedPairs(
            self.objective,
            batch,
            whole,
            inside[both],
            torch.from_numpy(inside[both]).to(self.batch.device, non_blocking=True),
            taken(self.multiplier),
            self.pair_weight,
            taken(self.divergence_multiplier),
            numbers_of,
            weights,
        )
