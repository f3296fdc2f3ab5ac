"""Rollout collection with replay: stored responses join groups without contrast, and hard prompts are asked again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokcredit.rollouts import Rollouts
from tokcredit.train.problems import Problem
from tokcredit.train.rollout_collection import RolloutCollection, SamplingContext, SingleTurn

_RIGHT = 0.5


class StoredResponse(NamedTuple):
    """A stored response, on the CPU.

    Attributes:
        tokens: int64 ``[L]``.
        log_probs: float32 ``[L]``, log-probs of the distributions that the tokens were sampled from.
        reward: Reward; the response is right if it exceeds one half.
        truncated: Whether the response was cut at the length limit.
    """

    tokens: Tensor
    log_probs: Tensor
    reward: float
    truncated: bool


def _packed(responses: Sequence[StoredResponse]) -> dict[str, Tensor]:
    nothing = torch.zeros(0)
    return {
        "lengths": torch.tensor([len(r.tokens) for r in responses], dtype=torch.int64),
        "tokens": torch.cat([nothing.long(), *(r.tokens for r in responses)]),
        "log_probs": torch.cat([nothing, *(r.log_probs for r in responses)]),
        "rewards": torch.tensor([r.reward for r in responses], dtype=torch.float64),
        "truncated": torch.tensor([r.truncated for r in responses], dtype=torch.bool),
    }


def _unpacked(packed: dict[str, Tensor]) -> list[StoredResponse]:
    lengths = packed["lengths"].tolist()
    # Copies, because a view would keep the whole batch in memory as long as one response is stored.
    tokens, log_probs = ([x.clone() for x in packed[name].split(lengths)] for name in ("tokens", "log_probs"))
    return list(map(StoredResponse, tokens, log_probs, packed["rewards"].tolist(), packed["truncated"].tolist()))


class Buffer:
    """The last right and the last wrong responses to each prompt, and the mean reward of all responses to it.

    Args:
        size: Number of right and of wrong responses kept per prompt.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, tuple[deque[StoredResponse], deque[StoredResponse]]] = {}
        self._totals: dict[str, tuple[int, float]] = {}

    def add(self, prompt: str, response: StoredResponse) -> None:
        """Store a response in place of the oldest of its kind.

        Args:
            prompt: Name of the prompt.
            response: The response.
        """
        kinds = self._kept.setdefault(prompt, (deque(maxlen=self._size), deque(maxlen=self._size)))
        kinds[response.reward > _RIGHT].append(response)
        count, total = self._totals.get(prompt, (0, 0.0))
        self._totals[prompt] = (count + 1, total + response.reward)

    def mean_reward(self, prompt: str) -> float | None:
        """Return the mean reward of all responses to a prompt, those no longer kept included, or None without any.

        Args:
            prompt: Name of the prompt.
        """
        count, total = self._totals.get(prompt, (0, 0.0))
        return total / count if count else None

    def draw(self, prompt: str, right: bool, count: int, generator: np.random.Generator) -> list[StoredResponse]:
        """Return different responses to a prompt, drawn at random; all of them if there are fewer.

        Args:
            prompt: Name of the prompt.
            right: Whether right or wrong responses are drawn.
            count: Number of responses.
            generator: Source of randomness.
        """
        kept = self._kept[prompt][right] if prompt in self._kept else ()
        return [kept[i] for i in generator.permutation(len(kept))[:count]]

    def state_dict(self) -> dict[str, Any]:
        """Return the kept responses and the totals, for a checkpoint."""
        rows = [(prompt, r) for prompt, kinds in self._kept.items() for kind in kinds for r in kind]
        return {"totals": self._totals, "prompts": [p for p, _ in rows], **_packed([r for _, r in rows])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self._kept, self._totals = {}, {}
        for prompt, response in zip(state["prompts"], _unpacked(state), strict=True):
            self.add(prompt, response)
        self._totals = dict(state["totals"])


class Replay(SingleTurn):
    """Collects responses to every prompt, and uses stored responses from the second time a prompt is asked.

    A group whose new rows are all right is joined by stored wrong rows of its prompt; one whose new rows are all wrong,
    by stored right ones. Stored rows are True in ``replayed``, and have the log-probs they were sampled with as
    ``rollout_log_probs``. A prompt whose mean reward so far is low is asked once more, in a group of its own: the
    question, a stored wrong response and a request to reflect. Those rows are not stored, because their prompt does not
    recur.

    Every process stores the responses of all processes, so a prompt may be asked by another process in the next epoch,
    and one state serves all.

    Args:
        context: Problems and sampler.
    """

    def __init__(self, context: SamplingContext) -> None:
        super().__init__(context)
        self._settings = context.settings.replay
        self._buffer = Buffer(self._settings.remembered)

    def collect(self, number: int) -> RolloutCollection:
        """Return the rewarded rollouts of a step. Outcomes are those of the new responses to the plain questions.

        Args:
            number: Number of the step, from 1.
        """
        made = super().collect(number)
        for prompt, response in self._context.ranks.exchange(list(_new_responses(made))):
            self._buffer.add(prompt, response)
        return made

    def _collect(self, number: int) -> RolloutCollection:
        context, sampling = self._context, self._context.settings.sampling
        groups, chosen = context.chosen(number)
        generators = [np.random.default_rng([context.settings.seed, number, n]) for n in groups]
        again = {
            n + sampling.prompts: problem
            for n, p, generator in zip(groups, chosen, generators, strict=True)
            for problem in self._reflections(p, generator)
        }
        made = self._responses(number, [*groups, *again], [*chosen, *again.values()])
        plain = len(chosen) * sampling.group
        made = made._replace(
            outcomes=made.outcomes[:plain],
            outcome_groups=made.outcome_groups[:plain],
            finished=made.finished[:plain],
        )
        right, judged = (
            x.view(-1, sampling.group).sum(1).tolist() for x in (made.outcomes > _RIGHT, ~made.outcomes.isnan())
        )
        joining = {
            i * sampling.group: self._buffer.draw(_key(p), right[i] == 0, self._settings.replayed, generator)
            for i, (p, generator) in enumerate(zip(chosen, generators, strict=True))
            if judged[i] and right[i] in (0, judged[i])
        }
        return self._joined(
            made,
            [row for row, responses in joining.items() for _ in responses],
            [response for responses in joining.values() for response in responses],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the stored responses, for a checkpoint."""
        return self._buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the stored responses of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        self._buffer.load_state_dict(state)

    def _reflections(self, problem: Problem, generator: np.random.Generator) -> Iterator[Problem]:
        """Yield the problem with a wrong response to it, if it is hard."""
        mean = self._buffer.mean_reward(_key(problem))
        if mean is not None and mean < self._settings.hard:
            for response in self._buffer.draw(_key(problem), False, 1, generator):
                yield problem.again(self._texts([response])[0], self._settings.reflection)

    def _texts(self, responses: Sequence[StoredResponse]) -> list[str]:
        return [self._context.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in responses]

    def _joined(self, made: RolloutCollection, rows: list[int], responses: list[StoredResponse]) -> RolloutCollection:
        """Return the rollouts followed by stored responses, each in the group of one of the rows."""
        batch, packed = made.batch, _packed(responses)
        device = batch.device
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
                "prompt_tokens": batch.input("prompt_tokens")[same],
                "truncated": extended(batch.input("truncated"), "truncated"),
                "replayed": torch.arange(len(same), device=device) >= batch.num_rows,
            },
        )
        return made._replace(
            problems=[*made.problems, *(made.problems[row] for row in rows)],
            responses=[*made.responses, *self._texts(responses)],
            batch=joined,
            dropped=torch.cat([made.dropped, made.dropped.new_zeros(len(rows))]),
        )


def _key(problem: Problem) -> str:
    return f"{problem.task}: {problem.question}"


def _new_responses(made: RolloutCollection) -> Iterator[tuple[str, StoredResponse]]:
    """Return the responses to the plain questions that have a reward, with the names of their prompts."""
    batch, count = made.batch, len(made.outcomes)
    packed = {
        "lengths": batch.end - batch.begin,
        "tokens": batch.tokens,
        "log_probs": batch.input("rollout_log_probs"),
        "rewards": batch.rewards,
        "truncated": batch.input("truncated"),
    }
    responses = _unpacked({name: x.cpu() for name, x in packed.items()})
    # The plain questions come first.
    rows = zip(made.problems[:count], responses[:count], made.dropped.tolist()[:count], strict=True)
    return ((_key(problem), response) for problem, response, dropped in rows if not dropped)
