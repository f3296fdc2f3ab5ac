"""Divergences between two distributions: contracts in ``csrc/ops/divergence.hpp`` and ``divergence_top.hpp``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result

DIVERGENCES = _C.DIVERGENCES
OUTSIDES = _C.OUTSIDES
MOST_TOP = _C.MOST_TOP
_ROWS = "Tensor student, Tensor teacher, Tensor? other, Tensor? weights, Tensor? mask, int kind, float share, "
_ROWS += "float temperature"


class DivergenceRows(NamedTuple):
    """What a divergence reads beside the student's logits; see ``csrc/ops/divergence.hpp``."""

    teacher: Tensor
    other: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    kind: int
    share: float
    temperature: float


class TopRows(NamedTuple):
    """The same where some of the teacher's log-probs are known; see ``csrc/ops/divergence_top.hpp``."""

    ids: Tensor
    log_probs: Tensor
    mask: Tensor | None
    kind: int
    share: float
    outside: int
    temperature: float


def _plain(*arguments: Any) -> tuple[Any, ...]:
    """Return arguments with contiguous tensors; those that are contiguous are the same."""
    return tuple(plain(x) if isinstance(x, Tensor) else x for x in arguments)


def _outputs(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = student.shape[:1], accumulated(student.dtype)
    return result(student, rows, dtype), result(student, rows, dtype), result(student, (*rows, 3), torch.float64)


@operation(f"divergence({_ROWS}, int threads) -> (Tensor, Tensor, Tensor)", _outputs)
def _forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(student)
    _C.divergence(*_plain(student, *arguments[:-1], *outputs, arguments[-1]))
    return outputs


def _gradient_output(student: Tensor, *arguments: Any) -> Tensor:
    return result(student, student.shape)


def _write_gradient(grad: Tensor, student: Tensor, *arguments: Any) -> None:
    _C.divergence_gradient(*_plain(student, *arguments[:-1], grad, arguments[-1]))


@operation(
    f"divergence_gradient({_ROWS}, Tensor saved, Tensor grad_values, int threads) -> Tensor",
    _gradient_output,
)
def _gradient(student: Tensor, *arguments: Any) -> Tensor:
    grad = _gradient_output(student)
    _write_gradient(grad, student.contiguous(), *arguments)
    return grad


def _no_outputs(*arguments: Any) -> None:
    return None


@operation(
    f"divergence_gradient_({_ROWS.replace('Tensor', 'Tensor(a!)', 1)}, Tensor saved, Tensor grad_values, int threads) "
    "-> ()",
    _no_outputs,
)
def _gradient_(student: Tensor, *arguments: Any) -> None:
    _write_gradient(student, student, *arguments)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, overwrite: bool, *rows: Any) -> tuple[Tensor, Tensor]:
        student = student.contiguous()
        rows = (*map(plain, rows[:4]), *rows[4:])
        values, entropies, saved = _forward(student, *rows, num_threads())
        ctx.save_for_backward(student, saved, *rows[:4])
        ctx.numbers, ctx.overwrite = rows[4:], overwrite
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student, saved, *tensors = ctx.saved_tensors
        arguments = (*tensors, *ctx.numbers, saved, grad_values, num_threads())
        if ctx.overwrite:
            grad = student.detach()
            _gradient_(grad, *arguments)
            torch.autograd.graph.increment_version(grad)  # a second backward pass would read the gradient as logits
        else:
            grad = _gradient(student, *arguments)
        return grad, None, *(None for _ in DivergenceRows._fields)


