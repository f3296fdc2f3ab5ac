"""Torch registrations of the native operations: shapes, devices and gradients. Contracts are in ``csrc/ops``.

Private: users call the modules of ``tokcredit.blocks``. Every operation is registered in ``torch.library`` with a fake
implementation that also allocates its outputs, so it composes with ``torch.compile`` and is checked by ``opcheck``. A
call goes through torch's dispatcher only where torch must see it; see :class:`tokcredit.ops.call.Operation`.
"""

from tokcredit.ops.baseline import baseline
from tokcredit.ops.call import accumulated, empty_cache, num_threads, set_num_threads, uncompiled
from tokcredit.ops.divergence import (
    DIVERGENCES,
    MOST_TOP,
    OUTSIDES,
    DivergenceRows,
    TopRows,
    divergence,
    divergence_top,
    kl,
)
from tokcredit.ops.diverse import diverse
from tokcredit.ops.logits import (
    LogitRows,
    LogitSums,
    joined_states,
    logits,
    logits_forward,
    logits_gradient_,
    logits_state,
    sums_of_state,
)
from tokcredit.ops.pieces import CUTS, pieces
from tokcredit.ops.policy_loss import COORDINATES, GATED_VALUES, LOSS_STATS, SURROGATES, policy_loss, row_product
from tokcredit.ops.repack import repack
from tokcredit.ops.scan import scan
from tokcredit.ops.score import log_deviation, score_bounds, score_factor
from tokcredit.ops.segment import (
    MOMENTS,
    REDUCTIONS,
    STANDARDS,
    count,
    row_affine,
    row_between,
    segment_ids,
    segment_rows,
    standardize,
    weighted_moments,
)
from tokcredit.ops.select import ROUNDINGS, maximum_variance, select, within_mean
from tokcredit.ops.tree import expand, spread, tree_build, tree_fold, tree_mean
from tokcredit.ops.tree_pack import TreePackArrays, tree_pack

__all__ = [
    "COORDINATES",
    "CUTS",
    "DIVERGENCES",
    "GATED_VALUES",
    "LOSS_STATS",
    "MOMENTS",
    "MOST_TOP",
    "OUTSIDES",
    "REDUCTIONS",
    "ROUNDINGS",
    "STANDARDS",
    "SURROGATES",
    "DivergenceRows",
    "LogitRows",
    "LogitSums",
    "TopRows",
    "TreePackArrays",
    "accumulated",
    "baseline",
    "count",
    "divergence",
    "divergence_top",
    "diverse",
    "empty_cache",
    "expand",
    "joined_states",
    "kl",
    "log_deviation",
    "logits",
    "logits_forward",
    "logits_gradient_",
    "logits_state",
    "maximum_variance",
    "num_threads",
    "pieces",
    "policy_loss",
    "repack",
    "row_affine",
    "row_between",
    "row_product",
    "scan",
    "score_bounds",
    "score_factor",
    "segment_ids",
    "segment_rows",
    "select",
    "set_num_threads",
    "spread",
    "standardize",
    "sums_of_state",
    "tree_build",
    "tree_fold",
    "tree_mean",
    "tree_pack",
    "uncompiled",
    "weighted_moments",
    "within_mean",
]
