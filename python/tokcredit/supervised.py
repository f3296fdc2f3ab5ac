"""The supervised objective, from batch to loss: imitation of given texts or of a teacher."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.from_hidden import FromHidden
from tokcredit.prepared import PreparedTokens, filtered, multiplied
from tokcredit.protocol import Denominators, Loss, Metrics, check_variables
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State, resolver
from tokcredit.selection import Section, Selection
from tokcredit.spans import Spans
from tokcredit.stages import aggregation as aggregations
from tokcredit.stages import filters as filter_stages
from tokcredit.stages import token_weights as weight_stages
from tokcredit.stages.base import Stage, part, parts
from tokcredit.stages.credit.group import per_token, product


class TokenLoss(Stage):
    """Base of token losses.

    Attributes:
        kind: ``"token_loss"``.
        variable: Per-token variable that ``loss`` is given, with gradient.
        sign: 1 if the variable is minimized, -1 if it is maximized.
    """

    kind: ClassVar[str] = "token_loss"
    variable: ClassVar[str]
    sign: ClassVar[float] = 1.0


@dataclass(frozen=True)
class nll(TokenLoss):
    """Negative log-likelihood of the row's own tokens. Pass their log-probs to ``loss``."""

    variable: ClassVar[str] = "log_probs"
    sign: ClassVar[float] = -1.0


@dataclass(frozen=True)
class reverse_kl(TokenLoss):
    """``KL(student || teacher)`` of the next-token distributions.

    Compute it with ``tokcredit.divergence.between`` and pass it to ``loss`` in place of log-probs.
    """

    variable: ClassVar[str] = "reverse_kl"


@dataclass(frozen=True)
class forward_kl(TokenLoss):
    """``KL(teacher || student)`` of the next-token distributions.

    Compute it with ``tokcredit.divergence.between`` and pass it to ``loss`` in place of log-probs.
    """

    variable: ClassVar[str] = "forward_kl"


