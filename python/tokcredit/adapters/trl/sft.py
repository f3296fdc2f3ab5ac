"""``SFTTrainer`` with any supervised objective: token weights, and filters that choose the tokens that train."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from tokcredit.adapters.capabilities import chosen_of, require_constant, require_defaults, require_inputs
from tokcredit.adapters.trl.progress import progress
from tokcredit.adapters.trl.recorder import Recorder
from tokcredit.rollouts import Rollouts
from tokcredit.supervised import Supervised

_ROWS = "the objective takes one sequence per row"
_DECIDED = {
    "loss_type": "the objective makes the loss",
    "label_smoothing_factor": "the objective makes the loss",
    "packing": _ROWS,
    "padding_free": _ROWS,
}


class CreditSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with the loss of a supervised objective of log-probs.

    Data, tokenization, PEFT and all metrics stay TRL's. The inputs ``old_log_probs`` and ``entropies`` are those of the
    forward pass itself, so stages can choose and weigh tokens by them, for example
    ``tc.Supervised(filters=(tc.filters.top_share(0.5, tc.token_score.given("entropies")),))``.

    The aggregation must be a mean over tokens. Its denominator is TRL's, all tokens with a label of the optimizer step;
    a filter does not change it.

    Args:
        model: As in TRL.
        args: As in TRL.
        method: Name of a supervised method, with its default settings.
        objective: Any supervised objective, in place of ``method``.
        host: Everything else that ``SFTTrainer`` takes.

    Raises:
        TypeError: Both ``method`` and ``objective`` are given, or neither, or it is no supervised objective.
        ValueError: A setting contradicts the objective, or a stage reads an input that TRL does not have.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        method: str | None = None,
        objective: Supervised | None = None,
        **host: Any,
    ) -> None:
        if args is None:
            raise ValueError("args: expected an SFTConfig, got None")
        self.credit_objective = chosen_of(Supervised, method, objective)
        require_defaults(args, SFTConfig, _DECIDED, "TRL")
        require_constant(self.credit_objective, "TRL", schedules=True)
        require_inputs(self.credit_objective, {"old_log_probs", "entropies"}, "SFTTrainer")
        if set(self.credit_objective.aggregation.counts) != {"tokens"}:
            raise ValueError(
                f"aggregation: expected a mean over tokens, whose number TRL knows, got "
                f"{self.credit_objective.aggregation!r}"
            )
        if host.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None because the objective makes the loss, got a function")
        super().__init__(model=model, args=args, **host)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the objective; TRL's own is computed for its metrics and not used.

        Args:
            model: The model.
            inputs: The batch.
            return_outputs: Whether to return the outputs of the model too.
            num_items_in_batch: Tokens with a label in the optimizer step, over all ranks that TRL counts.
        """
        recorder = Recorder(model)
        super().compute_loss(recorder, inputs, False, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        width, mask = labels.shape[1], labels != -100
        log_probs = recorder.read("log_probs", width)
        rows = mask.sum(1).new_ones(len(mask))
        batch = Rollouts.from_padded(
            inputs["input_ids"][:, 1:],
            mask,
            rows.cumsum(0),
            rows.float(),
            inputs["attention_mask"][:, 1:],
            old_log_probs=log_probs.detach(),
            entropies=recorder.read("entropy", width).detach(),
        )
        objective = self.credit_objective
        tokens = int(mask.sum() if num_items_in_batch is None else num_items_in_batch)
        prepared = objective.prepare(batch, batch_num_tokens=max(tokens, 1), progress=progress(objective, self.state))
        loss, _ = objective.loss(prepared, log_probs)
        kept = prepared.lengths.sum() / mask.sum().clamp(min=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["tokcredit/kept_fraction"].append(self.accelerator.gather(kept).mean().item())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * recorder.outputs.aux_loss / steps
        return (loss, recorder.outputs) if return_outputs else loss
