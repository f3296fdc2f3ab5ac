"""The learner: from the rollouts of a step to an update of the policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from tokcredit import inputs, mismatch
from tokcredit.from_hidden import FromHidden
from tokcredit.methods.align_distil import inverse_extrapolation
from tokcredit.prepared import multiplied
from tokcredit.protocol import PreparedBatch, TrainingObjective
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State
from tokcredit.stages.token_weights import importance
from tokcredit.train import collectors, masks, nonfinite, virtual_tokens
from tokcredit.train.clock import Clock
from tokcredit.train.critic import Critic
from tokcredit.train.learning_rate import learning_rate
from tokcredit.train.micro_batches import joined, micro_batches, units
from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import Settings
from tokcredit.train.side_optimizer import SideOptimizer
from tokcredit.train.teacher import Teacher
from tokcredit.train.teacher_scores import TeacherScores
from tokcredit.train.totals import Totals

_LIMIT = 10
"""Number of optimizer steps in a row whose skipping ends the run; the settings name it too."""


class Update(NamedTuple):
    """The update of a step.

    Attributes:
        prepared: The rollouts as the objective prepared them.
        log_probs: float ``[N]``, log-probs at the last pass over the rollouts; NaN in rows without gradient.
        metrics: Numbers by name, over all processes. A mean over tokens is left out if no row had a gradient.
        skipped: For each optimizer step that was left out, what was not finite and where.
    """

    prepared: PreparedBatch
    log_probs: Tensor
    metrics: dict[str, float]
    skipped: list[str]


class Learner:
    """Computes the loss of rollouts and updates the policy. It holds any objective that follows the protocol.

    Args:
        settings: Settings of the run.
        objective: Objective to optimize.
        model: The policy, on its device.
        reference: Reference policy, or None if nothing of it has to be computed.
        teacher: Teacher of a distilling objective, or None.
        accelerator: Devices and precision.
        critic: Critic that is trained beside the policy, or None.
        aligned: Aligned policy, or None.
        reverse_teacher: Model that the teacher is extrapolated away from, or None.
        teacher_scores: Gives batches what is kept of the teacher, or None.

    Attributes:
        state: State of the objective's controllers.
        skipped_in_row: Number of optimizer steps, up to the last one, that were skipped without one between them.
    """

    def __init__(
        self,
        settings: Settings,
        objective: TrainingObjective[Any],
        model: Any,
        reference: Any,
        teacher: Teacher | None,
        accelerator: Accelerator,
        *,
        critic: Critic | None = None,
        aligned: Any = None,
        reverse_teacher: Any = None,
        teacher_scores: TeacherScores | None = None,
    ) -> None:
        o = settings.optimizer
        self._settings, self._accelerator, self._ranks = settings, accelerator, Ranks(accelerator)
        self._objective, self._model = objective, model
        self._teacher, self._teacher_scores = teacher, teacher_scores
        self._models = (model, reference, teacher.model if teacher else None)
        self._masks = masks.networks(objective, model, settings.seed)
        self._trained: Any = torch.nn.ModuleList([model, self._masks]) if self._masks else model
        self._further: dict[str, Any] = {"critic": critic, "aligned": aligned, "reverse_teacher": reverse_teacher}
        weights = getattr(objective, "token_weights", ())
        self._extrapolation = next((x for x in weights if isinstance(x, inverse_extrapolation)), None)
        lr = settings.critic.critic_lr
        self._critic = SideOptimizer(critic, lr, o, self._ranks) if critic else None
        trained = [p for p in self._trained.parameters() if p.requires_grad]
        self._optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(trained, lr=o.lr, weight_decay=o.weight_decay, fused=True)
        )
        self.state, self.skipped_in_row = State(), 0

    def state_dict(self) -> dict[str, Any]:
        """Return what the next update depends on beside weights, for a checkpoint."""
        return {
            "controllers": self.state.state_dict(),
            "skipped_in_row": self.skipped_in_row,
            "teacher": self._teacher.state_dict() if self._teacher else None,
            "masks": self._masks.state_dict() if self._masks else None,
            "critic": self._critic.state_dict() if self._critic else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Args:
            state: From :meth:`state_dict`; other keys are left to others.
        """
        self.state.load_state_dict(state["controllers"])
        self.skipped_in_row = state["skipped_in_row"]
        if self._teacher:
            self._teacher.load_state_dict(state["teacher"])
        if self._masks:
            self._masks.load_state_dict(state["masks"])
        if self._critic:
            self._critic.load_state_dict(state["critic"])

    def with_inputs(self, batch: Rollouts, others: frozenset[str] = frozenset()) -> Rollouts:
        """Return the rollouts with the inputs that forward passes give, but for those of fixed models that they carry.

        Args:
            batch: Whole groups, packed, with ``prompt_tokens``.
            others: Names of inputs to collect beside those that the objective requires.
        """
        names, o = self._objective.required_inputs | others, self._settings.optimizer
        if o.epochs * o.minibatches > 1:
            names |= {"old_log_probs"}
        if self._teacher_scores:
            batch = self._teacher_scores(batch)
        known = frozenset().union(*map(inputs.names, ("reference", "aligned", "teacher", "teachers")))
        names -= {name for name in known if batch.has_input(name)}
        temperature = self._settings.sampling.temperature
        with self._accelerator.autocast():
            return collectors.collect(names, batch, o.micro_batch, *self._models, temperature, **self._further)

    def score(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies under the policy at temperature 1, float ``[N]`` each, without gradient.

        Args:
            batch: Packed rows with ``prompt_tokens``.
        """
        names = frozenset({"old_log_probs", "entropies"})
        with self._accelerator.autocast():
            scored = collectors.collect(names, batch, self._settings.optimizer.micro_batch, self._model)
        return scored.input("old_log_probs"), scored.input("entropies")

    def ref_log_probs(self, batch: Rollouts) -> Tensor:
        """Return log-probs under the reference policy at temperature 1, float ``[N]``, without gradient.

        Args:
            batch: Packed rows with ``prompt_tokens``.
        """
        size, reference = self._settings.optimizer.micro_batch, self._models[1]
        with self._accelerator.autocast():
            return collectors.collect({"ref_log_probs"}, batch, size, None, reference).input("ref_log_probs")

    @torch.no_grad()
    def measure(self, batch: Rollouts) -> dict[str, float]:
        """Return the loss and the metrics of the policy without an update, over all processes.

        Settings with a schedule have the values that they end with.

        Args:
            batch: As in :meth:`update`.
        """
        prepared = self._over_ranks(self._prepare(batch, 1.0))
        totals = Totals(self._metrics_of_nothing(prepared))
        passes = partial(self._passes, prepared, self._micro_batches(prepared), Clock(), backward=False)
        for _, metrics in self._ranks.together(passes):
            totals.add(metrics)
        return totals.metrics(self._ranks, 1)

    def update(self, batch: Rollouts, number: int, clock: Clock) -> Update:
        """Update the policy and return what was done.

        Args:
            batch: The rollouts of this process, whole groups, with the inputs that the objective requires.
            number: Number of the step, from 1.
            clock: Adds up the time spent on credit, and on losses that are computed apart from the output layer.

        Raises:
            RuntimeError: A loss or a gradient is not finite and is not skipped, or the weights became so.
        """
        warmup = self._settings.critic.critic_warmup
        of_policy, steps = number - warmup, self._settings.steps - warmup
        with clock("credit"):
            prepared = self._over_ranks(self._prepare(batch, max(of_policy - 1, 0) / max(steps - 1, 1)))
        virtual_tokens.for_step(self._model, number)
        lr = learning_rate(self._settings.optimizer, of_policy, steps) if of_policy > 0 else 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with self._frozen() if of_policy <= 0 else nullcontext():
            metrics, log_probs, skipped = self._optimize(prepared, number, clock)
        self._check_weights(number)
        if self._settings.optimizer.on_nonfinite == "skip":
            metrics["skipped_updates"] = float(len(skipped))
        return Update(prepared, log_probs, metrics | {"lr": lr} | self._mismatch(prepared, log_probs), skipped)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Exclude the policy from gradients inside this context, so that it stays as it is."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    def refuse(self, number: int, what: str, in_row: int) -> None:
        """Stop the run because an update is not finite, unless the settings say that it is skipped.

        Args:
            number: Number of the step.
            what: What is not finite.
            in_row: Number of updates of the same model that were skipped without one between them, with this one.

        Raises:
            RuntimeError: The settings say so, or too many updates in a row were skipped.
        """
        skips = self._settings.optimizer.on_nonfinite == "skip"
        if skips and in_row < _LIMIT:
            return
        advice = f"{_LIMIT} updates in a row were skipped" if skips else "--on-nonfinite skip leaves such updates out"
        raise RuntimeError(
            f"step {number}: expected a finite loss and gradient, got {what}; nothing of this step was saved; {advice}"
        )

    def _mismatch(self, prepared: PreparedBatch, log_probs: Tensor) -> dict[str, float]:
        """Return how far the engine that sampled is from the policy, over the rows of all processes, if that is known.

        A batch without old log-probs is used for one optimizer step, so those of its pass over the rows are the same.
        """
        batch = prepared.batch
        if batch.rollout_log_probs is None:
            return {}
        without = batch.old_log_probs is None
        if without:
            batch = batch.with_inputs(old_log_probs=log_probs)
        corrections = [x for x in getattr(self._objective, "token_weights", ()) if isinstance(x, importance)]
        names = frozenset({"old_log_probs", "rollout_log_probs"})
        batch, _ = self._ranks.gather(batch, names.union(*(x.required_inputs for x in corrections)))
        old, spans = batch.input("old_log_probs"), batch.spans
        if without:
            spans = spans.with_mask(batch.response_mask & ~old.isnan())
        weights = multiplied(corrections, batch, batch.rewards[:, None])  # which no importance weight reads
        found = mismatch.statistics(old, batch.input("rollout_log_probs"), spans, weights)
        return {f"mismatch_{name}": float(x) for name, x in found.items()}

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Move the controllers of the objective by the metrics of a step.

        A step in which no row had a gradient measured nothing and leaves them where they are.

        Args:
            metrics: Numbers by name, of the whole step over all processes.

        Raises:
            ValueError: The metric of a controller is missing.
        """
        if "entropy_mean" in metrics:
            self.state.observe(self._objective, metrics)

    def _prepare(self, batch: Rollouts, progress: float) -> PreparedBatch:
        def prepared(whole: Rollouts) -> Any:
            return self._ranks.together(lambda: self._objective.prepare(whole, progress=progress, state=self.state))

        if self._ranks.count == 1 or not self._objective.compares_groups:
            return prepared(batch)
        everything, mine = self._ranks.gather(batch, self._objective.required_inputs)
        return dataclasses.replace(prepared(everything).select(mine), batch=batch)

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters of the policy, of its masks and of its critic by name."""
        others = {"masks": self._masks, "critic": self._further["critic"]}
        further = (model.named_parameters(name) for name, model in others.items() if model)
        return dict(chain(self._model.named_parameters(), *further))

    def _check_weights(self, number: int) -> None:
        parameters = self._parameters()
        with torch.no_grad():
            finite = torch.nn.utils.get_total_norm(parameters.values()).isfinite()
        # The norm of finite weights may still overflow.
        if not finite and (bad := [name for name, x in parameters.items() if not x.isfinite().all()]):
            raise RuntimeError(
                f"step {number}: expected finite weights after the update, got others in {len(bad)} parameters, the "
                f"first is {bad[0]}; nothing of this step was saved; a smaller lr may help"
            )

    def _optimize(
        self, prepared: PreparedBatch, number: int, clock: Clock
    ) -> tuple[dict[str, float], Tensor, list[str]]:
        o, batch = self._settings.optimizer, prepared.batch
        log_probs = torch.full((batch.num_tokens,), torch.nan, device=batch.device)
        totals, steps, norms, critic_norms = Totals(self._metrics_of_nothing(prepared)), 0, 0.0, 0.0
        skipped: list[str] = []
        together = units(np.arange(batch.num_rows), batch, self._objective.couples_rows)
        for epoch in range(o.epochs):
            order = np.random.default_rng([self._settings.seed, number, epoch]).permutation(len(together))
            for numbers in np.array_split(order, o.minibatches):
                chosen, whole = joined([together[i] for i in numbers]), o.minibatches == 1
                part = prepared if whole else self._over_ranks(prepared.select(chosen))
                parts = self._micro_batches(part)
                if not self._ranks.any(bool(parts)):
                    continue
                found = self._ranks.together(partial(self._passes, part, parts, clock))
                for rows, (micro, _) in zip(parts, found, strict=True):
                    log_probs[batch.selection(rows if whole else chosen[rows]).tokens] = micro
                measured = [metrics for _, metrics in found]
                self._ranks.average_gradients(self._trained)
                norm = float(self._accelerator.clip_grad_norm_(self._trained.parameters(), o.max_grad_norm))
                critic_norm = self._critic.clip() if self._critic else 0.0
                total = torch.tensor([metrics["loss"] for metrics in measured], dtype=torch.float64).sum()
                loss = self._ranks.mean({"loss": total})["loss"]
                if not math.isfinite(norm + critic_norm + loss):
                    in_step = np.arange(batch.num_rows) if whole else chosen
                    of_critic = f", {critic_norm:g} of the critic" if self._critic else ""
                    where = self._sources(part, parts, in_step)
                    skipped.append(f"loss {loss:g} and gradient norm {norm:g}{of_critic}{where}")
                    self._forget()
                    self.skipped_in_row += 1
                    self.refuse(number, skipped[-1], self.skipped_in_row)
                    continue
                for metrics in measured:
                    totals.add(metrics)
                norms, critic_norms = norms + norm, critic_norms + critic_norm
                self._optimizer.step()
                if self._critic:
                    self._critic.step()
                self._forget()
                if self._teacher:
                    self._teacher.follow(self._model)
                steps, self.skipped_in_row = steps + 1, 0
        metrics = totals.metrics(self._ranks, steps) | {"grad_norm": norms / max(steps, 1)}
        if self._critic:
            metrics["critic_grad_norm"] = critic_norms / max(steps, 1)
        return metrics, log_probs, skipped

    def _forget(self) -> None:
        """Forget all gradients."""
        self._optimizer.zero_grad()
        if self._critic:
            self._critic.forget()

    def _sources(self, part: PreparedBatch, parts: list[NDArray[np.int64]], numbers: NDArray[np.int64]) -> str:
        """Return which rows of the step make a loss or a gradient that is not finite, and at which tokens.

        Args:
            part: Rows of the optimizer step.
            parts: Its micro-batches.
            numbers: Number in the step of each row.
        """
        found: dict[int, list[int]] = {}
        names = self._objective.variables
        for rows in parts:
            micro = part.select(rows)
            with torch.no_grad(), self._accelerator.autocast():
                forward = self._forward_pass(micro.batch, hidden_only=False)
                variables = {name: forward.read(name) for name in names}
            seen = nonfinite.tokens(self._objective, micro, variables)
            found |= {int(numbers[rows[row]]): positions for row, positions in seen.items()}
        if not found:
            for rows in parts:
                self._forget()
                self._pass(part.select(rows), Clock())
                gradients = [p.grad for p in self._parameters().values() if p.grad is not None]
                if not torch.nn.utils.get_total_norm(gradients).isfinite():
                    found |= {int(numbers[row]): [] for row in rows}
        prefix = f"process {self._ranks.index}: " if self._ranks.count > 1 else ""
        texts = self._ranks.exchange([prefix + text for text in nonfinite.described(found)])
        return " in " + "; ".join(texts) if texts else ""

    def _metrics_of_nothing(self, prepared: PreparedBatch) -> dict[str, float]:
        """Return the metrics of a micro-batch without rows: all processes then have the same names."""
        nothing = prepared.select([])
        zeros = torch.zeros(0, device=prepared.batch.device)
        further = dict.fromkeys(self._objective.variables[1:], zeros)
        found = self._objective.loss(nothing, zeros, **further).metrics
        return {**{name: 0.0 for name in found}, "entropy_mean": 0.0}

    def _forward_pass(self, batch: Rollouts, hidden_only: bool) -> collectors.ForwardPass:
        """Return forward passes that give the variables of the objective."""
        return collectors.ForwardPass(
            self._objective.variables,
            batch,
            *self._models,
            temperature=self._settings.sampling.temperature,
            token_loss=getattr(self._objective, "token_loss", None),
            hidden_only=hidden_only,
            masks=self._masks,
            extrapolation=self._extrapolation,
            **self._further,
        )

    def _passes(
        self, prepared: PreparedBatch, parts: Sequence[NDArray[np.int64]], clock: Clock, backward: bool = True
    ) -> list[tuple[Tensor, dict[str, float]]]:
        """Return what :meth:`_pass` returns of each micro-batch."""
        return [self._pass(prepared.select(rows), clock, backward) for rows in parts]

    def _pass(self, part: PreparedBatch, clock: Clock, backward: bool = True) -> tuple[Tensor, dict[str, float]]:
        """Add the gradient of a micro-batch if it is wanted; return its log-probs and its metrics."""
        names, temperature = self._objective.variables, self._settings.sampling.temperature
        forward = self._forward_pass(part.batch, hidden_only=True)
        layer = None if forward.shares_predictions and not forward.distils_hidden else forward.layer
        if layer is not None and isinstance(self._objective, FromHidden):
            with self._accelerator.autocast():
                weight, bias, settings = layer
                hidden, settings = forward.final_hidden_states, {"temperature": temperature, **settings}
                if forward.distils_hidden:
                    settings["teacher"] = forward.teacher_states
                elif others := [name for name in names if name not in ("log_probs", "entropies")]:
                    settings["variables"] = {name: forward.read(name) for name in others}
                whole = self._objective.loss_from_hidden(part, hidden, weight, bias, **settings)
            loss, found, log_probs, entropies = whole
        else:
            with self._accelerator.autocast():
                log_probs, entropies = forward.log_probs.detach(), forward.entropies.detach()
                variable, further = forward.read(names[0]), {name: forward.read(name) for name in names[1:]}
            with clock("credit"):
                loss, found = self._objective.loss(part, variable, **further)
        if backward:  # before the numbers are waited for
            loss.backward()
        metrics = {**found, "entropy_mean": entropies[part.batch.response_mask].mean()}
        values = torch.stack([x.detach().double().cpu() for x in metrics.values()]).tolist()
        return log_probs, dict(zip(metrics, values, strict=True))

    def _micro_batches(self, part: PreparedBatch) -> list[NDArray[np.int64]]:
        """Return the rows of each forward and backward pass."""
        rows, coupled = part.has_gradient.nonzero()[:, 0], self._objective.couples_rows
        return micro_batches(rows, part.batch, self._settings.optimizer.micro_batch, coupled)

    def _over_ranks(self, part: PreparedBatch) -> PreparedBatch:
        """Return these rows as an optimizer step of their own, with denominators over all processes."""
        if self._ranks.count == 1:
            return part.with_denominators()
        trains, trajectories = part.lengths > 0, part.batch.trajectories
        episodes = trains.nonzero()[:, 0].cpu().numpy()
        if trajectories is not None:
            episodes = np.unique(trajectories.number[episodes])
        counts = self._ranks.sum(
            {
                "batch_num_tokens": part.lengths.sum(),
                "global_batch_size": torch.tensor(len(episodes)),
                "global_num_groups": torch.tensor(part.batch.group_ids[trains].unique().numel()),
            }
        )
        return part.with_denominators(**{name: int(x) for name, x in counts.items()}, dp_size=self._ranks.count)
