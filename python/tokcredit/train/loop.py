"""The training loop: sample, reward, credit, update."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from tokcredit import segment
from tokcredit.objective import Prepared
from tokcredit.rollouts import Rollouts
from tokcredit.score import entropy_deviation
from tokcredit.temperature import AdaptiveTemperature
from tokcredit.train import evidence, models, tasks
from tokcredit.train.sampler import Sampler, TransformersSampler
from tokcredit.train.scoring import left_padded
from tokcredit.train.settings import OptimizerSettings, Settings


class Step(NamedTuple):
    """What a step sampled, how it was paid, and what came of it.

    Attributes:
        problems: of each rollout.
        replies: text of each rollout.
        prepared: the rollouts with their credit.
        log_probs: ``[N]``, at the last pass over the rollout; NaN where it was paid nothing.
        metrics: numbers by name, over all ranks.
    """

    problems: list[tasks.Problem]
    replies: list[str]
    prepared: Prepared
    log_probs: Tensor
    metrics: dict[str, float]


class Trainer:
    """A policy, its optimizer and everything that trains it; :func:`tokcredit.train.run` records it into a folder.

    Args:
        settings: resolved ones: no field that the recipe decides is None.

    Raises:
        ValueError: the objective needs evidence that the loop does not collect, or the prompts do not divide by ranks.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        sampling, optimizer = settings.sampling, settings.optimizer
        self.objective = settings.objective.build()
        if unknown := self.objective.needs - evidence.COLLECTED:
            raise ValueError(
                f"method: expected one whose evidence is among {', '.join(sorted(evidence.COLLECTED))}, "
                f"got {settings.objective.method}, which needs {', '.join(sorted(unknown))}"
            )
        self.accelerator = Accelerator(mixed_precision=optimizer.precision)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if sampling.prompts % self.ranks:
            raise ValueError(f"prompts: expected a multiple of the {self.ranks} processes, got {sampling.prompts}")
        if self.ranks > 1 and self.objective.spans_groups:
            raise ValueError(
                "method: expected one that compares rows inside their groups because there are "
                f"{self.ranks} processes, got {settings.objective.method}"
            )
        self.problems = tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)
        with self.accelerator.main_process_first():
            model, self.tokenizer = models.load(settings.model)
        # Without the float32 wrapper of the outputs, which would copy all logits.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.reference = copy.deepcopy(self.model) if "ref_log_probs" in self.objective.needs else None
        self.teacher = self._teacher() if evidence.needs_teacher(self.objective.needs) else None
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(self.model.parameters(), lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True)
        )
        dtype = torch.bfloat16 if optimizer.precision == "bf16" else None
        self.adaptive = AdaptiveTemperature(sampling.temperature, sampling.adaptive) if sampling.adaptive else None
        self.accelerator.register_for_checkpointing(self)
        self.sampler: Sampler = TransformersSampler(
            self.model, self.tokenizer, dtype, sampling.sampling_batch, self.adaptive
        )

    def state_dict(self) -> dict[str, Any]:
        """What a step hands to the next besides weights."""
        return {"temperature": self.adaptive.statistics if self.adaptive else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As after the step whose :meth:`state_dict` this is."""
        if self.adaptive:
            self.adaptive.statistics = state["temperature"]

    def _teacher(self) -> Any:
        if self.settings.teacher is None:
            raise ValueError(f"teacher: expected a model because of {self.settings.objective.method}, got None")
        teacher, words = models.load(self.settings.teacher)
        if words.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"teacher: expected the tokens of {self.settings.model}, got {self.settings.teacher}")
        return teacher.to(self.accelerator.device)

    def step(self, number: int) -> Step:
        """Samples, pays and learns from the prompts of step ``number``, counted from 1."""
        clock = _Clock()
        with clock("sample"):
            problems, batch, replies, finished = self._rollouts(number)
        with clock("train"):
            batch = self._evidence(batch)
            with clock("credit"):
                progress = (number - 1) / max(self.settings.steps - 1, 1)
                prepared = self._over_ranks(self.objective.prepare(batch, progress=progress))
            if self.adaptive:
                self.adaptive.statistics = entropy_deviation().statistics(batch)
            metrics, log_probs = self._update(prepared, number, clock)
        lengths = batch.lengths.float()
        # The spread inside each group: where it is 0 nothing can be told from the rewards.
        spread = segment.var(batch.rewards, segment.Ids(batch.group_index, batch.num_groups))
        metrics |= self._mean(
            {
                "reward": batch.rewards.mean(),
                "length": lengths.mean(),
                "finished": finished.float().mean(),
                "groups_with_signal": (spread > 0).float().mean(),
                "rows_with_credit": prepared.has_credit.float().mean(),
            }
        )
        tokens = self._sum({"tokens": lengths.sum()})["tokens"]
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "tokens": tokens, **clock.seconds}
        metrics["seconds"] = clock.seconds["sample_seconds"] + clock.seconds["train_seconds"]
        return Step(problems, replies, prepared, log_probs, metrics)

    def evaluate(self) -> float:
        """Mean reward of greedy replies to held-out problems."""
        everything = self.problems.held_out
        count = min(len(everything), self.settings.eval_problems)
        chosen = [everything[i * len(everything) // count] for i in range(count)][self.rank :: self.ranks]
        self.sampler.sync()
        _, replies, _ = self._sample(chosen, 1, 0.0)
        rewards = [p.reward(reply) for p, reply in zip(chosen, replies, strict=True)]
        total = self._sum({"reward": torch.tensor(rewards).sum(), "count": torch.tensor(len(rewards))})
        return total["reward"] / total["count"]

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self._sum({"flag": torch.tensor(float(flag))})["flag"] > 0

    def _sample(self, problems: Sequence[tasks.Problem], count: int, temperature: float) -> Any:
        prompts = [self._prompt(p.question) for p in problems]
        made = self.sampler.sample(prompts, count, self.settings.sampling.max_tokens, temperature)
        rows = made.tokens.split(made.cu_seqlens.diff().tolist())
        return prompts, self.tokenizer.batch_decode(rows, skip_special_tokens=True), made

    def _prompt(self, question: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(question).input_ids)
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _rollouts(self, number: int) -> tuple[list[tasks.Problem], Rollouts, list[str], Tensor]:
        s = self.settings.sampling
        everything = self.problems.step(number - 1, s.prompts, self.settings.seed)
        mine = range(self.rank, len(everything), self.ranks)
        chosen, group = [everything[i] for i in mine], s.group
        self.sampler.sync()
        with torch.random.fork_rng():
            # Seeded anew in each step, so that a resumed run draws what an uninterrupted one would.
            torch.manual_seed(_mixed(self.settings.seed, number, self.rank))
            prompts, replies, made = self._sample(chosen, group, s.temperature)
        problems = [p for p in chosen for _ in range(group)]
        rewards = [p.reward(reply) for p, reply in zip(problems, replies, strict=True)]
        device = made.tokens.device
        batch = Rollouts(
            made.tokens,
            made.cu_seqlens,
            group_ids=torch.tensor([i for i in mine for _ in range(group)], device=device),
            rewards=torch.tensor(rewards, dtype=torch.float32, device=device),
            rollout_log_probs=made.log_probs,
            extras={"prompt_tokens": left_padded(prompts, -1, device)[0].repeat_interleave(group, 0)},
        )
        return problems, batch, replies, made.finished

    def _evidence(self, batch: Rollouts) -> Rollouts:
        """The batch with what the objective reads of the policy before the update, and of other models."""
        needs, o = self.objective.needs, self.settings.optimizer
        if o.epochs * o.minibatches > 1:
            needs |= {"old_log_probs"}
        if self.adaptive:
            needs |= {"entropies"}
        with self.accelerator.autocast():
            return evidence.collect(
                needs,
                batch,
                o.micro_batch,
                self.model,
                self.reference,
                self.teacher,
                self.settings.sampling.temperature,
            )

    def _micro_batches(self, batch: Rollouts, rows: Tensor) -> Iterator[Tensor]:
        """Parts of the rows, those of a group side by side: they share their prompt."""
        order = batch.group_index[rows].argsort(stable=True)
        return iter(rows[order].split(self.settings.optimizer.micro_batch))

    def _update(self, prepared: Prepared, number: int, clock: _Clock) -> tuple[dict[str, float], Tensor]:
        """Optimizer steps of one training step; metrics, and the log-probs of the rows that were paid (else NaN)."""
        o, batch = self.settings.optimizer, prepared.batch
        log_probs = torch.full((batch.num_tokens,), torch.nan, device=batch.tokens.device)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        steps = 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(o, number, self.settings.steps)
        for epoch in range(o.epochs):
            order = torch.from_numpy(
                np.random.default_rng([self.settings.seed, number, epoch]).permutation(batch.num_rows)
            )
            for chosen in order.to(batch.tokens.device).tensor_split(o.minibatches):
                part = prepared if o.minibatches == 1 else self._over_ranks(prepared.select(chosen))
                paid = part.has_credit.nonzero()[:, 0]
                if not self._sum({"paid": torch.tensor(len(paid))})["paid"]:
                    continue
                for rows in self._micro_batches(part.batch, paid):
                    micro = part.select(rows)
                    with self.accelerator.autocast():
                        current, drawn, entropies = evidence.variable(
                            self.objective.variable,
                            micro.batch,
                            self.model,
                            self.teacher,
                            self.settings.sampling.temperature,
                        )
                    with clock("credit"):
                        out = self.objective.loss(micro, current)
                    out.loss.backward()
                    origin = rows if o.minibatches == 1 else chosen[rows]
                    log_probs[batch.token_positions(origin)[0]] = drawn.detach()
                    _add(totals, out.metrics | {"entropy": entropies.mean()})
                self._average_gradients()
                totals["grad_norm"] += self.accelerator.clip_grad_norm_(self.model.parameters(), o.max_grad_norm).cpu()
                self.optimizer.step()
                self.optimizer.zero_grad()
                steps += 1
        tokens = max(float(totals.pop("tokens", 0.0)), 1.0)
        return self._mean(
            {
                name: total / (max(steps, 1) if name in ("loss", "policy_loss", "kl", "grad_norm") else tokens)
                for name, total in totals.items()
            }
        ), log_probs

    def _over_ranks(self, part: Prepared) -> Prepared:
        """These rows as an optimizer step of their own, with denominators over all ranks."""
        if self.ranks == 1:
            return part.aggregated()
        lengths = segment.count(part.batch.tokens, part.rows)
        trained = lengths > 0
        counts = self._sum(
            {
                "batch_num_tokens": lengths.sum(),
                "global_batch_size": trained.sum(),
                "global_num_groups": part.batch.group_ids[trained].unique().numel() * torch.ones(()),
            }
        )
        return part.aggregated(**{name: int(x) for name, x in counts.items()}, dp_size=self.ranks)

    def _average_gradients(self) -> None:
        # Ranks skip rows without credit, so their passes differ in number: one average of the sums fits all of them.
        if self.ranks == 1:
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(grad, "mean")

    def _sum(self, numbers: dict[str, Tensor]) -> dict[str, float]:
        return self._reduced(numbers, "sum")

    def _mean(self, numbers: dict[str, Tensor]) -> dict[str, float]:
        return self._reduced(numbers, "mean")

    def _reduced(self, numbers: dict[str, Tensor], how: str) -> dict[str, float]:
        if not numbers:
            return {}
        stacked = torch.stack([x.double().cpu() for x in numbers.values()])
        if self.ranks > 1:
            stacked = self.accelerator.reduce(stacked.to(self.accelerator.device), how)
        return dict(zip(numbers, stacked.tolist(), strict=True))


def learning_rate(settings: OptimizerSettings, number: int, steps: int) -> float:
    """Of step ``number``, counted from 1: rises over the warm-up, then stays or falls, to reach 0 after the last."""
    lr, warmup = settings.lr, settings.warmup
    if number <= warmup:
        return lr * number / warmup
    left = (steps - number + 1) / max(steps - warmup, 1)
    return lr * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.schedule]


class _Clock:
    """Seconds by name, parts inside parts allowed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{name}_seconds"] += time.perf_counter() - start


def _add(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Sums of what adds up, and token-weighted sums of what is a mean over tokens."""
    tokens = metrics["tokens"].double().cpu()
    for name, value in metrics.items():
        weight = 1.0 if name in ("loss", "policy_loss", "kl", "tokens") else tokens
        totals[name] = totals[name] + value.detach().double().cpu() * weight


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
