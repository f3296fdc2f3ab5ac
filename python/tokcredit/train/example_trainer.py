"""The training loop on pairs or completions in place of rollouts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from tokcredit import inputs
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.supervised import Supervised
from tokcredit.train import (
    adapter,
    compatibility,
    examples,
    fixed_collectors,
    instructions,
    policy,
    tasks,
    virtual_tokens,
)
from tokcredit.train import teacher as teaching
from tokcredit.train.checkpoint import last
from tokcredit.train.clock import Clock
from tokcredit.train.curve import curve_of
from tokcredit.train.examples import Example, batch_of
from tokcredit.train.fixed_collectors import FixedCollectors
from tokcredit.train.fixed_inputs import FixedInputs
from tokcredit.train.learner import Learner, Update
from tokcredit.train.models import recipe
from tokcredit.train.problems import Problems, nth, spaced, split
from tokcredit.train.ranks import Ranks, check_launch
from tokcredit.train.rollout_collection import RolloutCollector, SamplingContext
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.settings import Settings
from tokcredit.train.virtual_tokens import VirtualPrompt

_OF_ROLLOUTS = (
    *("sampler", "staleness"),
    *("reward_model", "reward_model_lr"),
    *("group", "adaptive", "widths", "segment", "epochs", "minibatches"),
    *(
        f.name
        for group in ("probes", "replay", "privileged", "critic")
        for f in dataclasses.fields(getattr(Settings(), group))
    ),
)
"""Settings that only rollouts read."""
_OF_TASKS = (
    *("sampling_batch", "sampling_precision", "reward", "on_reward_error"),
    *(f.name for f in dataclasses.fields(Settings().tools)),
)
"""Settings that are read where tasks are measured."""


class ExampleStep(NamedTuple):
    """A step of training.

    Attributes:
        source: Name of the file.
        examples: Its examples in this process.
        update: The update of the policy.
        metrics: Numbers by name, over all processes.
    """

    source: str
    examples: list[Example]
    update: Update
    metrics: dict[str, float]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Texts that are recorded of each response, by column."""
        rows = [row for example in self.examples for row in example.rows]
        return {
            "task": [self.source] * len(rows),
            "prompt": [question for question, _, _ in rows],
            "completion": [response.text for _, _, response in rows],
        }


def checked(settings: Settings) -> tuple[Any, Problems | None]:
    """Return what the settings say before a model is loaded: the objective, and the problems that are measured.

    Args:
        settings: Settings without open defaults; see :func:`tokcredit.train.experiment.resolved`.

    Raises:
        TypeError: A setting of the method has the wrong type.
        ValueError: The method is not one for the data, or a setting is wrong or has no effect.
    """
    check_launch()
    option, kind, wanted = (
        ("pairs", Preference, "preference") if settings.pairs else ("completions", Supervised, "supervised")
    )
    virtual = None if settings.adapter is None else adapter.config(settings.adapter)
    controlled = isinstance(virtual, VirtualPrompt) and virtual.steps is not None
    if not controlled == (settings.imitate == "both") == (settings.objective.method == "meet"):
        raise ValueError(
            f"method, imitate, adapter: expected meet, both and control(...) together, or none of them, got "
            f"{settings.objective.method}, {settings.imitate}, {settings.adapter}"
        )
    objective = settings.objective.build()
    if not isinstance(objective, kind):
        raise ValueError(
            f"method: expected a {wanted} method because of {option}, got {settings.objective.method}, which is another"
        )
    compatibility.check_collected(objective, settings.objective.method, ("user", "host"))
    sampled = frozenset().union(*map(inputs.names, _SAMPLED)) - {"prompt_tokens"}
    if of_rollouts := sorted(objective.required_inputs & sampled):
        raise ValueError(
            f"method: expected one that reads no inputs of rollouts because of {option}, got "
            f"{settings.objective.method}, which requires {', '.join(of_rollouts)}"
        )
    compatibility.check_models(objective, settings)
    fixed_collectors.check(objective, settings)
    _check_read(settings, option)
    if not settings.tasks:
        return objective, None
    return objective, tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)


_SAMPLED = (
    *("told", "sampler", "continuations", "probes", "tree_sampler", "replay", "environment", "length_head"),
    *("critic", "credit", "reward_model", "greedy", "turn_answers", "ref_turn_answers", "roles"),
)


