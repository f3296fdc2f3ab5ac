"""``tokcredit analyze divergent``: where a small model would change a large model's response (arXiv 2505.21600)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

from tokcredit.analyze.settings import Divergent
from tokcredit.analyze.study import Pair, load_pair, opened, report, resolved
from tokcredit.analyze.verifier import Case, Verifier, imported, judge
from tokcredit.rollouts import Rollouts
from tokcredit.train.judging import Judging
from tokcredit.train.problems import Problem
from tokcredit.train.prompts import Prompts
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import left_padded, plan, predict

_CASE = pa.struct([("position", pa.int32()), ("small", pa.string()), ("large", pa.string()), ("label", pa.int8())])
_SCHEMA = pa.schema(
    [
        ("problem", pa.int64()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float32()),
        ("finished", pa.bool_()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("small_tokens", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int8())),
        ("cases", pa.list_(_CASE)),
        ("top_tokens", pa.list_(pa.list_(pa.int32()))),
        ("top_logits", pa.list_(pa.list_(pa.float32()))),
        ("hidden_states", pa.list_(pa.list_(pa.float32()))),
    ]
)
_BINS = 20


def divergent(settings: Divergent) -> dict[str, Any]:
    """Run the analysis in its folder and return its summary; see :class:`~tokcredit.analyze.settings.Divergent`.

    ``labels`` in the tables are 1 for a divergent token, 0 for an identical or a neutral one, and -1 where the verifier
    could not tell. A label, the small model's token and its logits are stored at the token that they are about: the
    small model predicts them from the tokens before it.

    Args:
        settings: Settings of the analysis.

    Raises:
        ValueError: The verifier is no function.
    """
    verify = imported(settings.verifier) if settings.verifier else None
    settings = dataclasses.replace(
        settings, study=resolved(settings.study, "divergent", settings.small, settings.large)
    )
    with opened(settings) as study:
        pair = load_pair(("small", settings.small), ("large", settings.large), settings.study.precision)
        if verify is None:
            verify = judge(str(settings.judge), pair.ends.device, pair.second.dtype, settings.batch)
        found = study.tables(Labeller(settings, pair, verify)).to_pylist()
        summary = summarize(found)
        return report(study.folder, summary, _picture(found), _printed(summary, settings))


class Labeller:
    """A function that labels the tokens of the large model's response to a problem.

    Args:
        settings: Settings of the analysis, without defaults left to fill in.
        pair: The small and the large model.
        verify: Function that compares continuations.
    """

    def __init__(self, settings: Divergent, pair: Pair, verify: Verifier) -> None:
        self._settings, self._pair, self._verify, tokenizer = settings, pair, verify, pair.tokenizer
        ids = sorted(tokenizer.get_vocab().values())
        texts = zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True)
        self._stops = {i for i, text in texts if text.rstrip(" ").endswith(settings.sentence_ends)}
        self._prompt = Prompts(tokenizer, settings.study.chat)
        self._responses = TransformersSampler(pair.second, tokenizer)
        self._sentences = TransformersSampler(pair.second, tokenizer, batch=settings.batch, stops=sorted(self._stops))

    @torch.no_grad()
    def __call__(self, number: int, problem: Problem) -> pa.Table:
        """Return the table of a problem, which has one row.

        Args:
            number: Number of the problem.
            problem: The problem.
        """
        tokenizer, top = self._pair.tokenizer, self._settings.top
        prompt = self._prompt(problem)
        made = self._responses.sample([prompt], 1, self._settings.study.max_tokens, 0.0)
        row = Rollouts(
            made.tokens,
            made.cu_seqlens,
            group_ids=torch.zeros_like(made.finished, dtype=torch.int64),
            rewards=torch.zeros_like(made.finished, dtype=torch.float32),
            extras={"prompt_tokens": left_padded([prompt], -1, made.tokens.device)[0]},
        )
        seen = predict(self._pair.first, plan(row), hidden_states=top > 0, logits=True)
        assert seen.logits is not None
        logits = seen.logits[:, : self._pair.vocabulary].float()
        response, small, finished = made.tokens.tolist(), logits.argmax(-1).tolist(), bool(made.finished)
        different = [t for t, token in enumerate(response) if small[t] != token]
        cases = self._cases(prompt, response, small, different, finished)
        labels = [0] * len(response)
        for t, label in zip(different, self._verify(cases), strict=True):
            labels[t] = label
        completion = tokenizer.decode(response, skip_special_tokens=True)
        kept = logits.topk(min(top, logits.shape[-1]), -1)
        columns = {
            "problem": number,
            "task": problem.task,
            "prompt": problem.question,
            "completion": completion,
            "reward": Judging()([problem], [completion])[0],
            "finished": finished,
            "prompt_tokens": prompt,
            "tokens": response,
            "small_tokens": small,
            "labels": labels,
            "cases": [
                {"position": t, "small": case.small, "large": case.large, "label": labels[t]}
                for t, case in zip(different, cases, strict=True)
            ],
            "top_tokens": kept.indices.tolist() if top else None,
            "top_logits": kept.values.tolist() if top else None,
            "hidden_states": seen.hidden_states.float().tolist() if seen.hidden_states is not None else None,
        }
        return pa.Table.from_pylist([columns], schema=_SCHEMA)

    def _cases(
        self, prompt: list[int], response: list[int], small: list[int], different: list[int], finished: bool
    ) -> list[Case]:
        """Return the large model's continuations of both tokens at each of these positions."""
        known = {t: self._in_response(response, t, finished) for t in different}
        asked = [[*prompt, *response[:t], small[t]] for t in different]
        asked += [[*prompt, *response[: t + 1]] for t in different if known[t] is None]
        made = iter(self._continued(asked))
        turns = [[small[t], *next(made)] for t in different]
        rests = [next(made) if (rest := known[t]) is None else rest for t in different]
        tokenizer = self._pair.tokenizer
        return [
            Case(
                tokenizer.decode([*prompt, *response[:t]], skip_special_tokens=True),
                self._marked(turn),
                self._marked([response[t], *rest]),
            )
            for t, turn, rest in zip(different, turns, rests, strict=True)
        ]

    def _in_response(self, response: list[int], t: int, finished: bool) -> list[int] | None:
        """Return the large model's continuation of its own token, or None where the response was cut before its end."""
        limit = self._limit
        rest = response[t + 1 : t + 1 + limit]
        end = next((i + 1 for i, token in enumerate(rest) if token in self._stops), None)
        if end is None and len(rest) < limit and not finished:
            return None
        return rest[:end]

    @property
    def _limit(self) -> int:
        return self._settings.continuation_tokens or self._settings.study.max_tokens

    def _continued(self, states: list[list[int]]) -> list[list[int]]:
        """Return greedy continuations up to the end of a sentence, empty after the end of a text."""
        ends = set(self._pair.ends.tolist())
        going = [state for state in states if state[-1] not in ends]
        if not going:
            return [[] for _ in states]
        made = self._sentences.sample(going, 1, self._limit, 0.0)
        rows = iter(made.tokens.split(made.cu_seqlens.diff().tolist()))
        return [[] if state[-1] in ends else next(rows).tolist() for state in states]

    def _marked(self, tokens: list[int]) -> str:
        return f"<<{self._pair.tokenizer.decode(tokens[:1])}>>{self._pair.tokenizer.decode(tokens[1:])}"


