"""Settings of the analyses. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokcredit.settings import Declared, number, whole_number
from tokcredit.train.settings import ChatSettings


@dataclass(frozen=True)
class StudySettings(Declared):
    """Which problems two models are asked, and where the results go."""

    tasks: tuple[str, ...] = ()
    """Tasks, as in training. Default: those of the recipe of one of the models."""
    reward: str | None = None
    """Reward function in place of the tasks' own, as in training."""
    held_out: float = number(0.2, above=0, below=1)
    """Fraction of the problems that training left out, and that are asked here. Must equal that of the training."""
    problems: int = whole_number(32, at_least=1)
    """Largest number of problems."""
    max_tokens: int = whole_number(0, at_least=0)
    """Largest number of tokens of a response. 0 takes that of the recipe."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How the chat template turns a question into a prompt, as in training."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of both models: bf16, no (float32), or auto for that of the recipe."""
    seed: int = whole_number(0, at_least=0, at_most=2**32 - 1)
    """Seed of the problems and of sampling."""
    output: Path | None = None
    """Folder of the results. Default: runs/ANALYSIS-MODEL-MODEL."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the analysis in this folder with the problems that are missing."""


@dataclass(frozen=True)
class Shift(Declared):
    """Where a tuned model differs from its base, and how much accuracy those tokens gain.

    First, along responses of the tuned model, the Jensen-Shannon divergence of the two next-token distributions at
    every token. Then responses in which one model takes over from the other wherever the divergence exceeds a
    threshold.
    """

    base: str
    """Model before training: "smollm2", "tiny", a folder, or a name on the hub."""
    tuned: str
    """Model after training, with the same vocabulary; given like the base."""
    study: StudySettings = field(default_factory=StudySettings)
    rollouts: int = whole_number(4, at_least=1)
    """Responses per problem, for each model and under each rule."""
    temperature: float = number(1.0, at_least=0)
    """Temperature of both models. 0 takes the likeliest token."""
    top_p: float = number(0.7, above=0, at_most=1)
    """Probability mass that each distribution keeps (nucleus sampling)."""
    threshold: float = number(0.1, at_least=0)
    """Divergence above which a token counts as shifted, nats."""
    thresholds: tuple[float, ...] = number((0.01, 0.03, 0.1, 0.3), at_least=0, several=True)
    """Divergences above which the other model chooses, nats, one rule each. The divergence is at most ln 2."""
    caps: tuple[int, ...] = whole_number((), at_least=0, several=True)
    """Largest numbers of changed tokens per response, with the threshold of shifted tokens, one rule each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0 and self.rollouts > 1:
            raise ValueError(f"rollouts: expected 1 because of temperature 0, where all are alike, got {self.rollouts}")


@dataclass(frozen=True)
class Divergent(Declared):
    """At which tokens of a large model's response a small model would change the meaning.

    Along greedy responses of the large model: wherever the small model's likeliest token is a different one, the large
    model continues both tokens, and a verifier says whether the two continuations differ in meaning, reasoning or
    outcome.
    """

    small: str
    """Small model: "smollm2", "tiny", a folder, or a name on the hub."""
    large: str
    """Large model, with the same vocabulary; given like the small one."""
    study: StudySettings = field(default_factory=StudySettings)
    verifier: str | None = None
    """Function "package.module:function" of (context, small, large) that returns 1 (divergent), 0 (neutral) or -1
    (unknown). The texts small and large continue the context; their first token stands in << >>."""
    judge: str | None = None
    """Language model that is asked in place of a verifier; given like the small one. Its vocabulary may differ."""
    sentence_ends: tuple[str, ...] = (".", "!", "?", "\n", "<think>", "</think>")
    """A continuation ends with a token whose text ends with one of these; spaces after it do not matter."""
    continuation_tokens: int = whole_number(0, at_least=0)
    """Largest number of tokens of a continuation. 0 takes that of a response."""
    top: int = whole_number(0, at_least=0)
    """Number of the small model's largest logits to keep for every token, with its final hidden state, for a router."""
    batch: int = whole_number(32, at_least=1)
    """Largest number of continuations generated at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.verifier is None) == (self.judge is None):
            raise ValueError(f"verifier, judge: expected one of them, got {self.verifier}, {self.judge}")
