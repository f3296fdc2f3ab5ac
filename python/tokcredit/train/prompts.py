"""Prompts: from the question of a problem to token ids."""

from __future__ import annotations

import re
from typing import Any

from tokcredit.settings import nearest
from tokcredit.train.problems import Message, Problem
from tokcredit.train.settings import ChatSettings


class Prompts:
    """Turns questions into token ids, in the chat template of the tokenizer if there is one.

    Args:
        tokenizer: Tokenizer of the model.
        settings: System prompt and arguments of the chat template.

    Raises:
        ValueError: There is no chat template but a setting needs one, or the template does not read an argument.
    """

    def __init__(self, tokenizer: Any, settings: ChatSettings | None = None) -> None:
        self._tokenizer, self._settings = tokenizer, settings or ChatSettings()
        self._arguments = self._settings.arguments()
        template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else None
        if template is None and self._settings != ChatSettings():
            raise ValueError("system_prompt, chat_template_args: expected a model with a chat template, got none")
        if unread := [name for name in self._arguments if not re.search(rf"\b{name}\b", template or "")]:
            raise ValueError(f"chat_template_args: expected names that the template reads, got {', '.join(unread)}")
        for name, value in self._arguments.items():
            known = re.findall(rf"\b{name}\b\s*[!=]=\s*['\"]([^'\"]+)['\"]", template or "")
            if value not in known and (hint := nearest(value, known)):
                expected = f"a value that the template compares, such as {', '.join(known)}"
                raise ValueError(f"chat_template_args: {name}: expected {expected}, got {value!r}{hint}")

    def __call__(self, problem: Problem | str) -> list[int]:
        """Return the token ids of a question up to where the response begins.

        Args:
            problem: A problem, or the text of a question.

        Raises:
            ValueError: The problem is a chat and there is no chat template, or the chat template refuses it.
        """
        if isinstance(problem, str):
            problem = Problem("", problem, "", float)
        self.check(problem)
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(problem.question).input_ids)
        return self._templated(problem.messages or (Message("user", problem.question),))

    def check(self, problem: Problem) -> None:
        """Raise an error if the problem is a chat that does not fit the tokenizer or the settings.

        Args:
            problem: The problem.

        Raises:
            ValueError: There is no chat template, or there are two system prompts.
        """
        if problem.messages and self._tokenizer.chat_template is None:
            raise ValueError(f"tasks: expected a model with a chat template for {problem.question[:100]!r}, got none")
        own = [message.content for message in problem.messages if message.role == "system"]
        if own and self._settings.system_prompt is not None:
            raise ValueError(f"system_prompt: expected none because a prompt has its own, {own[0]!r:.100}")

    def _templated(self, messages: tuple[Message, ...]) -> list[int]:
        from jinja2 import TemplateError

        if self._settings.system_prompt is not None:
            messages = (Message("system", self._settings.system_prompt), *messages)
        try:
            text = self._tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                add_generation_prompt=True,
                tokenize=False,
                **self._arguments,
            )
        except TemplateError as error:
            roles = [message.role for message in messages]
            raise ValueError(f"tasks: expected messages that the chat template takes, got {roles}: {error}") from error
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
