"""The training loop: collect rollouts, then update the policy."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit import inputs
from tokcredit.blocks import segment
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.groups import Groups
from tokcredit.methods.hapo import entropy_deviation
from tokcredit.mixing import mix
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.stages import term
from tokcredit.stages.credit import Credit
from tokcredit.stages.token_weights import tis
from tokcredit.train import (
    adapter,
    baselines,
    collectors,
    critic,
    fixed_collectors,
    implicit,
    policy,
    tasks,
    teacher_scores,
)
from tokcredit.train import teacher as teaching
from tokcredit.train.clock import Clock
from tokcredit.train.conversations import Conversations
from tokcredit.train.curve import REWARDS
from tokcredit.train.episodes import Episodes
from tokcredit.train.learner import Learner, Update
from tokcredit.train.lengths import LengthHead, LengthLearner
from tokcredit.train.probes import Prober
from tokcredit.train.problems import Problems
from tokcredit.train.ranks import Ranks, check_launch
from tokcredit.train.replay import Replay
from tokcredit.train.rollout_collection import RolloutCollection, RolloutCollector, SamplingContext, SingleTurn
from tokcredit.train.sampler import Sampler, TransformersSampler
from tokcredit.train.settings import CriticSettings, PrivilegedSettings, Settings
from tokcredit.train.trees import Trees
from tokcredit.train.virtual_tokens import VirtualPrompt


class Step(NamedTuple):
    """A step of training.

    Attributes:
        collection: The rollouts.
        update: The update of the policy.
        metrics: Numbers by name, over all processes.
    """

    collection: RolloutCollection
    update: Update
    metrics: dict[str, float]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What is recorded of each rollout beside its numbers, by column."""
        problems = self.collection.problems
        return {
            "task": [p.task for p in problems],
            "world": [None if p.world is None else str(p.world) for p in problems],
            "prompt": [p.question for p in problems],
            "completion": self.collection.responses,
            **self.collection.columns,
        }


def _with_length(objective: Any, longest: int) -> Any:
    """Return the objective with the generation limit where its aggregation would use the longest row of each batch."""
    aggregation: Any = getattr(objective, "aggregation", None)
    if aggregation is not None and aggregation.reads_width:
        return mix(objective, aggregation=dataclasses.replace(aggregation, length=longest))
    return objective


def _corrected(objective: Any) -> Any:
    """Return the objective with a token weight for an engine whose probabilities differ, unless it already has one."""
    corrections = (x for x in objective.stages() if x.kind in ("filter", "token_weight", "ratio", "scale"))
    if any("rollout_log_probs" in x.required_inputs for x in corrections):
        return objective
    return mix(objective, token_weights=(*objective.token_weights, tis()))


def _with_value_loss(objective: Any) -> Any:
    """Return the objective with the loss of a critic, unless it already has one."""
    if any(isinstance(x, term.value) for x in objective.terms):
        return objective
    return mix(objective, terms=(*objective.terms, term.value()))