def divergence(student: Tensor, rows: DivergenceRows, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Divergences ``[N]``, with gradient to the student's logits, and its entropies ``[N]``, without."""
    if student.requires_grad:
        return _Divergence.apply(student, overwrite, *rows)
    values, entropies, _ = _forward(student, *rows, num_threads())
    return values, entropies


def _top_outputs(student: Tensor, ids: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = student.shape[:1], accumulated(student.dtype)
    return (
        result(student, rows, dtype),
        result(student, rows, dtype),
        result(student, (*rows, 2), torch.float64),
        result(student, ids.shape, torch.float64),
    )


@operation(
    "divergence_top(Tensor student, Tensor ids, Tensor log_probs, Tensor? mask, int kind, float share, int outside, "
    "float temperature, int threads) -> (Tensor, Tensor, Tensor, Tensor)",
    _top_outputs,
)
def _top_forward(student: Tensor, ids: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _top_outputs(student, ids)
    _C.divergence_top(*_plain(student, ids, *arguments[:-1], *outputs, arguments[-1]))
    return outputs


def _write_top_gradient(grad: Tensor, student: Tensor, *arguments: Any) -> None:
    _C.divergence_top_gradient(*_plain(student, *arguments[:-1], grad, arguments[-1]))


_TOP_GRADIENT = (
    "Tensor ids, Tensor? mask, float temperature, Tensor saved, Tensor slopes, Tensor grad_values, int threads"
)


@operation(f"divergence_top_gradient(Tensor student, {_TOP_GRADIENT}) -> Tensor", _gradient_output)
def _top_gradient(student: Tensor, *arguments: Any) -> Tensor:
    grad = _gradient_output(student)
    _write_top_gradient(grad, student.contiguous(), *arguments)
    return grad


@operation(f"divergence_top_gradient_(Tensor(a!) student, {_TOP_GRADIENT}) -> ()", _no_outputs)
def _top_gradient_(student: Tensor, *arguments: Any) -> None:
    _write_top_gradient(student, student, *arguments)


class _Top(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, overwrite: bool, *rows: Any) -> tuple[Tensor, Tensor]:
        student, (ids, log_probs, mask, *numbers) = student.contiguous(), rows
        values, entropies, saved, slopes = _top_forward(student, ids, log_probs, mask, *numbers, num_threads())
        ctx.save_for_backward(student, ids, mask, saved, slopes)
        ctx.temperature, ctx.overwrite = numbers[-1], overwrite
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student, ids, mask, *kept = ctx.saved_tensors
        arguments = (ids, mask, ctx.temperature, *kept, grad_values, num_threads())
        if ctx.overwrite:
            grad = student.detach()
            _top_gradient_(grad, *arguments)
            torch.autograd.graph.increment_version(grad)
        else:
            grad = _top_gradient(student, *arguments)
        return grad, None, *(None for _ in TopRows._fields)


def divergence_top(student: Tensor, rows: TopRows, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Divergences ``[N]``, with gradient to the student's logits, and its entropies ``[N]``, without."""
    if student.requires_grad:
        return _Top.apply(student, overwrite, *rows)
    values, entropies, *_ = _top_forward(student, *rows, num_threads())
    return values, entropies


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
        p_logits, q_logits = p_logits.contiguous(), q_logits.contiguous()
        reverse = DIVERGENCES.index("reverse_kl")
        rows = DivergenceRows(q_logits, None, None, None, reverse, 0.5, temperature)
        kl, _, saved = _forward(p_logits, *rows, num_threads())
        ctx.save_for_backward(p_logits, q_logits, saved)
        ctx.temperature = temperature
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p_logits, q_logits, saved = ctx.saved_tensors

        def gradient(kind: str, student: Tensor, teacher: Tensor, saved: Tensor) -> Tensor:
            rows = DivergenceRows(teacher, None, None, None, DIVERGENCES.index(kind), 0.5, ctx.temperature)
            return _gradient(student, *rows, saved, grad, num_threads())

        to_p, to_q = ctx.needs_input_grad[:2]
        return (
            gradient("reverse_kl", p_logits, q_logits, saved) if to_p else None,
            gradient("forward_kl", q_logits, p_logits, saved[:, [1, 0, 2]]) if to_q else None,
            None,
        )


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """``KL(p || q)`` ``[N]`` with its gradient to both logits."""
    return _KL.apply(p_logits, q_logits, temperature)
