"""The training loop: explore, then learn."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from tokcredit.blocks import segment
from tokcredit.stages.aggregation import sequence_sum
from tokcredit.stages.base import parts
from tokcredit.stages.credit import shortening
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages.token_score import entropy_deviation
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.train import evidence, models, tasks
from tokcredit.train.clock import Clock
from tokcredit.train.conversations import Conversations
from tokcredit.train.explorer import SamplingContext, Explored, Explorer, Replies
from tokcredit.train.learner import Learner, Learnt
from tokcredit.train.lengths import LengthHead, LengthLearner
from tokcredit.train.probes import PROBED, Prober
from tokcredit.train.ranks import Ranks
from tokcredit.train.replay import Replay
from tokcredit.train.sampler import Sampler, TransformersSampler
from tokcredit.train.settings import Settings
from tokcredit.train.trees import Trees
from tokcredit.stages.token_weights import importance_truncated

_TREES = frozenset({"node_ids", "parent_ids"})
_MADE = frozenset({"rollout_log_probs", "truncated", "replayed", "turn_rewards", "length_values"})
COLLECTED = evidence.COLLECTED | PROBED | _TREES | _MADE
"""Names of the evidence that the trainer can give an objective."""


class Step(NamedTuple):
    """A step's rollouts, what came of them, and its numbers."""

    explored: Explored
    learnt: Learnt
    metrics: dict[str, float]


def _with_length(objective: Objective, longest: int) -> Objective:
    """The longest response possible where the aggregation asks for it, in place of the longest of each batch."""
    aggregate = objective.aggregation
    if isinstance(aggregate, sequence_sum) and aggregate.length is None:
        return dataclasses.replace(objective, aggregation=sequence_sum(longest))
    return objective


def _corrected(objective: Objective) -> Objective:
    """Weighted for an engine whose probabilities differ from the trainer's, unless it already is."""
    if any("rollout_log_probs" in weight.required_inputs for weight in objective.weights):
        return objective
    return dataclasses.replace(objective, weights=(*objective.weights, importance_truncated()))


