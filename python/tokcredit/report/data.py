"""The numbers behind the page and the terminal view, computed by the library and held as plain tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcredit import methods
from tokcredit.blocks import segment, select, tree, values
from tokcredit.groups import Groups
from tokcredit.objective import Prepared
from tokcredit.preference import Preference, PreparedPairs
from tokcredit.report import pairs
from tokcredit.report.episodes import turns
from tokcredit.report.readers import Run
from tokcredit.report.recorded import missing
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Controller, State
from tokcredit.stages.credit.group import per_token, product

Table = dict[str, Any]

INSIDE, CLIPPED, BOUNDED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Data:
    """Tables of a run: dictionaries of NumPy columns, or lists for text.

    Attributes:
        run: The run that was read.
        objectives: The objectives by name, their schedules and controllers replaced by numbers.
        groups: One line per prompt: ``prompt``, ``rollouts``, ``tokens``, ``mean`` and ``std`` of the rewards (the
            population's), ``differ``: whether the rewards differ. Rollouts without a token that the policy chose do not
            count in the statistics, as in the advantages.
        rollouts: One line per rollout: ``group``, ``reward`` (the total reward), ``begin`` (its first token),
            ``length``, ``leaf`` (the node at which it ends). The rows of an episode are one rollout.
        nodes: One line per node of the prefix trees: ``group``, ``parent``, ``depth``, ``length``, ``count``,
            ``value``: the mean reward of the rollouts through the node, and ``before``: that of its parent, or its own
            at a root.
        tokens: One line per token: ``rollout``, ``position`` from 0, ``token``, ``node``, ``branch``, ``response``, and
            ``log_prob`` before the update.
        methods: For each objective, columns with one number per token:

            - ``advantage``;
            - ``ratio``, and the bounds ``low`` and ``high`` that the clip sets it, NaN where there are none;
            - ``weight`` in the loss, 1 where it is that of the mean over all training tokens;
            - ``trains``: whether the token trains;
            - ``clipped``: 0 no, 1 the clip leaves no gradient, 2 the clip bounds the ratio and leaves a gradient;
            - ``gradient`` of the loss to the log-prob of the updated policy, in units of ``weight``, NaN if unknown;

            and with one number per rollout: ``median`` advantage of its training tokens, ``largest`` absolute
            advantage, ``has_gradient``. Preference objectives also have the columns of
            :func:`tokcredit.report.pairs.columns`.
        turns: One line per turn, or None; see :func:`tokcredit.report.episodes.turns`.
        with_ratio: Names of the objectives that have a ratio and a clip, the policy-gradient ones.
        with_margin: Names of the objectives that have pairs, the preference ones.
        notes: Sentences that a reader must know to understand the numbers.
    """

    run: Run
    objectives: Mapping[str, Any]
    groups: Table
    rollouts: Table
    nodes: Table
    tokens: Table
    methods: dict[str, Table]
    turns: Table | None
    with_ratio: frozenset[str]
    with_margin: frozenset[str]
    notes: list[str]


def compute(run: Run, objectives: Mapping[str, Any] | Sequence[str]) -> Data:
    """Return trees, values, advantages, ratios and bounds of a run under each objective.

    Args:
        run: From :func:`tokcredit.report.read`.
        objectives: Names of methods, or objectives by a name of your choice.

    Raises:
        ValueError: There is no objective, or one reads an input that the file does not have; the message names it.
    """
    chosen = dict(objectives) if isinstance(objectives, Mapping) else {name: methods.load(name) for name in objectives}
    if not chosen:
        raise ValueError("objectives: expected at least one method, got none")
    notes = []
    for name, objective in chosen.items():
        for lacking in missing(objective, run):
            raise ValueError(f"{lacking}: expected in {run.name} because {name} reads it, got none")
        if objective.is_scheduled and run.progress is None:
            notes.append(f"The progress of training is not known: {name} is shown with its settings of the last step.")
        if any(isinstance(x, Controller) for x in objective.adjustables):
            notes.append(f"The file has no states of controllers: {name} is shown with the settings it starts from.")
    batch, about = _batch(run, all(isinstance(x, Preference) for x in chosen.values()))
    notes += about
    progress = 1.0 if run.progress is None else run.progress
    # Each row is a trajectory from here on.
    prepared = {
        name: x.prepare(x.trajectories_of(batch), progress=progress, state=State()) for name, x in chosen.items()
    }
    log_probs, written = (_of_trajectories(batch, x) for x in (run.log_probs, run.advantages))
    batch = batch.whole
    tables = {name: _method(x, log_probs) for name, x in prepared.items()}
    notes += _differences(run.settings.get("method"), written, tables)
    trees = tree.build(batch.with_inputs(context_keys=None))  # the page shows whole rows
    return Data(
        run,
        {name: x.objective for name, x in prepared.items()},
        _groups(run, batch),
        _rollouts(trees),
        _nodes(trees),
        _tokens(trees),
        tables,
        turns(batch, _answers(run)),
        frozenset(name for name, x in prepared.items() if isinstance(x, Prepared)),
        frozenset(name for name, x in prepared.items() if isinstance(x, PreparedPairs)),
        notes,
    )


def _batch(run: Run, only_pairs: bool) -> tuple[Rollouts, list[str]]:
    """Return the batch with the log-probs that ratios start from, and notes about them."""
    batch, notes = run.batch, []
    if batch.old_log_probs is None and batch.rollout_log_probs is not None:
        batch = batch.with_inputs(old_log_probs=batch.rollout_log_probs)
        if run.log_probs is not None:
            notes.append(
                "Ratios are to the log-probs of the engine that sampled; the file does not have those of the trainer."
            )
    if run.log_probs is None and only_pairs:
        known = "unknown" if batch.old_log_probs is None else "those of the policy before it"
        notes.append(f"The file has no log-probs of the updated policy, so log-ratios and margins are {known}.")
    elif run.log_probs is None:
        notes.append("The file has no log-probs of the updated policy, so ratios and clipping are unknown.")
    elif batch.old_log_probs is None and not only_pairs:
        notes.append("The file has no log-probs of the policy that sampled, so ratios and clipping are unknown.")
    return batch, notes


def _of_trajectories(batch: Rollouts, x: Tensor | None) -> Tensor | None:
    """Return per-token numbers of rows in the order of their trajectories."""
    return x if x is None or batch.trajectories is None else batch.trajectories.joined.of_tokens(x)


def _answers(run: Run) -> list[list[str]] | None:
    """Return the texts that answered the turns of each trajectory."""
    if run.answers is None or run.batch.trajectories is None:
        return run.answers
    found: list[list[str]] = [[] for _ in range(run.batch.whole.num_rows)]
    for number, own in zip(run.batch.trajectories.number, run.answers, strict=True):
        found[number] += own
    return found


def _numpy(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def _counted(batch: Rollouts) -> Groups:
    """Return the groups in which the rows with a token of the policy count, or all rows where there is none."""
    counts = batch.lengths > 0
    some = segment.maximum(counts.float(), batch.groups) > 0
    return batch.groups.counting(counts | ~batch.groups.per_row(some))


def _groups(run: Run, batch: Rollouts) -> Table:
    statistics = segment.moments(batch.rewards, _counted(batch), ddof=0)
    tokens = segment.sum(batch.all_spans.lengths.double(), batch.groups)
    return {
        "prompt": run.prompts,
        "rollouts": _numpy(batch.groups.sizes),
        "tokens": _numpy(tokens).astype(np.int64),
        "mean": _numpy(statistics.mean),
        "std": _numpy(statistics.var.sqrt()),
        "differ": _numpy(statistics.minimum != statistics.maximum),
    }


def _rollouts(trees: tree.PrefixTree) -> Table:
    batch = trees.batch
    return {
        "group": _numpy(batch.group_index),
        "reward": _numpy(batch.rewards.double()),
        "begin": _numpy(batch.begin),
        "length": _numpy(batch.all_spans.lengths),
        "leaf": _numpy(trees.leaf),
    }


def _nodes(trees: tree.PrefixTree) -> Table:
    size, rewards, counted = int(trees.size), trees.batch.rewards.double(), trees.batch.lengths > 0
    known = values.monte_carlo(trees, torch.ones_like(rewards), counted) > 0
    value = torch.where(known, values.monte_carlo(trees, rewards, counted), values.monte_carlo(trees, rewards))
    before = value - values.temporal_difference(trees, value)
    columns = {name: getattr(trees, name) for name in ("group", "parent", "depth", "length", "count")}
    return {name: _numpy(x)[:size] for name, x in {**columns, "value": value, "before": before}.items()}


def _tokens(trees: tree.PrefixTree) -> Table:
    batch = trees.batch
    rollout = torch.repeat_interleave(torch.arange(batch.num_rows), batch.all_spans.lengths)
    log_prob = batch.old_log_probs if batch.old_log_probs is not None else torch.full(batch.tokens.shape, torch.nan)
    return {
        "rollout": _numpy(rollout),
        "position": _numpy(torch.arange(batch.num_tokens) - batch.begin[rollout]),
        "token": _numpy(batch.tokens),
        "node": _numpy(trees.node),
        "branch": _numpy(trees.is_branch),
        "response": _numpy(batch.response_mask),
        "log_prob": _numpy(log_prob.float()),
    }


def _method(prepared: Any, log_probs: Tensor | None) -> Table:
    """Return the columns of one objective."""
    batch, trains = prepared.batch, prepared.mask
    unknown = torch.full(batch.tokens.shape, torch.nan)
    advantages, tokens = batch.flat(prepared.advantages), trains.sum().clamp(min=1)
    weight = torch.where(trains, per_token(prepared.row_weights.expand(batch.num_rows, 1), batch.spans), 0) * tokens
    table = {"advantage": advantages, "ratio": unknown, "low": unknown, "high": unknown, "weight": weight}
    table |= {"trains": trains, "clipped": torch.zeros_like(trains, dtype=torch.uint8), "gradient": unknown}
    if log_probs is not None:
        table["gradient"] = _gradient(prepared, log_probs, tokens)
    if isinstance(prepared, Prepared):
        table |= _policy_gradient(prepared, log_probs, weight, table["gradient"])
    if isinstance(prepared, PreparedPairs):
        table |= pairs.columns(prepared, batch.old_log_probs if log_probs is None else log_probs)
    spans = batch.spans.with_mask(trains)
    return {
        **{name: _numpy(x) for name, x in table.items()},
        "median": _numpy(select.quantile(advantages.float(), 0.5, spans)),
        "largest": _numpy(segment.maximum(advantages.abs(), spans).clamp(min=0)),
        "has_gradient": _numpy(prepared.has_gradient),
    }


def _gradient(prepared: Any, log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the gradient of the loss, without further terms, to the log-prob of each token."""
    objective = prepared.objective
    if isinstance(prepared, Prepared):
        objective = replace(objective, terms=())
        prepared = replace(prepared, objective=objective, terms=())
    if objective.variables != ("log_probs",):
        return torch.full(log_probs.shape, torch.nan)
    current = log_probs.clone().requires_grad_()
    objective.loss(prepared, current).loss.backward()
    assert current.grad is not None
    return current.grad * tokens


def _policy_gradient(prepared: Prepared, log_probs: Tensor | None, weight: Tensor, gradient: Tensor) -> Table:
    """Return what only policy-gradient objectives have: token weights and scales, ratio, bounds and clipping."""
    objective, batch, trains = prepared.objective, prepared.batch, prepared.mask
    if prepared.multiplier is not None:
        weight = torch.where(trains, product(prepared.multiplier, weight, batch.spans), 0)
    to = getattr(objective.ratio, "to", "old_log_probs")
    if log_probs is None or not batch.has_input(to):
        return {"weight": weight}
    ratio = objective.ratio(batch.spans, log_probs, batch.input(to), prepared.credit)
    log_ratio = ratio.per_token(batch.spans, log_probs)
    window = prepared.window.per_token(batch.spans)
    for scale, signal in zip(objective.scales, prepared.signals, strict=True):
        factor = scale(log_probs, log_ratio, prepared.credit, batch.spans, window, signal)
        weight = torch.where(trains, product(factor, weight, batch.spans), 0)
    # A soft surrogate has temperatures in place of bounds, and a gate may look at something else than the ratio.
    gated = window.surrogate == "gated"
    on_ratio = window.surrogate == "clip" or (gated and window.gate.get("on", "ratio") == "ratio")
    bounds = (window.low, window.high) if on_ratio else (-torch.inf, torch.inf)
    low, high = (torch.as_tensor(bound, dtype=log_ratio.dtype).expand(log_ratio.shape) for bound in bounds)
    pulled = trains & (weight != 0) & (batch.flat(prepared.advantages) != 0)
    bounded = pulled & ((log_ratio < low) | (log_ratio > high)) & gated
    clipped = torch.where(pulled & (gradient == 0), CLIPPED, torch.where(bounded, BOUNDED, INSIDE))
    return {
        "ratio": torch.where(trains, log_ratio.exp(), torch.nan),
        "low": torch.where(trains & low.isfinite(), low.exp(), torch.nan),
        "high": torch.where(trains & high.isfinite(), high.exp(), torch.nan),
        "weight": weight,
        "clipped": clipped.to(torch.uint8),
    }


def _differences(name: str | None, written: Tensor | None, tables: dict[str, Table]) -> list[str]:
    """Return a note where the trainer's own advantages are not those computed here."""
    if written is None or name not in tables:
        return []
    ours, theirs = tables[name]["advantage"], _numpy(written)
    apart = int((np.abs(ours - theirs) > 1e-3 * np.maximum(1, np.abs(ours))).sum())
    if not apart:
        return []
    return [f"The advantages that the trainer wrote differ from those of {name} at {apart} of {ours.size} tokens."]