def checked(settings: Settings) -> tuple[Any, Problems, type[RolloutCollector]]:
    """Return what the settings say before a model is loaded: the objective, the problems and the rollout collector.

    Args:
        settings: Settings without open defaults; see :func:`tokcredit.train.experiment.resolved`.

    Raises:
        TypeError: A setting of the method has the wrong type.
        ValueError: The objective requires an input that the trainer does not collect, or a setting is wrong.
    """
    check_launch()
    virtual = None if settings.adapter is None else adapter.config(settings.adapter)
    if settings.objective.method == "meet" or (isinstance(virtual, VirtualPrompt) and virtual.steps is not None):
        raise ValueError("completions: expected a file of pairs because of meet and its adapter, control, got None")
    objective = _with_length(settings.objective.build(), settings.sampling.max_tokens)
    if settings.sampling.sampler == "vllm":
        if find_spec("vllm") is None:
            raise ValueError("sampler: expected transformers because vllm is not installed, got vllm")
        if isinstance(virtual, VirtualPrompt):
            raise ValueError(f"adapter: expected lora because the sampler is vllm, got {settings.adapter}")
        if settings.sampling.adaptive:
            raise ValueError(f"adaptive: expected 0 because the sampler is vllm, got {settings.sampling.adaptive}")
        if settings.objective.token_weights is None:
            objective = _corrected(objective)
    check_collected(objective, settings.objective.method, ("user", "host", *fixed_collectors.OF_EXAMPLES))
    check_models(objective, settings)
    fixed_collectors.check(objective, settings)
    if settings.critic.critic is not None:
        objective = _with_value_loss(objective)
    _check_group(settings, objective)
    if isinstance(objective, Preference) and settings.sampling.group != 2:
        raise ValueError(
            f"group: expected 2 because of {settings.objective.method}, which compares the two responses to a prompt, "
            f"got {settings.sampling.group}"
        )
    if objective.couples_rows and settings.sampling.group > settings.optimizer.micro_batch:
        raise ValueError(
            f"micro_batch: expected at least {settings.sampling.group}, the size of a group, because the objective "
            f"compares the rows of a group, got {settings.optimizer.micro_batch}"
        )
    if (stage := _length_stage(objective)) is not None and not hasattr(stage, "gamma"):
        raise ValueError(f"credit: expected a stage with a gamma because it reads length_values, got {stage}")
    problems = tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)
    found = collector(settings, objective.required_inputs, problems)
    if isinstance(objective, Preference) and (issubclass(found, Episodes) or settings.tools.episode_rows != "one"):
        raise ValueError(
            f"tasks: expected tasks whose responses are one row because {settings.objective.method} compares pairs of "
            f"rows, got {', '.join(settings.tasks)}"
        )
    _check_privileged(settings, objective, found)
    return objective, problems, found


_MODELS = {"teacher": "teacher", "critic": "critic", "aligned": "aligned policy", "reward_model": "reward model"}
"""Settings of models beside the policy, and what the model is."""


def check_models(objective: Any, settings: Settings) -> None:
    """Check that there is each model beside the policy if, and only if, the objective needs it.

    Args:
        objective: The objective.
        settings: Settings of the run.

    Raises:
        ValueError: One is missing or superfluous, or a setting of one is out of range.
    """
    method, chosen = settings.objective.method, settings.critic
    for name, given, needed, expected in (
        ("teacher", settings.teacher, distils(objective), "a model"),
        ("critic", chosen.critic, _reads(objective, "critic"), "head, initial or a model"),
        ("aligned", settings.aligned, _reads(objective, "aligned"), "a model"),
        ("reward_model", settings.reward_model, _reads(objective, "reward_model"), "initial or a model"),
    ):
        if given is None and needed:
            raise ValueError(f"{name}: expected {expected} because of {method}, got None")
        if given is not None and not needed:
            raise ValueError(f"{name}: expected None because {method} has no {_MODELS[name]}, got {given}")
    if settings.teacher is not None and teaching.moves(settings.teacher) and _reads(objective, "teachers"):
        raise ValueError(f"teacher: expected initial or a model because of {method}, got {settings.teacher}")
    _check_engine(objective, settings)
    if chosen.critic is not None:
        if all(type(x).targets is Credit.targets for x in objective.credit.stages() if isinstance(x, Credit)):
            raise ValueError(
                f"credit: expected one that says what a critic learns, such as gae(), got {objective.credit!r}"
            )
        if chosen.critic_warmup >= settings.steps:
            raise ValueError(
                f"critic_warmup: expected fewer than the {settings.steps} steps, got {chosen.critic_warmup}"
            )


def _check_engine(objective: Any, settings: Settings) -> None:
    """Raise if the teacher cannot be in the engine that the settings say."""
    method = settings.objective.method
    if settings.teacher_engine == "transformers":
        return
    if settings.teacher is None:
        raise ValueError(f"teacher_engine: expected transformers because {method} has no teacher, got vllm")
    if find_spec("vllm") is None:
        raise ValueError("teacher_engine: expected transformers because vllm is not installed, got vllm")
    if teaching.moves(settings.teacher):
        raise ValueError(f"teacher: expected initial or a model because teacher_engine is vllm, got {settings.teacher}")
    if settings.sampling.temperature != 1:
        got = settings.sampling.temperature
        raise ValueError(f"temperature: expected 1, that of the teacher, because teacher_engine is vllm, got {got}")
    if settings.adapter is not None and isinstance(adapter.config(settings.adapter), VirtualPrompt):
        raise ValueError(f"adapter: expected lora because teacher_engine is vllm, got {settings.adapter}")
    names, top_k = teacher_scores.wanted(objective)
    read = objective.required_inputs & (inputs.names("teacher") | inputs.names("teachers"))
    read |= collectors.FROM_TEACHER & set(objective.variables) - ({objective.token_loss.variable} if top_k else set())
    if others := sorted(read - names):
        raise ValueError(
            f"teacher_engine: expected transformers because {method} reads {', '.join(others)}, got vllm, which gives "
            f"log-probs of tokens, and divergences of a token loss with top_k and top_of=teacher"
        )


