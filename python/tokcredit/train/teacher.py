"""The teacher of a distilling run: which weights it has, and what its prompt says that the student's does not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit.expression import parse
from tokcredit.rollouts import Rollouts
from tokcredit.train import collectors, imported, teacher_scores
from tokcredit.train.policy import beside
from tokcredit.train.problems import Problem
from tokcredit.train.prompts import filled
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import PrivilegedSettings, Settings
from tokcredit.train.teacher_scores import TeacherScores

# Where the prompt ends with <think>, the thoughts begin with the response.
_THOUGHT = re.compile(r"\A((?!<think>).)*?</think>\s*|<think>.*?(</think>|\Z)\s*", re.S)


class Teacher:
    """A model that a policy imitates.

    Args:
        model: Causal language model, or the policy itself.
        rate: Share by which its weights move to those of the policy after every optimizer step; 0 leaves them.

    Attributes:
        model: The model, or None once an engine has its weights.
        longest: Largest number of tokens of prompt and response, or None for no limit.
    """

    def __init__(self, model: Any, rate: float = 0.0) -> None:
        self.model, self._rate = model, rate
        self.longest: int | None = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def follow(self, policy: Any) -> None:
        """Move the weights towards those of the policy.

        Args:
            policy: The policy after an optimizer step.
        """
        if self._rate:
            for mine, other in zip(self.model.parameters(), policy.parameters(), strict=True):
                mine.lerp_(other.to(mine.dtype), self._rate)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the weights if they move, for a checkpoint."""
        return dict(self.model.state_dict()) if self._rate else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take the weights of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        if state is not None:
            self.model.load_state_dict(state)


def rate_of(text: str) -> float | None:
    """Return the rate of a teacher that averages the policy's weights, or None if the text says another teacher.

    Args:
        text: The setting ``teacher``.

    Raises:
        ValueError: The rate is not above 0 and at most 1.
    """
    if not re.match(r"\s*ema\s*\(", text):
        return None
    call = parse(text, "teacher")
    given = [*call.positional, *call.named.values()]
    rate = given[0] if len(given) == 1 else None
    if not isinstance(rate, float | int) or isinstance(rate, bool) or not 0 < rate <= 1 or set(call.named) - {"rate"}:
        raise ValueError(f"teacher: expected ema(rate) with a rate above 0 and at most 1, got {text}")
    return float(rate)


def made(settings: Settings, policy: Any, tokenizer: Any) -> Teacher | None:
    """Return the teacher that the setting ``teacher`` says, or None without it.

    Args:
        settings: Settings of the run.
        policy: The policy before the first step, on its device.
        tokenizer: Tokenizer of the policy.

    Raises:
        ValueError: The teacher has other tokens.
    """
    text = settings.teacher
    if text is None:
        return None
    if text == "live":
        return Teacher(policy)
    rate = rate_of(text)
    if rate is not None or text == "initial":
        return Teacher(copy.deepcopy(policy), rate or 0.0)
    return Teacher(beside("teacher", text, settings, policy, tokenizer))


def moves(text: str) -> bool:
    """Return whether the weights of a teacher are others after a step.

    Args:
        text: The setting ``teacher``.
    """
    return text == "live" or rate_of(text) is not None


def scores(
    settings: Settings, objective: Any, teacher: Teacher | None, policy: Any, tokenizer: Any, accelerator: Accelerator
) -> TeacherScores | None:
    """Return the scores of the teacher that are kept, or None if its weights move or the objective reads none.

    With an engine the model of the teacher is let go.

    Args:
        settings: Settings of the run.
        objective: The objective.
        teacher: From :func:`made`.
        policy: The policy.
        tokenizer: Tokenizer of the policy.
        accelerator: Devices and precision.

    Raises:
        ValueError: The engine would have to give log-probs of all tokens.
    """
    names, top_k = teacher_scores.wanted(objective)
    if teacher is None or settings.teacher is None or moves(settings.teacher):
        return None
    engine, model, temperature = settings.teacher_engine, teacher.model, settings.sampling.temperature
    if top_k >= (ids := min(map(collectors.vocabulary, (policy, model)))):
        if engine == "vllm":
            raise ValueError(f"token_loss: expected a top_k below {ids}, the tokens of the teacher, got {top_k}")
        names, top_k = names - set(teacher_scores.TOP), 0
    if not names:
        return None
    precision, size = settings.optimizer.precision, settings.optimizer.micro_batch
    identity = (settings.teacher, teacher_scores.fingerprint(model), engine, precision, temperature, top_k)
    compute: Callable[[Rollouts], Rollouts]
    if engine == "vllm":
        from tokcredit.adapters.vllm import VllmTeacher

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        compute = VllmTeacher.of(model, tokenizer, dtype, top_k, collectors.vocabulary(policy))
        # The engine generates a token after every text.
        teacher.model, teacher.longest = None, teacher.longest and teacher.longest - 1
    else:

        def compute(rows: Rollouts) -> Rollouts:
            with accelerator.autocast():
                return collectors.collect(names, rows, size, policy, None, model, temperature, top_k=top_k)

    return TeacherScores(names, compute, str(identity), settings.output or Path())


