"""The preference objective, from batch to loss: pairs of a chosen and a rejected row."""

from __future__ import annotations

import dataclasses
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
from tokcredit.protocol import Denominators, Loss, Metrics, check_variables
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State, resolver
from tokcredit.stages import link as links
from tokcredit.stages import token_weights as weight_stages
from tokcredit.stages.base import input_name, option, part, parts
from tokcredit.stages.credit.group import per_token, product


@dataclass(frozen=True)
class Preference(FromHidden):
    """Preference optimization of pairs: a score per row, and a link that makes a loss of the two scores of a pair.

    A pair is a group of two rows of which the one with the higher reward is chosen; see ``Rollouts.from_pairs``. With
    ``w`` the token weights::

        score[row] = sum over t of w[t] * (log_probs[t] - ref_log_probs[t])       # divided by the tokens, if normalized
        loss = mean over pairs of link(score[chosen], score[rejected])

    Args:
        token_weights: Factors of the tokens in the score.
        reference: Input with the log-probs of the reference policy, or None for a score of ``log_probs`` alone.
        normalization: ``sum`` over the row's tokens, or ``mean``.
        link: Loss of a pair.
    """

    token_weights: tuple[weight_stages.TokenWeight, ...] = parts(weight_stages.TokenWeight)
    reference: str | None = input_name("ref_log_probs", optional=True)
    normalization: str = option("sum", "mean")
    link: links.Link = part(links.Link, links.logistic)

    @property
    def variables(self) -> tuple[str, ...]:
        """``log_probs``."""
        return ("log_probs",)

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
        rows, batch = batch, self.trajectories_of(batch)
        pairs = _pairs(batch)
        multiplier, ones = None, torch.ones_like(batch.rewards)[:, None]
        for weight in objective.token_weights:
            w = weight(batch, ones)
            multiplier = w if multiplier is None else product(multiplier, w, batch.spans)
        return PreparedPairs(objective, rows, batch, pairs, multiplier, _pair_weight(denominators, len(pairs)))

    def loss(self, prepared: PreparedPairs, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of prepared pairs, with its gradient to ``per_token``.

        Args:
            prepared: From :meth:`prepare` or :meth:`PreparedPairs.select`.
            per_token: float, log-probs in the layout of ``prepared.batch``: ``(B, T)`` or ``[N]``.
            variables: None; part of the common interface.

        Raises:
            TypeError: A variable is given that is not needed.
            ValueError: A shape is wrong.
        """
        check_variables(("log_probs",), variables)
        objective = prepared.objective
        scores = prepared.scores(prepared.batch.flat(per_token, "log_probs"))
        chosen, rejected = (scores.index_select(0, rows) for rows in prepared.rows_of_pairs)
        value = objective.link(chosen, rejected).sum() * prepared.pair_weight
        detached = value.detach()
        chosen, rejected = chosen.detach(), rejected.detach()

        def metrics() -> dict[str, Tensor]:
            margins = chosen - rejected
            pairs = max(len(prepared.pairs), 1)
            return {
                "loss": detached,
                "score_chosen_mean": chosen.sum() / pairs,
                "score_rejected_mean": rejected.sum() / pairs,
                "margin_mean": margins.sum() / pairs,
                "accuracy_mean": (margins > 0).double().sum() / pairs,
                "pairs": torch.full((), float(len(prepared.pairs)), device=margins.device),
                "tokens": prepared.lengths.sum().double(),
            }

        return Loss(value, Metrics(metrics))


def _pairs(batch: Rollouts) -> NDArray[np.int64]:
    """Return chosen and rejected trajectory of each pair, ``[P, 2]``, after checking that groups are pairs."""
    groups = batch.groups
    if bool((groups.sizes != 2).any()):
        wrong = int(groups.sizes[groups.sizes != 2][0])
        raise ValueError(f"group_ids: expected pairs, groups of two rows, got a group of {wrong}")
    rows = groups.sorted(torch.arange(batch.num_rows, device=batch.device)).view(-1, 2)
    rewards = batch.rewards[rows]
    if bool((rewards[:, 0] == rewards[:, 1]).any()):
        raise ValueError("rewards: expected a higher reward for the chosen row of each pair, got equal ones")
    swapped = torch.where((rewards[:, 0] > rewards[:, 1])[:, None], rows, rows.flip(1))
    pairs: NDArray[np.int64] = swapped.cpu().numpy()
    return pairs


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
        multiplier: Product of the token weights, ``[J, 1]``, or in the buffers of ``whole``, or None.
        pair_weight: Weight of each pair's loss.
    """

    objective: Preference
    batch: Rollouts
    whole: Rollouts
    pairs: NDArray[np.int64]
    multiplier: Tensor | None
    pair_weight: float

    @property
    def mask(self) -> Tensor:
        """The tokens that train; bool ``[N]``."""
        return self.batch.response_mask

    @property
    def rows_of_pairs(self) -> tuple[Tensor, Tensor]:
        """Chosen and rejected trajectories, int64 ``[P]`` each."""
        rows = torch.from_numpy(np.ascontiguousarray(self.pairs.T)).to(self.batch.device, non_blocking=True)
        return rows[0], rows[1]

    def _of_rows(self, x: Tensor) -> Tensor:
        """Return each row's own trajectory's number."""
        return x if self.batch.trajectories is None else self.batch.trajectories.divided.of_rows(x)

    @property
    def advantages(self) -> Tensor:
        """Weight of each token in the score, negative in rejected rows, in the layout of the batch."""
        sign = torch.ones_like(self.whole.rewards).index_fill_(0, self.rows_of_pairs[1], -1)[:, None]
        x = sign if self.multiplier is None else product(sign, self.multiplier, self.whole.spans)
        x = torch.where(self.whole.response_mask, per_token(x, self.whole.spans), 0)
        return self.batch.shaped(x if self.batch.trajectories is None else self.batch.trajectories.divided.of_tokens(x))

    @property
    def lengths(self) -> Tensor:
        """Training tokens of each row; int64 ``[R]``."""
        return self.batch.lengths

    @property
    def row_weights(self) -> Tensor:
        """Weight of each row's tokens in the score and of its pair in the loss; float64 ``[R, 1]``."""
        weights = torch.full((self.whole.num_rows, 1), self.pair_weight, dtype=torch.float64, device=self.batch.device)
        if self.objective.normalization == "mean":
            weights /= self.whole.lengths.clamp(min=1)[:, None]
        return self._of_rows(weights)

    @property
    def has_gradient(self) -> Tensor:
        """Rows that can have a gradient; bool ``[R]``. All rows of a pair are needed if one of them is."""
        groups = self.whole.groups
        either = groups.sorted(self.whole.lengths > 0).view(-1, 2).any(1)
        return self._of_rows(groups.per_row(either))

    def scores(self, log_probs: Tensor) -> Tensor:
        """Return the score of each trajectory, float ``[J]``, with gradient.

        Args:
            log_probs: float ``[N]``.
        """
        if self.batch.trajectories is not None:
            log_probs = self.batch.trajectories.joined.of_tokens(log_probs)
        spans = self.whole.spans
        if self.objective.reference is None:
            scores = segment.weighted_sum(log_probs, spans, self.multiplier)
        else:
            scores, _ = ops.policy_loss(
                log_probs, spans, "k1", reference=self.whole.input(self.objective.reference), weights=self.multiplier
            )
        if self.objective.normalization == "mean":
            scores = scores / self.whole.lengths.clamp(min=1)
        return scores

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
        return dataclasses.replace(self, pair_weight=_pair_weight(denominators, len(self.pairs)))

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
        both = (inside >= 0).all(1)
        if both.sum() * 2 != len(kept) or len(np.unique(numbers)) != len(numbers):
            raise ValueError(f"rows: expected both rows of each pair once, got {numbers.tolist()[:8]}")
        multiplier = self.multiplier
        if multiplier is not None:
            if multiplier.dim() == 2:
                multiplier = self.whole.selection(kept).of_rows(multiplier)
            elif trajectories is None:
                multiplier = chosen.of_tokens(multiplier)
            else:
                assert batch.trajectories is not None
                of_rows = chosen.of_tokens(trajectories.divided.of_tokens(multiplier))
                multiplier = batch.trajectories.joined.of_tokens(of_rows)
        return PreparedPairs(self.objective, batch, whole, inside[both], multiplier, self.pair_weight)