def summarize(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fractions of identical, neutral, divergent and unknown tokens.

    Args:
        found: Rows of the tables of all problems.
    """
    kinds = np.concatenate([_kinds(row) for row in found])
    return {
        "responses": len(found),
        "tokens": len(kinds),
        "accuracy": float(np.mean([row["reward"] for row in found])),
        "different": float((kinds != "identical").mean()),
        **{kind: float((kinds == kind).mean()) for kind in ("identical", *_LABELS.values())},
    }


_LABELS = {0: "neutral", 1: "divergent", -1: "unknown"}


def _kinds(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    triples = zip(row["tokens"], row["small_tokens"], row["labels"], strict=True)
    return np.array(["identical" if large == small else _LABELS[label] for large, small, label in triples])


def _printed(summary: dict[str, Any], settings: Divergent) -> Table:
    table = Table(
        *("tokens", "identical", "different", *_LABELS.values()),
        title=f"{settings.small} along {summary['responses']} responses of {settings.large}",
        title_justify="left",
    )
    shares = (f"{summary[kind]:.1%}" for kind in ("identical", "different", *_LABELS.values()))
    table.add_row(str(summary["tokens"]), *shares)
    return table


def _picture(found: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    kinds = np.concatenate([_kinds(row) for row in found])
    places = np.concatenate([np.arange(n := len(row["tokens"])) / n for row in found])
    edges = np.linspace(0, 1, _BINS + 1)
    total = np.maximum(np.histogram(places, edges)[0], 1)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(_BINS)
    for kind, color in zip(("divergent", "neutral", "unknown"), ("C3", "C0", "0.7"), strict=True):
        share = np.histogram(places[kinds == kind], edges)[0] / total
        axes.bar(edges[:-1], share, 1 / _BINS, below, align="edge", color=color, label=kind)
        below += share
    axes.set_title("fraction of tokens that the small model would change", fontsize=10)
    axes.set_xlabel("position in the response, from 0 at its beginning to 1 at its end")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
