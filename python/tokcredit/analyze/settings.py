"""Settings of the analyses. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokcredit.settings import Declared, number, option, whole_number
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


@dataclass(frozen=True)
class ReagentSettings(Declared):
    """Random replacements of ReAGent."""

    ratio: float = number(0.3, above=0, below=1)
    """Method reagent: probability that a token is replaced."""
    keep: float = number(0.3, above=0, at_most=1)
    """Method reagent: share of the tokens that stay when a run is tested."""
    tolerance: int = whole_number(3, at_least=1)
    """Method reagent: a run ends when the target is among so many likeliest tokens."""
    max_steps: int = whole_number(3000, at_least=1)
    """Method reagent: largest number of steps of a run."""
    runs: int = whole_number(8, at_least=1)
    """Method reagent: number of runs."""


@dataclass(frozen=True)
class ScoreSettings(Declared):
    """How the tokens of a prompt are scored."""

    method: str = option("gradient", "reagent", "globenc", "decompx")
    """Gradient times input of the log-prob, ReAGent, GlobEnc, or DecompX (sequence classifiers)."""
    max_tokens: int = whole_number(16, at_least=1)
    """Largest number of tokens of the response that a causal language model writes where none is given."""
    output_class: int | None = whole_number(None, at_least=0, optional=True)
    """Method decompx: class whose logit is explained. Default: the likeliest."""
    reagent: ReagentSettings = field(default_factory=ReagentSettings)
    """Settings of ReAGent."""
    seed: int = whole_number(0, at_least=0, at_most=2**32 - 1)
    """Method reagent: seed of the replacements."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_class is not None and self.method != "decompx":
            raise ValueError(f"output_class: expected none with method {self.method}, got {self.output_class}")


@dataclass(frozen=True)
class Attribute(Declared):
    """Which tokens of a prompt mattered for a response, or for a class.

    Prints the prompt coloured by importance, and the most important tokens.
    """

    model: str
    """For gradient and reagent a causal language model: "smollm2", "tiny", a folder, or a name on the hub. For globenc
    and decompx an encoder of the BERT or RoBERTa family: a folder or a name on the hub."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    """Method of the scores."""
    prompt: str | None = None
    """Text of the prompt."""
    response: str | None = None
    """Text of the response. Default: what the model writes."""
    prompts: Path | None = None
    """In place of a prompt: JSONL file with lines {"prompt": text} or {"prompt": text, "response": text}."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How the chat template of a causal language model turns a prompt into tokens."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSONL file to write: for each prompt the tokens, the score of each for each token of the response, and its
    importance, the mean of the absolute scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError(f"prompt, prompts: expected one of them, got {self.prompt}, {self.prompts}")
        encoder = self.score.method in ("globenc", "decompx")
        if self.response is not None and (encoder or self.prompt is None):
            needed = "none with an encoder" if encoder else "none with prompts from a file"
            raise ValueError(f"response: expected {needed}, got {self.response!r}")
        if encoder and self.chat != ChatSettings():
            raise ValueError("system_prompt, chat_template_args: expected none with an encoder, got some")


@dataclass(frozen=True)
class CompressSettings(Declared):
    """Which words of a prompt are kept."""

    path: tyro.conf.Positional[Path]
    """JSONL file with lines {"prompt": text} or {"prompt": text, "response": text}."""
    model: str
    """Model that scores the words; as for analyze attribute."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    """Method of the scores."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("compressed.jsonl")
    """JSONL file to write, with the short prompt, the original one, and the numbers of the words that were kept."""
    share: float = number(0.8, above=0, at_most=1)
    """Share of the words of each prompt that is kept, rounded to the nearest, at least one word."""
    protect: tuple[str, ...] = ()
    """Words that are always kept."""
    by_sentence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Scale the scores from 0 to 1 inside each sentence before words are compared."""
