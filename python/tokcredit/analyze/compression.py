"""``tokcredit compress``: shorter prompts of the words that mattered (FrugalPrompt, arXiv 2510.16439)."""

from __future__ import annotations

import json
import re
from bisect import bisect_right

import torch

from tokcredit import Spans, select
from tokcredit.analyze.attribute import Scorer, lines
from tokcredit.analyze.settings import CompressSettings
from tokcredit.files import write


def compress(settings: CompressSettings) -> dict[str, int]:
    """Write the compressed prompts as JSONL and return the number of ``prompts``, their ``words``, and ``words_kept``.

    Args:
        settings: Where prompts are read from, and how they are shortened.

    Raises:
        ValueError: A model, prompt or setting is not as expected.
    """
    asked = list(lines(settings.path, "path"))
    scorer = Scorer(settings.model, settings.score)
    if not scorer.tokenizer.is_fast:
        raise ValueError("model: expected a model with a fast tokenizer, which tells where tokens are in a text")
    written, total, kept = [], 0, 0
    for prompt, response in asked:
        words = [match.group() for match in re.finditer(r"\S+", prompt)]
        chosen = shortened(scorer, settings, prompt, response)
        total, kept = total + len(words), kept + len(chosen)
        line = {"prompt": " ".join(words[w] for w in chosen), "original": prompt, "words": chosen}
        written.append(line if response is None else {**line, "response": response})
    write(settings.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
    return {"prompts": len(asked), "words": total, "words_kept": kept}


def shortened(scorer: Scorer, settings: CompressSettings, prompt: str, response: str | None) -> list[int]:
    """Return the numbers of the words that are kept, ascending.

    Args:
        scorer: Scores tokens.
        settings: How many words are kept.
        prompt: Text of the prompt. Its words are what white space separates.
        response: Text of the response, or None for what the model writes.
    """
    tokenizer = scorer.tokenizer
    spans = [match.span() for match in re.finditer(r"\S+", prompt)]
    if not spans:
        return []
    read = tokenizer(prompt, return_offsets_mapping=True)
    own = None if response is None else tokenizer(response, add_special_tokens=False).input_ids
    score = scorer(read.input_ids, own).importance
    ends = [end for _, end in spans]
    # A token that begins with a space belongs to the word after it; special tokens have no text.
    begins = [end - len(prompt[begin:end].lstrip()) for begin, end in read.offset_mapping]
    word = [
        bisect_right(ends, begin) if begin < end else -1
        for begin, (_, end) in zip(begins, read.offset_mapping, strict=True)
    ]
    # An element of score 0 stands for each word, so that one without tokens competes too.
    of_words, count = torch.arange(len(spans)), len(spans)
    protected = torch.tensor([prompt[b:e] in settings.protect for b, e in spans] + [False] * len(word))
    sentences = torch.tensor(_sentences(prompt, spans) + [0] * len(word))
    kept = select.top_share(
        torch.cat([score.new_zeros(count), score]),
        select.Share(settings.share, "nearest"),
        Spans.single(count + len(word)),
        words=torch.cat([of_words, torch.tensor(word)]),
        protected=protected,
        segments=sentences if settings.by_sentence else None,
    )
    return of_words[kept[:count]].tolist()


def _sentences(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Return the number of the sentence of each word; a sentence ends with a word that ends with . ! or ?."""
    numbers, number = [], 0
    for begin, end in spans:
        numbers.append(number)
        number += text[begin:end].rstrip("\"')]").endswith((".", "!", "?"))
    return numbers
