"""The supervised objective, from batch to loss: imitation of given texts or of a teacher."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import float_tensor
from tokcredit.blocks import divergence, segment
from tokcredit.blocks.distilled_head import distilled_loss
from tokcredit.blocks.head import Head
from tokcredit.from_hidden import FromHidden, HiddenLoss, chosen_tokens, tile_gradients
from tokcredit.prepared import PreparedTokens, filtered, multiplied, training_tokens
from tokcredit.protocol import Denominators, Loss, Metrics, check_variables
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State, resolver
from tokcredit.spans import Spans
from tokcredit.stages import aggregation as aggregations
from tokcredit.stages import clip as clips
from tokcredit.stages import filters as filter_stages
from tokcredit.stages import scale as scales
from tokcredit.stages import token_weights as weight_stages
from tokcredit.stages.base import Stage, number, option, part, parts, whole_number
from tokcredit.stages.credit.group import per_token, product
from tokcredit.trajectories import Part


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

    def limited(self, value: Tensor) -> Tensor:
        """Return the loss of each token without its sign.

        Args:
            value: float ``[N]``, the variable, with gradient.
        """
        return value


@dataclass(frozen=True)
class nll(TokenLoss):
    """Negative log-likelihood of the row's own tokens. Pass their log-probs to ``loss``."""

    variable: ClassVar[str] = "log_probs"
    sign: ClassVar[float] = -1.0


@dataclass(frozen=True, kw_only=True)
class Divergence(TokenLoss):
    """Base of divergences between the next-token distributions of the student and of a teacher.

    Call the stage with logits, and pass what it returns to ``loss`` in place of log-probs::

        value = objective.token_loss(student_logits, teacher_logits)
        objective.loss(prepared, value)

    With ``top_k`` the divergence is that of ``top_k + 1`` outcomes: the most likely tokens, and all others as one.

    Args:
        top_k: Number of tokens of which probabilities are compared. None, or as many as the vocabulary has, compares
            all; ``top_of`` and ``outside`` then have no effect.
        top_of: Whose most likely tokens these are: ``student`` or ``teacher``.
        outside: What is done about the other tokens; see :class:`tokcredit.divergence.Top`.
        cap: Largest value of a token, nats. The loss of a token with a larger one, and its gradient, are multiplied by
            ``cap / value``, without gradient through the factor. An infinite one becomes ``cap``, without gradient.
    """

    top_k: int | None = whole_number(None, at_least=1, at_most=divergence.MOST_TOP, optional=True)
    top_of: str = option("student", "teacher")
    outside: str = option(*divergence.OUTSIDES)
    cap: float = number(math.inf, above=0, infinite=True)
    share: ClassVar[float | None] = None

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | divergence.Mixture | divergence.Top,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Return the divergence of each position, ``(...)``, with gradient to the student.

        Args:
            student: float ``(..., V)``, logits.
            teacher: float ``(..., V)``, logits; or a mixture, or top log-probs, neither together with ``top_k``.
            temperature: Positive; divides the logits of both.
            mask: bool ``(...)``, the positions to compute; the others get 0. All if None.
            overwrite: Whether the backward pass may write the gradient over the student's logits.

        Raises:
            TypeError: A dtype is wrong, or the teacher is not logits although ``top_k`` is given.
            ValueError: Shapes disagree, or a setting is out of range.
        """
        if self.top_k is not None and self.top_k < float_tensor("student", student).shape[-1]:
            if not isinstance(teacher, Tensor):
                raise TypeError(f"teacher: expected logits because of {self!r}, got {type(teacher).__name__}")
            if float_tensor("teacher", teacher).shape != (shape := student.shape):
                raise ValueError(f"teacher: expected the shape of student, {list(shape)}, got {list(teacher.shape)}")
            with torch.no_grad():
                wide = torch.promote_types(teacher.dtype, torch.float32)
                ids = (student if self.top_of == "student" else teacher).topk(self.top_k).indices
                total = (teacher.to(wide) / temperature).logsumexp(-1, keepdim=True)
                known = teacher.gather(-1, ids).to(wide) / temperature - total
            teacher = divergence.Top(ids, known, self.outside)
        return divergence.between(student, teacher, self.variable, self.share, temperature, mask, overwrite)

    def limited(self, value: Tensor) -> Tensor:
        """Return the loss of each token.

        Args:
            value: float ``[N]``, the divergence of each token, with gradient.
        """
        if self.cap == math.inf:
            return value
        size = value.detach()
        return torch.where(size == math.inf, self.cap, value * torch.where(size > self.cap, self.cap / size, 1))


@dataclass(frozen=True)
class reverse_kl(Divergence):
    """``KL(student || teacher)``."""

    variable: ClassVar[str] = "reverse_kl"


@dataclass(frozen=True)
class forward_kl(Divergence):
    """``KL(teacher || student)``."""

    variable: ClassVar[str] = "forward_kl"


class TokenSelection(Stage):
    """Base of selections of tokens by the current policy. How many there are of each row does not depend on it.

    Attributes:
        kind: ``"selection"``.
    """

    kind: ClassVar[str] = "selection"
    reads_contexts: ClassVar[bool] = True

    def count(self, lengths: Tensor) -> Tensor:
        """Return the number of tokens of each row that are selected, int64 ``[R]``.

        Args:
            lengths: int64 ``[R]``, tokens that filters left.
        """
        raise NotImplementedError

    def __call__(self, variable: Tensor, batch: Rollouts, spans: Spans) -> Tensor:
        """Return the tokens that are selected, bool ``[N]``.

        Args:
            variable: float ``[N]``, the variable of the token loss, without gradient.
            batch: The rows, which are whole.
            spans: The rows, with the mask of the tokens that filters left.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class js(Divergence):
    """The generalised Jensen-Shannon divergence: ``share * KL(q || m) + (1 - share) * KL(p || m)``.

    p is the student, q the teacher, and ``m = share * q + (1 - share) * p``.

    Args:
        share: Share of the teacher in m, above 0 and below 1. It is the beta of GKD.
        outside: What is done about tokens beside the ``top_k``; never ``cut``.
    """

    share: float = number(0.5, above=0, below=1)  # type: ignore[misc] # a class variable in the base
    _: KW_ONLY
    outside: str = option("bucket", "renormalised")
    variable: ClassVar[str] = "js"


