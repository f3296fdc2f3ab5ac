"""Networks whose masks are trained together with the policy (SparsePO)."""

from __future__ import annotations

from typing import Any

import torch

from tokcredit.methods.sparse_po import MaskNetwork
from tokcredit.train.collectors import LEARNED


def networks(objective: Any, model: Any, seed: int) -> torch.nn.ModuleDict | None:
    """Return a network for each variable of an objective that is a learned mask, or None if there is none.

    They have no dropout, so that micro-batches do not change results.

    Args:
        objective: The objective.
        model: The policy, whose layers are those of the reference policy.
        seed: Seed of the weights.
    """
    names = [name for name in objective.variables if name in LEARNED]
    if not names:
        return None
    config = model.config.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {name: MaskNetwork(config.num_hidden_layers, config.hidden_size, dropout=0.0) for name in names}
    return torch.nn.ModuleDict(made).to(model.device)
