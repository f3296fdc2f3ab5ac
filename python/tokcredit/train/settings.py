"""What can be chosen on the command line; nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokcredit import methods, schedule
from tokcredit.stages import aggregation, clip, credit, filters, ratio, scale, term, token_score, token_weights
from tokcredit.objective import Objective
from tokcredit.expression import construct, setting

_STAGES = {
    "sampling": sampling,
    "credit": credit,
    "weights": weights,
    "ratio": ratio,
    "clip": clip,
    "gain": gain,
    "aggregation": aggregation,
    "kl": loss,
}


def _choices(module: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if dataclasses.is_dataclass(value) and value.__module__.startswith(module.__name__) and name.islower()
    }


_PARTS = {k: v for module in (score, schedule, *_STAGES.values()) for k, v in _choices(module).items()}


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is optimized: a published method, its settings, and any stage put in another's place."""

    method: str = "tempo"
    """One of `tokcredit methods`."""
    set: tuple[str, ...] = ()
    """Settings of the method, name=value."""
    sampling: str | None = None
    """Another choice of the rows that take part, e.g. "most_varied(count=4)"."""
    credit: str | None = None
    """Another credit stage, e.g. "leave_one_out()"."""
    weights: tuple[str, ...] | None = None
    """Other weight stages, e.g. "importance_truncated(high=2.0)"."""
    ratio: str | None = None
    """Another ratio stage, e.g. "cumulative()"."""
    clip: str | None = None
    """Another clip stage, e.g. "growing(0.025, 0.05)"."""
    gain: str | None = None
    """Another gain stage, e.g. "divergence(strength=1.0)"."""
    aggregation: str | None = None
    """Another aggregation, e.g. "balanced()"."""
    kl: str | None = None
    """A penalty for leaving the initial model, e.g. "k3(beta=0.01)"."""

    def build(self) -> Objective:
        """The objective these settings name."""
        objective = methods.load(self.method, **dict(setting(text, "set") for text in self.set))
        changes: dict[str, Any] = {}
        for stage, module in _STAGES.items():
            chosen = getattr(self, stage)
            if isinstance(chosen, str):
                changes[stage] = construct(chosen, stage, _choices(module), _PARTS)
            elif chosen is not None:
                changes[stage] = tuple(construct(text, stage, _choices(module), _PARTS) for text in chosen)
        return dataclasses.replace(objective, **changes)


@dataclass(frozen=True)
class SamplingSettings:
    """How rollouts are made."""

    sampler: Literal["transformers", "vllm"] = "transformers"
    """The engine that generates. Where the method has no importance weights and no weights are chosen, vllm adds
    "importance_truncated()": its probabilities differ from the trainer's."""
    prompts: int = 0
    """Prompts per step; 0: the model's recipe."""
    group: int = 8
    """Rollouts per prompt."""
    max_tokens: int = 0
    """Tokens of a reply at most; 0: the model's recipe."""
    temperature: float = 1.0
    """Of sampling and of the trained distribution."""
    adaptive: float = 0.0
    """The temperature follows each token's entropy, up to this share of it; 0: it does not."""
    widths: tuple[int, ...] = (6, 6, 6)
    """Children of a node at each depth, for methods that sample trees; the group size is not read then."""
    segment: int = 0
    """Tokens of a tree's edge at most, except the last; 0: an even share of the reply."""
    sampling_batch: int = 256
    """Rollouts generated at once at most."""


@dataclass(frozen=True)
class ProbeSettings:
    """How states inside a rollout are valued, for methods that ask."""

    continuations: int = 9
    """Continuations from every state whose mean reward is its value."""
    interval: int = 5
    """A state is valued before every such improbable token."""
    below: float = 0.9
    """A token is improbable below this probability."""
    step_end: str = ".\n\n"
    """Text with which a step of reasoning ends."""
    text: str = "**Final Answer**\n\\boxed{"
    """What asks for a short answer after a step."""
    answers: int = 5
    """Short answers after every step."""
    answer_tokens: int = 10
    """Tokens of a short answer at most."""
    answer_temperature: float = 0.6
    """Of sampling short answers."""


@dataclass(frozen=True)
class ReplaySettings:
    """What is remembered and asked again, by methods that replay."""

    remembered: int = 4
    """Right and wrong replies kept per prompt, each at most this many, the last ones."""
    replayed: int = 2
    """Of them at most this many join a group that is all right (wrong ones) or all wrong (right ones)."""
    hard: float = 0.25
    """A prompt whose mean reward so far is less is also asked with one of its wrong replies; 0: none is."""
    reflection: str = "The reply above is wrong. Find the mistake, then solve the problem again."
    """What follows the wrong reply."""


@dataclass(frozen=True)
class ToolSettings:
    """How a model and its tools take turns, in tasks that have tools."""

    turns: int = 10
    """Turns of the model at most; max_tokens is for each of them."""
    matching: str = "optimal"
    """How its calls are matched with those that were expected: "optimal(penalty=0.5)", "greedy", "sinkhorn"."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How a step moves the policy."""

    lr: float = 0.0
    """Learning rate of AdamW; 0: the model's recipe."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate over the steps."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    epochs: int = 1
    """Passes over the rollouts of a step."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    micro_batch: int = 16
    """Rows of one forward and backward pass; changes memory and speed, not results."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Mixed precision of training, and the dtype that samples; auto: the model's recipe."""


@dataclass(frozen=True)
class Settings:
    """Trains a language model with a token-credit method on verifiable tasks."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    tools: ToolSettings = field(default_factory=ToolSettings)
    model: str = "smollm2"
    """"smollm2", "tiny", or a folder or hub name of a causal language model."""
    tasks: tuple[str, ...] = ()
    """Tasks, mixed evenly: a reasoning_gym dataset with its configuration, e.g. "products(max_digits=1)";
    "jsonl('file.jsonl')" of {"prompt", "answer"}; "choices('file.jsonl')" of the same with letters as answer;
    "addition(digits=2)"; "calculator(operations=2)", which has a tool. The model's recipe by default."""
    teacher: str | None = None
    """Model that a distilling method asks, with the same tokens; as model."""
    reward: str | None = None
    """Another reward, "package.module:function" of (prompt, reply, answer) -> float."""
    held_out: float = 0.2
    """Share of the problems kept from training and measured."""
    steps: int = 0
    """Training steps; 0: the model's recipe."""
    seed: int = 0
    """Of the data, the sampling and the order of rows."""
    eval_every: int = 10
    """Steps between measurements on held-out problems."""
    eval_problems: int = 100
    """Held-out problems measured at most."""
    rollouts_every: int = 10
    """Steps between recorded batches of rollouts."""
    save_every: int = 25
    """Steps between checkpoints."""
    output: Path | None = None
    """Folder of the run; runs/MODEL-METHOD by default."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in this folder from its last checkpoint; start it if there is none."""
