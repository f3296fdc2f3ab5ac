"""Log-probs and entropies from logits: contract in ``csrc/ops/logits.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result


def _logits_outputs(logits: Tensor, tokens: Tensor, temperature: float, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulated(logits.dtype)
    return (
        result(logits, tokens.shape, dtype),
        result(logits, tokens.shape, dtype),
        result(logits, tokens.shape, torch.float64),
    )


@operation(
    "logits(Tensor logits, Tensor tokens, float temperature, int threads) -> (Tensor, Tensor, Tensor)", _logits_outputs
)
def logits_forward(logits: Tensor, tokens: Tensor, temperature: float, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and log-normalizers ``[N]`` without gradient; see ``csrc/ops/logits.hpp``."""
    outputs: tuple[Tensor, Tensor, Tensor] = _logits_outputs(logits, tokens, temperature, threads)
    _C.logits(logits.contiguous(), tokens.contiguous(), temperature, *outputs, threads)
    return outputs


def _logits_gradient_output(logits: Tensor, *arguments: Any) -> Tensor:
    return result(logits, logits.shape)


def _write_gradient(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    logsumexp: Tensor,
    entropies: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropies: Tensor | None,
    threads: int,
) -> None:
    gradients = plain(grad_log_probs), plain(grad_entropies)
    _C.logits_gradient(logits, tokens.contiguous(), temperature, logsumexp, entropies, *gradients, grad, threads)


@operation(
    "logits_gradient(Tensor logits, Tensor tokens, float temperature, Tensor logsumexp, Tensor entropies, "
    "Tensor? grad_log_probs, Tensor? grad_entropies, int threads) -> Tensor",
    _logits_gradient_output,
)
def _logits_gradient(logits: Tensor, *arguments: Any) -> Tensor:
    grad = _logits_gradient_output(logits)
    _write_gradient(grad, logits.contiguous(), *arguments)
    return grad


def _logits_gradient_in_place_outputs(*arguments: Any) -> None:
    return None


@operation(
    "logits_gradient_(Tensor(a!) logits, Tensor tokens, float temperature, Tensor logsumexp, Tensor entropies, "
    "Tensor? grad_log_probs, Tensor? grad_entropies, int threads) -> ()",
    _logits_gradient_in_place_outputs,
)
def logits_gradient_(logits: Tensor, *arguments: Any) -> None:
    """Write the gradient over the logits; see ``csrc/ops/logits.hpp``."""
    _write_gradient(logits, logits, *arguments)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, overwrite: bool) -> tuple[Tensor, Tensor]:
        logits, tokens = logits.contiguous(), tokens.contiguous()
        log_probs, entropies, logsumexp = logits_forward(logits, tokens, temperature, num_threads())
        ctx.save_for_backward(logits, tokens, logsumexp, entropies)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_log_probs is None and grad_entropies is None:
            return None, None, None, None
        logits, tokens, *sums = ctx.saved_tensors
        arguments = (tokens, ctx.temperature, *sums, grad_log_probs, grad_entropies, num_threads())
        if ctx.overwrite:
            grad = logits.detach()
            logits_gradient_(grad, *arguments)
            torch.autograd.graph.increment_version(grad)  # a second backward pass would read the gradient as logits
        else:
            grad = _logits_gradient(logits, *arguments)
        return grad, None, None, None


def logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` and entropies ``[N]`` of ``csrc/ops/logits.hpp``."""
    if logits.requires_grad:
        return _Logits.apply(logits, tokens, temperature, overwrite)
    log_probs, entropies, _ = logits_forward(logits, tokens, temperature, num_threads())
    return log_probs, entropies
