"""``tokcredit analyze attribute``: which tokens of a prompt mattered for a response or a class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from tokcredit import attribution
from tokcredit.analyze.settings import Attribute, ScoreSettings
from tokcredit.files import write
from tokcredit.train import models, records
from tokcredit.train.prompts import Prompts
from tokcredit.train.ranks import processes

_LISTED = 10


class Scores(NamedTuple):
    """Scores of the tokens of a prompt.

    Attributes:
        rows: float ``[T, n]``: one row for each token of the response, or one row for an encoder.
        response: Token ids of the response; empty for an encoder.
        output: Class whose logit is explained; None but for ``decompx``.
    """

    rows: Tensor
    response: list[int]
    output: int | None

    @property
    def importance(self) -> Tensor:
        """Mean of the absolute scores over the response, float ``[n]``."""
        return self.rows.abs().mean(0)


class Scorer:
    """A model, its tokenizer, and how tokens are scored.

    Args:
        model: Name of the model.
        settings: Method.

    Raises:
        ValueError: There is no such model, or it has no scores of this method.

    Attributes:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, model: str, settings: ScoreSettings) -> None:
        disable_progress_bar()
        self._name, self._settings = model, settings
        self._encoder = settings.method in ("globenc", "decompx")
        self._model, self.tokenizer = _encoder(model, settings.method) if self._encoder else models.load(model)
        self._device = processes().device
        self._model.to(self._device)
        special = set(self.tokenizer.all_special_ids)
        self._sample = attribution.uniform([i for i in range(len(self.tokenizer)) if i not in special])
        self._generator = torch.Generator(self._device).manual_seed(settings.seed)

    def __call__(self, prompt: list[int], response: list[int] | None = None) -> Scores:
        """Return the scores of a prompt.

        Args:
            prompt: Token ids, at least one.
            response: Token ids of the response, or None for what the model writes.

        Raises:
            ValueError: The prompt or the response has no token, there is no such class, or a score is not finite.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        ids = torch.tensor(prompt, device=self._device)
        scores = self._of_encoder(ids) if self._encoder else self._of_causal(ids, response)
        if not bool(scores.rows.isfinite().all()):
            raise ValueError(f"model: expected finite scores of the prompt, got others from {self._name}")
        return scores._replace(rows=scores.rows.cpu())

    def _of_encoder(self, ids: Tensor) -> Scores:
        score = attribution.globenc if self._settings.method == "globenc" else attribution.decompx
        try:
            parts = score(self._model, ids[None])[0]
        except TypeError as error:  # the model is of another family
            raise ValueError(str(error)) from error
        if parts.dim() == 1:
            return Scores(parts[None], [], None)
        output = int(parts.sum(0).argmax()) if self._settings.output_class is None else self._settings.output_class
        if output >= parts.shape[1]:
            raise ValueError(f"output_class: expected a number below {parts.shape[1]}, got {output}")
        return Scores(parts[:, output][None], [], output)

    def _of_causal(self, ids: Tensor, response: list[int] | None) -> Scores:
        if response is None:
            response = self._written(ids)
        if not response:
            raise ValueError("response: expected at least one token, got none")
        rows = []
        for place, target in enumerate(response):
            before = torch.cat([ids, ids.new_tensor(response[:place])])
            rows.append(self._of_token(before, target)[: len(ids)])
        return Scores(torch.stack(rows), response, None)

    def _of_token(self, ids: Tensor, target: int) -> Tensor:
        if self._settings.method == "gradient":
            return attribution.gradient_times_input(self._model, ids, target, log_prob=True)
        s = self._settings.reagent
        found = attribution.reagent(
            *(self._model, ids, target, self._sample, s.ratio, s.keep, s.tolerance, s.max_steps, s.runs),
            self._generator,
        )
        return found.mean

    def _written(self, ids: Tensor) -> list[int]:
        """Return the likeliest response of the model, with its end token."""
        written = self._model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=self._settings.max_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        found: list[int] = written[0, len(ids) :].tolist()
        return found


def _encoder(name: str, method: str) -> tuple[Any, Any]:
    loader = AutoModelForSequenceClassification if method == "decompx" else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, read = loader.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        expected = "a folder or a name on the hub of an encoder"
        raise ValueError(f"model: expected {expected} for {method}, got {name!r}: {reason}") from error
    if method == "decompx" and read["missing_keys"]:
        missing = ", ".join(sorted(read["missing_keys"]))
        raise ValueError(f"model: expected a sequence classifier, got {name!r} without {missing}")
    return model.eval(), tokenizer


def lines(path: Path, setting: str) -> Iterator[tuple[str, str | None]]:
    """Yield the prompt and the response, or None, of each line of a JSONL file.

    Args:
        path: File of lines ``{"prompt": text}`` or ``{"prompt": text, "response": text}``.
        setting: Name of the setting that chose it, for errors.

    Raises:
        ValueError: The file cannot be read, has no line, or a line has another form.
    """
    found = list(records.of_file(setting, str(path), ("prompt",)))
    if not found:
        raise ValueError(f"{setting}: expected at least one line, got none in {path}")
    for record in found:
        prompt, response = record.values["prompt"], record.values.get("response")
        if not isinstance(prompt, str) or not (response is None or isinstance(response, str)):
            raise record.expected(setting, 'a text as "prompt", and as "response" a text or none', record.text)
        yield prompt, response


def attribute(settings: Attribute) -> dict[str, Any]:
    """Print which tokens mattered, write the scores, and return the first record; see :class:`Attribute`.

    Args:
        settings: Settings of the analysis.

    Raises:
        ValueError: A model, prompt or setting is not as expected.
    """
    if settings.prompts is None:
        asked = [(settings.prompt or "", settings.response)]
    else:
        asked = list(lines(settings.prompts, "prompts"))
    scorer = Scorer(settings.model, settings.score)
    records = [record(scorer, settings, *texts) for texts in asked]
    for each in records:
        _show(each)
    if settings.output is not None:
        write(settings.output, "".join(json.dumps(x, ensure_ascii=False, allow_nan=False) + "\n" for x in records))
        Console().print(f"{settings.output}", highlight=False)
    return records[0]


def record(scorer: Scorer, settings: Attribute, prompt: str, response: str | None) -> dict[str, Any]:
    """Return what is known of one prompt, in the form in which it is written.

    Args:
        scorer: The model.
        settings: Settings of the analysis.
        prompt: Text of the prompt.
        response: Text of the response, or None for what the model writes.
    """
    tokenizer = scorer.tokenizer
    if settings.score.method in ("globenc", "decompx"):
        ids = tokenizer(prompt).input_ids
    else:
        ids = Prompts(tokenizer, settings.chat, "prompt")(prompt)
    own = None if response is None else tokenizer(response, add_special_tokens=False).input_ids
    found = scorer(ids, own)
    return {
        "model": settings.model,
        "method": settings.score.method,
        "prompt": prompt,
        "prompt_tokens": ids,
        "prompt_texts": [tokenizer.decode([i]) for i in ids],
        "response_tokens": found.response,
        "response_texts": [tokenizer.decode([i]) for i in found.response],
        "class": found.output,
        "scores": found.rows.tolist(),
        "importance": found.importance.tolist(),
    }


def _show(found: dict[str, Any]) -> None:
    importance, texts = found["importance"], found["prompt_texts"]
    largest = max(importance) or 1.0
    colored = Text()
    for text, x in zip(texts, importance, strict=True):
        faint = round(255 * (1 - x / largest))
        colored.append(text, f"black on rgb(255,{faint},{faint})")
    console = Console()
    console.print(colored)
    if found["response_texts"]:
        console.print(Text("".join(found["response_texts"]), "dim"))
    table = Table("position", "token", "importance", "share", box=None, padding=(0, 2, 0, 0), header_style="dim")
    total = sum(importance) or 1.0
    for i in sorted(range(len(texts)), key=lambda i: -importance[i])[:_LISTED]:
        table.add_row(str(i), Text(repr(texts[i])), f"{importance[i]:.4g}", f"{importance[i] / total:.1%}")
    console.print(table)