@dataclass(frozen=True)
class Supervised(FromHidden):
    """Imitation of a text or of a teacher: a token loss, which tokens train, their weights, and how they are averaged.

    The defaults are plain supervised fine-tuning. Rewards and groups of the batch are not read.

    Args:
        token_loss: Loss of each token.
        filters: Which rows and tokens train. Others are not counted in any denominator.
        token_weights: Factors of the token losses, decided once per batch.
        scales: Factors of the token losses that depend on the current policy, without gradient.
        aggregation: How token losses become one number.
        selection: Which of the tokens that filters left train, by the current policy, or None for all of them. Others
            are not counted in any denominator.
    """

    token_loss: TokenLoss = part(TokenLoss, nll)
    filters: tuple[filter_stages.Filter, ...] = parts(filter_stages.Filter)
    token_weights: tuple[weight_stages.TokenWeight, ...] = parts(weight_stages.TokenWeight)
    scales: tuple[scales.Scale, ...] = parts(scales.Scale)
    aggregation: aggregations.Aggregation = part(aggregations.Aggregation, aggregations.token_mean)
    selection: TokenSelection | None = part(TokenSelection, None, optional=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in self.filters:
            if stage.before_credit:
                raise ValueError(f"filters: expected filters that read no rewards, got {stage!r}")
        for scale in self.scales:
            if scale.needs_bounds:
                raise ValueError(f"scales: expected scales that read no bounds, got {scale!r}")
        if self.aggregation.reads_signs:
            raise ValueError(f"aggregation: expected one that reads no advantages, got {self.aggregation!r}")

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The variable of the token loss, and ``log_probs`` if a scale needs them too."""
        own = self.token_loss.variable
        return (own, "log_probs") if self.scales and own != "log_probs" else (own,)

    def separable(self, prepared: PreparedSupervised) -> bool:
        """Return whether the derivative of the loss at a token depends on that token alone.

        Args:
            prepared: A prepared batch of this objective.
        """
        stages = prepared.objective.scales
        return prepared.objective.selection is None and not any(scale.couples_tokens for scale in stages)

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
            global_batch_size: Trajectories with a training token over all ranks.
            global_num_groups: Groups with such a trajectory over all ranks.
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
        rows, batch = batch, self.trajectories_of(batch)
        ones = torch.ones_like(batch.rewards)[:, None]
        kept = filtered(objective.filters, batch, ones)
        multiplier = multiplied(objective.token_weights, kept, ones)
        if not self.compares_groups:
            denominators.require(objective.aggregation)
        lengths = kept.lengths if objective.selection is None else objective.selection.count(kept.lengths)
        weights = denominators.row_weights(objective.aggregation, batch, lengths)
        signals = tuple(scale.signal(batch, clips.Window("clip")) for scale in objective.scales)
        prepared = PreparedSupervised(objective, batch, kept.spans, multiplier, signals, lengths, weights)
        return prepared.divided(rows)

    def loss(self, prepared: PreparedSupervised, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of a prepared batch, or of a part of it, with its gradient to ``per_token``.

        Args:
            prepared: From :meth:`prepare` or :meth:`PreparedSupervised.select`.
            per_token: float, the variable of the token loss in the layout of ``prepared.batch``: ``(B, T)`` or ``[N]``.
            variables: ``log_probs`` in the same layout, if :attr:`variables` names them. Their gradient is not used.

        Raises:
            TypeError: A variable is missing, not needed, or not a float tensor.
            ValueError: A shape is wrong.
        """
        objective, spans = prepared.objective, prepared.spans
        token_loss, name = objective.token_loss, objective.token_loss.variable
        check_variables(objective.variables, per_token, variables)
        x, weights = prepared.batch.flat(per_token, name), prepared.row_weights
        if objective.selection is not None:
            spans = spans.with_mask(prepared.mask & objective.selection(x.detach(), prepared.batch, spans))
        factors = [] if prepared.multiplier is None else [prepared.multiplier]
        if objective.scales:
            current = prepared.batch.flat(variables.get("log_probs", per_token), "log_probs").detach()
            factors += prepared.factors(current)
        for factor in factors:
            weights = product(weights, factor, spans)
            x = _zero_where_zero(x, factor, spans)
        value = token_loss.sign * segment.weighted_sum(token_loss.limited(x), spans, weights, total=True)
        detached = value.detach()

        def metrics() -> dict[str, Tensor]:
            tokens = prepared.lengths.sum()
            mean = segment.sum(per_token.detach().reshape(-1), spans).sum() / tokens.clamp(min=1)
            return {"loss": detached, f"{name}_mean": mean, "tokens": tokens.double()}

        return Loss(value, Metrics(metrics))

    @ops.uncompiled
    def loss_from_hidden(
        self,
        prepared: PreparedSupervised,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        teacher: tuple[Tensor, Head] | None = None,
        **settings: Any,
    ) -> HiddenLoss:
        """Return the loss with its gradient to hidden states, weight and bias. The logits exist in tiles only.

        A divergence from a teacher takes four matrix products: a tile of logits of each model, and two for the
        gradients. They are computed together with the loss, so one backward pass is possible.

        Args:
            prepared: From :meth:`prepare` or ``select``.
            hidden: float ``(B, T, d)`` or ``[N, d]``, as in :meth:`FromHidden.loss_from_hidden`.
            weight: float ``[V, d]``, weight of the output layer.
            bias: float ``[V]`` or None.
            teacher: Hidden states of the teacher at the same positions, ``(B, T, d')`` or ``[N, d']``, and its output
                layer, ``tokcredit.head.Head(weight, bias)``; for a divergence only.
            settings: Of the student's output layer; see :class:`tokcredit.blocks.head.Head`. Its temperature divides
                the logits of both.

        Raises:
            TypeError: The teacher is missing, or not needed, or a dtype is wrong.
            ValueError: A shape or number is wrong. With a divergence also if a scale combines tokens, or if there is a
                selection.
        """
        objective, batch = prepared.objective, prepared.batch
        token_loss = objective.token_loss
        if not isinstance(token_loss, Divergence):
            if teacher is not None:
                raise TypeError(f"teacher: expected None because of {token_loss!r}, got hidden states")
            return super().loss_from_hidden(prepared, hidden, weight, bias, **settings)
        if teacher is None:
            raise TypeError(f"teacher: expected hidden states and an output layer because of {token_loss!r}, got None")
        if objective.selection is not None:
            raise ValueError(f"selection: expected None because of {token_loss!r}, got {objective.selection!r}")
        if not objective.separable(prepared):
            raise ValueError(f"scales: expected scales of single tokens, got {objective.scales!r}")
        by_token, whole = prepared.by_token(), list[HiddenLoss]()

        def evaluate(part: PreparedSupervised, value: Tensor, log_probs: Tensor) -> Loss:
            return self.loss(part, value, **dict.fromkeys(objective.variables[1:], log_probs))

        def slopes(at: Tensor, value: Tensor, log_probs: Tensor, entropies: Tensor) -> Tensor:
            (found,) = tile_gradients(by_token, evaluate, at, (value, log_probs), 1)
            return torch.zeros_like(value) if found is None else found

        def total(value: Tensor, log_probs: Tensor, entropies: Tensor) -> Tensor:
            out = evaluate(prepared, value, log_probs)
            whole.append(HiddenLoss(*out, log_probs, entropies))
            return out.loss

        loss = distilled_loss(
            hidden, weight, chosen_tokens(batch), teacher, token_loss, slopes, total, bias, **settings
        )
        return whole[0]._replace(loss=loss)


def _zero_where_zero(x: Tensor, factor: Tensor, spans: Spans) -> Tensor:
    # A divergence may be infinite at a token of weight 0.
    return torch.where(per_token(factor, spans) == 0, 0, x)


@dataclass(frozen=True, eq=False)
class PreparedSupervised(PreparedTokens):
    """A batch with everything that does not depend on the current policy.

    Attributes:
        objective: The objective, its schedules and controllers replaced by numbers.
        batch: The rows.
        spans: The rows, with the mask of the tokens that train, or that a selection chooses from.
        multiplier: Product of the token weights, ``[R, 1]`` or ``[N]``, or None.
        signals: For each scale what it needs beside the current policy, ``[N]`` or None.
        lengths: int64 ``[R]``, training tokens of each row.
        row_weights: float64 ``[R, 1]`` or 0-d, from the aggregation.
    """

    objective: Supervised
    batch: Rollouts
    spans: Spans
    multiplier: Tensor | None
    signals: tuple[Tensor | None, ...]
    lengths: Tensor
    row_weights: Tensor

    def factors(self, log_probs: Tensor) -> list[Tensor]:
        """Return the factor of each scale, ``[N]`` or ``[R, 1]``.

        Args:
            log_probs: float ``[N]``, of the current policy, without gradient.
        """
        batch, objective = self.batch, self.objective
        ones = torch.ones_like(batch.outcome_rewards)[:, None]
        old = log_probs if batch.old_log_probs is None else batch.old_log_probs
        log_ratio = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)) - old
        window = clips.Window("clip")
        found = zip(objective.scales, self.signals, strict=True)
        return [scale(log_probs, log_ratio, ones, batch.spans, window, signal) for scale, signal in found]

    @property
    def advantages(self) -> Tensor:
        """Weight of each token that trains, in the layout of the batch; 0 at the other tokens."""
        weight = torch.ones_like(self.batch.outcome_rewards)[:, None] if self.multiplier is None else self.multiplier
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

    def _part(self, chosen: Part, part: Rollouts) -> PreparedSupervised:
        multiplier = self.multiplier
        if multiplier is not None:
            multiplier = chosen.of_tokens(multiplier) if multiplier.dim() == 1 else chosen.of_rows(multiplier)
        spans = part.spans.with_mask(chosen.of_tokens(self.mask))
        return PreparedSupervised(
            self.objective,
            part,
            spans,
            multiplier,
            tuple(None if x is None else chosen.of_tokens(x) for x in self.signals),
            training_tokens(chosen, self.lengths, spans),
            self.row_weights if self.row_weights.dim() == 0 else chosen.of_rows(self.row_weights),
        )
