"""What the analyses can be told; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class StudySettings:
    """What two models are asked, and where the findings go."""

    tasks: tuple[str, ...] = ()
    """Tasks, as in training; the recipe of one of the models by default."""
    reward: str | None = None
    """Another reward, as in training."""
    held_out: float = 0.2
    """Share of the problems kept from training; those are asked, so it must be the training's."""
    problems: int = 32
    """Held-out problems asked at most."""
    max_tokens: int = 0
    """Tokens of a reply at most; 0: the recipe."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """The dtype of both models; auto: the recipe."""
    seed: int = 0
    """Of the data and the sampling."""
    output: Path | None = None
    """Folder of the findings; runs/ANALYSIS-MODEL-MODEL by default."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the analysis in this folder with the problems it lacks."""


@dataclass(frozen=True)
class Shift:
    """Where a tuned model departs from its base, and how much of the difference in accuracy lies there.

    Along replies of the tuned model: the Jensen-Shannon divergence between both next-token distributions at every
    token. Then replies in which one model takes over from the other wherever they diverge by more than a threshold.
    """

    base: str
    """Model before training: "smollm2", "tiny", a folder or a hub name."""
    tuned: str
    """Model after training, with the same tokens; as base."""
    study: StudySettings = field(default_factory=StudySettings)
    rollouts: int = 4
    """Replies per problem, of each model and under each rule."""
    temperature: float = 1.0
    """Of both models; 0: each takes its likeliest token."""
    top_p: float = 0.7
    """Share of probability that each distribution keeps."""
    threshold: float = 0.1
    """Divergence in nats above which a token counts as shifted."""
    thresholds: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Divergences above which the other model takes over, each a point of the accuracy curve; at most ln 2 matters."""
    caps: tuple[int, ...] = ()
    """At most so many changed tokens per reply, at the threshold of shifted tokens; each a point too."""


@dataclass(frozen=True)
class Divergent:
    """At which tokens of a large model's reply a small model would take a turn that matters.

    Along greedy replies of the large model: where the small model's likeliest token is another, the large model goes
    on from either, and a verifier says whether the two sentences differ in meaning, reasoning or outcome.
    """

    small: str
    """Small model: "smollm2", "tiny", a folder or a hub name."""
    large: str
    """Large model, with the same tokens; as small."""
    study: StudySettings = field(default_factory=StudySettings)
    verifier: str | None = None
    """"package.module:function" of (context, small, large) -> 1 divergent, 0 neutral, -1 unknown; the texts go on from
    the context, each with its first token in << >>."""
    judge: str | None = None
    """Model that is asked the same in place of a verifier; as small, with tokens of its own."""
    sentence_ends: tuple[str, ...] = (".", "!", "?", "\n", "<think>", "</think>")
    """A continuation ends with a token that ends so, spaces aside."""
    continuation_tokens: int = 0
    """Tokens of a continuation at most; 0: as a reply."""
    top: int = 0
    """Keep the small model's so many largest logits and its final hidden state with every token, for a router."""
    batch: int = 32
    """Continuations generated at once at most."""
