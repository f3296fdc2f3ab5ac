"""The training loop: explore, then learn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from tokcredit import segment
from tokcredit.score import entropy_deviation
from tokcredit.temperature import AdaptiveTemperature
from tokcredit.train import evidence, models, tasks
from tokcredit.train.clock import Clock
from tokcredit.train.explorer import Desk, Explored, Explorer, Replies
from tokcredit.train.learner import Learner, Learnt
from tokcredit.train.ranks import Ranks
from tokcredit.train.replay import Replay
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.settings import Settings


class Step(NamedTuple):
    """A step's rollouts, what came of them, and its numbers."""

    explored: Explored
    learnt: Learnt
    metrics: dict[str, float]


class Trainer:
    """A policy and everything that trains it; :func:`tokcredit.train.run` records it into a folder.

    Args:
        settings: resolved ones.

    Raises:
        ValueError: the objective needs evidence that is not collected, or several processes cannot carry it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.objective = settings.objective.build()
        method = settings.objective.method
        if unknown := self.objective.needs - evidence.COLLECTED:
            raise ValueError(
                f"method: expected one whose evidence is among {', '.join(sorted(evidence.COLLECTED))}, "
                f"got {method}, which needs {', '.join(sorted(unknown))}"
            )
        self.accelerator = Accelerator(mixed_precision=settings.optimizer.precision)
        self.ranks = Ranks(self.accelerator)
        if self.ranks.count > 1 and self.objective.spans_groups:
            raise ValueError(
                f"method: expected one that compares rows inside their groups because there are {self.ranks.count} "
                f"processes, got {method}"
            )
        self.problems = tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)
        with self.accelerator.main_process_first():
            model, self.tokenizer = models.load(settings.model)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        # Without the float32 wrapper of the outputs, which would copy all logits.
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        teacher = self._teacher() if evidence.needs_teacher(self.objective.needs) else None
        s, half = settings.sampling, settings.optimizer.precision == "bf16"
        self.adaptive = AdaptiveTemperature(s.temperature, s.adaptive) if s.adaptive else None
        sampler = TransformersSampler(
            self.model, self.tokenizer, torch.bfloat16 if half else None, s.sampling_batch, self.adaptive
        )
        self.desk = Desk(settings, self.problems, self.tokenizer, sampler, self.ranks)
        replays = "replayed" in self.objective.needs
        self.explorer: Explorer = Replay(self.desk) if replays else Replies(self.desk)
        self.learner = Learner(settings, self.objective, self.model, teacher, self.accelerator)
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        """What a step hands to the next besides weights."""
        statistics = self.adaptive.statistics if self.adaptive else None
        return {"temperature": statistics, "explorer": self.explorer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As after the step whose :meth:`state_dict` this is."""
        if self.adaptive:
            self.adaptive.statistics = state["temperature"]
        self.explorer.load_state_dict(state["explorer"])

    def step(self, number: int) -> Step:
        """Step ``number``, counted from 1."""
        clock = Clock()
        with clock("sample"):
            explored = self.explorer.explore(number)
        with clock("train"):
            learnt = self.learner.learn(explored.batch, number, clock)
        batch = learnt.prepared.batch
        if self.adaptive:
            self.adaptive.statistics = entropy_deviation().statistics(batch)
        spread = segment.var(batch.rewards, segment.Ids(batch.group_index, batch.num_groups))
        seconds = clock.seconds["sample_seconds"] + clock.seconds["train_seconds"]
        metrics = learnt.metrics | self.ranks.mean(
            {
                "reward": explored.outcomes.double().mean(),
                "length": batch.lengths.double().mean(),
                "finished": explored.finished.double().mean(),
                "groups_with_signal": (spread > 0).double().mean(),
                "rows_with_credit": learnt.prepared.has_credit.double().mean(),
            }
        )
        metrics |= self.ranks.sum({"tokens": batch.lengths.sum()})
        return Step(explored, learnt, {**metrics, **clock.seconds, "seconds": seconds})

    def _teacher(self) -> Any:
        if self.settings.teacher is None:
            raise ValueError(f"teacher: expected a model because of {self.settings.objective.method}, got None")
        teacher, words = models.load(self.settings.teacher)
        if words.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"teacher: expected the tokens of {self.settings.model}, got {self.settings.teacher}")
        return teacher.to(self.accelerator.device)
