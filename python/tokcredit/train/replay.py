"""Rollouts joined by stored ones of the opposite outcome, and hard prompts asked again with a mistake to reflect on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.train import tasks
from tokcredit.train.explorer import SamplingContext, Explored, Replies

_RIGHT = 0.5


class Reply(NamedTuple):
    """A stored reply, on the CPU.

    Attributes:
        tokens: int64 ``[L]``.
        log_probs: float32 ``[L]``, of the distributions they were drawn from.
        reward: right if it exceeds a half.
        truncated: whether it was cut at the greatest length.
    """

    tokens: Tensor
    log_probs: Tensor
    reward: float
    truncated: bool


def _packed(replies: Sequence[Reply]) -> dict[str, Tensor]:
    nothing = torch.zeros(0)
    return {
        "lengths": torch.tensor([len(r.tokens) for r in replies], dtype=torch.int64),
        "tokens": torch.cat([nothing.long(), *(r.tokens for r in replies)]),
        "log_probs": torch.cat([nothing, *(r.log_probs for r in replies)]),
        "rewards": torch.tensor([r.reward for r in replies], dtype=torch.float64),
        "truncated": torch.tensor([r.truncated for r in replies], dtype=torch.bool),
    }


def _unpacked(packed: dict[str, Tensor]) -> list[Reply]:
    lengths = packed["lengths"].tolist()
    # Copies: a view would keep all of them in memory as long as one is stored.
    tokens, log_probs = ([x.clone() for x in packed[name].split(lengths)] for name in ("tokens", "log_probs"))
    return list(map(Reply, tokens, log_probs, packed["rewards"].tolist(), packed["truncated"].tolist()))


class Buffer:
    """The last right and the last wrong replies to each prompt, and the mean reward of all there ever were.

    Args:
        size: replies of either kind kept per prompt.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, tuple[deque[Reply], deque[Reply]]] = {}
        self._totals: dict[str, tuple[int, float]] = {}

    def add(self, prompt: str, reply: Reply) -> None:
        """Stores it in place of the oldest of its kind."""
        kinds = self._kept.setdefault(prompt, (deque(maxlen=self._size), deque(maxlen=self._size)))
        kinds[reply.reward > _RIGHT].append(reply)
        count, total = self._totals.get(prompt, (0, 0.0))
        self._totals[prompt] = (count + 1, total + reply.reward)

    def mean_reward(self, prompt: str) -> float | None:
        """Over all replies to the prompt, forgotten ones included; None where there were none."""
        count, total = self._totals.get(prompt, (0, 0.0))
        return total / count if count else None

    def draw(self, prompt: str, right: bool, count: int, generator: np.random.Generator) -> list[Reply]:
        """``count`` different ones of the replies kept, or all where there are fewer."""
        kept = self._kept[prompt][right] if prompt in self._kept else ()
        return [kept[i] for i in generator.permutation(len(kept))[:count]]

    def state_dict(self) -> dict[str, Any]:
        rows = [(prompt, r) for prompt, kinds in self._kept.items() for kind in kinds for r in kind]
        return {"totals": self._totals, "prompts": [p for p, _ in rows], **_packed([r for _, r in rows])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept, self._totals = {}, {}
        for prompt, reply in zip(state["prompts"], _unpacked(state), strict=True):
            self.add(prompt, reply)
        self._totals = dict(state["totals"])


class Replay:
    """Replies to every prompt; from the second time on, what is stored of a prompt serves it.

    A group whose fresh rows are all right is joined by stored wrong rows of its prompt, one whose fresh rows are all
    wrong by stored right ones. They carry the log-probs they were drawn with as ``rollout_log_probs``, and are marked
    ``replayed``. A prompt whose mean reward so far is low is asked once more, in a group of its own: the question, a
    stored wrong reply and a request to reflect. Those rows are not stored, since their prompt does not recur.

    Every process stores the replies of all of them, so that a prompt may change processes between epochs and one
    state serves all.

    Args:
        desk: of the run.

    Raises:
        ValueError: more are to be replayed than are remembered.
    """

    def __init__(self, context: SamplingContext) -> None:
        self._context, self._replies, self._settings = context, Replies(context), context.settings.replay
        if not 0 <= self._settings.replayed <= self._settings.remembered:
            raise ValueError(
                f"replayed: expected 0 to the {self._settings.remembered} replies remembered, "
                f"got {self._settings.replayed}"
            )
        self._buffer = Buffer(self._settings.remembered)

    def explore(self, number: int) -> Explored:
        """As in :class:`~tokcredit.train.explorer.Explorer`; ``outcomes`` and ``finished`` are of plain questions."""
        context, sampling = self._context, self._context.settings.sampling
        numbers, chosen = context.chosen(number)
        draws = [np.random.default_rng([context.settings.seed, number, n]) for n in numbers]
        again = {
            n + sampling.prompts: problem
            for n, p, draw in zip(numbers, chosen, draws, strict=True)
            for problem in self._reflections(p, draw)
        }
        explored = self._replies.answers(number, [*numbers, *again], [*chosen, *again.values()])
        plain = len(chosen) * sampling.group
        explored = explored._replace(outcomes=explored.outcomes[:plain], finished=explored.finished[:plain])
        right = (explored.outcomes > _RIGHT).view(-1, sampling.group).sum(1).tolist()
        joining = {
            i * sampling.group: self._buffer.draw(_key(p), right[i] == 0, self._settings.replayed, draw)
            for i, (p, draw) in enumerate(zip(chosen, draws, strict=True))
            if right[i] in (0, sampling.group)
        }
        for prompt, reply in context.ranks.exchange(list(_fresh(explored))):
            self._buffer.add(prompt, reply)
        return self._joined(
            explored,
            [row for row, replies in joining.items() for _ in replies],
            [reply for replies in joining.values() for reply in replies],
        )

    def attempt(self, problems: Sequence[tasks.Problem]) -> list[float]:
        return self._replies.attempt(problems)

    def state_dict(self) -> dict[str, Any]:
        return self._buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer.load_state_dict(state)

    def _reflections(self, problem: tasks.Problem, draw: np.random.Generator) -> Iterator[tasks.Problem]:
        """The problem with one of its mistakes, if it is hard."""
        mean = self._buffer.mean_reward(_key(problem))
        if mean is not None and mean < self._settings.hard:
            for reply in self._buffer.draw(_key(problem), False, 1, draw):
                parts = (problem.question, *self._texts([reply]), self._settings.reflection)
                yield problem._replace(question="\n\n".join(parts))

    def _texts(self, replies: Sequence[Reply]) -> list[str]:
        return [self._context.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in replies]

    def _joined(self, explored: Explored, rows: list[int], replies: list[Reply]) -> Explored:
        """With stored replies behind, each in the group of one of the rows."""
        batch, packed = explored.batch, _packed(replies)
        device = batch.tokens.device
        same = torch.tensor([*range(batch.num_rows), *rows], device=device)

        def extended(x: Tensor, name: str) -> Tensor:
            return torch.cat([x, packed[name].to(device, x.dtype)])

        lengths = extended(batch.end - batch.begin, "lengths")
        joined = Rollouts(
            extended(batch.tokens, "tokens"),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            group_ids=batch.group_ids[same],
            rewards=extended(batch.rewards, "rewards"),
            rollout_log_probs=extended(batch.input("rollout_log_probs"), "log_probs"),
            extras={
                "prompt_tokens": batch.extras["prompt_tokens"][same],
                "truncated": extended(batch.extras["truncated"], "truncated"),
                "replayed": torch.arange(len(same), device=device) >= batch.num_rows,
            },
        )
        problems = [*explored.problems, *(explored.problems[row] for row in rows)]
        return explored._replace(problems=problems, replies=[*explored.replies, *self._texts(replies)], batch=joined)


def _key(problem: tasks.Problem) -> str:
    return f"{problem.task}: {problem.question}"


def _fresh(explored: Explored) -> Iterator[tuple[str, Reply]]:
    """Replies to the plain questions, which come first, with the names of their prompts."""
    batch, count = explored.batch, len(explored.outcomes)
    packed = {
        "lengths": batch.end - batch.begin,
        "tokens": batch.tokens,
        "log_probs": batch.input("rollout_log_probs"),
        "rewards": batch.rewards,
        "truncated": batch.extras["truncated"],
    }
    replies = _unpacked({name: x.cpu() for name, x in packed.items()})
    return zip(map(_key, explored.problems[:count]), replies[:count], strict=True)
