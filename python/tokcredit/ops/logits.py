"""Log-probs and entropies from logits: contract in ``csrc/ops/logits.hpp``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result

_ROWS = (
    "Tensor logits, Tensor tokens, float temperature, Tensor? temperatures, float scale, float softcap, Tensor? chosen"
)


class LogitRows(NamedTuple):
    """What is read beside the logits; see ``csrc/ops/logits.hpp``."""

    tokens: Tensor
    temperature: float = 1.0
    temperatures: Tensor | None = None
    scale: float = 1.0
    softcap: float = math.inf
    chosen: Tensor | None = None

    def plain(self) -> LogitRows:
        """Return the same with contiguous tensors."""
        return self._replace(
            tokens=self.tokens.contiguous(), temperatures=plain(self.temperatures), chosen=plain(self.chosen)
        )


class LogitSums(NamedTuple):
    """Results of rows of logits."""

    log_probs: Tensor
    entropies: Tensor
    squares: Tensor | None
    chosen: Tensor | None
    logsumexp: Tensor


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor that a native operation takes as rows of logits: the same where its rows lie apart.

    Args:
        x: ``[N, V]`` or ``(B, T, V)``.
    """
    *sizes, ids = x.shape
    *strides, step = x.stride()
    apart, free = ids < 2 or step == 1, ids
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1:
            apart, free = apart and stride >= free, stride * size
    return x if apart else x.contiguous()


def _outputs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    scale: float,
    softcap: float,
    chosen: Tensor | None,
    squares: bool,
    threads: int,
) -> tuple[Tensor, ...]:
    dtype, shape = accumulated(logits.dtype), tokens.shape
    return (
        result(logits, shape, dtype),
        result(logits, shape, dtype),
        result(logits, shape if squares else (0,), dtype),
        result(logits, (0,) if chosen is None else chosen.shape, dtype),
        result(logits, shape, torch.float64),
    )