def _check_read(settings: Settings, option: str) -> None:
    """Raise if a setting that has no effect here is not its default."""
    given, default = (_flat(x) for x in (settings, Settings()))
    for name in (*_OF_ROLLOUTS, *(() if settings.tasks else _OF_TASKS)):
        if given[name] != default[name]:
            reason = f"because of {option}" if name in _OF_ROLLOUTS else f"because of {option} without tasks"
            raise ValueError(f"{name}: expected {default[name]} {reason}, got {given[name]}")


def _flat(settings: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        out |= _flat(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return out


class ExampleTrainer:
    """A policy and everything that trains it on pairs or completions; :func:`tokcredit.train.run` records it.

    Args:
        settings: Settings without open defaults; see :func:`tokcredit.train.experiment.resolved`.

    Raises:
        ValueError: A setting is wrong; see :func:`checked`.

    Attributes:
        curve: Which metrics the learning curve shows.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.curve = settings, curve_of(settings)
        self.objective, problems = checked(settings)
        self.accelerator = Accelerator(mixed_precision=settings.optimizer.precision)
        self.ranks = Ranks(self.accelerator)
        if settings.sampling.prompts % self.ranks.count:
            count, got = self.ranks.count, settings.sampling.prompts
            raise ValueError(f"prompts: expected a multiple of the {count} processes, got {got}")
        self.model, self.tokenizer = policy.load(settings, self.accelerator)
        self._load()
        loaded = (settings, self.model, self.tokenizer)
        teacher = teaching.made(*loaded)
        reverse = policy.beside("reverse_teacher", settings.collectors.reverse_teacher, *loaded)
        self._fixed_names = fixed_collectors.names() & self.objective.required_inputs
        reference = policy.reference(self.objective, self.model, self._fixed_names)
        models = (self.model, reference, teacher)
        scores = teaching.scores(settings, self.objective, teacher, *loaded[1:], self.accelerator)
        self._teachers = (teacher.model if teacher else None, reverse)  # with an engine there is no model any more
        further = {"reverse_teacher": reverse, "teacher_scores": scores}
        self.learner = Learner(settings, self.objective, *models, self.accelerator, **further)
        self._tasks = self._measured_tasks(problems) if problems else None
        self._fixed = self._computed()
        self.accelerator.register_for_checkpointing(self)

    def _load(self) -> None:
        s = self.settings
        both = s.pairs or s.imitate == "both"
        path, names = s.pairs or s.completions, examples.PAIRS if both else (s.imitate,)
        assert path is not None
        self._path = path
        found, self._notes = examples.load(path, names, self.tokenizer, s.chat, s.sampling.max_tokens)
        if s.reverse_pairs:
            found = [x._replace(responses=x.responses[::-1]) for x in found]
        prefix = adapter.prefix(self.model)
        self._examples = [x._replace(prompt=[*prefix, *x.prompt]) for x in found]
        if "prompt_pairs" in self.objective.required_inputs:
            longest = getattr(self.model.config, "max_position_embeddings", None) or 0
            self._examples, notes = instructions.levels(self._examples, s, self.tokenizer, prefix, longest)
            self._notes += notes
        train, held_out = split(_Numbered.of(self._examples), s.held_out)
        if not train or not held_out:
            raise ValueError(
                f"held_out: expected a share that leaves prompts on both sides, got {s.held_out} of {path}"
            )
        self._train = [x.number for x in train]
        self._held_out = [x.number for x in spaced(held_out, s.eval_problems)]
        if (got := len(self._held_out)) < (count := self.ranks.count):
            raise ValueError(
                f"eval_problems, held_out: expected at least {count} held-out examples, one for each process, "
                f"got {got} of {path}"
            )
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(repr((example.prompt, example.responses)).encode(errors="surrogatepass"))
        self._digest = digest.hexdigest()
        self._count = len(held_out)

    def _computed(self) -> FixedInputs:
        """Return the inputs that do not change, for all steps of the run; the model is the reference policy now."""
        s = self.settings
        folder = s.output or Path()
        known = FixedInputs(self._fixed_names, self._examples, folder if last(folder) else None)
        blocks = [self._held_out, *(self._chosen(number) for number in range(1, s.steps + 1))]
        collect = FixedCollectors(self._fixed_names, s, self.model, self.tokenizer, self._teachers)
        with self.accelerator.autocast():
            known.compute(blocks, collect, self.ranks)
        return known

    def _measured_tasks(self, problems: Problems) -> tuple[SamplingContext, RolloutCollector]:
        half = self.settings.sampler_precision == "bf16"
        dtype, batch = torch.bfloat16 if half else None, self.settings.sampling.sampling_batch
        sampler = TransformersSampler(self.model, self.tokenizer, dtype, batch)
        # No limit of the examples is none of sampling.
        limit = self.settings.sampling.max_tokens or recipe(self.settings.model).max_tokens
        sampling = dataclasses.replace(self.settings.sampling, max_tokens=limit)
        settings = dataclasses.replace(self.settings, sampling=sampling)
        context = SamplingContext(settings, problems, self.tokenizer, sampler, self.ranks)
        context.prompt.prefix = adapter.prefix(self.model)
        return context, compatibility.collector(settings, frozenset(), problems)(context)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside weights, for a checkpoint."""
        return {
            **self.learner.state_dict(),
            "examples": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: The examples are not those of the run.
        """
        if state["examples"] != self._digest:
            option = "pairs" if self.settings.pairs else "completions"
            raise ValueError(f"{option}: expected those of the run in {self.settings.output}, got others in the file")
        self.learner.load_state_dict(state)

    @property
    def introduction(self) -> str:
        """What is trained on, for the user."""
        counts = f"{self._path}: {len(self._train)} examples to train on, {self._count} held out"
        return "\n".join([counts, *self._notes])

    def write(self, folder: Path) -> None:
        """Write the inputs that do not change.

        Args:
            folder: Folder of the run.
        """
        self._fixed.write(folder)

    def measure(self) -> dict[str, float]:
        """Return what is measured on held-out examples, and on the problems of the tasks if there are some, by name."""
        mine = self._held_out[self.ranks.index :: self.ranks.count]
        metrics = self.learner.measure(self._batch(mine))
        wanted = ("loss", "margin_mean", "accuracy_mean")
        out = {f"held_out_{name}": metrics[name] for name in wanted if name in metrics}
        if self._tasks is not None:
            context, collector = self._tasks
            out["held_out_reward_mean"] = context.evaluate(collector.attempt)
        return out

    def step(self, number: int) -> ExampleStep:
        """Update the policy on the examples of a step.

        Args:
            number: Number of the step, from 1.
        """
        clock = Clock()
        mine = self._chosen(number)[self.ranks.index :: self.ranks.count]
        with clock("train"):
            batch = self._batch(mine)
            update = self.learner.update(batch, number, clock)
        sums = self.ranks.sum({"tokens": batch.lengths.sum(), "rows": torch.tensor(batch.num_rows)})
        metrics = update.metrics | {"tokens": sums["tokens"], "length_mean": sums["tokens"] / sums["rows"]}
        self.learner.observe(metrics)
        seconds = clock.seconds["train_seconds"]
        chosen = [self._examples[i] for i in mine]
        return ExampleStep(self._path.stem, chosen, update, {**metrics, **clock.seconds, "seconds": seconds})

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return what the progress bar shows of a step.

        Args:
            metrics: Its metrics.
        """
        names = {"loss": "loss", "margin_mean": "margin", "accuracy_mean": "accuracy"}
        return {text: f"{metrics[name]:.3f}" for name, text in names.items() if name in metrics}

    def _chosen(self, number: int) -> list[int]:
        """Return the numbers of the examples of a step, in all processes."""
        count = self.settings.sampling.prompts
        return nth([self._train], range((number - 1) * count, number * count), self.settings.seed)

    def _batch(self, numbers: Sequence[int]) -> Rollouts:
        return self.ranks.together(lambda: self._scored(numbers))

    def _scored(self, numbers: Sequence[int]) -> Rollouts:
        made = batch_of([self._examples[i] for i in numbers], range(len(numbers)), self.accelerator.device)
        prompts = virtual_tokens.of_rejected(self.model, made.input("prompt_tokens"), made.rewards == 0)
        made = made.with_inputs(prompt_tokens=prompts)
        if "prompt_pairs" in self.objective.required_inputs:
            marks = [x.compares_prompts for i in numbers for x in [self._examples[i]] for _ in x.responses]
            made = made.with_inputs(prompt_pairs=torch.tensor(marks, device=made.device))
        return self.learner.with_inputs(self._fixed.add(made, numbers))


class _Numbered(NamedTuple):
    """An example with its number in the file, for the split by prompts."""

    number: int
    question: str

    @classmethod
    def of(cls, found: Sequence[Example]) -> list[_Numbered]:
        return [cls(number, example.question) for number, example in enumerate(found)]
