"""A batch of rollouts: rows of tokens in flat buffers, their groups and rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, row_indices, tensor
from tokcredit.evidence import FIELDS, KNOWN, check
from tokcredit.ops import Rows


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Rows of tokens, packed one after another, with the group and the reward of each.

    Row r is ``tokens[cu_seqlens[r] : cu_seqlens[r + 1]]``. :meth:`from_padded` makes the same from ``(B, T)`` tensors
    without copying them.

    Args:
        tokens: int32 or int64 ``[N]``, token ids.
        cu_seqlens: int32 or int64 ``[R + 1]``, where rows begin and end; from 0 to N, never decreasing. Batches made by
            :meth:`from_padded` and :meth:`among`, with gaps between rows, hold ``[2, R]``: begins, ends.
        group_ids: integer ``[R]``, the prompt of each row; any values in any order, groups of any size.
        rewards: float ``[R]``, finite.
        response_mask: bool ``[N]``, True where the policy chose the token, or None for all. A False token inside a row
            (a tool's reply) is part of the state but is paid nothing and trains nothing.
        old_log_probs: float ``[N]``, of the policy that the update starts from; None means exactly on policy.
        rollout_log_probs: float ``[N]``, of the engine that sampled.
        ref_log_probs: float ``[N]``, of the reference policy.
        entropies: float ``[N]``, of the next-token distributions, in nats.
        extras: further evidence by name, whatever a method asks for; see :mod:`tokcredit.evidence`.

    Raises:
        TypeError, ValueError: ``argument: expected ..., got ...``.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    rewards: Tensor
    response_mask: Tensor = None  # type: ignore[assignment]
    old_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropies: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] | None = field(default=None, repr=False)
    begin: Tensor = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    end: Tensor = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    group_index: Tensor = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    num_groups: int = field(default=0, init=False, repr=False)
    lengths: Tensor = field(default=None, init=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.tokens, Tensor):
            raise TypeError(f"tokens: expected torch.Tensor, got {type(self.tokens).__name__}")
        device, n = self.tokens.device, self.tokens.numel()
        tensor("tokens", self.tokens, INTEGERS, (n,), device)
        edges = self.cu_seqlens
        if isinstance(edges, Tensor) and edges.dim() == 2:
            edges = tensor("cu_seqlens", edges, INTEGERS, (2, edges.shape[1]), device).long()
            put("begin", edges[0])
            put("end", edges[1])
        else:
            size = edges.numel() if isinstance(edges, Tensor) else 0
            edges = tensor("cu_seqlens", edges, INTEGERS, (size,), device).long()
            if size == 0 or edges[0] != 0 or edges[-1] != n or bool((edges.diff() < 0).any()):
                raise ValueError(f"cu_seqlens: expected to rise from 0 to {n}, got {edges.tolist()[:8]}...")
            put("begin", edges[:-1].contiguous())
            put("end", edges[1:].contiguous())
        rows = self.begin.numel()
        groups = tensor("group_ids", self.group_ids, (*INTEGERS, torch.int16, torch.uint8), (rows,), device)
        rewards = tensor("rewards", self.rewards, FLOATS, (rows,), device)
        if not bool(torch.isfinite(rewards).all()):
            raise ValueError(f"rewards: expected finite numbers, got {rewards[~torch.isfinite(rewards)].tolist()[:4]}")
        put("rewards", rewards.double() if rewards.dtype == torch.float64 else rewards.float())
        names, index = torch.unique(groups, return_inverse=True)
        put("group_index", index.long())
        put("num_groups", names.numel())
        if self.response_mask is None:
            put("response_mask", torch.ones(n, dtype=torch.bool, device=device))
        tensor("response_mask", self.response_mask, (torch.bool,), (n,), device)
        for name in FIELDS:
            if getattr(self, name) is not None:
                tensor(name, getattr(self, name), FLOATS, (n,), device)
        put("lengths", ops.count(self.rows, self.response_mask).long())

    @classmethod
    def from_padded(
        cls,
        tokens: Tensor,
        response_mask: Tensor,
        group_ids: Tensor,
        rewards: Tensor,
        attention_mask: Tensor | None = None,
        *,
        extras: Mapping[str, Any] | None = None,
        **per_token: Tensor | None,
    ) -> Rollouts:
        """The same batch from right-padded ``(B, T)`` tensors, which are viewed, not copied.

        Args:
            tokens: integer ``(B, T)``.
            response_mask: bool ``(B, T)``; integer and float masks of 0 and 1 are accepted.
            group_ids: integer ``(B,)``.
            rewards: float ``(B,)``.
            attention_mask: ``(B, T)``, True on real tokens, which come first. Without it a row ends after the last True
                of ``response_mask``.
            extras: as in the class.
            per_token: ``old_log_probs`` and the other per-token fields, each ``(B, T)``.
        """
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError(f"tokens: expected integers (B, T), got {describe(tokens)}")
        if unknown := set(per_token) - set(FIELDS):
            raise TypeError(f"{sorted(unknown)[0]}: expected one of {', '.join(FIELDS)}")
        shape = (tokens.shape[0], tokens.shape[1])

        def as_mask(name: str, mask: Any) -> Tensor:
            if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
                raise ValueError(f"{name}: expected bool {list(shape)}, got {describe(mask)}")
            return mask if mask.dtype == torch.bool else mask != 0

        mask = as_mask("response_mask", response_mask)
        real = mask if attention_mask is None else as_mask("attention_mask", attention_mask)
        begin = torch.arange(shape[0], device=tokens.device) * shape[1]
        flat = real.reshape(-1)
        length = _length(real)
        if attention_mask is not None:
            if not torch.equal(ops.count(Rows(begin, begin + shape[1], flat), flat).long(), length):
                raise ValueError("attention_mask: expected real tokens first (right padding), got a gap in a row")
            if bool((mask & ~real).any()):
                raise ValueError("response_mask: expected False on padding, got True outside attention_mask")
        for name, x in per_token.items():
            if x is not None and (not isinstance(x, Tensor) or tuple(x.shape) != shape):
                raise ValueError(f"{name}: expected float {list(shape)}, got {describe(x)}")
        return cls(
            tokens.reshape(-1),
            torch.stack([begin, begin + length]),
            group_ids,
            rewards,
            mask.reshape(-1),
            **{name: None if x is None else x.reshape(-1) for name, x in per_token.items()},
            extras=extras or {},
            shape=shape,
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return self.begin.numel()

    @property
    def num_tokens(self) -> int:
        """N, the length of the flat buffers, padding included."""
        return self.tokens.numel()

    @property
    def rows(self) -> Rows:
        """Spans and mask as the native operations take them."""
        return Rows(self.begin, self.end, self.response_mask)

    @property
    def everything(self) -> Rows:
        """Spans without the mask: all real tokens."""
        return Rows(self.begin, self.end)

    def evidence(self, name: str) -> Any:
        """What the batch carries under this name, its tokens in one axis: ``[N, ...]``, or ``[R, ...]`` per row.

        Raises:
            TypeError, ValueError: it is missing, or not what :mod:`tokcredit.evidence` says.
        """
        x = getattr(self, name) if name in FIELDS else self.extras.get(name)
        if x is None:
            raise ValueError(f"{name}: expected in the batch because the objective needs it, got None")
        return check(name, x, self.num_tokens, self.num_rows, self.shape)

    def improbable(self, below: float) -> Tensor:
        """True at tokens to which the old policy gave a probability of less than ``below``; bool ``[N]``."""
        return self.evidence("old_log_probs") < (math.log(below) if below > 0 else -math.inf)

    def flat(self, x: Tensor, name: str = "x") -> Tensor:
        """A per-token tensor in the layout of the inputs, ``(B, T)`` or ``[N]``, as ``[N]``."""
        expected = self.shape or (self.num_tokens,)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(x.shape)}")
        return x.reshape(-1)

    def shaped(self, x: Tensor) -> Tensor:
        """A flat ``[N]`` tensor in the layout of the inputs."""
        return x if self.shape is None else x.view(self.shape)

    def to_padded(self, x: Tensor) -> Tensor:
        """A per-token tensor as ``(B, T)``, 0 on padding; a packed batch is unpacked to its longest row."""
        if self.shape is not None:
            return self.flat(x.reshape(-1).view(self.shape)).view(self.shape)
        length = self.end - self.begin
        width = int(length.max()) if self.num_rows else 0
        target = torch.arange(self.num_rows, device=x.device) * width
        return ops.repack(self.flat(x), self.begin, target, length, self.num_rows * width).view(self.num_rows, width)

    def to_packed(self, x: Tensor) -> Tensor:
        """A per-token tensor as ``[sum of (end - begin)]``, the rows one after another without padding."""
        if self.cu_seqlens.dim() == 1:
            return self.flat(x)
        length = self.end - self.begin
        edges = length.cumsum(0)
        size = int(edges[-1]) if self.num_rows else 0
        return ops.repack(self.flat(x), self.begin, edges - length, length, size)

    def token_positions(self, rows: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        """Where the tokens of these rows (int64 ``[M]``) are, and the spans and shape of the batch they make."""
        length = (self.end - self.begin)[rows]
        if self.shape is None:
            edges = torch.cat([length.new_zeros(1), length.cumsum(0)])
            take = torch.repeat_interleave(self.begin[rows] - edges[:-1], length)
            return take + torch.arange(take.numel(), device=take.device), edges, None
        width = self.shape[1]
        columns = torch.arange(width, device=rows.device)
        begin = torch.arange(rows.numel(), device=rows.device) * width
        take = (self.begin[rows][:, None] + columns).reshape(-1)
        return take, torch.stack([begin, begin + length]), (rows.numel(), width)

    def among(self, rows: Tensor) -> Rollouts:
        """The batch of these rows in the buffers of the whole, which are not copied: other rows become padding.

        Per-token results have the layout of the whole.

        Args:
            rows: bool ``[R]``.
        """
        taken = tensor("rows", rows, (torch.bool,), (self.num_rows,), self.tokens.device).nonzero()[:, 0]
        return replace(
            self,
            cu_seqlens=torch.stack([self.begin[taken], self.end[taken]]),
            group_ids=self.group_ids[taken],
            rewards=self.rewards[taken],
            response_mask=ops.spread(rows, self.rows, self.tokens),
            extras=self._extras(taken),
        )

    def _extras(self, rows: Tensor, tokens: Tensor | None = None) -> dict[str, Any]:
        """The extras of these rows, and of these tokens, or None where tokens stay."""

        def pick(name: str, x: Any) -> Any:
            size = x.shape[0] if isinstance(x, Tensor) and x.dim() else -1
            if tokens is None and size >= 0 and tuple(x.shape[:2]) == self.shape:
                return x
            per = KNOWN[name].per if name in KNOWN else {self.num_rows: "row", self.num_tokens: "token"}.get(size)
            index = {"row": rows, "token": tokens}.get(per) if per else None
            return x if index is None else (self.evidence(name) if name in KNOWN else x).index_select(0, index)

        return {name: pick(name, x) for name, x in self.extras.items()}

    def select(self, rows: Tensor) -> Rollouts:
        """The batch of these rows, in this order. Per-row and per-token extras follow.

        Args:
            rows: integer ``[M]`` or bool ``[R]``.
        """
        rows = row_indices(rows, self.num_rows, self.tokens.device)
        take, spans, shape = self.token_positions(rows)
        per_token = {name: x.index_select(0, take) for name in FIELDS if (x := getattr(self, name)) is not None}
        return Rollouts(
            self.tokens.index_select(0, take),
            spans,
            self.group_ids[rows],
            self.rewards[rows],
            self.response_mask.index_select(0, take),
            **per_token,
            extras=self._extras(rows, take),
            shape=shape,
        )


def _length(mask: Tensor) -> Tensor:
    """One past the last True of each row of a bool matrix, int64 ``[B]``."""
    rows, width = mask.shape
    if width == 0:
        return torch.zeros(rows, dtype=torch.long, device=mask.device)
    # Eight at a time where they make a word: found in two steps, with an eighth of the temporaries.
    mask = mask.contiguous()
    size = 8 if width % 8 == 0 and mask.storage_offset() % 8 == 0 else 1
    present = mask.view(torch.int64 if size == 8 else torch.uint8) != 0
    # Walking back from the end of the row, the first True is the last of it.
    skipped = present.flip(1).view(torch.uint8).argmax(1)
    word = present.shape[1] - 1 - skipped
    last = mask.view(rows, -1, size)[torch.arange(rows, device=mask.device), word]
    inside = size - last.flip(1).view(torch.uint8).argmax(1)
    return torch.where(last.any(1), word * size + inside, 0)
