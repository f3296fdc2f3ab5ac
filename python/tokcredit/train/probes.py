"""Values of states inside rollouts: the policy continues, or gives a short answer, from within a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.rollouts import Rollouts
from tokcredit.stages import credit
from tokcredit.train.problems import Problem
from tokcredit.train.rollout_collection import SamplingContext
from tokcredit.train.scoring import left_padded

_END_OF_THOUGHT = "</think>"


class Prober:
    """Samples continuations and short answers from inside the rollouts of a step.

    Args:
        context: The sampler and its settings.
        score: Function of rollouts that returns log-probs ``[N]`` and entropies ``[N]`` under the policy, at
            temperature 1.
    """

    def __init__(self, context: SamplingContext, score: Callable[[Rollouts], tuple[Tensor, Tensor]]) -> None:
        self._context, self._score, self._settings = context, score, context.settings.probes

    def probe(
        self, required_inputs: frozenset[str], batch: Rollouts, problems: Sequence[Problem], number: int
    ) -> dict[str, Tensor]:
        """Return the required inputs whose collector is ``continuations`` or ``probes``.

        Args:
            required_inputs: Names of inputs; those with other collectors are left out.
            batch: The rollouts; with ``old_log_probs`` if ``state_values`` are required.
            problems: Problem of each row.
            number: Number of the step, which seeds the sampling.

        Returns:
            float ``[N]`` by name, NaN at tokens without a value.
        """
        rows = _Rows(self._context, batch)
        values = {}
        with torch.random.fork_rng():
            self._context.seeded(number, 1)
            if "state_values" in required_inputs:
                cuts = credit.improbable_cuts(batch, self._settings.below, self._settings.interval)
                values["state_values"] = self._values(rows, cuts.nonzero()[:, 0].tolist(), problems)
            if "step_values" in required_inputs:
                begins = [b for b, e in rows.spans if b < e]
                begins += [t + 1 for t in rows.step_ends(self._settings.step_end) if t + 1 not in rows.ends]
                values["step_values"] = self._values(rows, sorted(begins), problems)
            if required_inputs & {"answer_probs", "answer_confidences"}:
                ends = rows.step_ends(self._settings.step_end)
                values["answer_probs"], values["answer_confidences"] = self._answers(rows, ends, problems)
        return {name: value for name, value in values.items() if name in required_inputs}

    def answers_of_turns(
        self, batch: Rollouts, problems: Sequence[Problem], log_probs_of: Callable[[Rollouts], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the mean log-prob of the true answer's tokens after every turn but the last, and after the prompt.

        The answer follows the text of the settings. What a turn led to, such as the reply of a tool, comes before it.

        Args:
            batch: The rollouts.
            problems: Problem of each row.
            log_probs_of: Function of rollouts that returns their log-probs, float ``[N]``.

        Returns:
            float ``[N]``, at the last token of each turn and NaN elsewhere, and float ``[R]``.
        """
        rows, turns = _Rows(self._context, batch), batch.turns
        ids = batch.trajectory_ids
        trajectory = list(range(batch.num_rows)) if ids is None else ids.tolist()
        asked: dict[tuple[tuple[int, ...], str], list[tuple[Tensor, int]]] = {}
        after, first = rows.without_values(), torch.zeros(batch.num_rows, device=batch.device)
        prompts: dict[int, list[int]] = {}
        for row, problem in enumerate(problems):
            prompt = prompts.setdefault(trajectory[row], rows.prompt(row))
            asked.setdefault((tuple(prompt), problem.answer), []).append((first, row))
        before: dict[int, int] = {}
        for row, begin, last in zip(turns.row.tolist(), turns.first.tolist(), turns.last.tolist(), strict=True):
            if trajectory[row] in before:
                state = (*rows.prompt(row), *rows.before(begin))
                asked.setdefault((state, problems[row].answer), []).append((after, before[trajectory[row]]))
            before[trajectory[row]] = last
        question = self._ids(self._settings.text)
        forced = self._forced([[*state, *question] for state, _ in asked], [answer for _, answer in asked])
        found = segment.mean(log_probs_of(forced), forced.spans)
        for places, value in zip(asked.values(), found.to(after), strict=True):
            for column, place in places:
                column[place] = value
        return after, first

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._context.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _forced(self, states: list[list[int]], answers: list[str]) -> Rollouts:
        """Return true answers as rows, each after its state."""
        return self._rollouts(states, list(map(self._ids, answers)))

    def _values(self, rows: _Rows, tokens: list[int], problems: Sequence[Problem]) -> Tensor:
        """Return the mean reward of continuations from before each of these tokens; equal states are sampled once."""
        context, s = self._context, self._context.settings.sampling
        count = self._settings.continuations
        states: dict[tuple[int, ...], list[int]] = {}
        for t in tokens:
            states.setdefault((*rows.prompt_of(t), *rows.before(t)), []).append(t)
        made = context.complete(list(states), count, s.temperature)
        parts = made.tokens.split(made.cu_seqlens.diff().tolist())
        responses: list[list[int]] = []
        for i, (t, *_) in enumerate(states.values()):
            before = rows.before(t)
            # A continuation is cut where the whole response would have reached the length limit.
            responses += (
                before + part.tolist()[: s.max_tokens - len(before)] for part in parts[i * count : (i + 1) * count]
            )
        asked = [problems[rows.row_of(places[0])] for places in states.values() for _ in range(count)]
        texts = context.tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else []
        rewards = torch.tensor(context.rewards(asked, texts), dtype=torch.float64).view(-1, count)
        out = rows.without_values()
        for places, value in zip(states.values(), rewards.nanmean(1).to(out), strict=True):
            out[places] = value
        return out

    def _answers(self, rows: _Rows, ends: list[int], problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """Return, after each of these tokens, the mean probability of the true answer's tokens, and the confidence."""
        context, p = self._context, self._settings
        probs, confidences = rows.without_values(), rows.without_values()
        if not ends:
            return probs, confidences
        question = self._ids(p.text)
        states = [rows.prompt_of(t) + rows.through(t) + question for t in ends]
        forced = self._forced(states, [problems[rows.row_of(t)].answer for t in ends])
        log_probs, _ = self._score(forced)
        probs[ends] = segment.mean(log_probs.exp(), forced.spans).to(probs.dtype)
        made = context.complete(states, p.answers, p.answer_temperature, p.answer_tokens)
        sampled = self._rollouts(
            [state for state in states for _ in range(p.answers)],
            [part.tolist() for part in made.tokens.split(made.cu_seqlens.diff().tolist())],
        )
        _, entropies = self._score(sampled)
        confidence = (-segment.mean(entropies, sampled.spans)).exp().view(len(ends), p.answers).mean(1)
        confidences[ends] = confidence.to(confidences.dtype)
        return probs, confidences

    def _rollouts(self, prompts: list[list[int]], rows: list[list[int]]) -> Rollouts:
        device = self._context.sampler.device
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return Rollouts(
            torch.tensor([t for row in rows for t in row], dtype=torch.int64, device=device),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
            torch.zeros(len(rows), dtype=torch.int64, device=device),
            torch.zeros(len(rows), device=device),
            extras={"prompt_tokens": left_padded(prompts, -1, device)[0]},
        )


class _Rows:
    """The rows of a batch as lists: where they are, what precedes a token, where steps end."""

    def __init__(self, context: SamplingContext, batch: Rollouts) -> None:
        self._tokenizer, self._size, self._device = context.tokenizer, batch.num_tokens, batch.device
        self._tokens = batch.tokens.tolist()
        self._prompts = [row[row >= 0].tolist() for row in batch.input("prompt_tokens")]
        self.spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
        self.ends = {e for _, e in self.spans}
        self._row = [r for r, (b, e) in enumerate(self.spans) for _ in range(b, e)]

    def without_values(self) -> Tensor:
        return torch.full((self._size,), torch.nan, device=self._device)

    def row_of(self, token: int) -> int:
        return self._row[token]

    def prompt(self, row: int) -> list[int]:
        return self._prompts[row]

    def prompt_of(self, token: int) -> list[int]:
        return self._prompts[self._row[token]]

    def before(self, token: int) -> list[int]:
        """Return the tokens of the same row before this one."""
        return self._tokens[self.spans[self._row[token]][0] : token]

    def through(self, token: int) -> list[int]:
        """Return the tokens of the same row up to this one, which is included."""
        return [*self.before(token), self._tokens[token]]

    def step_ends(self, mark: str) -> list[int]:
        """Return the tokens after which the text of a row ends in ``mark``, up to the end of thought."""
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
