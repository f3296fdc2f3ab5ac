"""Torch registrations of the native operations: shapes, devices and gradients. Contracts are in ``csrc/ops``.

Private: users call the stage modules. Every operation is defined in ``torch.library`` with a fake implementation
that also allocates its outputs, so it composes with ``torch.compile`` and is checked by ``opcheck``.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import define, impl, register_fake

from tokcredit import _C

_DEVICES = ("cpu", "cuda")
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def num_threads() -> int:
    """Threads of CPU operations: the CPUs this process may run on, whatever ``OMP_NUM_THREADS`` says."""
    return _threads


def set_num_threads(count: int) -> None:
    """Sets :func:`num_threads`; results do not depend on it, not even in the last bit."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    global _threads
    _threads = count


class Rows(NamedTuple):
    """Spans of flat token buffers: row r is ``[begin[r], end[r])``, and only tokens with ``mask`` take part.

    ``begin`` and ``end`` are int64 ``[R]``, increasing and disjoint; ``mask`` is bool ``[N]`` or None for all.
    """

    begin: Tensor
    end: Tensor
    mask: Tensor | None = None


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# -- scan --------------------------------------------------------------------------------------------------------

define(
    "tokcredit::scan",
    "(Tensor x, Tensor begin, Tensor end, Tensor? mask, float decay, Tensor? carry, bool reverse, bool exclusive, "
    "int threads) -> (Tensor, Tensor)",
)


