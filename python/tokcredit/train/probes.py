"""Values of the states inside rollouts, by asking the policy to go on from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.stages import credit
from tokcredit.rollouts import Rollouts
from tokcredit.train.explorer import SamplingContext
from tokcredit.train.scoring import left_padded
from tokcredit.train.tasks import Problem

PROBED = frozenset({"state_values", "step_values", "answer_probs", "answer_confidences"})
_END_OF_THOUGHT = "</think>"


class Prober:
    """Asks for continuations and short answers from inside the rollouts of a step.

    Args:
        desk: asks the sampler.
        score: ``(rollouts) -> (log_probs [N], entropies [N])`` under the policy, at temperature 1.
    """

    def __init__(self, context: SamplingContext, score: Callable[[Rollouts], tuple[Tensor, Tensor]]) -> None:
        self._context, self._score, self._settings = context, score, context.settings.probes

    def probe(
        self, required_inputs: frozenset[str], batch: Rollouts, problems: Sequence[Problem], number: int
    ) -> dict[str, Tensor]:
        """Evidence ``[N]`` for the names among ``PROBED`` that are needed, NaN where no state was asked about.

        Args:
            needs: names of evidence.
            batch: the rollouts, with ``old_log_probs`` if states are chosen by them.
            problems: of each row.
            number: of the step; draws are seeded by it.
        """
        rows = _Rows(self._context, batch)
        found = {}
        with torch.random.fork_rng():
            self._context.seeded(number, 1)
            if "state_values" in required_inputs:
                cuts = credit.improbable_cuts(batch, self._settings.below, self._settings.interval)
                found["state_values"] = self._values(rows, cuts.nonzero()[:, 0].tolist(), problems)
            if "step_values" in required_inputs:
                begins = [b for b, e in rows.spans if b < e]
                begins += [t + 1 for t in rows.step_ends(self._settings.step_end) if t + 1 not in rows.ends]
                found["step_values"] = self._values(rows, sorted(begins), problems)
            if required_inputs & {"answer_probs", "answer_confidences"}:
                ends = rows.step_ends(self._settings.step_end)
                found["answer_probs"], found["answer_confidences"] = self._answers(rows, ends, problems)
        return {name: value for name, value in found.items() if name in required_inputs}

    def _values(self, rows: _Rows, tokens: list[int], problems: Sequence[Problem]) -> Tensor:
        """Mean reward of continuations from before each of these tokens; equal states are asked about once."""
        context, s = self._context, self._context.settings.sampling
        count = self._settings.continuations
        asked: dict[tuple[int, ...], list[int]] = {}
        for t in tokens:
            asked.setdefault((*rows.prompt_of(t), *rows.before(t)), []).append(t)
        made = context.complete(list(asked), count, s.temperature)
        parts = made.tokens.split(made.cu_seqlens.diff().tolist())
        out = rows.nothing()
        for i, places in enumerate(asked.values()):
            t = places[0]
            before = rows.before(t)
            # What would have been cut at the greatest length is cut here too.
            replies = [
                before + part.tolist()[: s.max_tokens - len(before)] for part in parts[i * count : (i + 1) * count]
            ]
            texts = context.tokenizer.batch_decode(replies, skip_special_tokens=True)
            reward = problems[rows.row_of(t)].reward
            out[places] = sum(map(reward, texts)) / count
        return out

    def _answers(self, rows: _Rows, ends: list[int], problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """After each of these tokens: mean probability of the true answer's tokens, and confidence in short answers."""
        context, p = self._context, self._settings
        probs, confidences = rows.nothing(), rows.nothing()
        if not ends:
            return probs, confidences
        question = context.tokenizer(p.text, add_special_tokens=False).input_ids
        states = [rows.prompt_of(t) + rows.through(t) + question for t in ends]
        truths = [context.tokenizer(problems[rows.row_of(t)].answer, add_special_tokens=False).input_ids for t in ends]
        forced = self._rollouts(states, truths)
        log_probs, _ = self._score(forced)
        probs[ends] = segment.mean(log_probs.exp(), forced.rows).to(probs.dtype)
        made = context.complete(states, p.answers, p.answer_temperature, p.answer_tokens)
        drawn = self._rollouts(
            [state for state in states for _ in range(p.answers)],
            [part.tolist() for part in made.tokens.split(made.cu_seqlens.diff().tolist())],
        )
        _, entropies = self._score(drawn)
        sure = (-segment.mean(entropies, drawn.rows)).exp().view(len(ends), p.answers).mean(1)
        confidences[ends] = sure.to(confidences.dtype)
        return probs, confidences

    def _rollouts(self, prompts: list[list[int]], rows: list[list[int]]) -> Rollouts:
        device = self._context.sampler.device
        lengths = torch.tensor([len(row) for row in rows])
        return Rollouts(
            torch.tensor([t for row in rows for t in row], dtype=torch.int64, device=device),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
            torch.zeros(len(rows), dtype=torch.int64, device=device),
            torch.zeros(len(rows), device=device),
            extras={"prompt_tokens": left_padded(prompts, -1, device)[0]},
        )


class _Rows:
    """The rows of a batch as lists: where they are, what stands before a token, where steps end."""

    def __init__(self, context: SamplingContext, batch: Rollouts) -> None:
        self._tokenizer, self._size, self._device = context.tokenizer, batch.num_tokens, batch.tokens.device
        self._tokens = batch.tokens.tolist()
        self._prompts = [row[row >= 0].tolist() for row in batch.extras["prompt_tokens"]]
        self.spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
        self.ends = {e for _, e in self.spans}
        self._row = [r for r, (b, e) in enumerate(self.spans) for _ in range(b, e)]

    def nothing(self) -> Tensor:
        return torch.full((self._size,), torch.nan, device=self._device)

    def row_of(self, token: int) -> int:
        return self._row[token]

    def prompt_of(self, token: int) -> list[int]:
        return self._prompts[self._row[token]]

    def before(self, token: int) -> list[int]:
        """Tokens of its row before this one."""
        return self._tokens[self.spans[self._row[token]][0] : token]

    def through(self, token: int) -> list[int]:
        """Tokens of its row up to and with this one."""
        return [*self.before(token), self._tokens[token]]

    def step_ends(self, mark: str) -> list[int]:
        """Tokens with which the text of a row comes to end in ``mark``, before the end of thought if there is one."""
        found = []
        for begin, end in self.spans:
            text = ""
            for t, piece in enumerate(self._tokenizer.batch_decode([[x] for x in self._tokens[begin:end]]), begin):
                text += piece
                if _END_OF_THOUGHT in text:
                    break
                if text.endswith(mark):
                    found.append(t)
        return found
