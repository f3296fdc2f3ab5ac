"""Token-level credit assignment for training language models."""

from __future__ import annotations

__version__ = "0.2.0"

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("tokcredit needs torch>=2.10: pip install torch") from error
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"tokcredit needs torch>=2.10, found {_torch.__version__}: pip install -U torch")

from tokcredit import attribution, decoding, inputs, methods, packing, rewards, rollout_correction, schedule
from tokcredit._C import build_info
from tokcredit.blocks import divergence, head, length, log_probs, mismatch, scan, segment, select, tree, values
from tokcredit.mixing import mix
from tokcredit.objective import Objective, Prepared
from tokcredit.ops import num_threads, set_num_threads
from tokcredit.preference import Preference
from tokcredit.protocol import Loss
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import (
    aggregation,
    clip,
    credit,
    filters,
    link,
    pair,
    ratio,
    scale,
    term,
    token_score,
    token_weights,
)
from tokcredit.supervised import Supervised

__all__ = [
    "Loss",
    "Objective",
    "Preference",
    "Prepared",
    "Rollouts",
    "Spans",
    "Supervised",
    "aggregation",
    "attribution",
    "build_info",
    "clip",
    "credit",
    "decoding",
    "divergence",
    "filters",
    "head",
    "inputs",
    "length",
    "link",
    "log_probs",
    "methods",
    "mismatch",
    "mix",
    "num_threads",
    "packing",
    "pair",
    "ratio",
    "rewards",
    "rollout_correction",
    "scale",
    "scan",
    "schedule",
    "segment",
    "select",
    "set_num_threads",
    "term",
    "token_score",
    "token_weights",
    "tree",
    "values",
]
