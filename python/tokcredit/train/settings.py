"""Settings of a run, which are also the options of the command line; nothing heavy is imported here.

Each states its type, and a number its range, in one line; see :mod:`tokcredit.settings`. All are checked when they are
made, and ``--help`` shows the ranges.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tokcredit import methods
from tokcredit.expression import setting
from tokcredit.mixing import method, mix
from tokcredit.settings import Declared, RefusedError, number, option, whole_number
from tokcredit.train.tools import rule


@dataclass(frozen=True)
class ObjectiveSettings(Declared):
    """What is optimized: a published method, its settings, and other stages in place of its own.

    A stage is the name of a method that has it, or a stage with its settings; see :func:`tokcredit.mix`.
    """

    method: str = option("tempo", *methods.names())
    """Name of the method; `tokcredit methods` lists them."""
    set: tuple[str, ...] = ()
    """Settings of the method, name=value: a number, true, false, none, or a stage or schedule with its settings."""
    credit: str | None = None
    """Credit stage, for example "tempo" or "leave_one_out()"."""
    filters: tuple[str, ...] | None = None
    """Filters, which select the rows and tokens that train, for example "dapo" or "nonzero_advantage()"."""
    token_weights: tuple[str, ...] | None = None
    """Token weights, which multiply the loss of each token, for example "tis(high=2.0)"."""
    ratio: str | None = None
    """Importance ratio, for example "ctpo" or "cumulative()"."""
    clip: str | None = None
    """Clip stage, for example "ctpo" or "growing(0.025, 0.05)"."""
    scales: tuple[str, ...] | None = None
    """Advantage scales, which depend on the current policy, for example "divergence(strength=1.0)"."""
    aggregation: str | None = None
    """How the losses of tokens become one number, for example "ba" or "token_mean()"."""
    terms: tuple[str, ...] | None = None
    """Terms that are added to the policy loss, for example "kl(0.01)" or "entropy(0.001)"."""
    token_loss: str | None = None
    """Token loss of a supervised method, for example "forward_kl()"."""

    def build(self) -> Any:
        """Return the objective that these settings describe.

        Raises:
            TypeError: The method has no such setting or no such kind of stage, or a setting has the wrong type.
            ValueError: There is no such method or stage, a setting is out of range, or two stages do not fit together.
        """
        settings = dict(setting(text, "set") for text in self.set)
        try:
            base = method(self.method, settings)
        except RefusedError as error:
            raise error.of(f"set: {error.name}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"set: {error}") from error
        kinds = (f.name for f in dataclasses.fields(self) if f.name not in ("method", "set"))
        return mix(base, **{kind: text for kind in kinds if (text := getattr(self, kind)) is not None})


@dataclass(frozen=True)
class SamplingSettings(Declared):
    """How rollouts are sampled."""

    sampler: Literal["transformers", "vllm"] = "transformers"
    """Engine that samples. With vllm, and with staleness or a sampling_precision other than precision, probabilities of
    the sampler differ from the policy's: the token weight tis() is added, except to a preference method, unless the
    objective already corrects for that or token weights are given; "--token-weights" without a value gives none."""
    staleness: int = whole_number(0, at_least=0)
    """Number of steps by which the weights that sample are older than the policy, as in asynchronous training. The
    first steps sample with the first weights."""
    sampling_precision: Literal["auto", "no", "bf16"] = "auto"
    """Dtype of the weights that sample: float32 or bfloat16; auto takes that of precision."""
    prompts: int = whole_number(0, at_least=0)
    """Number of prompts per step; 0 takes the number that suits the model."""
    group: int = whole_number(8, at_least=1)
    """Number of rollouts per prompt."""
    max_tokens: int = whole_number(0, at_least=0)
    """Largest number of tokens of a response; 0 takes the number that suits the model."""
    temperature: float = number(1.0, above=0)
    """Temperature of sampling, and of the distribution that is trained."""
    adaptive: float = number(0.0, at_least=0, below=1)
    """Largest relative change of the temperature, which then follows each token's entropy (hapo); 0 turns it off."""
    widths: tuple[int, ...] = whole_number((6, 6, 6), at_least=1, several=True)
    """Children of a node at each depth, for methods that sample trees; these do not read the group size."""
    segment: int = whole_number(0, at_least=0)
    """Largest number of tokens of a tree's edge, except at the last depth; 0 divides the response evenly."""
    sampling_batch: int = whole_number(256, at_least=1)
    """Largest number of rollouts that are generated at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            raise ValueError("widths: expected at least one number, got none")


@dataclass(frozen=True)
class ProbeSettings(Declared):
    """How states inside a rollout are valued, for methods that need it."""

    continuations: int = whole_number(9, at_least=1)
    """Number of continuations of a state; its value is their mean reward."""
    interval: int = whole_number(5, at_least=1)
    """A state is valued before every such improbable token."""
    below: float = number(0.9, at_least=0, at_most=1)
    """A token is improbable if its probability is below this."""
    step_end: str = ".\n\n"
    """Text that ends a step of reasoning."""
    text: str = "**Final Answer**\n\\boxed{"
    """Text after a step, or a turn, that makes the model give a short answer."""
    answers: int = whole_number(5, at_least=1)
    """Number of short answers after a step."""
    answer_tokens: int = whole_number(10, at_least=1)
    """Largest number of tokens of a short answer."""
    answer_temperature: float = number(0.6, at_least=0)
    """Temperature of sampling short answers; 0 takes the likeliest token."""


@dataclass(frozen=True)
class ReplaySettings(Declared):
    """What is stored and used again, by methods that replay."""

    remembered: int = whole_number(4, at_least=0)
    """Number of right and of wrong responses that are stored per prompt; 0 stores none."""
    replayed: int = whole_number(2, at_least=0)
    """Largest number of stored responses that join a group whose responses are all right (wrong ones join) or all wrong
    (right ones join)."""
    hard: float = number(0.25, at_least=0, at_most=1)
    """A prompt whose mean reward so far is below this is also asked together with a wrong response; 0 turns it off."""
    reflection: str = "The reply above is wrong. Find the mistake, then solve the problem again."
    """Text that follows the wrong response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replayed > self.remembered:
            raise ValueError(
                f"replayed: expected at most the {self.remembered} responses remembered, got {self.replayed}"
            )


