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
from tokcredit.ops.pair_link import LINK_FUNCTIONS, PAIR_COLUMNS, LinkTerm, combined, pair_link, pair_losses
from tokcredit.ops.pieces import CUTS, pieces
from tokcredit.ops.policy_loss import (
    COORDINATES,
    GATED_VALUES,
    LOSS_STATS,
    SURROGATES,
    Combine,
    policy_loss,
    row_product,
)
from tokcredit.ops.repack import repack
from tokcredit.ops.row_weights import COUNTED, row_weights
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
    "COUNTED",
    "CUTS",
    "DIVERGENCES",
    "GATED_VALUES",
    "LINK_FUNCTIONS",
    "LOSS_STATS",
    "MOMENTS",
    "MOST_TOP",
    "OUTSIDES",
    "PAIR_COLUMNS",
    "REDUCTIONS",
    "ROUNDINGS",
    "STANDARDS",
    "SURROGATES",
    "Combine",
    "DivergenceRows",
    "LinkTerm",
    "LogitRows",
    "LogitSums",
    "TopRows",
    "TreePackArrays",
    "accumulated",
    "baseline",
    "combined",
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
    "pair_link",
    "pair_losses",
    "pieces",
    "policy_loss",
    "repack",
    "row_affine",
    "row_between",
    "row_product",
    "row_weights",
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