@operation(f"logits({_ROWS}, bool squares, int threads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _outputs)
def _forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    outputs = _outputs(logits, *arguments)
    *read, squares, threads = arguments
    rows = LogitRows(*read).plain()
    log_probs, entropies, squared, chosen, logsumexp = outputs
    wanted = squared if squares else None, None if rows.chosen is None else chosen
    _C.logits(in_rows(logits), *rows, log_probs, entropies, *wanted, logsumexp, threads)
    return outputs


def logits_forward(logits: Tensor, rows: LogitRows, squares: bool = False) -> LogitSums:
    """Return what ``csrc/ops/logits.hpp`` defines of rows of logits, without gradient.

    Args:
        logits: float ``[N, V]`` or ``(B, T, V)``.
        rows: What is read beside them.
        squares: Whether sums of squared probabilities are wanted.
    """
    log_probs, entropies, squared, chosen, logsumexp = _forward(logits, *rows, squares, num_threads())
    return LogitSums(
        log_probs, entropies, squared if squares else None, None if rows.chosen is None else chosen, logsumexp
    )


def _no_outputs(*arguments: Any) -> None:
    return None


def _state_output(logits: Tensor, *arguments: Any) -> Tensor:
    chosen = arguments[5]
    return result(logits, (logits.shape[0], 5 + (0 if chosen is None else chosen.shape[1])), torch.float64)


@operation(f"logits_state({_ROWS}, int first, int ids, Tensor? before, int threads) -> Tensor", _state_output)
def _state(logits: Tensor, *arguments: Any) -> Tensor:
    *rows, first, ids, before, threads = arguments
    state = _state_output(logits, *arguments)
    _C.logits_state(in_rows(logits), *LogitRows(*rows).plain(), first, ids, plain(before), state, threads)
    return state


def logits_state(logits: Tensor, rows: LogitRows, first: int, ids: int, before: Tensor | None = None) -> Tensor:
    """Return the state ``[N, 5 + K]`` of a part of the vocabulary with K chosen ids, together with the parts before.

    Args:
        logits: float ``[N, V]``, those of the ids from ``first`` on.
        rows: What is read beside them; tokens and chosen ids are those of the whole vocabulary.
        first: Id of the first column.
        ids: Number of ids of the whole vocabulary.
        before: The state of the parts before, float64 ``[N, 5 + K]``, or None.
    """
    state: Tensor = _state(logits, *rows, first, ids, before, num_threads())
    return state


def joined_states(states: Tensor) -> Tensor:
    """Return the state ``[N, 5 + K]`` of parts of the vocabulary together.

    Args:
        states: float64 ``[parts, N, 5 + K]``, of :func:`logits_state`.
    """
    most = states[..., 0].amax(0)
    less = torch.where(states[..., 0] == -math.inf, -746.0, states[..., 0] - most)  # exp(-746) = 0
    factor = less.exp()
    _, exps, weighted, squares, *own = states.unbind(-1)
    sums = (factor * exps, factor * (weighted + less * exps), factor.square() * squares, *own)
    return torch.stack((most, *(x.sum(0) for x in sums)), -1)


def sums_of_state(state: Tensor, rows: LogitRows, dtype: torch.dtype) -> LogitSums:
    """Return the results of rows from their state over the whole vocabulary.

    Args:
        state: float64 ``[N, 5 + K]``, of :func:`logits_state`.
        rows: Those of the state.
        dtype: dtype of the logits.
    """
    most, exps, weighted, squares, own, *chosen = state.unbind(-1)
    log_sum, wide = exps.log(), accumulated(dtype)
    takes_part = rows.tokens != -1

    def part(x: Tensor) -> Tensor:
        return torch.where(takes_part, x, 0).to(wide)

    of_chosen = None
    if rows.chosen is not None:
        log_p = torch.stack(chosen, -1) - most[:, None] - log_sum[:, None] if chosen else state[:, 5:]
        of_chosen = torch.where(takes_part[:, None] & (rows.chosen != -1), log_p, 0).to(wide)
    return LogitSums(
        part(own - most - log_sum),
        part(log_sum - weighted / exps),
        part(squares / exps.square()),
        of_chosen,
        torch.where(takes_part, most + log_sum, 0),
    )


_GIVEN = (
    "Tensor logsumexp, Tensor entropies, Tensor? squares, Tensor? grad_log_probs, Tensor? grad_entropies, "
    "Tensor? grad_squares, Tensor? grad_chosen"
)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the beginning of each row of a tensor, as numbers of a dtype.

    Args:
        x: float ``(..., V)``.
        dtype: Its dtype, or one of fewer bytes.
    """
    return x if x.dtype == dtype else x.view(dtype)[..., : x.shape[-1]]


def _write_gradient(grad: Tensor, logits: Tensor, *arguments: Any) -> None:
    *rows, first, ids = arguments[:8]
    given = map(plain, arguments[8:-1])
    every: list[Any] = [*LogitRows(*rows).plain(), first, ids, *given, grad, arguments[-1]]
    _C.logits_gradient(logits, *every)


def _gradient_output(logits: Tensor, *arguments: Any) -> Tensor:
    return result(logits, logits.shape)


@operation(f"logits_gradient({_ROWS}, int first, int ids, {_GIVEN}, int threads) -> Tensor", _gradient_output)
def _gradient(logits: Tensor, *arguments: Any) -> Tensor:
    grad = _gradient_output(logits)
    _write_gradient(grad, in_rows(logits), *arguments)
    return grad


@operation(
    f"logits_gradient_({_ROWS.replace('Tensor', 'Tensor(a!)', 1)}, int first, int ids, {_GIVEN}, ScalarType dtype, "
    "int threads) -> ()",
    _no_outputs,
)
def _gradient_(logits: Tensor, *arguments: Any) -> None:
    *others, dtype, threads = arguments
    _write_gradient(narrowed(logits, dtype), logits, *others, threads)


def logits_gradient_(
    logits: Tensor,
    rows: LogitRows,
    sums: LogitSums,
    given: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    first: int = 0,
    ids: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Write the gradient over the logits, and return it.

    Args:
        logits: float ``[N, V]`` or ``(B, T, V)``; its rows lie apart from each other.
        rows: What is read beside them.
        sums: Results of the rows; log-probs and those of chosen ids are not read.
        given: Gradients to log-probs, entropies, squares and log-probs of chosen ids, each or None.
        first: Id of the first column.
        ids: Number of ids of the whole vocabulary; -1 for the columns.
        dtype: That of the gradient: that of the logits if None, or half precision for float32.
    """
    dtype = dtype or logits.dtype
    before = (sums.logsumexp, sums.entropies, sums.squares)
    _gradient_(logits, *rows, first, ids, *before, *given, dtype, num_threads())
    return narrowed(logits, dtype)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, squares: bool, overwrite: bool, *rows: Any) -> tuple[Tensor | None, ...]:
        logits, own = in_rows(logits), LogitRows(*rows).plain()
        sums = logits_forward(logits, own, squares)
        tensors = (own.tokens, own.temperatures, own.chosen, sums.logsumexp, sums.entropies, sums.squares)
        ctx.save_for_backward(logits, *tensors)
        ctx.numbers, ctx.overwrite = (own.temperature, own.scale, own.softcap), overwrite
        ctx.set_materialize_grads(False)
        return tuple(sums[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (2 + len(LogitRows._fields))
        if all(x is None for x in given):
            return None, *nothing
        logits, tokens, temperatures, chosen, *before = ctx.saved_tensors
        temperature, scale, softcap = ctx.numbers
        rows = (tokens, temperature, temperatures, scale, softcap, chosen)
        arguments = (*rows, 0, -1, *before, *given)
        if ctx.overwrite:
            grad = logits.detach()
            _gradient_(grad, *arguments, grad.dtype, num_threads())
            torch.autograd.graph.increment_version(grad)  # a second backward pass would read the gradient as logits
        else:
            grad = _gradient(logits, *arguments, num_threads())
        return grad, *nothing


def logits(
    logits: Tensor, rows: LogitRows, squares: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The first four results of :class:`LogitSums`, with gradient to the logits."""
    if logits.requires_grad:
        return _Logits.apply(logits, squares, overwrite, *rows)
    return logits_forward(logits, rows, squares)[:4]
