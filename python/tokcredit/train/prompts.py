"""Prompts: from the question of a problem to token ids."""

from __future__ import annotations

import re
from typing import Any

from tokcredit.settings import nearest
from tokcredit.train.problems import Message, Problem
from tokcredit.train.settings import ChatSettings

_RESPONSE = "the response of the model"


def filled(template: str, **texts: str) -> str:
    """Return a template with a text in place of each ``{name}``, in one pass, because a text may contain such a name.

    Args:
        template: The template.
        texts: Texts by name.
    """
    return re.sub("|".join(rf"\{{{name}\}}" for name in texts), lambda found: texts[found[0][1:-1]], template)


class Prompts:
    """Turns questions into token ids, in the chat template of the tokenizer if there is one.

    Args:
        tokenizer: Tokenizer of the model.
        settings: System prompt and arguments of the chat template.
        option: Name of the option that the questions come from, for errors.

    Raises:
        ValueError: There is no chat template but a setting needs one, or the template does not read an argument.

    Attributes:
        prefix: Token ids that stand before every prompt.
    """

    def __init__(self, tokenizer: Any, settings: ChatSettings | None = None, option: str = "tasks") -> None:
        self._tokenizer, self._settings, self._option = tokenizer, settings or ChatSettings(), option
        self._arguments = self._settings.arguments()
        self.prefix: list[int] = []
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
            return [*self.prefix, *self._tokenizer(problem.question).input_ids]
        return [*self.prefix, *self.templated(problem.messages or (Message("user", problem.question),))]

    def check(self, problem: Problem) -> None:
        """Raise an error if the problem is a chat that does not fit the tokenizer or the settings.

        Args:
            problem: The problem.

        Raises:
            ValueError: There is no chat template, or there are two system prompts.
        """
        if problem.messages and self._tokenizer.chat_template is None:
            asked = f"{problem.question[:100]!r}"
            raise ValueError(f"{self._option}: expected a model with a chat template for {asked}, got none")
        own = [message.content for message in problem.messages if message.role == "system"]
        if own and self._settings.system_prompt is not None:
            raise ValueError(f"system_prompt: expected none because a prompt has its own, {own[0]!r:.100}")

    def templated(self, messages: tuple[Message, ...], add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a chat, without the prefix.

        Args:
            messages: The messages.
            add_generation_prompt: Whether the beginning of a response follows them.

        Raises:
            ValueError: The chat template refuses the messages.
        """
        return list(
            self._tokenizer(self._rendered(messages, add_generation_prompt), add_special_tokens=False).input_ids
        )

    def between(self, text: str, last: int) -> list[int]:
        """Return the token ids between a response and the next one, to a text that the user says in between.

        In a chat template that is the end of the response, unless it has ended, a message of the user, and the
        beginning of a response; else it is the text on lines of its own.

        Args:
            text: What the user says.
            last: Last token of the response.
        """
        end = self._tokenizer.decode([last])
        if self._tokenizer.chat_template is None:
            text = text if end.endswith("\n") else f"\n{text}"
            return list(self._tokenizer(f"{text}\n", add_special_tokens=False).input_ids)
        chat = (Message("user", "?"), Message("assistant", _RESPONSE), Message("user", text))
        rest = self._rendered(chat, True).partition(_RESPONSE)[2]
        if last in self._tokenizer.all_special_ids:
            rest = rest.removeprefix(end)
        return list(self._tokenizer(rest, add_special_tokens=False).input_ids)

    def _rendered(self, messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        if self._settings.system_prompt is not None:
            messages = (Message("system", self._settings.system_prompt), *messages)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message._asdict() for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **self._arguments,
                )
            )
        except TemplateError as error:
            roles = [message.role for message in messages]
            expected = "expected messages that the chat template takes"
            raise ValueError(f"{self._option}: {expected}, got {roles}: {error}") from error
