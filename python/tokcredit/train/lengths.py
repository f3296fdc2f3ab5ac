"""A value head that learns, beside the policy, how many tokens remain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokcredit.blocks import length
from tokcredit.rollouts import Rollouts
from tokcredit.train.ranks import Ranks


class LengthHead(nn.Module):
    """A value head ``z = W2 silu(W1 h + b1) + b2`` on final hidden states; the value is ``-sigmoid(z)``.

    :mod:`tokcredit.length` defines the value.

    Args:
        width: Size d of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return z of each hidden state.

        Args:
            hidden_states: float ``(..., d)``.

        Returns:
            float ``(...)``.
        """
        return self.layers(hidden_states)[..., 0]


class LengthLearner:
    """Predicts the length values of a step's rollouts, and then learns from their true lengths.

    Args:
        head: The value head.
        gamma: Discount per token, that of the objective.
        ranks: The processes, which keep one head.
        lr: Learning rate of AdamW.
        passes: Optimizer steps on the rollouts of a step.
    """

    def __init__(self, head: LengthHead, gamma: float, ranks: Ranks, lr: float = 1e-3, passes: int = 4) -> None:
        self.head, self._gamma, self._ranks, self._passes = head, gamma, ranks, passes
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def values(self, batch: Rollouts) -> Tensor:
        """Return ``-(1 - gamma^l)`` before each token, with l the predicted remaining tokens; float ``[N]``.

        Args:
            batch: Rollouts with ``hidden_states``.
        """
        return -self.head(batch.input("hidden_states")).sigmoid()

    def update(self, batch: Rollouts, finished: Tensor) -> float:
        """Fit the head to the rows that the model ended, and return the loss before that, or 0 without such rows.

        The loss is the mean over the tokens of these rows in all processes.

        Rows cut at the length limit do not show how long they would have been. If a loss or a gradient is not finite,
        the head stays as it is and the loss is NaN.

        Args:
            batch: Rollouts with ``hidden_states``.
            finished: bool ``[R]``, the rows that the model ended.
        """
        first = 0.0
        part = batch.select(finished)
        tokens = part.lengths.sum()
        total = self._ranks.sum({"tokens": tokens})["tokens"]
        if not total:
            return first
        # The gradients of the processes are averaged with equal weights.
        share = float(tokens) * self._ranks.count / total
        target = length.targets(part.spans, self._gamma)
        hidden = part.input("hidden_states")
        for i in range(self._passes):
            loss = length.squared(self.head(hidden), target, part.spans) * share
            self._optimizer.zero_grad()
            loss.backward()
            self._ranks.average_gradients(self.head)
            norm = nn.utils.get_total_norm([p.grad for p in self.head.parameters() if p.grad is not None])
            value = self._ranks.mean({"loss": loss})["loss"]
            if not math.isfinite(float(norm) + value):
                return math.nan
            self._optimizer.step()
            first = value if i == 0 else first
        return first

    def state_dict(self) -> dict[str, Any]:
        """Return the head and the state of its optimizer, for a checkpoint."""
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])


def candidates_head(model: Any, head: LengthHead, ends: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the head as :class:`tokcredit.decoding.length.LengthTilt` calls it: z after each candidate token.

    Every candidate costs a forward pass over the text so far, so this suits short texts and few candidates.

    Args:
        model: Causal language model that the head was trained on.
        head: The value head.
        ends: int64 ``[E]``, tokens that end a text.

    Returns:
        Function of ``input_ids (B, T)`` and ``candidates (B, K)`` that returns z, float ``(B, K)``; -inf for an end.
    """

    @torch.no_grad()
    def after(input_ids: Tensor, candidates: Tensor) -> Tensor:
        rows, count = candidates.shape
        texts = torch.cat([input_ids.repeat_interleave(count, 0), candidates.reshape(-1, 1)], 1)
        out = model(texts, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        z = head(out.hidden_states[-1][:, -1].float()).view(rows, count)
        return z.masked_fill(torch.isin(candidates, ends), -torch.inf)

    return after
