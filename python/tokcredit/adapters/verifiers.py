"""verifiers: the advantages of an objective in the nodes of traces, where prime-rl reads them.

A row is a branch of a trace, and a trace is a trajectory. A message that several branches share trains in the first of
them. :func:`score_group` is what an ``Algorithm`` of prime-rl calls in its method of that name. Tested with verifiers
0.4.0; prime-rl is not on PyPI.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from verifiers.v1.episode import Episode
from verifiers.v1.trace import Branch, Trace

from tokcredit.adapters import two_phase
from tokcredit.adapters.capabilities import host_fields
from tokcredit.adapters.rows import Fields, HostRows, host_rows
from tokcredit.objective import Objective

FIELDS = host_fields(
    rollout_log_probs="logprobs",
    old_log_probs="trainer_logprobs",
    ref_log_probs="reference_logprobs",
    entropies="entropies",
)
"""The field of a branch for each input that it can carry."""


def assign(
    objective: Objective,
    traces: Iterable[Trace[Any, Any, Any]],
    group_ids: Sequence[Hashable] | None = None,
    *,
    turn_rewards: str | None = None,
) -> None:
    """Set ``advantages`` of the sampled nodes of all traces, one number for each sampled token.

    Traces of agents that are not trained, and nodes of branches that are not, keep None.

    Args:
        objective: Its credit and token weights make the advantages.
        traces: The traces, with whole groups.
        group_ids: The group of each trace. None if traces of the same task and agent are a group.
        turn_rewards: Entry of ``Trace.info`` with the reward of each sampled node that trains, in the order of the
            branches. They are rewards beside the outcome ``Trace.reward``. None if traces have an outcome only.

    Raises:
        ValueError: The objective has filters, reads another input or has settings that change during training, or a
            trace lacks a reward, a task, or a reward of a turn.
    """
    part, whole = two_phase.advantage_part(objective, "verifiers"), list(traces)
    groups = [_group(trace) for trace in whole] if group_ids is None else list(group_ids)
    if len(groups) != len(whole):
        raise ValueError(f"group_ids: expected one for each of {len(whole)} traces, got {len(groups)}")
    rows = [(i, branch, first) for i, trace in enumerate(whole) for branch, first in _rows(trace)]
    if not rows:
        return
    tokens = pad_sequence([torch.tensor(b.token_ids, dtype=torch.long) for _, b, _ in rows], batch_first=True)
    masks = [[m and new for node, new in zip(b.nodes, first, strict=True) for m in node.mask] for _, b, first in rows]
    mask = pad_sequence([torch.tensor(x, dtype=torch.bool) for x in masks], batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([len(x) for x in masks])[:, None]
    # A branch begins with nothing before it, so its prefixes are all that the policy had seen.
    named = {"context_keys": torch.zeros(len(rows), dtype=torch.int64)}
    for name, field in FIELDS.items():
        given = [getattr(branch, field) for _, branch, _ in rows]
        if all(x is not None for x in given):
            named[name] = pad_sequence([torch.tensor(x, dtype=torch.float32) for x in given], batch_first=True)
    prompts = [groups[i] for i, *_ in rows]
    outcomes = torch.tensor([_outcome(whole[i]) for i, *_ in rows], dtype=torch.float64)
    fields = Fields("trace", "group_ids", "rewards")
    found = host_rows([i for i, *_ in rows], prompts, outcomes, mask, "same", fields)
    if turn_rewards is not None:
        named["token_rewards"] = torch.zeros(mask.shape).masked_scatter(mask, _of_turns(whole, rows, turn_rewards))
    ids = two_phase.group_ids(prompts)
    advantages = two_phase.advantages_padded(part, tokens, real, mask, ids, found, "verifiers", **named)
    for (_, branch, first), of_row, trained in zip(rows, advantages, mask, strict=True):
        values = iter(of_row[trained].tolist())
        for node, new in zip(branch.nodes, first, strict=True):
            if new:
                node.advantages = [next(values) for m in node.mask if m]


def score_group(objective: Objective, episodes: Iterable[Episode], *, turn_rewards: str | None = None) -> None:
    """Set ``advantages`` of the traces of a cohort of prime-rl, which are one group.

    Traces with an error, of agents that are not trained, and without sampled tokens are left as they are: those that
    ``iter_trainable_traces`` of prime-rl leaves out.

    Args:
        objective: Its credit and token weights make the advantages.
        episodes: The episodes of the cohort, as prime-rl passes them to ``Algorithm.score_group``.
        turn_rewards: As in :func:`assign`.

    Raises:
        ValueError: As in :func:`assign`.
    """
    traces = [trace for episode in episodes for trace in episode.traces if not trace.has_error]
    traces = [trace for trace in traces if trace.agent.trainable and any(any(node.mask) for node in trace.nodes)]
    assign(objective, traces, [0] * len(traces), turn_rewards=turn_rewards)


def _group(trace: Trace[Any, Any, Any]) -> tuple[str, str]:
    task = trace.task.key or trace.task.hash
    if task is None:
        raise ValueError(f"group_ids: expected groups, because trace {trace.id} names no task, got None")
    return task, trace.agent.name


def _rows(trace: Trace[Any, Any, Any]) -> list[tuple[Branch, list[bool]]]:
    """Return the branches that train, and which of their nodes train in them."""
    if not trace.agent.trainable:
        return []
    out, seen = [], set[int]()
    for branch in trace.branches:
        if branch.trainable:
            first = [node.sampled and id(node) not in seen for node in branch.nodes]
            seen |= {id(node) for node in branch.nodes}
            out.append((branch, first))
    return out


def _outcome(trace: Trace[Any, Any, Any]) -> float:
    missing = [name for name, x in trace.rewards.items() if x is None]
    if missing or not trace.rewards:
        raise ValueError(
            f"rewards: expected a score for each reward of trace {trace.id}, got None for {', '.join(missing) or 'all'}"
        )
    return trace.reward


def _of_turns(
    traces: list[Trace[Any, Any, Any]], rows: list[tuple[int, Branch, list[bool]]], name: str
) -> torch.Tensor:
    """Return the rewards of the tokens that train, in the order of the rows."""
    turns = [
        (i, sum(node.mask)) for i, branch, first in rows for node, new in zip(branch.nodes, first, strict=True) if new
    ]
    rewards: list[float] = []
    for i in dict.fromkeys(i for i, *_ in rows):
        count, given = sum(j == i for j, _ in turns), traces[i].info.get(name)
        if given is None or len(given) != count:
            raise ValueError(
                f"info[{name!r}]: expected {count} numbers in trace {traces[i].id}, one for each sampled node, got "
                f"{given}"
            )
        rewards += given
    counts = torch.tensor([count for _, count in turns])
    trained = torch.arange(int(counts.max())) < counts[:, None]
    names = [i for i, _ in turns]
    fields = Fields("trace", "trace", f"info[{name!r}]")
    found: HostRows = host_rows(names, names, torch.tensor(rewards, dtype=torch.float64), trained, "sum", fields)
    assert found.token_rewards is not None
    return found.token_rewards[trained]