def feedback(path: str) -> Callable[..., Any]:
    """Return the function of the user that gives feedback on a response.

    Args:
        path: The setting ``feedback``.

    Raises:
        ValueError: There is no such function, or it takes other arguments.
    """
    return imported.function(path, "feedback", ("prompt", "response", "answer"))


class PrivilegedPrompts:
    """Tells a teacher more than the student: the answer, a successful attempt of the group, or feedback.

    Args:
        settings: What it is told, and in which words.
        prompt: Token ids of a problem up to where the response begins.
        longest: Largest number of tokens of prompt and response that the teacher can read, or None for no limit.
    """

    def __init__(
        self, settings: PrivilegedSettings, prompt: Callable[[Problem], list[int]], longest: int | None
    ) -> None:
        self._settings, self._prompt, self._longest = settings, prompt, longest
        self._feedback = None if settings.feedback is None else feedback(settings.feedback)

    def __call__(self, batch: Rollouts, problems: Sequence[Problem], responses: Sequence[str]) -> Rollouts:
        """Return the batch with ``teacher_mask``, and with ``teacher_prompt_tokens`` if the teacher is told anything.

        A row whose teacher cannot be told anything keeps its own prompt and is False in ``teacher_mask``. So is one
        that would be too long for the teacher: a response is never cut.

        Args:
            batch: The rows, with ``prompt_tokens``.
            problems: Problem of each row.
            responses: Text of each row.
        """
        if self._settings.privileged == "nothing":
            return batch.with_inputs(teacher_mask=torch.ones_like(batch.group_ids, dtype=torch.bool))
        told = [self._told(row, batch, problems, responses) for row in range(batch.num_rows)]
        own = [[t for t in row if t >= 0] for row in batch.input("prompt_tokens").tolist()]
        lengths, prompts, mask = (batch.end - batch.begin).tolist(), [], []
        for row, text in enumerate(told):
            tokens = own[row] if text is None else self._prompt(text)
            fits = self._longest is None or len(tokens) + lengths[row] <= self._longest
            prompts.append(tokens if fits else own[row])
            mask.append(text is not None and fits)
        padded = left_padded(prompts, -1, batch.device)[0]
        told_rows = torch.tensor(mask, dtype=torch.bool, device=batch.device)
        return batch.with_inputs(teacher_prompt_tokens=padded, teacher_mask=told_rows)

    def _told(self, row: int, batch: Rollouts, problems: Sequence[Problem], responses: Sequence[str]) -> Problem | None:
        """Return the problem as the teacher of a row sees it, or None if there is nothing to tell."""
        problem, s = problems[row], self._settings
        if s.privileged == "answer":
            return _asked(problem, s.privileged_template, problem.answer) if problem.answer else None
        if text := self._attempt(row, batch, responses):
            return _asked(problem, s.privileged_template, text)
        if self._feedback is None:
            return None
        text = self._feedback(problem.question, responses[row], problem.answer)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"feedback: expected a text or None, got {type(text).__name__}")
        return _asked(problem, s.feedback_template, text) if text else None

    def _attempt(self, row: int, batch: Rollouts, responses: Sequence[str]) -> str | None:
        """Return the first other response of the group that succeeded, without its thoughts, or None."""
        same: Tensor = (batch.group_ids == batch.group_ids[row]) & (batch.rewards >= self._settings.success_reward)
        others = (_THOUGHT.sub("", responses[other]) for other in same.nonzero()[:, 0].tolist() if other != row)
        return next((text for text in others if text), None)


def _asked(problem: Problem, template: str, told: str) -> Problem:
    """Return the problem with the question that the teacher sees."""

    def words(question: str) -> str:
        return filled(template, question=question, told=told)

    *before, last = problem.messages or (None,)
    messages = () if last is None else (*before, last._replace(content=words(last.content)))
    return problem._replace(question=words(problem.question), messages=messages)
