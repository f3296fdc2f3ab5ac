"""``DPOTrainer`` with any preference objective.

TRL makes the batches, runs the models and logs its metrics; only the loss is replaced. Log-probs of the reference are
kept per token, in the precomputed data set too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from trl import DPOConfig, DPOTrainer

from tokcredit.adapters.capabilities import chosen_of, require_constant, require_defaults, require_inputs
from tokcredit.adapters.trl.progress import progress
from tokcredit.adapters.trl.recorder import Recorder
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts

_LOSS = "the objective makes the loss"
_DECIDED = {
    "loss_type": _LOSS,
    "loss_weights": _LOSS,
    "label_smoothing": "the objective's link smooths labels",
    "f_divergence_type": _LOSS,
    "f_alpha_divergence_coef": _LOSS,
    "discopop_tau": _LOSS,
    "use_weighting": "the objective's pair weights weigh pairs",
    "ld_alpha": "the objective's token weights weigh tokens",
}
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
_HOOKS = ("_compute_loss", "_precompute_ref_logps", "compute_ref_log_probs")


class CreditDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """``DPOTrainer`` with the loss of a preference objective.

    Data, tokenization, the reference model, PEFT, precomputed reference log-probs and all metrics stay TRL's. Settings
    of ``DPOConfig`` that the objective decides must have their defaults; ``beta`` is that of the objective's link. With
    ``precompute_ref_log_probs=True``, an objective without a reference needs no reference model at all.

    Differences from TRL:
        - Precomputed log-probs are kept per token in the data set, and not in a file for the next run.
        - Logged rewards are those of sequences without token weights, as in TRL; ``tokcredit/`` has those of the
          objective.

    Args:
        model: As in TRL.
        args: As in TRL.
        method: Name of a preference method, with its default settings.
        objective: Any preference objective, in place of ``method``.
        host: Everything else that ``DPOTrainer`` takes.

    Raises:
        TypeError: Both ``method`` and ``objective`` are given, or neither, or it is no preference objective.
        ValueError: A setting contradicts the objective, or a stage reads an input that TRL does not have.
        RuntimeError: This version of TRL lacks a hook.
    """

    # Attributes of TRL that are replaced here.
    beta: float
    data_collator: Any
    precompute_ref_logps: bool

    def __init__(
        self,
        model: Any,
        args: DPOConfig | None = None,
        *,
        method: str | None = None,
        objective: Preference | None = None,
        **host: Any,
    ) -> None:
        if missing := [name for name in _HOOKS if not hasattr(DPOTrainer, name)]:
            raise RuntimeError(f"trl: expected a version from 1.16 on with {missing[0]}, got {trl.__version__}")
        if args is None:
            raise ValueError("args: expected a DPOConfig, got None")
        self.credit_objective = chosen_of(Preference, method, objective)
        require_defaults(args, DPOConfig, _DECIDED, "TRL")
        require_constant(self.credit_objective, "TRL", schedules=True)
        require_inputs(self.credit_objective, {"ref_log_probs", "old_log_probs", "squared_probs"}, "DPOTrainer")
        if "squared_probs" in self.credit_objective.required_inputs:
            # TRL's output layer then gives them. Its weights are those of its own loss, which is not used.
            args = copy.copy(args)
            args.use_weighting = True
        super().__init__(model=model, args=args, **host)
        beta = getattr(self.credit_objective.link, "beta", self.beta)
        if args.beta not in (beta, DPOConfig.beta):
            raise ValueError(f"beta: expected {beta} as in {self.credit_objective.link!r}, got {args.beta}")
        self.beta = beta  # TRL's metrics have this factor.
        self.data_collator = _WithReference(self.data_collator)

    @property
    def _reads_reference(self) -> bool:
        return "ref_log_probs" in self.credit_objective.required_inputs

    def _reference(self, inputs: dict[str, Any]) -> Tensor:
        """Return the log-probs of the reference, ``(B, T - 1)``."""
        recorder = Recorder(self.ref_model or self.model)
        self.compute_ref_log_probs(recorder, inputs)
        return recorder.read("log_probs", inputs["input_ids"].shape[1] - 1)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the data set with the log-probs of the reference, a list per response."""
        if not self._reads_reference:
            return dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(f"precompute_ref_log_probs: expected a Dataset, got {type(dataset).__name__}")
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        found: dict[str, list[list[float]]] = {column: [] for column in _REFERENCES}
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"reference log-probs of {name}", unit="batch"):
            mask = batch["completion_mask"][:, 1:].bool()
            rows = self._reference(batch).masked_fill(~mask, torch.nan)
            for column, part in zip(_REFERENCES, rows.chunk(2), strict=True):
                padded = self.accelerator.pad_across_processes(part, dim=1, pad_index=torch.nan)
                whole = self.accelerator.gather_for_metrics(padded)
                found[column] += [row[~row.isnan()].tolist() for row in whole.cpu()]
        for column, lists in found.items():
            dataset = dataset.add_column(column, lists)
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        reference = inputs.pop("ref_log_probs", None)
        tokens, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
        if reference is None and self._reads_reference:
            reference = self._reference(inputs)
        # TRL's own loss is computed from sums that are at hand, for its metrics; it is not used.
        sums = tokens.new_zeros(len(tokens), dtype=torch.float) if reference is None else reference.sum(1)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        recorder = Recorder(model)
        try:
            given = inputs | dict(zip(_REFERENCES, sums.chunk(2), strict=True))
            super()._compute_loss(recorder, given, False)
        finally:
            self.precompute_ref_logps = precomputed
        log_probs = recorder.read("log_probs", tokens.shape[1])
        pairs = torch.arange(len(tokens) // 2, device=tokens.device)
        batch = Rollouts.from_padded(
            tokens,
            mask,
            torch.cat([pairs, pairs]),
            (torch.arange(len(tokens), device=tokens.device) < len(pairs)).float(),
            inputs["attention_mask"][:, 1:],
            ref_log_probs=reference,
            old_log_probs=log_probs.detach(),
        )
        if self.use_weighting:
            squared = recorder.read("log_sum_sq_probs", tokens.shape[1]).detach().exp()
            batch = batch.with_inputs(squared_probs=squared)
        objective = self.credit_objective
        prepared = objective.prepare(batch, progress=progress(objective, self.state))
        loss, metrics = objective.loss(prepared, log_probs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * recorder.outputs.aux_loss
        self._log(metrics)
        return (loss, recorder.outputs) if return_outputs else loss

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        for name in ("score_chosen_mean", "score_rejected_mean", "margin_mean", "accuracy_mean"):
            values = self.accelerator.gather(metrics[name].to(self.accelerator.device))
            self._metrics[mode][f"tokcredit/{name}"].append(values.mean().item())


class _WithReference:
    """A collator that also collates lists of reference log-probs, as ``ref_log_probs`` of ``(B, T - 1)``.

    Args:
        collate: TRL's collator.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lists = [example[name] for name in _REFERENCES for example in examples if name in example]
        rest = [{name: x for name, x in example.items() if name not in _REFERENCES} for example in examples]
        batch = self._collate(rest)
        if lists:
            mask = batch["completion_mask"][:, 1:].bool()
            values = torch.tensor([x for row in lists for x in row])
            batch["ref_log_probs"] = torch.zeros(mask.shape).masked_scatter_(mask, values)
        return batch
