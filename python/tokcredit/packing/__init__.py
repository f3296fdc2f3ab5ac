"""Training on the prefix tree: each distinct token of a batch is computed once, forward and backward.

Example::

    plan = tc.packing.pack(batch, budget=16_384)  # once per batch of rollouts
    old = tc.packing.log_probs(model, plan)
    prepared = objective.prepare(batch.with_inputs(old_log_probs=old.log_probs))
    for part in plan:
        out = tc.packing.forward(model, part)
        objective.loss(prepared.select(part.rows), out.log_probs).loss.backward()
"""

from tokcredit.blocks.tree_pack import TreePack, TreePart, pack
from tokcredit.packing.predictions import PerToken, check, forward, log_probs
from tokcredit.packing.tree_attention import attention

__all__ = ["PerToken", "TreePack", "TreePart", "attention", "check", "forward", "log_probs", "pack"]
