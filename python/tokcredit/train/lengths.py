"""A head that learns, beside the policy, how many tokens are still to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokcredit.decoding import length
from tokcredit.rollouts import Rollouts
from tokcredit.train.ranks import Ranks


class LengthHead(nn.Module):
    """``z = W2 silu(W1 h + b1) + b2`` on final hidden states; the value is ``-sigmoid(z)`` (:mod:`tokcredit.length`).

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(..., d) -> (...)``."""
        return self.layers(hidden_states)[..., 0]


class LengthLearner:
    """Predicts the length values of a step's rollouts, then learns from how long they really were.

    Args:
        head: what predicts.
        gamma: of the values; that of the objective.
        ranks: the processes, which keep one head.
        lr: of AdamW.
        passes: over the rollouts of a step.
    """

    def __init__(self, head: LengthHead, gamma: float, ranks: Ranks, lr: float = 1e-3, passes: int = 4) -> None:
        self.head, self._gamma, self._ranks, self._passes = head, gamma, ranks, passes
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def values(self, batch: Rollouts) -> Tensor:
        """``-(1 - gamma^l)`` before each token, ``[N]``, from ``hidden_states``."""
        return -self.head(batch.input("hidden_states")).sigmoid()

    def learn(self, batch: Rollouts, finished: Tensor) -> float:
        """Regression on the rows that ended by themselves, bool ``[R]``; the loss before it, 0 without such rows.

        Rows cut at the greatest length do not say how long they would have been.
        """
        first = 0.0
        part = batch.select(finished)
        if not self._ranks.any(part.num_tokens > 0):
            return first
        target = length.targets(part.spans, part.num_tokens, self._gamma)
        hidden = part.input("hidden_states")
        for i in range(self._passes):
            loss = length.squared(self.head(hidden), target, part.spans)
            self._optimizer.zero_grad()
            loss.backward()
            self._ranks.average_gradients(self.head)
            self._optimizer.step()
            first = float(loss.detach()) if i == 0 else first
        return first

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])


def candidates_head(model: Any, head: LengthHead, ends: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What :class:`tokcredit.length.LengthTilt` asks: the head's output after each candidate, -inf after an end token.

    Every candidate costs a forward pass over the text so far, so this is for short texts and few candidates.

    Args:
        model: the causal language model the head was trained on.
        head: the head.
        ends: int64, the tokens that end a text.
    """

    @torch.no_grad()
    def after(input_ids: Tensor, candidates: Tensor) -> Tensor:
        rows, count = candidates.shape
        texts = torch.cat([input_ids.repeat_interleave(count, 0), candidates.reshape(-1, 1)], 1)
        out = model(texts, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        z = head(out.hidden_states[-1][:, -1].float()).view(rows, count)
        return z.masked_fill(torch.isin(candidates, ends), -torch.inf)

    return after