def only_read(settings: Settings, objective: Any) -> Settings:
    """Return the settings without the models and prompts beside the policy that the objective does not read.

    Args:
        settings: Settings of a run.
        objective: Its objective.
    """
    rewarded = _reads(objective, "reward_model")
    return dataclasses.replace(
        settings,
        teacher=settings.teacher if distils(objective) else None,
        teacher_engine=settings.teacher_engine if distils(objective) else "transformers",
        critic=settings.critic if _reads(objective, "critic") else CriticSettings(),
        collectors=fixed_collectors.read(objective, settings.collectors),
        privileged=settings.privileged if distils(objective) else PrivilegedSettings(),
        aligned=settings.aligned if _reads(objective, "aligned") else None,
        reward_model=settings.reward_model if rewarded else None,
        reward_model_lr=settings.reward_model_lr if rewarded else 0.0,
    )


def _reads(objective: Any, collector: str) -> bool:
    return bool(inputs.names(collector) & objective.required_inputs)


def distils(objective: Any) -> bool:
    """Return whether an objective reads or differentiates what a teacher gives.

    Args:
        objective: The objective.
    """
    found = inputs.names("teacher") & objective.required_inputs | collectors.FROM_TEACHER & set(objective.variables)
    return bool(found)


def _check_privileged(settings: Settings, objective: Any, collector: type[RolloutCollector]) -> None:
    told = settings.privileged.privileged
    if told == "nothing":
        if "teacher_mask" in objective.required_inputs:
            raise ValueError(
                f"privileged: expected answer or attempt because of {settings.objective.method}, whose teacher is told "
                f"more than the student, got nothing"
            )
    elif not distils(objective):
        raise ValueError(f"privileged: expected nothing because {settings.objective.method} has no teacher, got {told}")
    elif not issubclass(collector, SingleTurn):
        raise ValueError(f"privileged: expected nothing because rows are not whole responses to a prompt, got {told}")
    elif told == "attempt" and settings.sampling.group == 1:
        raise ValueError("group: expected at least 2 because the teacher is told another response of the group, got 1")
    if settings.privileged.feedback is not None:
        teaching.feedback(settings.privileged.feedback)


def _check_group(settings: Settings, objective: Any) -> None:
    """Raise if the credit compares the responses to a prompt, and there is one response."""
    if settings.sampling.group > 1 or objective.required_inputs & inputs.names("tree_sampler"):
        return

    def compares(credit: Credit) -> bool:
        rows, rewards = torch.arange(2), torch.tensor([0.0, 1.0])
        together, apart = (
            credit(Rollouts(rows, torch.arange(3), group_ids, rewards)) for group_ids in (torch.zeros_like(rows), rows)
        )
        return not together.equal(apart)

    credits = (x for x in objective.stages() if isinstance(x, Credit) and not x.required_inputs)
    if any(map(compares, credits)):
        raise ValueError(
            f"group: expected at least 2 because the credit of {settings.objective.method} compares the responses to a "
            f"prompt, got {settings.sampling.group}"
        )


def _length_stage(objective: Any) -> Any:
    return next((x for x in objective.stages() if x.reads & inputs.names("length_head")), None)