class Trainer:
    """A policy and everything that trains it; :func:`tokcredit.train.run` records it into a folder.

    Args:
        settings: resolved ones.

    Raises:
        ValueError: the objective needs evidence that is not collected.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.objective = _with_length(settings.objective.build(), settings.sampling.max_tokens)
        if settings.sampling.sampler == "vllm" and settings.objective.weights is None:
            self.objective = _corrected(self.objective)
        method = settings.objective.method
        required_inputs = self.objective.required_inputs
        if unknown := required_inputs - COLLECTED:
            raise ValueError(
                f"method: expected one whose evidence is among {', '.join(sorted(COLLECTED))}, "
                f"got {method}, which needs {', '.join(sorted(unknown))}"
            )
        self.accelerator = Accelerator(mixed_precision=settings.optimizer.precision)
        self.ranks = Ranks(self.accelerator)
        self.problems = tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)
        with self.accelerator.main_process_first():
            model, self.tokenizer = models.load(settings.model)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        # Without the float32 wrapper of the outputs, which would copy all logits.
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        teacher = self._teacher() if evidence.needs_teacher(required_inputs) else None
        s, half = settings.sampling, settings.optimizer.precision == "bf16"
        self.score = next((p for p in parts(self.objective) if isinstance(p, entropy_deviation)), entropy_deviation())
        literal = self.score.literal_sign
        self.adaptive = AdaptiveTemperature(s.temperature, s.adaptive, None, literal) if s.adaptive else None
        sampler: Sampler
        if s.sampler == "vllm":
            sampler = self._vllm(torch.bfloat16 if half else torch.float32)
        else:
            dtype = torch.bfloat16 if half else None
            sampler = TransformersSampler(self.model, self.tokenizer, dtype, s.sampling_batch, self.adaptive)
        self.context = SamplingContext(settings, self.problems, self.tokenizer, sampler, self.ranks)
        self.explorer = self._explorer()
        self.learner = Learner(settings, self.objective, self.model, teacher, self.accelerator)
        self.prober = Prober(self.context, self.learner.score)
        self.lengths = self._length_learner() if "length_values" in required_inputs else None
        self.accelerator.register_for_checkpointing(self)

    def _vllm(self, dtype: torch.dtype) -> Sampler:
        if self.adaptive:
            raise ValueError(f"adaptive: expected 0 because the sampler is vllm, got {self.settings.sampling.adaptive}")
        from tokcredit.adapters import vllm

        return vllm.VllmSampler.of(self.model, self.tokenizer, dtype)

    def state_dict(self) -> dict[str, Any]:
        """What a step hands to the next besides weights."""
        statistics = self.adaptive.statistics if self.adaptive else None
        lengths = self.lengths.state_dict() if self.lengths else None
        return {"temperature": statistics, "explorer": self.explorer.state_dict(), "lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As after the step whose :meth:`state_dict` this is."""
        if self.adaptive:
            self.adaptive.statistics = state["temperature"]
        if self.lengths:
            self.lengths.load_state_dict(state["lengths"])
        self.explorer.load_state_dict(state["explorer"])

    def evaluate(self) -> float:
        """Mean reward on held-out problems, over all processes."""
        return self.context.evaluate(self.explorer.attempt)

    def step(self, number: int) -> Step:
        """Step ``number``, counted from 1."""
        clock = Clock()
        with clock("sample"):
            explored = self.explorer.explore(number)
        with clock("train"):
            batch = self._with_evidence(explored, number)
            learnt = self.learner.learn(batch, number, clock)
        if self.adaptive:
            everything, _ = self.ranks.gather(batch, frozenset({"entropies"}))
            self.adaptive.statistics = self.score.statistics(everything)
        paid = learnt.prepared.has_gradient
        groups = segment.maximum(paid.double(), segment.Ids(batch.group_index, batch.num_groups))
        seconds = clock.seconds["sample_seconds"] + clock.seconds["train_seconds"]
        metrics = learnt.metrics | self.ranks.mean(
            {
                "reward": explored.outcomes.double().mean(),
                "length": batch.lengths.double().mean(),
                "finished": explored.finished.double().mean(),
                "groups_with_signal": groups.mean(),
                "rows_with_credit": paid.double().mean(),
            }
        )
        if batch.old_log_probs is not None and batch.rollout_log_probs is not None:
            # How far the engine that samples is from the model that trains, in nats per token.
            gap = (batch.old_log_probs - batch.rollout_log_probs).abs()
            metrics |= self.ranks.mean({"engine_gap": segment.mean(gap, batch.spans).double().mean()})
        metrics |= self.ranks.sum({"tokens": batch.lengths.sum()})
        if "turn_rewards" in batch.extras:
            metrics |= self.ranks.mean({"turn_rewards": batch.extras["turn_rewards"].double().sum() / batch.num_rows})
        if self.lengths:
            metrics["length_loss"] = self.lengths.learn(batch, ~batch.input("truncated"))
        return Step(explored, learnt, {**metrics, **clock.seconds, "seconds": seconds})

    def _explorer(self) -> Explorer:
        required_inputs = self.objective.required_inputs
        called = any(p.calls is not None for p in self.problems.held_out)
        if called and (others := required_inputs & (PROBED | _TREES | {"replayed"})):
            raise ValueError(
                f"tasks: expected ones that call no tools because {self.settings.objective.method} needs "
                f"{', '.join(sorted(others))}, got {', '.join(self.settings.tasks)}"
            )
        if required_inputs & _TREES:
            return Trees(self.context)
        if called or "turn_rewards" in required_inputs:
            return Conversations(self.context)
        return Replay(self.context) if "replayed" in required_inputs else Replies(self.context)

    def _with_evidence(self, explored: Explored, number: int) -> Rollouts:
        required_inputs, others = self.objective.required_inputs, frozenset[str]()
        if self.adaptive:
            others |= {"entropies"}
        if "state_values" in required_inputs:
            others |= {"old_log_probs"}
        if self.lengths:
            others |= {"hidden_states"}
        batch = self.learner.with_evidence(explored.batch, others)
        found = self.prober.probe(required_inputs, batch, explored.problems, number) if required_inputs & PROBED else {}
        if self.lengths:
            found["length_values"] = self.lengths.values(batch)
        return dataclasses.replace(batch, extras={**batch.extras, **found}) if found else batch

    def _length_learner(self) -> LengthLearner:
        paid = self.objective.credit
        if not isinstance(paid, shortening):
            raise ValueError(f"credit: expected shortening because of length_values, got {paid}")
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            head = LengthHead(self.model.config.hidden_size).to(self.accelerator.device)
        return LengthLearner(head, paid.gamma, self.ranks)

    def _teacher(self) -> Any:
        if self.settings.teacher is None:
            raise ValueError(f"teacher: expected a model because of {self.settings.objective.method}, got None")
        teacher, words = models.load(self.settings.teacher)
        if words.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"teacher: expected the tokens of {self.settings.model}, got {self.settings.teacher}")
        return teacher.to(self.accelerator.device)
