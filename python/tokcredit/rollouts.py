"""The batch: rows of tokens in flat buffers, with the group, the trajectory, the reward and the inputs of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokcredit import inputs, ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, row_numbers, tensor
from tokcredit.groups import Groups
from tokcredit.layout import Layout
from tokcredit.pairing import Pairing
from tokcredit.selection import Section, Selection
from tokcredit.spans import Spans, padded_lengths
from tokcredit.trajectories import Joined, Trajectories, check_agreement, check_duplicates
from tokcredit.turns import Turns, runs


@dataclass(frozen=True, eq=False)
class Rollouts(Layout):
    """Rows of tokens, packed one after another, with the group and the reward of each row.

    A row is one response: the tokens that followed a prompt. Row r is ``tokens[cu_seqlens[r] : cu_seqlens[r + 1]]``.
    :meth:`from_padded` makes the same batch from ``(B, T)`` tensors without copying them. Making a batch checks
    everything once, which on CUDA waits for the device.

    A trajectory is one episode, in one or more rows: the tokens that the policy chose, in order. It counts once in
    every statistic and denominator, and advantages, loss and gradients do not depend on how it is cut into rows. A
    token that a later row repeats as context must be False in its mask there. Stages see :attr:`whole`, the batch in
    which each row is a trajectory.

    Rewards may have any finite size: group statistics are computed in float64. A trajectory without a True token in
    ``response_mask`` trains nothing and is left out of group statistics.

    Args:
        tokens: int32 or int64 ``[N]``, token ids.
        cu_seqlens: int32 or int64 ``[R + 1]``, ascending offsets from 0 to N. :class:`~tokcredit.Spans` of N tokens for
            rows with gaps between them.
        group_ids: Integers ``[R]``, which rows share a prompt; any values in any order, groups of any size.
        rewards: float ``[R]``, finite, the outcome; or ``[R, K]``, K rewards whose sum is the outcome. All rows of a
            trajectory have the same: one reward of the trajectory, not a share of it. None for 0 beside
            ``token_rewards``.
        response_mask: bool ``[N]``, True where the policy chose the token, or None for all True. A token that the
            policy did not choose (a tool's reply) is part of the state and has no advantage and no loss.
        old_log_probs: float ``[N]``, under the policy that the update starts from. None if the batch is used for one
            optimizer step: the ratio is then exactly 1.
        rollout_log_probs: float ``[N]``, under the engine that sampled.
        ref_log_probs: float ``[N]``, under the reference policy.
        entropies: float ``[N]``, of the next-token distributions, in nats.
        extras: Any other registered inputs by name; see :mod:`tokcredit.inputs`.
        trajectory_ids: Integers ``[R]``, the episode that each row belongs to. Its rows are in order, and other rows
            may lie between them. None if each row is a trajectory.
        token_rewards: float ``[N]``, rewards of tokens that the policy chose, 0 at the others. The reward of a turn is
            at its last token. The total reward of a trajectory, which groups are compared by, is the sum of these
            and of ``rewards``. Those that may equal the outcomes by chance are added by :meth:`with_inputs`.
        shape: ``(B, T)`` of a padded batch, whose rows begin at multiples of T; set by :meth:`from_padded`.

    Raises:
        TypeError: An argument is not a tensor or has the wrong dtype.
        ValueError: A shape, a device or a value is wrong, an input is not registered, rows of a trajectory differ in
            what belongs to the trajectory, turns are out of order, or ``rewards`` repeat what ``token_rewards`` sum to.
    """

    tokens: Tensor
    cu_seqlens: Tensor | Spans
    group_ids: Tensor
    rewards: Tensor
    response_mask: Tensor = None  # type: ignore[assignment]
    old_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropies: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    trajectory_ids: Tensor | None = field(default=None, kw_only=True)
    token_rewards: Tensor | None = field(default=None, kw_only=True)
    shape: tuple[int, int] | None = field(default=None, repr=False, kw_only=True)
    spans: Spans = field(init=False, repr=False)
    trajectories: Trajectories | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tensor):
            raise TypeError(f"tokens: expected torch.Tensor, got {type(self.tokens).__name__}")
        device, n = self.tokens.device, self.tokens.numel()
        tensor("tokens", self.tokens, INTEGERS, (n,), device)
        edges = self.cu_seqlens
        spans = edges if isinstance(edges, Spans) else Spans.from_cu_seqlens(edges)
        if spans.size != n:
            raise ValueError(f"cu_seqlens: expected offsets from 0 to {n}, the number of tokens, got {spans.size}")
        if spans.device != device:
            raise ValueError(f"cu_seqlens: expected a tensor on {device}, got one on {spans.device}")
        rows = spans.num_rows
        tensor("group_ids", self.group_ids, (*INTEGERS, torch.int16, torch.uint8), (rows,), device)
        self._set("rewards", self._checked_rewards(rows))
        trajectories = None
        if self.trajectory_ids is not None:
            ids = tensor("trajectory_ids", self.trajectory_ids, INTEGERS, (rows,), device)
            trajectories = Trajectories.of(ids, Spans.trusted(spans.begin, spans.end, n))
        self._set("trajectories", trajectories)
        if self.response_mask is None:
            self._set("response_mask", torch.ones(n, dtype=torch.bool, device=device))
        mask = tensor("response_mask", self.response_mask, (torch.bool,), (n,), device)
        if trajectories is not None and self.shape is None and int(trajectories.sizes.sum()) < n:
            # Gaps between the rows of a trajectory must not count.
            every_row = torch.ones(rows, dtype=torch.bool, device=device)
            self._set("response_mask", ops.spread(every_row, spans.with_mask(mask)))
        self._set("spans", spans.with_mask(self.response_mask))
        if doubled := sorted(self.extras.keys() & set(FIELDS)):
            raise ValueError(f"extras: expected {doubled[0]} as the argument of that name, got it in extras")
        self._check_inputs({name: getattr(self, name) for name in FIELDS} | dict(self.extras))
        if trajectories is not None:
            check_agreement(trajectories, "group_ids", self.group_ids)
            check_agreement(trajectories, "rewards", self.rewards)
        if self.token_rewards is not None:
            whole = self.whole
            check_duplicates(whole.outcome_rewards, whole.rewards, whole.nonempty)

    def _checked_rewards(self, rows: int) -> Tensor:
        if self.rewards is None and self.token_rewards is not None:
            return torch.zeros(rows, device=self.device)
        further = tuple(self.rewards.shape[1:]) if isinstance(self.rewards, Tensor) and self.rewards.dim() == 2 else ()
        if further == (0,):
            raise ValueError(
                f"rewards: expected [{rows}] or [{rows}, K] with K at least 1, got {describe(self.rewards)}"
            )
        rewards = tensor(
            "rewards", self.rewards, FLOATS, (rows, *further), self.device, "; convert with rewards.float()"
        )
        if not bool(torch.isfinite(rewards).all()):
            raise ValueError(f"rewards: expected finite numbers, got {rewards[~torch.isfinite(rewards)].tolist()[:4]}")
        return rewards if rewards.dtype == torch.float64 else rewards.float()

    def _check_inputs(self, named: Mapping[str, Tensor | None]) -> None:
        for name, x in named.items():
            if name not in FIELDS:
                checked = inputs.get(name).check(x, self.num_tokens, self.num_rows, self.shape, self.device)
                if inputs.get(name).per == "row" and self.trajectories is not None:
                    check_agreement(self.trajectories, name, checked, inputs.get(name).of_trajectory)
            elif x is not None:
                tensor(name, x, FLOATS, (self.num_tokens,), self.device)
        if (rewards := named.get("token_rewards")) is not None and bool(
            (wrong := ~rewards.isfinite() | (rewards != 0) & ~self.response_mask).any()
        ):
            t = int(wrong.nonzero()[0])
            raise ValueError(
                f"token_rewards: expected finite numbers, and 0 where response_mask is False, got {rewards[t].item()} "
                f"at token {t}"
            )
        if "turn_ids" in named:
            _ = self.whole.turns

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_padded(
        cls,
        tokens: Tensor,
        response_mask: Tensor,
        group_ids: Tensor,
        rewards: Tensor,
        attention_mask: Tensor | None = None,
        *,
        extras: Mapping[str, Tensor] | None = None,
        trajectory_ids: Tensor | None = None,
        **per_token: Tensor | None,
    ) -> Rollouts:
        """Return a batch from right-padded ``(B, T)`` tensors, which are viewed and not copied.

        Args:
            tokens: Integers ``(B, T)``.
            response_mask: bool ``(B, T)``; integers and floats count as True where they are not 0.
            group_ids: Integers ``(B,)``.
            rewards: float ``(B,)``, or ``(B, K)``.
            attention_mask: ``(B, T)``, True on real tokens, which come first. Without it a row ends after the last
                True of ``response_mask``.
            extras: As in the class; per-token inputs are ``(B, T, ...)``.
            trajectory_ids: As in the class.
            per_token: ``old_log_probs`` and the other per-token arguments of the class, each ``(B, T)``.

        Raises:
            TypeError: An argument is unknown, or has the wrong dtype.
            ValueError: A shape or value is wrong, or real tokens do not come first.
        """
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError(f"tokens: expected integers (B, T), got {describe(tokens)}")
        if unknown := set(per_token) - set(FIELDS):
            raise TypeError(f"{sorted(unknown)[0]}: expected one of {', '.join(FIELDS)}; put other inputs into extras")
        shape = (tokens.shape[0], tokens.shape[1])

        def as_mask(name: str, mask: Any) -> Tensor:
            if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
                raise ValueError(f"{name}: expected bool {list(shape)}, got {describe(mask)}")
            return mask if mask.dtype == torch.bool else mask != 0

        mask = as_mask("response_mask", response_mask)
        real = mask if attention_mask is None else as_mask("attention_mask", attention_mask)
        length = padded_lengths(real)
        if attention_mask is not None:
            if not torch.equal(real.sum(1), length):
                raise ValueError("attention_mask: expected real tokens first (right padding), got a gap in a row")
            if bool((mask & ~real).any()):
                raise ValueError("response_mask: expected False on padding, got True outside attention_mask")
        for name, x in per_token.items():
            if x is not None and (not isinstance(x, Tensor) or tuple(x.shape) != shape):
                raise ValueError(f"{name}: expected float {list(shape)}, got {describe(x)}")
        return cls(
            tokens.reshape(-1),
            Spans.from_padded(length, shape[1]),
            group_ids,
            rewards,
            mask.reshape(-1),
            **{name: None if x is None else x.reshape(-1) for name, x in per_token.items()},
            extras=extras or {},
            trajectory_ids=trajectory_ids,
            shape=shape,
        )

    @classmethod
    def from_pairs(
        cls,
        chosen: Tensor,
        rejected: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
        **per_token: tuple[Tensor, Tensor],
    ) -> Rollouts:
        """Return preference pairs as groups of two rows: row 2i is chosen with reward 1, row 2i + 1 rejected with 0.

        Args:
            chosen: Integers ``(P, T)``, token ids of the chosen rows.
            rejected: Integers ``(P, T)``, token ids of the rejected rows.
            chosen_mask: bool ``(P, T)``, True on the tokens of the response.
            rejected_mask: bool ``(P, T)``.
            per_token: Any per-token input by name, for the chosen and for the rejected rows, ``(P, T, ...)`` each.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: A shape is wrong, or an input is not registered.
        """

        def joined(name: str, pair: tuple[Tensor, Tensor]) -> Tensor:
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
                raise TypeError(f"{name}: expected tensors for chosen and rejected, got {type(pair).__name__}")
            first, second = pair
            if first.shape != second.shape or first.shape[:2] != chosen.shape[:2]:
                raise ValueError(
                    f"{name}: expected {list(chosen.shape)} for chosen and rejected, "
                    f"got {describe(first)} and {describe(second)}"
                )
            return torch.stack([first, second], 1).flatten(0, 1)

        joined("chosen, rejected", (chosen, rejected))
        if chosen.dim() != 2:
            raise ValueError(f"chosen: expected integers (P, T), got {describe(chosen)}")
        pairs = chosen.shape[0]
        groups = torch.arange(pairs, device=chosen.device).repeat_interleave(2)
        rewards = torch.tensor([1.0, 0.0], device=chosen.device).repeat(pairs)
        named = {name: joined(name, pair) for name, pair in per_token.items()}
        return cls.from_padded(
            joined("rejected", (chosen, rejected)),
            joined("rejected_mask", (chosen_mask, rejected_mask)),
            groups,
            rewards,
            extras={name: x for name, x in named.items() if name not in FIELDS},
            **{name: x for name, x in named.items() if name in FIELDS},
        )

    @property
    def whole(self) -> Rollouts:
        """The batch as stages see it: each row is a trajectory, and ``rewards`` are total rewards ``[J]``.

        Tokens are not copied where the rows of each trajectory follow one another. This batch itself where it is so
        already.
        """
        if "_components" in self.__dict__:
            return self
        made = self if self.trajectories is None else self.take(self.trajectories.joined)
        if self.token_rewards is None and self.rewards.dim() == 1:
            return made
        total, outcome = made.outcome_rewards, made.reward_components
        if made.token_rewards is not None:
            dense = ops.segment_rows(
                made.token_rewards, *made.spans.arrays, ops.REDUCTIONS.index("sum"), 0.0, ops.num_threads()
            )
            total = total + dense
        return made._derived((), rewards=total, _components=outcome)

    @property
    def reward_components(self) -> Tensor:
        """The rewards one by one, float ``[R, K]``, without ``token_rewards``."""
        given: Tensor = self.__dict__.get("_components", self.rewards)
        return given if given.dim() == 2 else given[:, None]

    @property
    def outcome_rewards(self) -> Tensor:
        """The outcome of each row's trajectory, float ``[R]``: the sum of its rewards without ``token_rewards``."""
        components = self.reward_components
        return components[:, 0] if components.shape[1] == 1 else components.sum(1)

    @cached_property
    def turns(self) -> Turns:
        """The turns of each row; on CUDA this waits for the device.

        A turn has the same number in ``turn_ids`` at all its tokens. In a batch without them it is a maximal run of
        tokens that the policy chose.
        """
        if self.has_input("turn_ids"):
            return Turns.of(self.policy_spans, self.input("turn_ids"))
        if "_parts" in self.__dict__:
            return Turns.of(self.policy_spans, runs(self.policy_spans, self.__dict__["_parts"]))
        return Turns.of_runs(self.policy_spans)

    @property
    def contexts(self) -> tuple[Spans, Tensor]:
        """The rows as they were cut, without mask, and the key of the context of each, int64 ``[P]``."""
        if "_part_keys" in self.__dict__:
            return self.__dict__["_parts"], self.__dict__["_part_keys"].long()
        return self.all_spans, self.input("context_keys").long()

    @property
    def longest(self) -> int:
        """Largest number of tokens that the policy chose in a trajectory, if trajectories are given, else ``width``.

        On CUDA the former waits for the device.
        """
        return self.width if self.trajectory_ids is None else int(self.lengths.max()) if self.num_rows else 0

    @cached_property
    def groups(self) -> Groups:
        """The groups, sorted once. Reductions such as ``segment.mean(rewards, batch.groups)`` reuse the order."""
        return Groups.of(self.group_ids)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row that the policy chose; int64 ``[R]``."""
        return ops.count(self.spans)

    @cached_property
    def nonempty(self) -> Tensor:
        """Rows with a token that the policy chose; bool ``[R]``."""
        return self.lengths > 0

    @cached_property
    def nonempty_groups(self) -> Groups:
        """The groups, in which only rows with a token that the policy chose count."""
        return self.groups.counting(self.nonempty)

    @cached_property
    def pairing(self) -> Pairing:
        """The preference pairs, found once. On CUDA this waits for the device."""
        return Pairing.of(self.group_index, self.num_groups, self.outcome_rewards)

    @property
    def group_index(self) -> Tensor:
        """Group of each row, from 0 to ``num_groups - 1``; int64 ``[R]``."""
        return self.groups.index

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return self.groups.count

    def input(self, name: str) -> Tensor:
        """Return a named input, with its tokens on one axis.

        Args:
            name: Name of a registered input, for example ``"entropies"``. See :mod:`tokcredit.inputs`.

        Returns:
            Tensor ``[N, ...]`` for a per-token input, ``[R, ...]`` for a per-row input.

        Raises:
            ValueError: The batch does not carry the input, or its shape is wrong.
            TypeError: Its dtype is wrong.
        """
        entry = inputs.get(name)
        x = getattr(self, name) if name in FIELDS else self.extras.get(name)
        if x is None:
            raise ValueError(f"{name}: expected in the batch because the objective reads it, got None")
        return entry.check(x, self.num_tokens, self.num_rows, self.shape, self.device)

    def has_input(self, name: str) -> bool:
        """Return whether the batch carries an input.

        Args:
            name: Name of a registered input.
        """
        return (getattr(self, name) if name in FIELDS else self.extras.get(name)) is not None

    def with_inputs(self, **named: Tensor | None) -> Rollouts:
        """Return the batch with more inputs, or other ones under the same names.

        Args:
            named: Registered inputs by name, per-token ones as ``[N, ...]`` or in the layout of the batch; None removes
                one.
        """
        if "_parts" in self.__dict__ and named.get("context_keys") is not None:
            raise ValueError("context_keys: expected in the batch of the rows, got them for whole trajectories")
        own = {name: self._one_axis(x) for name, x in named.items() if name in FIELDS}
        extras = {**self.extras, **{name: x for name, x in named.items() if name not in FIELDS}}
        extras = {name: x for name, x in extras.items() if x is not None}
        stale = {"turn_ids": "turns", "context_keys": "_part_keys"}
        made = self._derived(tuple(stale[name] for name in stale.keys() & named), **own, extras=extras)
        made._check_inputs(own | {name: extras[name] for name in named if name in extras})
        return made

    def selection(self, rows: Any) -> Selection:
        """Return which rows and tokens make up a part of the batch.

        Nothing is sorted and nothing waits for the device, unless ``rows`` itself lies on CUDA.

        Args:
            rows: Integers ``[M]`` or bool ``[R]``: a tensor, an array or a sequence; best on the host.

        Raises:
            TypeError: ``rows`` holds neither integers nor bool.
            ValueError: A row number is out of range.
        """
        padded = self.shape is not None and self.shape[0] == self.num_rows
        return Selection.of(row_numbers(rows, self.num_rows), self.spans, self.sizes, self.shape if padded else None)

    def section(self, first: int, last: int) -> Section:
        """Return which rows have some of the tokens ``[first, last)``, and where.

        Args:
            first: First token.
            last: One past the last token.
        """
        return Section.of(first, last, self.spans, self.starts, self.sizes)

    def select(self, rows: Any) -> Rollouts:
        """Return the batch of these rows, in this order, with their inputs.

        Args:
            rows: Integers ``[M]`` or bool ``[R]``: a tensor, an array or a sequence; best on the host.

        Raises:
            TypeError: ``rows`` holds neither integers nor bool.
            ValueError: A row number is out of range.
        """
        return self.take(self.selection(rows))

    def take(self, chosen: Selection | Section | Joined) -> Rollouts:
        """Return the batch of a selection of rows, or of trajectories as rows.

        Args:
            chosen: From :meth:`selection` or :meth:`section`, or ``trajectories.joined``.
        """
        made = object.__new__(Rollouts)
        mask = chosen.of_tokens(self.response_mask)

        def part(name: str, x: Tensor) -> Tensor:
            entry = inputs.get(name)
            if entry.per == "token":
                return chosen.of_tokens(self.input(name))
            if isinstance(chosen, Joined) and entry.of_trajectory == "last":
                return x.index_select(0, chosen.last)
            return chosen.of_rows(x)

        extras = {name: part(name, x) for name, x in self.extras.items()}
        per_token = {name: None if (x := getattr(self, name)) is None else chosen.of_tokens(x) for name in FIELDS}
        values: dict[str, Any] = {
            "tokens": chosen.of_tokens(self.tokens),
            "cu_seqlens": chosen.spans,
            "group_ids": chosen.of_rows(self.group_ids),
            "rewards": chosen.of_rows(self.rewards),
            "response_mask": mask,
            **per_token,
            "extras": extras,
            "trajectory_ids": None if self.trajectory_ids is None else chosen.of_rows(self.trajectory_ids),
            "spans": chosen.spans.with_mask(mask),
        }
        if isinstance(chosen, Joined):
            values |= {"shape": None, "trajectories": None, "_parts": chosen.parts}
            if (keys := self.extras.get("context_keys")) is not None:
                values["_part_keys"] = keys.index_select(0, chosen.order)
        else:
            trajectories = None if self.trajectories is None else self.trajectories.take(chosen)
            values |= {"shape": chosen.shape, "trajectories": trajectories}
            values |= {"lengths": chosen.of_rows(self.lengths), "sizes": chosen.sizes}
        if "_components" in self.__dict__:
            values["_components"] = chosen.of_rows(self.reward_components)
        for name, value in values.items():
            made._set(name, value)
        return made

    def detached(self) -> Rollouts:
        """Return the batch with inputs that carry no gradient."""
        named = {name: x for name in FIELDS if (x := getattr(self, name)) is not None} | dict(self.extras)
        attached = {name: x.detach() for name, x in named.items() if x.requires_grad}
        batch = self.with_inputs(**attached) if attached else self
        return batch.with_rewards(self.rewards.detach()) if self.rewards.requires_grad else batch

    def with_mask(self, response_mask: Tensor) -> Rollouts:
        """Return the batch with another response mask. Nothing waits for the device.

        Args:
            response_mask: bool ``[N]``.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Its shape or device is wrong.
        """
        return self._derived(_OF_MASK, response_mask=response_mask, spans=self.spans.with_mask(response_mask))

    def filtered(self, response_mask: Tensor) -> Rollouts:
        """Return the batch in the mask of a filter. ``policy_spans`` still has the tokens that it rejects.

        Args:
            response_mask: bool ``[N]``.
        """
        spans = self.spans.with_mask(response_mask)
        return self._derived(_OF_MASK, response_mask=response_mask, spans=spans, _policy_spans=self.policy_spans)

    @property
    def policy_spans(self) -> Spans:
        """The rows with the mask of all tokens that the policy chose, also of those that filters rejected."""
        spans: Spans = self.__dict__.get("_policy_spans", self.spans)
        return spans

    def with_rewards(self, rewards: Tensor) -> Rollouts:
        """Return the batch with other rewards. Nothing waits for the device; their values are not checked.

        Args:
            rewards: float, in the shape of those of the batch.

        Raises:
            TypeError: The rewards are not float.
            ValueError: Their shape or device is wrong.
        """
        tensor("rewards", rewards, FLOATS, tuple(self.rewards.shape), self.device)
        return self._derived(("pairing",), rewards=rewards if rewards.dtype == torch.float64 else rewards.float())

    def _derived(self, stale: tuple[str, ...], **changes: Any) -> Rollouts:
        """Return a batch with other attributes that are right by construction, without the stale cached ones."""
        made = object.__new__(Rollouts)
        made.__dict__.update(self.__dict__)
        for name in stale:
            made.__dict__.pop(name, None)
        made.__dict__.update(changes)
        return made

    def keeping(self, rows: Tensor) -> Rollouts:
        """Return a batch of some rows that shares the buffers of this batch. Tokens of the other rows are padding.

        Per-token results keep the layout of the whole batch. On CUDA this waits for the device.

        Args:
            rows: bool ``[R]``.

        Raises:
            ValueError: A trajectory has several rows; take :attr:`whole` first.
        """
        if self.trajectories is not None:
            raise ValueError("rows: expected a batch in which each row is a trajectory, got several rows in one")
        kept = tensor("rows", rows, (torch.bool,), (self.num_rows,), self.device).nonzero()[:, 0]
        mask = ops.spread(rows, self.spans)

        def of_rows(x: Tensor) -> Tensor:
            return x.index_select(0, kept)

        spans = Spans.trusted(of_rows(self.begin), of_rows(self.end), self.num_tokens, mask)
        components = {"_components": of_rows(self.reward_components)} if "_components" in self.__dict__ else {}
        return self._derived(
            ("sizes", "starts", *_OF_MASK, "_policy_spans", "pairing"),
            cu_seqlens=spans,
            spans=spans,
            group_ids=of_rows(self.group_ids),
            groups=self.groups.subset(kept),
            rewards=of_rows(self.rewards),
            response_mask=mask,
            lengths=of_rows(self.lengths),
            extras={name: x if inputs.get(name).per == "token" else of_rows(x) for name, x in self.extras.items()},
            trajectory_ids=None if self.trajectory_ids is None else of_rows(self.trajectory_ids),
            trajectories=None,
            **components,
        )


_OF_MASK = ("lengths", "nonempty", "nonempty_groups", "turns")
"""Cached attributes that depend on the response mask."""

FIELDS = tuple(f.name for f in fields(Rollouts) if f.name in inputs.names())
"""Registered inputs that are arguments of :class:`Rollouts` of their own."""