def collector(settings: Settings, wanted: frozenset[str], problems: Problems) -> type[RolloutCollector]:
    """Return the class that collects rollouts.

    Args:
        settings: Settings of the run.
        wanted: Names of the inputs that the objective requires.
        problems: The problems.

    Raises:
        ValueError: The inputs cannot be collected with tools.
    """
    with_tools = any(p.calls is not None for p in problems.held_out)
    in_worlds = any(p.world is not None for p in problems.held_out)
    method, chosen = settings.objective.method, ", ".join(settings.tasks)
    single = ["continuations", "probes", "tree_sampler", "replay", "length_head"]
    if in_worlds:  # which have no true answer
        single += ["turn_answers", "ref_turn_answers"]
    if (with_tools or in_worlds) and (others := wanted & frozenset().union(*map(inputs.names, single))):
        kind = "tools" if with_tools else "an environment"
        raise ValueError(
            f"tasks: expected tasks without {kind} because {method} requires {', '.join(sorted(others))}, got {chosen}"
        )
    if wanted & inputs.names("tree_sampler"):
        return Trees
    if in_worlds:
        return Episodes
    if others := wanted & inputs.names("environment") - {"turn_rewards", "turn_ids"}:
        raise ValueError(
            f"tasks: expected tasks with an environment, such as minigrid(), because {method} requires "
            f"{', '.join(sorted(others))}, got {chosen}"
        )
    if with_tools or wanted & inputs.names("environment"):
        return Conversations
    return Replay if wanted & inputs.names("replay") else SingleTurn


def check_collected(objective: Any, method: str, others: Collection[str]) -> None:
    """Check that the trainer collects what an objective requires and computes what it differentiates.

    Args:
        objective: The objective.
        method: Name of its method, for errors.
        others: Collectors that the trainer does not have.

    Raises:
        ValueError: It does not.
    """
    by_forward = collectors.collected()
    wanted = objective.required_inputs
    missing = wanted & frozenset().union(*map(inputs.names, others)) | {
        x for x in wanted & by_forward if not collectors.computes(x)
    }
    if missing:
        raise ValueError(
            f"method: expected an objective whose inputs the trainer collects, got {method}, "
            f"which requires {', '.join(sorted(missing))}"
        )
    if unknown := [name for name in objective.variables if not collectors.computes(name)]:
        raise ValueError(
            f"method: expected an objective of variables that a forward pass computes, got {method}, "
            f"which differentiates {', '.join(unknown)}"
        )


