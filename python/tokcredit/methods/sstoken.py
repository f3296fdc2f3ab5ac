"""Self-modulated and semantic-aware token selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import float_tensor, tensor
from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range
from tokcredit.spans import Spans
from tokcredit.stages import aggregation
from tokcredit.stages.base import InputName, input_name, number
from tokcredit.stages.filters import highest
from tokcredit.supervised import Supervised, TokenSelection, nll


@torch.no_grad()
def prompt_attention(
    query: Tensor, key: Tensor, prompt: Tensor, scale: float | None = None, block: int = 256
) -> Tensor:
    """Return the ``prompt_attention`` of the tokens of one row: the mean over heads of the attention to its prompt.

    ``mean over heads of sum over j <= i in the prompt of softmax(scale * q[i] . k)[j]`` with causal attention, computed
    for some positions at a time. There is no tensor of size ``[heads, T, T]``.

    Args:
        query: float ``[heads, T, d]`` of one layer, with the positions rotated in.
        key: float ``[key heads, T, d]``; each serves as many heads.
        prompt: bool ``[T]``, True for tokens of the prompt.
        scale: Factor of the dot products; ``1 / sqrt(d)`` if None.
        block: Positions at a time, at least 1.

    Returns:
        float32 ``[T]``, or float64 for float64 queries, from 0 to 1.

    Raises:
        ValueError: A shape is wrong.
    """
    if float_tensor("query", query).dim() != 3 or not query.shape[1]:
        raise ValueError(f"query: expected float [heads, T, d], got {list(query.shape)}")
    heads, length, width = query.shape
    if float_tensor("key", key).dim() != 3 or key.shape[1:] != query.shape[1:] or heads % max(key.shape[0], 1):
        raise ValueError(f"key: expected float [key heads, {length}, {width}], got {list(key.shape)}")
    tensor("prompt", prompt, (torch.bool,), (length,), query.device)
    Range("whole number", at_least=1).checked("block", block)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(width) if scale is None else scale
    grouped = query.to(wide).reshape(key.shape[0], heads // key.shape[0], length, width)
    keys, position = key.to(wide)[:, None], torch.arange(length, device=query.device)
    shares = query.new_empty(length, dtype=wide)
    for first in range(0, length, block):
        last = min(first + block, length)
        scores = scale * (grouped[:, :, first:last] @ keys[:, :, :last].transpose(2, 3))
        scores.masked_fill_(position[:last] > position[first:last, None], -math.inf)
        total = scores.logsumexp(-1)
        to_prompt = scores.masked_fill_(~prompt[:last], -math.inf).logsumexp(-1)
        shares[first:last] = (to_prompt - total).exp().mean((0, 1))
    return shares


@dataclass(frozen=True)
class improved_share(TokenSelection):
    """The share of each row's tokens that improved most since an earlier model, and attend most to the prompt.

    With ``improvement = log p - log p_history``, min-max scaled in the row with 1e-8 added to the width::

        score = gamma * scaled(improvement) + (1 - gamma) * attention
        selected = the ceil(share * tokens) largest scores; ties go to the lower index

    A token whose improvement is NaN or infinite is selected first, so that a log-prob that is so shows in the loss, and
    the others are scaled without it. Of the other tokens, one whose attention is NaN is selected last.

    Args:
        share: Share of the tokens, above 0 and at most 1.
        gamma: Share of the improvement in the score, from 0 to 1; may be a schedule.
        history: Input with the log-probs of the earlier model.
        attention: Input with the attention to the prompt.
    """

    share: float = number(0.6, above=0, at_most=1)
    gamma: float = number(0.5, at_least=0, at_most=1, scheduled=True)
    history: str = input_name("ref_log_probs")
    attention: str = input_name("prompt_attention")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The two inputs."""
        return frozenset({self.history, self.attention})

    def count(self, lengths: Tensor) -> Tensor:
        """Return ``ceil(share * tokens)`` of each row, int64 ``[R]``.

        Args:
            lengths: int64 ``[R]``, tokens that filters left.
        """
        wanted = lengths.double().mul_(self.share).sub_(1e-9).ceil_().long()  # as `highest` counts
        return torch.minimum(wanted.clamp_(min=1), lengths)

    def __call__(self, variable: Tensor, batch: Rollouts, spans: Spans) -> Tensor:
        assert spans.mask is not None
        improvement = variable.to(torch.promote_types(variable.dtype, torch.float32)) - batch.input(self.history)
        finite = improvement.isfinite()
        counted = spans.with_mask(spans.mask & finite)
        low = segment.minimum(improvement, counted)
        width = ops.spread(segment.maximum(improvement, counted) - low + 1e-8, spans)
        scaled = (improvement - ops.spread(low, spans)) / width
        score = self.gamma * scaled + (1 - self.gamma) * batch.input(self.attention)
        return highest(score.where(finite, math.inf), self.share, spans)


def sstoken(
    rho: float = 0.6,
    gamma: float = 0.5,
    history: InputName = "ref_log_probs",
    per_row: bool = False,
) -> Supervised:
    """ssToken: SFT of the tokens that the model has improved on, and that attend to the prompt.

    For each token of a response::

        improvement = log p - log p_history
        score = gamma * minmax(improvement) + (1 - gamma) * prompt_attention
        loss = mean over the selected tokens of -log p

    The ``ceil(rho * tokens)`` tokens of each response with the largest score are selected anew at every step. The
    ``prompt_attention`` is that of a deep layer at the token's own position, where it is the input:
    ``from tokcredit.methods.sstoken import prompt_attention``. The trainer takes the last layer. Rows may not be cut.

    Args:
        rho: Share of the tokens of each response that train, above 0 and at most 1. With 1 it is SFT.
        gamma: Share of the improvement in the score, from 0 to 1; may be a schedule.
        history: Input with the log-probs of an earlier model, by default the reference policy, the model before
            training.
        per_row: Whether the mean is over rows of the mean over the row's selected tokens.

    Cost: SFT, log-probs of the history model, and the attention of one layer.
    References: arXiv 2510.18250.
    Differences from the paper:
        - The history model is fixed, as in the released code. In the trainer it moves with
          ``history="teacher_log_probs"`` and ``--teacher "ema(0.05)"``.
        - The paper's mean is over the tokens of one response; ``per_row`` averages that over rows.
    Differences from the released code:
        - Its first 10000 samples are selected by attention alone; a schedule of ``gamma`` does the same.
        - Ties go to the lower index.
    """
    mean = aggregation.sequence_mean() if per_row else aggregation.token_mean()
    return Supervised(nll(), aggregation=mean, selection=improved_share(rho, gamma, history))
