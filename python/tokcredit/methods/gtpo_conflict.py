"""GTPO: tokens that good and bad responses share are not blamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.base import flag, number, part
from tokcredit.stages.credit import Credit, group_normalized, outcome
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class entropy_penalized(Credit):
    """Another credit minus ``penalty`` times the mean entropy of the row; 0 in rows with a larger mean than ``limit``.

    Args:
        of: The other credit.
        penalty: Factor of the mean entropy, at least 0.
        limit: Largest mean entropy of a row that trains, nats.
    """

    of: Credit = part(Credit, group_normalized)
    penalty: float = number(0.1, at_least=0)
    limit: float = number(0.7, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages = self.of(batch)
        mean = segment.mean(batch.input("entropies"), batch.spans)[:, None]
        penalty, beyond = (self.penalty * mean).to(advantages.dtype), mean > self.limit
        if advantages.dim() == 1:
            penalty, beyond = per_token(penalty, batch.spans), per_token(beyond, batch.spans)
        return (advantages - penalty).masked_fill_(beyond, 0)


@dataclass(frozen=True)
class conflict(TokenWeight):
    """2 in good rows and 0 in bad ones at tokens that rows of both kinds share, at the start or at the end; else 1.

    A row is good if its reward is above the mean of its group, and bad if it is below. A token is shared at the start
    if a good row of the group and a bad one begin with the same prefix up to and including it, and at the end if they
    end alike from it on. Where both hold, the weight is 4 or 0.

    Args:
        divided: Whether the weights of a row are divided by the number of its shared tokens, if there are any.
    """

    divided: bool = flag(False)
    reads_contexts: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        sign, size, dtype = outcome(batch).sign(), batch.num_tokens, advantages.dtype
        group, groups = batch.group_index, batch.num_groups
        start = _shared(batch.tokens, batch.all_spans, group, groups, sign, dtype)
        # In the buffer from its end on rows are reversed, and so is their order.
        mirrored = Spans.trusted((size - batch.end).flip(0), (size - batch.begin).flip(0), size)
        end = _shared(batch.tokens.flip(0), mirrored, group.flip(0), groups, sign.flip(0), dtype).flip(0)
        one = torch.ones_like(sign)
        weights = ops.row_affine(start, sign, one, batch.spans, dtype)
        weights.mul_(ops.row_affine(end, sign, one, batch.spans, dtype))
        if self.divided:
            either = batch.response_mask & (start + end > 0) & ops.spread(sign != 0, batch.spans)
            count = ops.count(batch.spans.with_mask(either)).clamp(min=1)
            weights = weights / ops.spread(count, batch.spans).clamp(min=1)
        return weights


def _shared(tokens: Tensor, rows: Spans, group: Tensor, groups: int, sign: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 at the tokens whose prefix rows of both signs have and 0 elsewhere, ``[N]``."""
    leaf, parent, _, depth, *_ = ops.tree_build(tokens, rows, group, groups)
    share = ops.tree_mean(leaf, parent, sign != 0, sign.clamp(min=0), False)  # of rows above the mean
    both = ((share > 0) & (share < 1)).to(dtype)
    return ops.expand(rows, dtype, leaf, parent, depth, None, both, None)


def gtpo_conflict(penalty: float = 0.1, limit: float = 0.7, divided: bool = False) -> Objective:
    """GTPO: tokens that good and bad responses share at their start or end are raised twice as much, never lowered.

    With ``A`` the advantage of GRPO and ``H`` the mean entropy of the response::

        A'[i] = A[i] - penalty * H[i] if H[i] <= limit else 0
        w = 2 if A > 0, 0 if A < 0    at tokens of a prefix that responses with A > 0 and with A < 0 share
        w = the same                  at tokens of a suffix that they share; the two are multiplied
        w = 1                         elsewhere
        loss = mean over i, then t, of -A'[i] * w[i, t] * p / sg(p), with sg the stop-gradient

    Args:
        penalty: Factor of the mean entropy.
        limit: Largest mean entropy of a response that trains, nats.
        divided: Whether the loss of a response is divided by the number of its shared tokens, as in the released code.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs, and two prefix trees per group.
    References: arXiv 2508.03772.
    Differences from the paper:
        - The README of the repository filters responses by another rule, from ln 2 and the initial entropy.
    Differences from the released code:
        - A token is shared if the whole prefix, or suffix, is. The release also takes a token that responses with
          different beginnings have at the same position.
        - The release divides by the number of shared tokens; see ``divided``.
    """
    return Objective(
        entropy_penalized(penalty=penalty, limit=limit),
        token_weights=(conflict(divided),),
        ratio=ratio.one(),
        clip=clip.unclipped(),
        aggregation=aggregation.sequence_mean(),
    )
