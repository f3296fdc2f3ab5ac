"""Token-level credit assignment for reinforcement learning on language models."""

from __future__ import annotations

__version__ = "0.1.0"

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("tokcredit needs torch>=2.10: pip install torch") from error
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"tokcredit needs torch>=2.10, found {_torch.__version__}: pip install -U torch")

from tokcredit import (
    aggregation,
    clip,
    credit,
    divergence,
    evidence,
    gain,
    length,
    loss,
    matching,
    methods,
    policy,
    ratio,
    sampling,
    scan,
    schedule,
    score,
    segment,
    select,
    temperature,
    tree,
    values,
    weights,
)
from tokcredit._C import build_info
from tokcredit.objective import Objective
from tokcredit.ops import empty_cache, num_threads, set_num_threads
from tokcredit.prepared import Prepared
from tokcredit.rollouts import Rollouts

__all__ = [
    "Objective",
    "Prepared",
    "Rollouts",
    "aggregation",
    "build_info",
    "clip",
    "credit",
    "divergence",
    "empty_cache",
    "evidence",
    "gain",
    "length",
    "loss",
    "matching",
    "methods",
    "num_threads",
    "policy",
    "ratio",
    "sampling",
    "scan",
    "schedule",
    "score",
    "segment",
    "select",
    "set_num_threads",
    "temperature",
    "tree",
    "values",
    "weights",
]
