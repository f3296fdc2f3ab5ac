"""A training loop of one's own: torch and tokcredit, nothing else.

The reward is the share of a response's tokens that repeat the digit of the prompt::

    python examples/grpo.py --method tempo
    python examples/grpo.py --method tempo --ratio ctpo --clip ctpo
"""

import argparse

import tokcredit as tc
import torch
from torch import nn

DIGITS, LENGTH, GROUPS, SIZE = 10, 8, 16, 8
END = DIGITS


class Policy(nn.Module):
    """A recurrent network over digits and an end token."""

    def __init__(self, width=64):
        super().__init__()
        self.embed, self.cell = nn.Embedding(DIGITS + 1, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, DIGITS + 1)

    def forward(self, ids, state=None):
        """Return logits ``(B, T, V)`` and the state after the last token."""
        hidden, state = self.cell(self.embed(ids), state)
        return self.head(hidden), state

    @torch.no_grad()
    def sample(self, prompts):
        """Return responses ``(B, LENGTH)`` to prompts ``(B, 1)``."""
        ids, state, responses = prompts, None, []
        for _ in range(LENGTH):
            logits, state = self(ids, state)
            ids = torch.distributions.Categorical(logits=logits[:, -1]).sample()[:, None]
            responses.append(ids)
        return torch.cat(responses, 1)

    def log_probs(self, prompts, responses):
        """Return the log-probs of the responses' tokens, ``(B, LENGTH)``."""
        logits, _ = self(torch.cat([prompts, responses[:, :-1]], 1))
        return tc.log_probs.from_logits(logits, responses)


def main(method, steps, **stages):
    """Train from scratch with a published method, or with stages of several."""
    torch.manual_seed(0)
    policy, objective = Policy(), tc.mix(method, **stages)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    for step in range(steps):
        prompts = torch.randint(DIGITS, (GROUPS, 1))[groups]
        responses = policy.sample(prompts)
        mask = (responses == END).cumsum(1) - (responses == END).int() == 0  # up to the first end token
        rewards = ((responses == prompts) & mask).float().mean(1)
        with torch.no_grad():
            old = policy.log_probs(prompts, responses)
        batch = tc.Rollouts.from_padded(responses, mask, groups, rewards, old_log_probs=old)
        prepared = objective.prepare(batch, progress=step / steps)
        for _ in range(2):
            for rows in torch.randperm(len(groups)).split(32):
                out = objective.loss(prepared.select(rows), policy.log_probs(prompts[rows], responses[rows]))
                out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  reward {rewards.mean():.3f}  clipped {out.metrics['clip_high_fraction']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="tempo")
    parser.add_argument("--steps", type=int, default=100)
    for kind in ("credit", "ratio", "clip", "aggregation"):
        parser.add_argument(f"--{kind}", help=f"another method's {kind} stage, by name", default=argparse.SUPPRESS)
    main(**vars(parser.parse_args()))