@dataclass(frozen=True)
class Supervised(FromHidden):
    """Imitation of a text or of a teacher: a token loss, which tokens train, their weights, and how they are averaged.

    The defaults are plain supervised fine-tuning. Rewards and groups of the batch are not read.

    Args:
        token_loss: Loss of each token.
        filters: Which rows and tokens train. Others are not counted in any denominator.
        token_weights: Factors of the token losses.
        aggregation: How token losses become one number.
    """

    token_loss: TokenLoss = part(TokenLoss, nll)
    filters: tuple[filter_stages.Filter, ...] = parts(filter_stages.Filter)
    token_weights: tuple[weight_stages.TokenWeight, ...] = parts(weight_stages.TokenWeight)
    aggregation: aggregations.Aggregation = part(aggregations.Aggregation, aggregations.token_mean)

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in self.filters:
            if stage.before_credit:
                raise ValueError(f"filters: expected filters that read no rewards, got {stage!r}")
        if self.aggregation.reads_signs:
            raise ValueError(f"aggregation: expected one that reads no advantages, got {self.aggregation!r}")

    @property
    def variables(self) -> tuple[str, ...]:
        """The variable of the token loss."""
        return (self.token_loss.variable,)

    def separable(self, prepared: PreparedSupervised) -> bool:
        """Return True: the loss is a weighted sum of token losses.

        Args:
            prepared: A prepared batch of this objective.
        """
        return True

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
    ) -> PreparedSupervised:
        """Return the batch with the training mask and weights.

        Args:
            batch: The rows.
            batch_num_tokens: Training tokens over all ranks. This and the next two are counted when there is one rank.
            global_batch_size: Rows with a training token over all ranks.
            global_num_groups: Groups with such a row over all ranks.
            dp_size: Number of ranks whose gradients the host averages. The loss is multiplied by it, so that the
                average is the gradient of the whole batch.
            progress: From 0 at the first step of training to 1 at the last, for an objective with schedules.
            state: State of the controllers, for an objective with controllers.

        Raises:
            TypeError: An argument or an input has the wrong type.
            ValueError: An input is missing or wrong, or a number is missing or too small.
        """
        denominators = Denominators(batch_num_tokens, global_batch_size, global_num_groups, dp_size)
        objective = self.resolved(resolver(progress, state))
        for name in self.required_inputs:
            batch.input(name)
        batch = batch.detached()
        ones = torch.ones_like(batch.rewards)[:, None]
        kept = filtered(objective.filters, batch, ones)
        multiplier = multiplied(objective.token_weights, kept, ones)
        if not self.compares_groups:
            denominators.require(objective.aggregation)
        weights = denominators.row_weights(objective.aggregation, batch, kept.lengths)
        return PreparedSupervised(objective, batch, kept.spans, multiplier, kept.lengths, weights)

    def loss(self, prepared: PreparedSupervised, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of a prepared batch, or of a part of it, with its gradient to ``per_token``.

        Args:
            prepared: From :meth:`prepare` or :meth:`PreparedSupervised.select`.
            per_token: float, the variable of the token loss in the layout of ``prepared.batch``: ``(B, T)`` or ``[N]``.
            variables: None; part of the common interface.

        Raises:
            TypeError: A variable is given that is not needed.
            ValueError: A shape is wrong.
        """
        name = prepared.objective.token_loss.variable
        check_variables((name,), variables)
        x, spans = prepared.batch.flat(per_token, name), prepared.spans
        weights = prepared.row_weights
        if prepared.multiplier is not None:
            weights = product(prepared.multiplier, weights, spans)
        value = prepared.objective.token_loss.sign * segment.weighted_sum(x, spans, weights, total=True)
        detached = value.detach()

        def metrics() -> dict[str, Tensor]:
            tokens = prepared.lengths.sum()
            mean = segment.sum(per_token.detach().reshape(-1), spans).sum() / tokens.clamp(min=1)
            return {"loss": detached, f"{name}_mean": mean, "tokens": tokens.double()}

        return Loss(value, Metrics(metrics))


@dataclass(frozen=True, eq=False)
class PreparedSupervised(PreparedTokens):
    """A batch with everything that does not depend on the current policy.

    Attributes:
        objective: The objective, its schedules and controllers replaced by numbers.
        batch: The rows.
        spans: The rows, with the mask of the tokens that train.
        multiplier: Product of the token weights, ``[R, 1]`` or ``[N]``, or None.
        lengths: int64 ``[R]``, training tokens of each row.
        row_weights: float64 ``[R, 1]`` or 0-d, from the aggregation.
    """

    objective: Supervised
    batch: Rollouts
    spans: Spans
    multiplier: Tensor | None
    lengths: Tensor
    row_weights: Tensor

    @property
    def advantages(self) -> Tensor:
        """Weight of each token that trains, in the layout of the batch; 0 at the other tokens."""
        weight = torch.ones_like(self.batch.rewards)[:, None] if self.multiplier is None else self.multiplier
        return self.batch.shaped(torch.where(self.mask, per_token(weight, self.spans), 0))

    @property
    def has_gradient(self) -> Tensor:
        """Rows that can have a gradient; bool ``[R]``."""
        return self.lengths > 0

    def _with(self, denominators: Denominators) -> PreparedSupervised:
        if not self.objective.compares_groups:
            denominators.require(self.objective.aggregation)
        weights = denominators.row_weights(self.objective.aggregation, self.batch, self.lengths)
        return dataclasses.replace(self, row_weights=weights)

    def _part(self, chosen: Selection | Section) -> PreparedSupervised:
        multiplier = self.multiplier
        if multiplier is not None:
            multiplier = chosen.of_tokens(multiplier) if multiplier.dim() == 1 else chosen.of_rows(multiplier)
        return PreparedSupervised(
            self.objective,
            self.batch.take(chosen),
            chosen.spans.with_mask(chosen.of_tokens(self.mask)),
            multiplier,
            chosen.of_rows(self.lengths),
            self.row_weights if self.row_weights.dim() == 0 else chosen.of_rows(self.row_weights),
        )
