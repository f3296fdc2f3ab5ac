"""The functions that trainers call today, imported from the installed packages and called as they are."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate
    from trl.experimental.async_grpo.packing import TreeRow
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import selective_log_softmax_and_entropy
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos as verl
    from verl.utils import torch_functional as verl_functional
    from verl.workers.config import ActorConfig
    from verl.workers.utils import padding as verl_padding

__all__ = [
    "AlgoConfig",
    "TreeRow",
    "areal_tries",
    "selective_log_softmax_and_entropy",
    "trl_dpo_loss",
    "trl_loss",
    "unwhitened",
    "vec_generalized_advantage_estimate",
    "verl",
    "verl_functional",
    "verl_loss",
    "verl_padding",
]


@functools.cache
def areal_tries() -> Callable[[dict[str, Tensor], int], tuple[list[object], list[int]]]:
    """Return AReaL's planner, which makes tries of a padded batch. Of its package only this module is imported."""
    folder = Path(importlib.util.find_spec("areal").origin).parent
    for name in ("", ".models", ".models.tree_attn", ".api", ".utils"):
        package = ModuleType(f"areal{name}")
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package

    def unchanged(*args: object) -> object:
        return lambda f: f

    unused = {
        "api.cli_args": ("MicroBatchSpec",),
        "models.tree_attn.module_fsdp": ("create_block_mask_from_dense",),
        "models.tree_attn.triton_kernel": ("TRITON_AVAILABLE", "TreeAttentionData", "precompute_tree_attention_data"),
        "utils.data": ("MicroBatchList",),
        "utils.perf_tracer": ("trace_perf", "trace_scope"),
        "utils.logging": ("getLogger",),
        "utils.stats_tracker": (),
    }
    for name, members in unused.items():
        module = sys.modules[f"areal.{name}"] = ModuleType(f"areal.{name}")
        vars(module).update(dict.fromkeys(members, unchanged))
        setattr(sys.modules[module.__name__.rpartition(".")[0]], name.rpartition(".")[2], module)
    planner: Callable[..., tuple[list[object], list[int]]]
    planner = importlib.import_module("areal.models.tree_attn.tree")._greedy_build_tries
    return planner


def unwhitened(f: Callable[..., object]) -> Callable[..., object]:
    """Return a verl estimator without its last step, the whitening of the batch, which is another operation."""

    def run(*args: object, **kwargs: object) -> object:
        whiten = verl.verl_F.masked_whiten
        verl.verl_F.masked_whiten = lambda x, mask: x
        try:
            return f(*args, **kwargs)
        finally:
            verl.verl_F.masked_whiten = whiten

    return run


def verl_loss(low: float, high: float) -> Callable[..., Tensor]:
    """Return verl's clipped loss, a mean over tokens, with its metrics."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e4,
    )

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return verl.compute_policy_loss_vanilla(old, log_probs, advantages, mask, "token-mean", config)[0]

    return loss


def trl_loss(low: float, high: float) -> Callable[..., Tensor]:
    """Return the loss of TRL's trainer (``loss_type="bnpo"``, a mean over tokens) with its metrics."""
    alone = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=alone,
        args=SimpleNamespace(delta=None),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level="token",
        loss_type="bnpo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )

    def loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, old, None)
        trainer._metrics["train"].clear()
        nothing = tokens[:, :0]
        return GRPOTrainer._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": tokens,
                "completion_mask": mask,
                "advantages": advantages,
                "old_per_token_logps": old,
            },
        )

    return loss


def trl_dpo_loss(beta: float) -> Callable[..., Tensor]:
    """Return the loss of TRL's ``DPOTrainer`` (``loss_type="sigmoid"``, references known) with its metrics."""
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=alone,
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )

    def loss(log_probs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """``(2 B, T)`` each, the chosen responses first; masked log-probs are 0, as TRL's model gives them."""
        nothing = torch.zeros_like(reference)
        found = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        chosen, rejected = (reference * mask).sum(1).chunk(2)
        whole = torch.nn.functional.pad(mask, (1, 0))  # the first token has no log-prob
        inputs = {"input_ids": whole.long(), "attention_mask": whole, "completion_mask": whole}
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer._metrics["train"].clear()
        return DPOTrainer._compute_loss(trainer, lambda **_: found, inputs, False)

    return loss