@dataclass(frozen=True)
class ChatSettings(Declared):
    """How a chat template turns a question into a prompt, for models that have one."""

    system_prompt: str | None = None
    """System message before every question."""
    chat_template_args: tuple[str, ...] = ()
    """Arguments of the chat template, name=value, for example enable_thinking=false."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the chat template by name.

        Raises:
            ValueError: A text has another form, a name comes twice, or the name is one that the trainer sets.
        """
        pairs = [setting(text, "chat_template_args") for text in self.chat_template_args]
        pairs = [(name, _json(name, value)) for name, value in pairs]
        names = [name for name, _ in pairs]
        if wrong := [name for name in names if name in _TEMPLATE_NAMES or names.count(name) > 1]:
            expected = f"different names other than {', '.join(_TEMPLATE_NAMES)}"
            raise ValueError(f"chat_template_args: expected {expected}, got {', '.join(wrong)}")
        return dict(pairs)


def _json(name: str, text: str) -> Any:
    """Return what a text says in JSON, such as ``false`` or ``3``, or the text itself."""
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    if word in ("yes", "no", "on", "off") or difflib.get_close_matches(word, ("true", "false"), cutoff=0.7):
        raise ValueError(f"chat_template_args: {name}: expected true or false, or a text in quotes, got {text}")
    try:
        return json.loads(text)
    except ValueError:
        return text


_WORDS = {"true": True, "false": False, "null": None, "none": None}


_TEMPLATE_NAMES = ("messages", "conversation", "chat_template", "add_generation_prompt", "tokenize")


