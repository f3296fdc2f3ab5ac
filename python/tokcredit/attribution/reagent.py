"""ReAGent: importance from random replacements, repeated until the important tokens alone keep the prediction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit.arguments import whole_number
from tokcredit.attribution.model import evaluated, next_logits, output, sequence
from tokcredit.attribution.replacement import Sampler

_LARGEST_CHANGE = 1 - 1e-6


class Importance(NamedTuple):
    """What ReAGent found.

    Attributes:
        mean: float ``[n]``, mean importance over the runs that stopped, or over all if none did; adds up to 1.
        runs: float ``[runs, n]``, importance of each run.
        stopped: bool ``[runs]``, whether the important tokens alone kept the prediction before the last step.
        steps: int64 ``[runs]``, steps that each run took.
    """

    mean: Tensor
    runs: Tensor
    stopped: Tensor
    steps: Tensor

    def rationale(self, keep: int, overlap: int = 2) -> Tensor:
        """Return the positions that are among the most important of several runs, ascending int64.

        Args:
            keep: Number of the most important tokens of each run, stopped or not.
            overlap: Number of runs in which a position must be among them.
        """
        among = _largest(self.runs, min(whole_number("keep", keep), self.runs.shape[1]))
        return (among.sum(0) >= overlap).nonzero()[:, 0]


def updated(score: Tensor, replaced: Tensor, change: Tensor) -> Tensor:
    """Return scores after one replacement, in logits.

    ``d = change`` of the target's probability where a token was replaced and ``-change`` elsewhere;
    ``score + ln((1 + d) / (1 - d))``.

    Args:
        score: float ``[runs, n]``.
        replaced: bool ``[runs, n]``.
        change: float ``[runs]``, probability before minus probability after.
    """
    d = torch.where(replaced, change[:, None], -change[:, None])
    return score + 2 * d.clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE).atanh()


def reagent(
    model: Any,
    ids: Tensor,
    target: int,
    sample: Sampler,
    ratio: float = 0.3,
    keep: int | float = 0.3,
    tolerance: int = 3,
    max_steps: int = 3000,
    runs: int = 8,
    generator: torch.Generator | None = None,
) -> Importance:
    """Return the importance of each token for the prediction of the next one.

    Each run starts from random scores and repeats: replace tokens at random, each with probability ``ratio``; see by
    how much d the probability of the target falls, and move the scores of replaced tokens by ``logit((d + 1) / 2)`` and
    those of the others by its negative; then replace all but the ``keep`` most important tokens, and
    stop if the target is among the ``tolerance`` likeliest predictions. The importance is the softmax of the scores.

    Args:
        model: Causal language model of transformers.
        ids: Integers ``[n]``, the tokens before the target.
        target: Token whose prediction is explained.
        sample: Draws replacements; see :func:`uniform` and :func:`from_masked_model`.
        ratio: Probability that a token is replaced, between 0 and 1.
        keep: Number of tokens that stay when a run is tested, or as a float the share of them, rounded up.
        tolerance: A run stops if the target is among so many likeliest tokens.
        max_steps: Largest number of steps of a run. The paper gives 1000, 3000 and 5000.
        runs: Number of runs, which are computed together.
        generator: Source of random numbers, on the device of ``ids``.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape is wrong, a number is out of its range, or there is no such target.

    References:
        arXiv 2402.00794.

    Differences from the released code:
        - If no run stopped, the mean is over all runs; the release divides by 0.
        - Changes of probability are kept 1e-6 away from 1, where the release has an infinite score.
    """
    ids = sequence(model, ids)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: expected a number between 0 and 1, got {ratio}")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share above 0 and at most 1, or a whole number, got {keep}")
    kept = math.ceil(keep * len(ids)) if isinstance(keep, float) else whole_number("keep", keep)
    runs, max_steps = whole_number("runs", runs, 1), whole_number("max_steps", max_steps, 1)
    tolerance = whole_number("tolerance", tolerance, 1)
    with evaluated(model), torch.no_grad():
        logits = next_logits(model, input_ids=ids[None])
        number = output(target, logits)
        before = _probability(logits, number)
        score = torch.rand((runs, len(ids)), generator=generator, device=ids.device, dtype=before.dtype)
        steps = torch.zeros(runs, dtype=torch.int64, device=ids.device)
        active = torch.arange(runs, device=ids.device)
        for _ in range(max_steps):
            rows = ids.expand(len(active), -1)
            replaced = torch.rand(rows.shape, generator=generator, device=ids.device) < ratio
            after = next_logits(model, input_ids=sample(rows, replaced, generator))
            score[active] = updated(score[active], replaced, before - _probability(after, number))
            others = ~_largest(score[active], min(kept, len(ids)))
            test = next_logits(model, input_ids=sample(rows, others, generator))
            steps[active] += 1
            active = active[(test > test[:, number, None]).sum(1) >= tolerance]
            if not len(active):
                break
    stopped = torch.ones(runs, dtype=torch.bool, device=ids.device)
    stopped[active] = False
    importance = score.softmax(-1)
    counted = stopped if bool(stopped.any()) else ~stopped
    return Importance(importance[counted].mean(0), importance, stopped, steps)


def _probability(logits: Tensor, number: int) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[:, number]


def _largest(score: Tensor, k: int) -> Tensor:
    """Return a mask of the k largest scores of each row; ties go to the lower index."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