class Trainer:
    """A policy and everything that trains it on rollouts; :func:`tokcredit.train.run` records it into a folder.

    Args:
        settings: Settings without open defaults; see :func:`tokcredit.train.experiment.resolved`.

    Raises:
        ValueError: A setting is wrong; see :func:`checked`.

    Attributes:
        curve: Which metrics the learning curve shows.
    """

    curve = REWARDS

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.objective, self.problems, make = checked(settings)
        required_inputs = self.objective.required_inputs
        self.accelerator = Accelerator(mixed_precision=settings.optimizer.precision)
        self.ranks = Ranks(self.accelerator)
        self.model, self.tokenizer = policy.load(settings, self.accelerator)
        teacher = teaching.made(settings, self.model, self.tokenizer)
        s, half = settings.sampling, settings.optimizer.precision == "bf16"
        deviations = (x for x in self.objective.stages() if isinstance(x, entropy_deviation))
        self.deviation = next(deviations, entropy_deviation())
        literal = self.deviation.literal_sign
        self.adaptive = AdaptiveTemperature(s.temperature, s.adaptive, None, literal) if s.adaptive else None
        sampler: Sampler
        if s.sampler == "vllm":
            sampler = self._vllm(torch.bfloat16 if half else torch.float32)
        else:
            dtype = torch.bfloat16 if half else None
            sampler = TransformersSampler(self.model, self.tokenizer, dtype, s.sampling_batch, self.adaptive)
        self.context = SamplingContext(settings, self.problems, self.tokenizer, sampler, self.ranks)
        self.context.prompt.prefix = adapter.prefix(self.model)
        self.rollout_collector = make(self.context)
        reference = policy.reference(self.objective, self.model)
        loaded = (settings, self.model, self.tokenizer)
        further = {
            "critic": critic.made(*loaded),
            "aligned": policy.aligned(*loaded),
            "reverse_teacher": teaching.reverse(*loaded),
            "teacher_scores": teaching.scores(settings, self.objective, teacher, *loaded[1:], self.accelerator),
        }
        models = (self.model, reference, teacher)
        self.learner = Learner(settings, self.objective, *models, self.accelerator, **further)
        self.privileged = None
        if teacher:
            self.privileged = teaching.PrivilegedPrompts(settings.privileged, self.context.prompt, teacher.longest)
        self.prober = Prober(self.context, self.learner.score)
        self.lengths = self._length_learner() if required_inputs & inputs.names("length_head") else None
        self.reward_model = implicit.made(settings, self.objective, self.model, self.tokenizer, self.accelerator)
        everything = (*self.problems.held_out, *chain.from_iterable(self.problems.train))
        self.roles = baselines.Roles(everything, self.ranks) if "role_baselines" in required_inputs else None
        self._skipped = Counter[str]()
        self.accelerator.register_for_checkpointing(self)

    def _vllm(self, dtype: torch.dtype) -> Sampler:
        from tokcredit.adapters import vllm

        return vllm.VllmSampler.of(self.model, self.tokenizer, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside weights, for a checkpoint."""
        return {
            "temperature": self.adaptive.statistics if self.adaptive else None,
            "rollout_collector": self.rollout_collector.state_dict(),
            "lengths": self.lengths.state_dict() if self.lengths else None,
            "skipped": dict(self._skipped),
            "roles": self.roles.state_dict() if self.roles else None,
            "reward_model": self.reward_model.state_dict() if self.reward_model else None,
            **self.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`.
        """
        if self.adaptive:
            self.adaptive.statistics = state["temperature"]
        if self.lengths:
            self.lengths.load_state_dict(state["lengths"])
        if self.reward_model:
            self.reward_model.load_state_dict(state["reward_model"])
        if self.roles:
            self.roles.load_state_dict(state["roles"])
        self._skipped = Counter(state.get("skipped", {}))
        self.rollout_collector.load_state_dict(state["rollout_collector"])
        self.learner.load_state_dict(state)

    @property
    def introduction(self) -> str:
        """What is trained on, for the user."""
        problems = self.problems
        return (
            f"{' + '.join(self.settings.tasks)}: {sum(map(len, problems.train))} problems to train on, "
            f"{len(problems.held_out)} held out"
        )

    def measure(self) -> dict[str, float]:
        """Return what is measured on held-out problems, by name."""
        return {self.curve.held_out: self.evaluate()}

    def evaluate(self) -> float:
        """Return the mean reward on held-out problems, over all processes."""
        return self.context.evaluate(self.rollout_collector.attempt)

    def step(self, number: int) -> Step:
        """Collect rollouts, update the policy and return the step.

        Args:
            number: Number of the step, from 1.
        """
        clock = Clock()
        with clock("sample"):
            collection = self.rollout_collector.collect(number).judged()
            if "greedy_rewards" in self.objective.required_inputs:
                collection = baselines.with_greedy(collection, self.rollout_collector.attempt)
            pairs: dict[str, float] = {}
            if isinstance(self.objective, Preference):
                collection, pairs["pairs_skipped"] = self._pairs(collection, number)
        with clock("train"):
            batch, learned = self._with_inputs(collection, number), dict[str, float]()
            if self.reward_model:
                batch, learned = self.reward_model(batch)
            update = self.learner.update(batch, number, clock)
        if self.adaptive and not update.skipped:
            everything, _ = self.ranks.gather(batch, frozenset({"entropies"}))
            self.adaptive.statistics = self.deviation.statistics(everything)
        metrics = update.metrics | pairs | learned | self.ranks.mean(self._measured(collection, update))
        failures = torch.tensor(self.context.rewards.failures())
        metrics |= self.ranks.sum({"tokens": batch.lengths.sum(), "reward_failures": failures})
        if self.settings.critic.critic is not None:
            metrics["explained_variance"] = critic.explained(batch, self.ranks)
        self.learner.observe(metrics)
        if "reward_model_loss" in learned:
            self._count(number, "reward model", learned["reward_model_loss"], metrics)
        if self.lengths:
            metrics["length_loss"] = self.lengths.update(batch, ~batch.input("truncated"))
            self._count(number, "length head", metrics["length_loss"], metrics)
        seconds = clock.seconds["sample_seconds"] + clock.seconds["train_seconds"]
        return Step(collection, update, {**metrics, **clock.seconds, "seconds": seconds})

    def _count(self, number: int, model: str, loss: float, metrics: dict[str, float]) -> None:
        """Count an update of a model beside the policy as skipped if its loss is not finite, or stop the run."""
        self._skipped[model] = 0 if math.isfinite(loss) else self._skipped[model] + 1
        if self._skipped[model]:
            self.learner.refuse(number, f"a loss or a gradient of the {model}", self._skipped[model])
            metrics["skipped_updates"] += 1

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return what the progress bar shows of a step.

        Args:
            metrics: Its metrics.
        """
        return {"reward": f"{metrics['reward_mean']:.2f}", "length": f"{metrics['length_mean']:.0f}"}

    def write(self, folder: Path) -> None:
        """Write nothing: the metrics and rollouts of the steps are all that there is.

        Args:
            folder: Folder of the run.
        """

    def _pairs(self, collection: RolloutCollection, number: int) -> tuple[RolloutCollection, float]:
        """Return the collection without responses of equal reward, and the number of pairs that were skipped."""
        paired = collection.paired()
        skipped = collection.batch.num_groups - paired.batch.num_groups
        counts = self.ranks.sum({"left": torch.tensor(paired.batch.num_groups), "skipped": torch.tensor(skipped)})
        if not counts["left"]:
            raise RuntimeError(
                f"step {number}: expected two responses with different rewards to at least one prompt, got equal "
                f"rewards for all {counts['skipped']:g}; more --prompts, or a --reward that tells responses apart, help"
            )
        return paired, counts["skipped"]

    def _measured(self, collection: RolloutCollection, update: Update) -> dict[str, Tensor]:
        """Return the means that describe the rollouts of this process."""
        batch = update.prepared.batch.whole
        groups, outcomes = Groups.of(collection.outcome_groups), collection.outcomes.double()
        mixed = segment.maximum(outcomes, groups) > segment.minimum(outcomes, groups)
        out = {
            "reward_mean": outcomes.mean(),
            "length_mean": batch.lengths.double().mean(),
            "finished_fraction": collection.finished.double().mean(),
            "groups_mixed_fraction": mixed.double().mean(),
            "rows_with_gradient_fraction": update.prepared.has_gradient.double().mean(),
        }
        if batch.has_input("old_log_probs") and batch.has_input("rollout_log_probs"):
            gap = (batch.input("old_log_probs") - batch.input("rollout_log_probs")).abs()
            out["rollout_log_prob_gap_mean"] = segment.mean(gap, batch.spans).double().mean()
        if batch.has_input("turn_rewards"):
            out["turn_reward_sum_mean"] = batch.input("turn_rewards").double().sum() / batch.num_rows
        return out

    def _with_inputs(self, collection: RolloutCollection, number: int) -> Rollouts:
        """Return the rollouts with all inputs that the objective requires."""
        wanted, others = self.objective.required_inputs, frozenset[str]()
        if self.adaptive:
            others |= {"entropies"}
        if "state_values" in wanted:
            others |= {"old_log_probs"}
        if self.lengths:
            others |= {"hidden_states"}
        batch = collection.batch
        if self.privileged:
            batch = self.privileged(batch, collection.problems, collection.responses)
        batch = self.learner.with_inputs(batch, others)
        if wanted & (inputs.names("continuations") | inputs.names("probes")):
            batch = batch.with_inputs(**self.prober.probe(wanted, batch, collection.problems, number))
        for collector, prefix, log_probs_of in (
            ("turn_answers", "", lambda forced: self.learner.score(forced)[0]),
            ("ref_turn_answers", "ref_", self.learner.ref_log_probs),
        ):
            if wanted & inputs.names(collector):
                after, first = self.prober.answers_of_turns(batch, collection.problems, log_probs_of)
                names = (f"{prefix}answer_log_probs", f"{prefix}initial_answer_log_probs")
                batch = batch.with_inputs(**dict(zip(names, (after, first), strict=True)))
        if self.roles:
            batch = batch.with_inputs(role_baselines=self.roles.of(batch, collection.problems))
        if self.lengths:
            batch = batch.with_inputs(length_values=self.lengths.values(batch))
        if "value_targets" in wanted:
            batch = batch.with_inputs(value_targets=self.objective.credit.targets(batch))
        return batch

    def _length_learner(self) -> LengthLearner:
        stage = _length_stage(self.objective)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            head = LengthHead(self.model.config.hidden_size).to(self.accelerator.device)
        return LengthLearner(head, stage.gamma, self.ranks)
