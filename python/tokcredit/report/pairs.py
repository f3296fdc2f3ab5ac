"""The columns of preference objectives: log-ratios, tokens of a barrier, scores and margins."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit.methods.tab_po import barrier
from tokcredit.preference import PreparedPairs


def columns(prepared: PreparedPairs, log_probs: Tensor | None) -> dict[str, Tensor]:
    """Return what only preference objectives have; NaN and False where it is not known.

    Args:
        prepared: Pairs in which each row is a trajectory.
        log_probs: float ``[N]``, of the policy, or None if they are not known.

    Returns:
        ``log_ratio`` float ``[N]``: the log-prob minus that of the reference policy, or the log-prob itself where the
        score has no reference. ``barrier`` bool ``[N]``: tokens that count in TAB-PO's barrier. ``score`` float
        ``[R]``. ``margin`` float ``[G]``: the chosen score minus the rejected one.
    """
    batch, objective = prepared.batch, prepared.objective
    known = log_probs is not None
    current = log_probs if log_probs is not None else torch.full(batch.tokens.shape, torch.nan)
    reference = 0 if objective.reference is None else batch.input(objective.reference)
    gates = [term.gate(current) for term in objective.pair_terms if isinstance(term, barrier) and term.coefficient]
    marked = torch.stack([torch.zeros_like(prepared.mask), *gates]).any(0)
    score = torch.full((batch.num_rows,), torch.nan, dtype=current.dtype)
    if known and objective.variables == ("log_probs",):
        score = prepared.scores(current)
    chosen, rejected = (prepared.of_comparisons(score[rows]) for rows in prepared.rows_of_pairs)
    return {
        "log_ratio": torch.where(prepared.mask, current - reference, torch.nan),
        "barrier": marked & prepared.mask & (batch.flat(prepared.advantages) > 0),
        "score": score,
        "margin": chosen - rejected,
    }