@register_fake("tokcredit::scan")
def _scan_outputs(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    decay: float,
    carry: Tensor | None,
    reverse: bool,
    exclusive: bool,
    threads: int,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulated(x.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(begin.shape, dtype=dtype)


@impl("tokcredit::scan", _DEVICES)
def _scan(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    decay: float,
    carry: Tensor | None,
    reverse: bool,
    exclusive: bool,
    threads: int,
) -> tuple[Tensor, Tensor]:
    y, last = _scan_outputs(x, begin, end, mask, decay, carry, reverse, exclusive, threads)
    if begin.numel() == 0:
        return y.zero_(), last
    _C.scan(x.contiguous(), begin, end, _plain(mask), decay, _plain(carry), reverse, exclusive, y, last, threads)
    return y, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carry: Tensor | None, rows: Rows, decay: float, reverse: bool, exclusive: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.rows, ctx.decay, ctx.reverse, ctx.exclusive, ctx.dtype = rows, decay, reverse, exclusive, x.dtype
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return torch.ops.tokcredit.scan(x, *rows, decay, carry, reverse, exclusive, num_threads())

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        # The adjoint of a decayed recurrence is the same recurrence walked the other way.
        def adjoint(g: Tensor, carry: Tensor | None, exclusive: bool) -> tuple[Tensor, Tensor]:
            return torch.ops.tokcredit.scan(g, *ctx.rows, ctx.decay, carry, not ctx.reverse, exclusive, num_threads())

        gx = gcarry = None
        if grad is not None:
            gx, gcarry = adjoint(grad, None, ctx.exclusive)
            gcarry = gcarry if ctx.exclusive else gcarry * ctx.decay
        if grad_last is not None:
            through, first = adjoint(grad_last.new_zeros(ctx.shape), grad_last, True)
            gx = through if gx is None else gx + through
            gcarry = first if gcarry is None else gcarry + first
        gcarry = gcarry if ctx.needs_input_grad[1] else None
        return None if gx is None else gx.to(ctx.dtype), gcarry, None, None, None, None


def scan(
    x: Tensor,
    rows: Rows,
    decay: float = 1.0,
    carry: Tensor | None = None,
    reverse: bool = False,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and last states of the masked recurrence of ``csrc/ops/scan.hpp``."""
    if x.requires_grad or (carry is not None and carry.requires_grad):
        return _Scan.apply(x, carry, rows, decay, reverse, exclusive)
    return torch.ops.tokcredit.scan(x, *rows, decay, carry, reverse, exclusive, num_threads())


# -- tree --------------------------------------------------------------------------------------------------------

define(
    "tokcredit::tree_build",
    "(Tensor tokens, Tensor begin, Tensor end, Tensor group, int groups, int threads) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@register_fake("tokcredit::tree_build")
def _tree_outputs(
    tokens: Tensor, begin: Tensor, end: Tensor, group: Tensor, groups: int, threads: int
) -> tuple[Tensor, ...]:
    nodes = [begin.new_empty(2 * begin.shape[0]) for _ in range(6)]
    return begin.new_empty(begin.shape), *nodes, begin.new_zeros(())


@impl("tokcredit::tree_build", _DEVICES)
def _tree_build(
    tokens: Tensor, begin: Tensor, end: Tensor, group: Tensor, groups: int, threads: int
) -> tuple[Tensor, ...]:
    outputs = _tree_outputs(tokens, begin, end, group, groups, threads)
    if begin.numel():
        _C.tree_build(tokens.contiguous(), begin, end, group.contiguous(), groups, *outputs, threads)
    return outputs


define("tokcredit::tree_fold", "(Tensor leaf, Tensor parent, Tensor? scale, Tensor x) -> Tensor")


@register_fake("tokcredit::tree_fold")
def _fold_output(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(parent.shape)


@impl("tokcredit::tree_fold", _DEVICES)
def tree_fold(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """Sums from the leaves to the roots, see ``csrc/ops/tree.hpp``."""
    y = _fold_output(leaf, parent, scale, x)
    if x.numel():
        _C.tree_fold(leaf, parent, _plain(scale), x.contiguous(), y)
    return y


define(
    "tokcredit::expand",
    "(Tensor like, ScalarType dtype, Tensor begin, Tensor end, Tensor? mask, Tensor? row, Tensor? leaf, "
    "Tensor? parent, Tensor? depth, Tensor? body, Tensor? head, int threads) -> Tensor",
)


@register_fake("tokcredit::expand")
def _expand_output(
    like: Tensor,
    dtype: torch.dtype,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    row: Tensor | None,
    leaf: Tensor | None,
    parent: Tensor | None,
    depth: Tensor | None,
    body: Tensor | None,
    head: Tensor | None,
    threads: int,
) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype)


@impl("tokcredit::expand", _DEVICES)
def _expand(
    like: Tensor,
    dtype: torch.dtype,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    row: Tensor | None,
    leaf: Tensor | None,
    parent: Tensor | None,
    depth: Tensor | None,
    body: Tensor | None,
    head: Tensor | None,
    threads: int,
) -> Tensor:
    y = _expand_output(like, dtype, begin, end, mask, row, leaf, parent, depth, body, head, threads)
    if begin.numel() == 0:
        return y.zero_()
    _C.expand(begin, end, _plain(mask), _plain(row), leaf, parent, depth, _plain(body), _plain(head), y, threads)
    return y


def spread(row: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Each row's number at each of its unmasked tokens and 0 elsewhere, in the layout of ``like``."""
    if row.dtype not in (torch.float32, torch.float64, torch.int64, torch.bool):
        row = row.float()
    return torch.ops.tokcredit.expand(like, row.dtype, *rows, row, None, None, None, None, None, num_threads())


# -- repack ------------------------------------------------------------------------------------------------------

define(
    "tokcredit::repack", "(Tensor x, Tensor source, Tensor target, Tensor length, SymInt size, int threads) -> Tensor"
)


@register_fake("tokcredit::repack")
def _repack_output(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int, threads: int) -> Tensor:
    return x.new_empty(size)


@impl("tokcredit::repack", _DEVICES)
def _repack(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int, threads: int) -> Tensor:
    y = _repack_output(x, source, target, length, size, threads)
    if source.numel() == 0:
        return y.zero_()
    _C.repack(x.contiguous(), source.contiguous(), target.contiguous(), length.contiguous(), y, threads)
    return y


class _Repack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int) -> Tensor:
        ctx.source, ctx.target, ctx.length, ctx.size = source, target, length, x.numel()
        return torch.ops.tokcredit.repack(x, source, target, length, size, num_threads())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return repack(grad, ctx.target, ctx.source, ctx.length, ctx.size), None, None, None, None


def repack(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int) -> Tensor:
    """Rows of tokens moved from one layout to another, 0 elsewhere; see ``csrc/ops/repack.hpp``."""
    if x.requires_grad:
        return _Repack.apply(x, source, target, length, size)
    return torch.ops.tokcredit.repack(x, source, target, length, size, num_threads())


# -- baseline ----------------------------------------------------------------------------------------------------

define(
    "tokcredit::baseline",
    "(Tensor log_probs, Tensor squares, Tensor rewards, Tensor begin, Tensor end, Tensor? mask, Tensor group, "
    "int groups, float epsilon, bool with_returns, int threads) -> (Tensor, Tensor)",
)


@register_fake("tokcredit::baseline")
def _baseline_outputs(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    with_returns, dtype = arguments[8], _accumulated(log_probs.dtype)
    return (
        log_probs.new_empty(log_probs.shape, dtype=dtype),
        log_probs.new_empty(log_probs.shape if with_returns else (0,), dtype=dtype),
    )


@impl("tokcredit::baseline", _DEVICES)
def _baseline(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    advantages, returns = _baseline_outputs(log_probs, *arguments)
    squares, rewards, begin, end, mask, group, groups, epsilon, with_returns, threads = arguments
    if begin.numel() == 0:
        return advantages.zero_(), returns.zero_()
    _C.baseline(
        log_probs.contiguous(),
        squares.contiguous(),
        rewards.contiguous(),
        begin,
        end,
        _plain(mask),
        group.contiguous(),
        groups,
        epsilon,
        advantages,
        returns if with_returns else None,
        threads,
    )
    return advantages, returns


def baseline(
    log_probs: Tensor,
    squares: Tensor,
    rewards: Tensor,
    rows: Rows,
    group: Tensor,
    groups: int,
    epsilon: float = 1e-8,
    with_returns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages ``[N]`` over the baseline of least variance, and returns (``[0]`` unless wanted).

    ``rewards`` is ``[N]`` or one per row, ``[R, 1]``; see ``csrc/ops/baseline.hpp``.
    """
    advantages, returns = torch.ops.tokcredit.baseline(
        log_probs, squares, rewards, *rows, group, groups, epsilon, with_returns, num_threads()
    )
    return advantages, returns


# -- policy_loss -------------------------------------------------------------------------------------------------

SURROGATES = ("clip", "weighted", "soft", "k1", "k2", "k3")
LOSS_STATS = ("loss", "tokens", "below", "above", "capped", "ratio", "divergence")

define(
    "tokcredit::policy_loss",
    "(Tensor log_probs, Tensor? reference, Tensor? log_ratio, Tensor? advantages, Tensor? weights, Tensor? low, "
    "Tensor? high, Tensor? cap, Tensor begin, Tensor end, Tensor? mask, Tensor? trains, int surrogate, "
    "bool cumulative, float bound, float power, float clamp_low, float clamp_high, bool differentiate, int threads) "
    "-> (Tensor, Tensor)",
)


@register_fake("tokcredit::policy_loss")
def _policy_loss_outputs(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    begin, differentiate = arguments[7], arguments[17]
    return (
        log_probs.new_empty((begin.shape[0], len(LOSS_STATS)), dtype=torch.float64),
        log_probs.new_empty(log_probs.shape if differentiate else (0,), dtype=_accumulated(log_probs.dtype)),
    )


@impl("tokcredit::policy_loss", _DEVICES)
def _policy_loss(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    stats, gradient = _policy_loss_outputs(log_probs, *arguments)
    *tensors, begin, end, mask, trains, surrogate, cumulative, bound, power, low, high, differentiate, threads = (
        arguments
    )
    if begin.numel() == 0:
        return stats, gradient.zero_()
    _C.policy_loss(
        log_probs.contiguous(),
        *map(_plain, tensors),
        begin,
        end,
        _plain(mask),
        _plain(trains),
        surrogate,
        cumulative,
        bound,
        power,
        low,
        high,
        stats,
        gradient if differentiate else None,
        threads,
    )
    return stats, gradient


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        stats, gradient = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
        ctx.save_for_backward(log_probs)
        ctx.mark_non_differentiable(stats)
        ctx.gradient, ctx.arguments = gradient, arguments
        return stats[:, 0].sum().to(gradient.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (log_probs,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second time through the same graph
            _, gradient = torch.ops.tokcredit.policy_loss(log_probs, *ctx.arguments)
        # The first pass wrote it, so it is scaled where it lies and given away: no second buffer.
        if torch.compiler.is_compiling():
            gradient = gradient * grad
        elif grad.device.type != "cpu" or grad != 1:
            gradient.mul_(grad)
        return gradient.to(log_probs.dtype), *([None] * len(ctx.arguments))


def policy_loss(
    log_probs: Tensor,
    rows: Rows,
    surrogate: str,
    *,
    reference: Tensor | None = None,
    log_ratio: Tensor | None = None,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    cap: Tensor | None = None,
    trains: Tensor | None = None,
    cumulative: bool = False,
    bound: float = float("inf"),
    power: float = 0.0,
    clamp: tuple[float, float] = (-float("inf"), float("inf")),
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted surrogate over all rows, and ``LOSS_STATS`` ``[R, 7]``; see ``csrc/ops/policy_loss.hpp``.

    Every operand may be 0-d (one for all), ``[R, 1]`` (one per row) or ``[N]`` (one per token). ``trains`` is bool
    ``[N]``: the other unmasked tokens count in sums and positions only.
    """
    dtype = _accumulated(log_probs.dtype)
    if reference is not None and reference.dtype != log_probs.dtype:
        # Differences are taken in the wider of the two, never after rounding one of them.
        common = torch.promote_types(log_probs.dtype, reference.dtype)
        log_probs, reference = log_probs.to(common), reference.to(common)
        dtype = _accumulated(common)
    operands = [None if x is None else x.to(dtype) for x in (log_ratio, advantages, weights, low, high, cap)]
    arguments = (
        reference,
        *operands,
        *rows,
        trains,
        SURROGATES.index(surrogate),
        cumulative,
        bound,
        power,
        *clamp,
        log_probs.requires_grad and torch.is_grad_enabled(),
        num_threads(),
    )
    if log_probs.requires_grad and torch.is_grad_enabled():
        return _PolicyLoss.apply(log_probs, *arguments)
    stats, _ = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
    return stats[:, 0].sum().to(dtype), stats


# -- logits -------------------------------------------------------------------------------------------------

define(
    "tokcredit::logits",
    "(Tensor logits, Tensor tokens, float temperature, int threads) -> (Tensor, Tensor, Tensor)",
)
define(
    "tokcredit::logits_gradient",
    "(Tensor logits, Tensor tokens, float temperature, Tensor logsumexp, Tensor entropies, "
    "Tensor? grad_log_probs, Tensor? grad_entropies, int threads) -> Tensor",
)


define(
    "tokcredit::logits_gradient_",
    "(Tensor(a!) logits, Tensor tokens, float temperature, Tensor logsumexp, Tensor entropies, "
    "Tensor? grad_log_probs, Tensor? grad_entropies, int threads) -> ()",
)


@register_fake("tokcredit::logits")
def _logits_outputs(logits: Tensor, tokens: Tensor, temperature: float, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulated(logits.dtype)
    return (
        logits.new_empty(tokens.shape, dtype=dtype),
        logits.new_empty(tokens.shape, dtype=dtype),
        logits.new_empty(tokens.shape, dtype=torch.float64),
    )


@impl("tokcredit::logits", _DEVICES)
def _logits(logits: Tensor, tokens: Tensor, temperature: float, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _logits_outputs(logits, tokens, temperature, threads)
    _C.logits(logits.contiguous(), tokens.contiguous(), temperature, *outputs, threads)
    return outputs


@register_fake("tokcredit::logits_gradient")
def _logits_gradient_output(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    logsumexp: Tensor,
    entropies: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropies: Tensor | None,
    threads: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


@impl("tokcredit::logits_gradient", _DEVICES)
def _logits_gradient(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    logsumexp: Tensor,
    entropies: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropies: Tensor | None,
    threads: int,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _C.logits_gradient(
        logits.contiguous(),
        tokens.contiguous(),
        temperature,
        logsumexp,
        entropies,
        _plain(grad_log_probs),
        _plain(grad_entropies),
        grad,
        threads,
    )
    return grad


@register_fake("tokcredit::logits_gradient_")
def _logits_gradient_in_place_outputs(*arguments: Any) -> None:
    return None


@impl("tokcredit::logits_gradient_", _DEVICES)
def _logits_gradient_in_place(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    logsumexp: Tensor,
    entropies: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropies: Tensor | None,
    threads: int,
) -> None:
    gradients = _plain(grad_log_probs), _plain(grad_entropies)
    _C.logits_gradient(logits, tokens.contiguous(), temperature, logsumexp, entropies, *gradients, logits, threads)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, overwrite: bool) -> tuple[Tensor, Tensor]:
        logits, tokens = logits.contiguous(), tokens.contiguous()
        log_probs, entropies, logsumexp = torch.ops.tokcredit.logits(logits, tokens, temperature, num_threads())
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
            torch.ops.tokcredit.logits_gradient_(grad, *arguments)
            torch.autograd.graph.increment_version(grad)  # a second backward pass would read the gradient as logits
        else:
            grad = torch.ops.tokcredit.logits_gradient(logits, *arguments)
        return grad, None, None, None


def logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` and entropies ``[N]`` of ``csrc/ops/logits.hpp``."""
    if logits.requires_grad:
        return _Logits.apply(logits, tokens, temperature, overwrite)
    log_probs, entropies, _ = torch.ops.tokcredit.logits(logits, tokens, temperature, num_threads())
    return log_probs, entropies


# -- segment -----------------------------------------------------------------------------------------------------

REDUCTIONS = ("sum", "mean", "var", "minimum", "maximum", "count", "logsumexp")

define(
    "tokcredit::segment_rows",
    "(Tensor x, Tensor begin, Tensor end, Tensor? mask, int reduction, float ddof, int threads) -> Tensor",
)
define(
    "tokcredit::segment_ids",
    "(Tensor x, Tensor ids, Tensor? mask, int segments, int reduction, float ddof) -> Tensor",
)


@register_fake("tokcredit::segment_rows")
def _segment_rows_output(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    return x.new_empty(begin.shape, dtype=_accumulated(x.dtype))


@impl("tokcredit::segment_rows", _DEVICES)
def _segment_rows(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    y = _segment_rows_output(x, begin, end, mask, reduction, ddof, threads)
    if begin.numel():
        _C.segment_rows(x.contiguous(), begin, end, _plain(mask), reduction, ddof, y, threads)
    return y


@register_fake("tokcredit::segment_ids")
def _segment_ids_output(
    x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float
) -> Tensor:
    return x.new_empty((segments,), dtype=_accumulated(x.dtype))


@impl("tokcredit::segment_ids", _DEVICES)
def _segment_ids(x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float) -> Tensor:
    y = _segment_ids_output(x, ids, mask, segments, reduction, ddof)
    if segments:
        _C.segment_ids(x.contiguous(), ids.contiguous(), _plain(mask), reduction, ddof, y)
    return y


def count(rows: Rows, like: Tensor) -> Tensor:
    """Unmasked tokens of each row as a float; ``like`` is any ``[N]``, which is not read."""
    return torch.ops.tokcredit.segment_rows(like, *rows, REDUCTIONS.index("count"), 0.0, num_threads())


# -- select ------------------------------------------------------------------------------------------------------

define(
    "tokcredit::select",
    "(Tensor x, Tensor begin, Tensor end, Tensor? mask, Tensor scope, Tensor wanted, bool ranks, int threads) "
    "-> Tensor",
)


@register_fake("tokcredit::select")
def _select_output(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    scope: Tensor,
    wanted: Tensor,
    ranks: bool,
    threads: int,
) -> Tensor:
    if ranks:
        return x.new_empty(wanted.shape, dtype=_accumulated(x.dtype))
    return x.new_empty(x.shape, dtype=torch.bool)


@impl("tokcredit::select", _DEVICES)
def _select(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    scope: Tensor,
    wanted: Tensor,
    ranks: bool,
    threads: int,
) -> Tensor:
    y = _select_output(x, begin, end, mask, scope, wanted, ranks, threads)
    if begin.numel() == 0 or wanted.numel() == 0:
        return y.fill_(float("nan")) if ranks else y.fill_(False)
    _C.select(x.contiguous(), begin, end, _plain(mask), scope.contiguous(), wanted.contiguous(), ranks, y, threads)
    return y


define("tokcredit::maximum_variance", "(Tensor x, Tensor scope, Tensor wanted) -> Tensor")


@register_fake("tokcredit::maximum_variance")
def _maximum_variance_output(x: Tensor, scope: Tensor, wanted: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


@impl("tokcredit::maximum_variance", _DEVICES)
def _maximum_variance(x: Tensor, scope: Tensor, wanted: Tensor) -> Tensor:
    chosen = _maximum_variance_output(x, scope, wanted)
    _C.maximum_variance(x.double().contiguous(), scope.contiguous(), wanted.contiguous(), chosen)
    return chosen
