"""How far the probabilities of an inference engine are from those of the trainer, as numbers to watch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, tensor
from tokcredit.blocks import segment
from tokcredit.spans import Spans, require_spans


def statistics(
    log_probs: Tensor, engine_log_probs: Tensor, spans: Spans, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return statistics of the log-ratio between a trainer and an engine, with the names of verl.

    With ``o`` and ``b`` the log-probs under the trainer and the engine, and ``y = o - b``, held within 20 nats and 0
    where ``b`` is NaN; means over the tokens, or over the rows that have a token::

        kl             mean over tokens of -y
        k3_kl          mean over tokens of exp(y) - y - 1
        training_ppl   mean over rows of exp(-mean o)
        rollout_ppl    mean over rows of exp(-mean b)
        log_ppl_diff, log_ppl_abs_diff, log_ppl_diff_max, log_ppl_diff_min
                       mean, mean absolute value, largest and smallest, over rows, of mean(b) - mean(o)
        ppl_ratio      mean over rows of exp(mean(b) - mean(o))
        chi2_token     mean over tokens of exp(2 y) - 1
        chi2_seq       mean over rows of exp(2 sum(y)) - 1, the sum held within 20
        ess            1 / mean((w / mean(w))^2) over tokens, with w the weights: from 0 to 1

    On CUDA this waits for the device.

    Args:
        log_probs: float ``[N]``, under the trainer.
        engine_log_probs: float ``[N]``, under the engine; NaN where it did not report one.
        spans: The rows, with the mask of the tokens that count.
        weights: Importance weights, float ``[N]`` or ``[R, 1]``, or None for no ``ess``; see
            :class:`tokcredit.token_weights.importance`.

    Returns:
        float64 0-d tensors by name. Without tokens perplexities and their ratio are 1, and the others 0.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape or a device is wrong.
    """
    require_spans("spans", spans)
    for name, x in (("log_probs", log_probs), ("engine_log_probs", engine_log_probs)):
        tensor(name, x, FLOATS, (spans.size,), spans.device)
    trained = log_probs.double()
    engine = torch.where(engine_log_probs.isnan(), trained, engine_log_probs.double())
    ratio = (trained - engine).clamp_(-20.0, 20.0)
    inside = ops.spread(torch.ones_like(spans.begin, dtype=torch.bool), spans)
    y = ratio[inside]
    rows = segment.count(spans) > 0
    own, other = (segment.mean(x, spans)[rows] for x in (trained, engine))
    total = segment.sum(ratio, spans)[rows].clamp_(-20.0, 20.0)
    if not len(y):
        y, own, other, total = (torch.zeros(1, dtype=torch.float64, device=y.device) for _ in range(4))
    found = {
        "kl": (-y).mean(),
        "k3_kl": (y.expm1() - y).mean(),
        "training_ppl": (-own).exp().mean(),
        "rollout_ppl": (-other).exp().mean(),
        "log_ppl_diff": (other - own).mean(),
        "log_ppl_abs_diff": (other - own).abs().mean(),
        "log_ppl_diff_max": (other - own).amax(),
        "log_ppl_diff_min": (other - own).amin(),
        "ppl_ratio": (other - own).exp().mean(),
        "chi2_token": (2 * y).expm1().mean(),
        "chi2_seq": (2 * total).expm1().mean(),
    }
    if weights is not None:
        w = weights if weights.dim() == 1 else ops.spread(weights[:, 0], spans)
        w = w[inside].double()
        found["ess"] = w.sum().square() / (w.square().sum() * max(len(w), 1)).clamp(min=1e-300)
    return found