@dataclass(frozen=True)
class ToolSettings(Declared):
    """How the model and its tools, or its environment, take turns, in tasks that have them."""

    turns: int = whole_number(10, at_least=1)
    """Largest number of turns of the model; max_tokens holds for each turn."""
    episode_rows: Literal["one", "call"] = "one"
    """Rows of an episode: one, or one for each call of the model, whose prompt is all that came before. It changes no
    result."""
    matching: str = "optimal"
    """How calls are matched with the expected ones: "optimal(penalty=0.5)", "greedy" or "sinkhorn"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule(self.matching)


@dataclass(frozen=True)
class PrivilegedSettings(Declared):
    """What the teacher of a distilling method is told beside the prompt of the student."""

    privileged: Literal["nothing", "answer", "attempt", "feedback"] = "nothing"
    """What the teacher is told: the answer of the problem; the first other response of the group that succeeded; or
    that, and without one the feedback on the response itself. The methods sdpo, sdft and opsd need one; their teacher
    is initial, live or ema(0.05)."""
    privileged_template: str = "{question}\n\nA correct solution:\n\n{told}\n\nNow solve the problem yourself.\n"
    """Question that the teacher sees, with {question} and {told}."""
    feedback: str | None = None
    """Feedback on a response: "package.module:function" of (prompt, response, answer) that returns a text, or None."""
    feedback_template: str = "{question}\n\nFeedback on an earlier attempt:\n\n{told}\n\nNow solve the problem again.\n"
    """Question that the teacher sees with feedback, with {question} and {told}."""
    success_reward: float = number(0.5, at_least=0)
    """Smallest reward of a successful attempt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("privileged_template", "feedback_template"):
            text = getattr(self, name)
            if missing := [part for part in ("{question}", "{told}") if part not in text]:
                raise ValueError(f"{name}: expected a text with {' and '.join(missing)}, got {text!r}")
        wanted = self.privileged == "feedback"
        if wanted != (self.feedback is not None):
            expected = "a function" if wanted else "None"
            raise ValueError(
                f"feedback: expected {expected} because privileged is {self.privileged}, got {self.feedback}"
            )


@dataclass(frozen=True)
class CollectorSettings(Declared):
    """Other models and prompts that some methods read. A setting that the method does not read is refused."""

    positive: str | None = None
    """Model of cdpo that was trained on right solutions, given like model."""
    negative: str | None = None
    """Model of cdpo that was trained on wrong solutions, given like model."""
    contrast: float = number(1.0, at_least=0)
    """Strength of the contrast of both models in cdpo; 0 takes the positive one alone."""
    better_template: str = "{question}\n\nGive a helpful, correct, coherent and concise answer.\n"
    """Prompt of t_reg that asks for a better answer, with {question}; {response} stands for the response itself."""
    worse_template: str = "{question}\n\nGive an unhelpful, incorrect, incoherent and verbose answer.\n"
    """Prompt of t_reg that asks for a worse answer."""
    mask_activations: tuple[str, ...] = option(("mlp", "attention", "residual", "logits"), several=True)
    """Activations of the reference model from which sparse_po makes masks that are not learned."""
    reverse_teacher: str | None = None
    """Model of align_distil that was trained like its teacher, but with chosen and rejected responses swapped."""
    instructions: int = whole_number(2, at_least=1)
    """Number of instructions that mapl adds to a prompt."""
    instructions_template: str = "{question}\n\n{instructions}\n"
    """Prompt of mapl with instructions, with {question} and {instructions}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in (
            ("better_template", ["{question}"]),
            ("worse_template", ["{question}"]),
            ("instructions_template", ["{question}", "{instructions}"]),
        ):
            if any(part not in getattr(self, name) for part in parts):
                raise ValueError(f"{name}: expected a text with {' and '.join(parts)}, got {getattr(self, name)!r}")
        if not self.mask_activations:
            raise ValueError("mask_activations: expected at least one kind, got none")


@dataclass(frozen=True)
class CriticSettings(Declared):
    """The critic of methods that read values, such as ppo. The term value() is its loss, which is added if missing."""

    critic: str | None = None
    """Critic: head for a linear layer on the final hidden states of the policy; or one on those of a model of its own
    with the same tokens, given like model, or initial for a copy of the model before the first step."""
    critic_lr: float = number(0.0, at_least=0)
    """Learning rate of the critic, which has no schedule; 0 takes ten times that of the policy."""
    critic_warmup: int = whole_number(0, at_least=0)
    """Number of steps, the first of the run, that train the critic alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("critic_lr", "critic_warmup"):
            if self.critic is None and getattr(self, name):
                raise ValueError(f"{name}: expected 0 because there is no critic, got {getattr(self, name)}")


