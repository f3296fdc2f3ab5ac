"""The training loop: collect rollouts, then update the policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from tokcredit import inputs
from tokcredit.blocks import segment
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.groups import Groups
from tokcredit.methods.hapo import entropy_deviation
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.train import (
    adapter,
    baselines,
    compatibility,
    critic,
    implicit,
    policy,
)
from tokcredit.train import teacher as teaching
from tokcredit.train.clock import Clock
from tokcredit.train.curve import REWARDS
from tokcredit.train.learner import Learner, Update
from tokcredit.train.lengths import LengthHead, LengthLearner
from tokcredit.train.older_weights import OlderWeights
from tokcredit.train.probes import Prober
from tokcredit.train.ranks import Ranks
from tokcredit.train.rollout_collection import RolloutCollection, SamplingContext
from tokcredit.train.sampler import Sampler, TransformersSampler
from tokcredit.train.settings import Settings


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
        self.objective, self.problems, make = compatibility.checked(settings)
        required_inputs = self.objective.required_inputs
        self.accelerator = Accelerator(mixed_precision=settings.optimizer.precision)
        self.ranks = Ranks(self.accelerator)
        self.model, self.tokenizer = policy.load(settings, self.accelerator)
        teacher = teaching.made(settings, self.model, self.tokenizer)
        s, half = settings.sampling, settings.sampler_precision == "bf16"
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
        self.older = OlderWeights(self.model, s.staleness) if s.staleness else None
        self.context = SamplingContext(settings, self.problems, self.tokenizer, sampler, self.ranks)
        self.context.prompt.prefix = adapter.prefix(self.model)
        self.rollout_collector = make(self.context)
        reference = policy.reference(self.objective, self.model)
        loaded = (settings, self.model, self.tokenizer)
        further = {
            "critic": critic.made(*loaded),
            "aligned": policy.beside("aligned", settings.aligned, *loaded),
            "reverse_teacher": policy.beside("reverse_teacher", settings.collectors.reverse_teacher, *loaded),
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
            "older_weights": self.older.state_dict() if self.older else None,
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
        if self.older:
            self.older.load_state_dict(state["older_weights"])
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
            collection = self._collected(number)
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
        metrics = update.metrics | pairs | learned | self._measured(collection, update)
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

    def _collected(self, number: int) -> RolloutCollection:
        """Return the rollouts of a step, sampled with the weights that the settings say."""
        with self.older.in_place() if self.older else nullcontext():
            collection = judged = self.rollout_collector.collect(number).judged(self.ranks)
            if "greedy_rewards" in self.objective.required_inputs:
                attempt = self.rollout_collector.attempt
                collection = self.ranks.together(lambda: baselines.with_greedy(judged, attempt))
        if self.older:  # continuations of the rollouts are those of the policy
            self.ranks.together(self.context.sampler.sync)
        return collection

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

    def _measured(self, collection: RolloutCollection, update: Update) -> dict[str, float]:
        """Return the means that describe the rollouts of all processes, some of which may have no pair of a step."""
        batch = update.prepared.batch.whole
        groups, outcomes = Groups.of(collection.outcome_groups), collection.outcomes.double()
        mixed = segment.maximum(outcomes, groups) > segment.minimum(outcomes, groups)
        out = {
            "reward_mean": outcomes,
            "length_mean": batch.lengths,
            "finished_fraction": collection.finished,
            "groups_mixed_fraction": mixed,
            "rows_with_gradient_fraction": update.prepared.has_gradient,
        }
        if batch.has_input("old_log_probs") and batch.has_input("rollout_log_probs"):
            gap = (batch.input("old_log_probs") - batch.input("rollout_log_probs")).abs()
            out["rollout_log_prob_gap_mean"] = segment.mean(gap, batch.spans)
        if batch.has_input("turn_rewards"):
            out["turn_reward_sum_mean"] = segment.sum(batch.input("turn_rewards").double(), batch.all_spans)
        sums = self.ranks.sum({name: x.double().sum() for name, x in out.items()})
        counts = self.ranks.sum({name: torch.tensor(len(x)) for name, x in out.items()})
        return {name: total / counts[name] for name, total in sums.items()}

    def _with_inputs(self, collection: RolloutCollection, number: int) -> Rollouts:
        """Return the rollouts with all inputs that the objective requires."""
        batch = self.ranks.together(lambda: self._scored(collection, number))
        if self.roles:
            batch = batch.with_inputs(role_baselines=self.roles.of(batch, collection.problems))
        if self.lengths:
            batch = batch.with_inputs(length_values=self.lengths.values(batch))
        if "value_targets" in self.objective.required_inputs:
            batch = batch.with_inputs(value_targets=self.objective.credit.targets(batch))
        return batch

    def _scored(self, collection: RolloutCollection, number: int) -> Rollouts:
        """Return the rollouts with the inputs that need no other process."""
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
        return batch

    def _length_learner(self) -> LengthLearner:
        stage = compatibility.length_stage(self.objective)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            head = LengthHead(self.model.config.hidden_size).to(self.accelerator.device)
        return LengthLearner(head, stage.gamma, self.ranks)