@dataclass(frozen=True)
class OptimizerSettings(Declared):
    """How a step updates the policy."""

    lr: float = number(0.0, at_least=0)
    """Learning rate of AdamW; 0 takes the rate that suits the model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate over the steps."""
    warmup: int = whole_number(0, at_least=0)
    """Number of steps over which the learning rate rises from 0."""
    weight_decay: float = number(0.0, at_least=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = number(1.0, above=0, infinite=True)
    """Gradients with a larger norm are scaled down to this norm; inf leaves them as they are."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens when a loss or a gradient is not finite: stop names the step, the rows and the tokens, and saves
    nothing; skip leaves that optimizer step out and counts it, and stops after 10 in a row."""
    epochs: int = whole_number(1, at_least=1)
    """Number of passes over the rollouts of a step."""
    minibatches: int = whole_number(1, at_least=1)
    """Number of optimizer steps per pass."""
    micro_batch: int = whole_number(16, at_least=1)
    """Rows of one forward and backward pass. It changes memory and speed, not results."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Mixed precision of training; auto takes what suits the model."""


@dataclass(frozen=True)
class Settings(Declared):
    """Train a language model with a token-credit method on tasks with verifiable answers."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    tools: ToolSettings = field(default_factory=ToolSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    privileged: PrivilegedSettings = field(default_factory=PrivilegedSettings)
    collectors: CollectorSettings = field(default_factory=CollectorSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    model: str = "smollm2"
    """Model to train: "smollm2", "tiny", "tiny_tools", "tiny_agent", or a folder or hub name of a causal language
    model."""
    adapter: str | None = None
    """Adapter to train in place of all weights: "lora(r=16, alpha=32.0, targets='all-linear')", where targets may be a
    regular expression of names of layers, or "prompt(tokens=20)", embeddings before every prompt. The model itself is
    then the reference policy; `tokcredit merge` merges LoRA. "control(tokens=20, steps=50)" has embeddings for chosen
    and others for rejected responses, which train alone for some steps, then with all weights (meet)."""
    tasks: tuple[str, ...] = ()
    """Tasks, in equal parts: a reasoning_gym data set with its configuration, for example "products(max_digits=1)";
    "jsonl('file.jsonl')" with lines {"prompt", "answer"}, where the prompt is a text or the messages of a chat;
    "choices('file.jsonl')" with letters as answers;
    "addition(digits=2)"; "calculator(operations=2)", which has a tool; "minigrid('Empty-Random-6x6')",
    "textarena('FrozenLake-v0')" and "environment('package.module:Class')", in which the model acts. The default suits
    the model."""
    pairs: Path | None = None
    """Pairs to train on in place of rollouts, for a preference method: JSONL of {"prompt", "chosen", "rejected"}, or a
    folder of datasets.Dataset.save_to_disk. prompts is then the number of pairs per step. Tasks are only measured."""
    reverse_pairs: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Swap chosen and rejected of the pairs, as the reverse teacher of align_distil needs it."""
    completions: Path | None = None
    """The same for a supervised method, with {"prompt", "completion"}."""
    imitate: str = option("completion", "chosen", "rejected", "both")
    """Field with the completion; chosen and rejected take one side of a file of pairs, as the models of cdpo need; both
    takes each side with the control tokens for it (meet)."""
    teacher: str | None = None
    """Teacher of a distilling method: a model with the same tokens, given like model; initial for the model before the
    first step; live for the model itself; ema(rate) for an average of its weights over the steps."""
    teacher_engine: Literal["transformers", "vllm"] = "transformers"
    """Where a teacher whose weights do not change is computed. vllm gives log-probs of the sampled tokens, and the most
    likely tokens for a token loss such as js(0.5, top_k=20, top_of=teacher)."""
    aligned: str | None = None
    """Policy that was trained on preferences, for rto and tgdpo: a model with the same tokens, given like model."""
    reward_model: str | None = None
    """Implicit reward model of prime, which learns from the outcomes of every step: initial for a copy of the model
    before the first step, or a model with the same tokens, given like model."""
    reward_model_lr: float = number(0.0, at_least=0)
    """Learning rate of the reward model, which has no schedule; 0 takes that of the policy."""
    reward: str | None = None
    """Reward function in place of the task's own: "package.module:function" of (prompt, response, answer) -> float."""
    on_reward_error: Literal["stop", "zero", "drop"] = "stop"
    """What happens to a response for which a reward function raises an error or returns no finite number, and to an
    episode whose environment raises an error or hangs: stop ends the run with the traceback, zero makes the reward 0,
    drop leaves the response out of its group, so it trains nothing."""
    held_out: float = number(0.2, above=0, below=1)
    """Share of the problems that is kept from training and measured."""
    steps: int = whole_number(0, at_least=0)
    """Number of training steps; 0 takes the number that suits the model."""
    seed: int = whole_number(0, at_least=0, at_most=2**32 - 1)
    """Seed of the data, of the sampling and of the order of rows."""
    eval_every: int = whole_number(10, at_least=0)
    """Number of steps between measurements on held-out problems; 0 measures only before the first step and after the
    last."""
    eval_problems: int = whole_number(100, at_least=1)
    """Largest number of held-out problems that are measured."""
    rollouts_every: int = whole_number(10, at_least=0)
    """Number of steps between recorded batches of rollouts; 0 records only those of the last step."""
    save_every: int = whole_number(25, at_least=0)
    """Number of steps between checkpoints; 0 saves only at the end."""
    output: Path | None = None
    """Folder of the run; runs/MODEL-METHOD by default."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the folder from its last checkpoint, or start it if there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs and self.completions:
            raise ValueError(f"pairs, completions: expected one of them, got {self.pairs}, {self.completions}")
        if self.reverse_pairs and not self.pairs:
            raise ValueError("reverse_pairs: expected False because there are no pairs, got True")
        if self.imitate != "completion" and not self.completions:
            raise ValueError(f"imitate: expected completion because there are no completions, got {self.imitate}")
        if self.reward_model is None and self.reward_model_lr:
            raise ValueError(
                f"reward_model_lr: expected 0 because there is no reward model, got {self.reward_model_lr}"
            )

    @property
    def sampler_precision(self) -> str:
        """Precision of the weights that sample: that of training, unless another one was chosen."""
        chosen = self.sampling.sampling_precision
        return self.optimizer.precision if chosen == "auto" else chosen

    @property
    def trains_on_examples(self) -> bool:
        """Whether pairs or completions take the place of rollouts."""
        return self.pairs is not None or self.completions is not None


def is_due(number: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens after a step; never if 0.

    Args:
        number: Number of the step, from 1.
        every: Number of steps, or 0.
    """
    return every > 0 and number % every == 0


@dataclass(frozen=True)
class MergeSettings(Declared):
    """Which adapter is merged into its model."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run with an adapter, or folder of an adapter."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of the model to write."""


@dataclass(frozen=True)
class ComparisonSettings(Declared):
    """Which runs are compared."""

    methods: tuple[str, ...] = option(("grpo", "tempo", "ctpo"), *methods.names(), several=True)
    """Names of methods."""
    seeds: int = whole_number(3, at_least=1)
    """Number of runs per method, with seeds from that of the settings on."""


@dataclass(frozen=True)
class StudySettings(Declared):
    """Which study is run."""

    study: tyro.conf.Positional[str] = "tiny"
    """Study of this package, "tiny", "tiny_again", "tiny_async" or "smollm2", or the path of a JSON file."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the study; runs/study-NAME by default."""
    jobs: int = whole_number(1, at_least=1)
    """Largest number of runs at a time."""
