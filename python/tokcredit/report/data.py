"""The computed numbers behind the page and the terminal view, as plain tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcredit import methods, ops
from tokcredit.blocks import segment, select, tree, values
from tokcredit.report.readers import Run
from tokcredit.report.recorded import missing
from tokcredit.objective import Objective
from tokcredit.prepared import Prepared, per_token, product
from tokcredit.rollouts import Rollouts

Table = dict[str, Any]

FREE, STOPPED, BOUNDED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Data:
    """Tables: dictionaries of numpy columns (lists for text), so that ``pandas.DataFrame(data.tokens)`` works.

    Attributes:
        run: what was read.
        objectives: the methods by name.
        groups: ``prompt``, ``rollouts``, ``tokens``, ``mean`` and ``std`` of the rewards (population), ``signal``:
            whether rewards differ.
        rollouts: ``group``, ``reward``, ``begin``, ``length``, ``leaf``: the node where it ends.
        nodes: ``group``, ``parent``, ``depth``, ``length``, ``count``, ``value``: the mean reward of the rollouts
            through the node, and ``before``: that of its parent (its own at a root).
        tokens: ``rollout``, ``position`` from 0, ``token``, ``node``, ``branch``, ``response``, and ``log_prob`` of
            the policy before the update.
        methods: by name one row per token: ``advantage``; ``ratio`` and its window ``low``, ``high`` (NaN where
            unknown or unbounded); ``weight`` of the token in the loss, 1 being what the mean over all training tokens
            gives; ``trains``; ``clipped``: 0, 1 where the clip stops the gradient, 2 where it bounds the ratio only;
            ``gradient`` of the loss to the log-prob, in the units of weight. And one number per rollout:
            ``constant``, the median advantage of its training tokens; ``largest``, their largest ``|A|``; ``moves``:
            whether it can move the policy.
        notes: what a reader must know to trust the numbers.
    """

    run: Run
    objectives: Mapping[str, Objective]
    groups: Table
    rollouts: Table
    nodes: Table
    tokens: Table
    methods: dict[str, Table]
    notes: list[str]


def resolve(names: Mapping[str, Objective] | tuple[str, ...] | list[str]) -> dict[str, Objective]:
    """Objectives by name, from method names or as they are given."""
    return dict(names) if isinstance(names, Mapping) else {name: methods.load(name) for name in names}


def compute(run: Run, objectives: Mapping[str, Objective] | tuple[str, ...] | list[str]) -> Data:
    """Trees, values, advantages, ratios and windows of the run under each method.

    Args:
        run: from :func:`tokcredit.inspect.read`.
        objectives: names of methods, or objectives by a name of your choice.

    Raises:
        ValueError: no method, or one that needs evidence the file does not have; the message names it.
    """
    objectives, notes = resolve(objectives), []
    if not objectives:
        raise ValueError("objectives: expected at least one method, got none")
    for name, objective in objectives.items():
        for evidence in missing(objective, run):
            raise ValueError(f"{evidence}: expected in {run.name} because {name} needs it, got none")
        if objective.is_scheduled and run.progress is None:
            notes.append(f"How far training had come is not known: {name} is shown with its settings at the end.")
    progress = 1.0 if run.progress is None else run.progress
    objectives = {name: objective.at(progress) for name, objective in objectives.items()}
    batch, about = _batch(run)
    notes += about
    trees = tree.build(batch)
    tables = {name: _method(batch, run.log_probs, objective) for name, objective in objectives.items()}
    notes += _differences(run, tables)
    nodes = _nodes(trees)
    return Data(run, objectives, _groups(run, batch), _rollouts(trees), nodes, _tokens(trees), tables, notes)


def _batch(run: Run) -> tuple[Rollouts, list[str]]:
    """The batch with the log-probs that ratios start from, and what there is to say about them."""
    batch, notes = run.batch, []
    if batch.old_log_probs is None and batch.rollout_log_probs is not None:
        batch = replace(batch, old_log_probs=batch.rollout_log_probs)
        if run.log_probs is not None:
            notes.append(
                "Ratios are to the log-probs of the engine that sampled; the trainer's own are not in the file."
            )
    if run.log_probs is None:
        notes.append("The file has no log-probs of the updated policy, so there are no ratios and nothing is clipped.")
    elif batch.old_log_probs is None:
        notes.append("The file has no log-probs of the policy that sampled, so there are no ratios.")
    return batch, notes


def _numpy(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def _groups(run: Run, batch: Rollouts) -> Table:
    by = segment.Ids(batch.group_index, batch.num_groups)
    rewards = batch.rewards.double()
    std = segment.var(rewards, by, ddof=0).sqrt()
    return {
        "prompt": run.prompts,
        "rollouts": _numpy(segment.count(rewards, by)).astype(np.int64),
        "tokens": _numpy(segment.sum(batch.lengths.double(), by)).astype(np.int64),
        "mean": _numpy(segment.mean(rewards, by)),
        "std": _numpy(std),
        "signal": _numpy(segment.minimum(rewards, by) != segment.maximum(rewards, by)),
    }


def _rollouts(trees: tree.PrefixTree) -> Table:
    batch = trees.batch
    return {
        "group": _numpy(batch.group_index),
        "reward": _numpy(batch.rewards.double()),
        "begin": _numpy(batch.begin),
        "length": _numpy(batch.end - batch.begin),
        "leaf": _numpy(trees.leaf),
    }


def _nodes(trees: tree.PrefixTree) -> Table:
    size = int(trees.size)
    value = values.monte_carlo(trees, trees.batch.rewards.double())
    before = value - values.temporal_difference(trees, value)
    columns = {name: getattr(trees, name) for name in ("group", "parent", "depth", "length", "count")}
    return {name: _numpy(x)[:size] for name, x in {**columns, "value": value, "before": before}.items()}


def _tokens(trees: tree.PrefixTree) -> Table:
    batch = trees.batch
    length = batch.end - batch.begin
    rollout = torch.repeat_interleave(torch.arange(batch.num_rows), length)
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


def _method(batch: Rollouts, log_probs: Tensor | None, objective: Objective) -> Table:
    prepared = objective.prepare(batch)
    rows = prepared.spans
    unknown = torch.full(batch.tokens.shape, torch.nan)
    advantages = batch.flat(prepared.advantages)
    trains = ops.spread(torch.ones(batch.num_rows, dtype=torch.bool), rows, batch.tokens)
    scale = trains.sum().clamp(min=1)
    weight = _weight(prepared, trains) * scale
    table = {"advantage": advantages, "ratio": unknown, "low": unknown, "high": unknown, "weight": weight}
    table |= {"trains": trains, "clipped": torch.zeros_like(trains, dtype=torch.uint8), "gradient": unknown}
    if log_probs is not None and batch.old_log_probs is not None and objective.variable == "log_probs":
        table |= _update(prepared, log_probs, batch.old_log_probs, weight, scale)
    return {
        **{name: _numpy(x) for name, x in table.items()},
        "constant": _numpy(select.quantile(advantages.float(), 0.5, rows)),
        "largest": _numpy(segment.maximum(advantages.abs(), rows).clamp(min=0)),
        "moves": _numpy(prepared.has_gradient),
    }


def _weight(prepared: Prepared, trains: Tensor) -> Tensor:
    """Weight of each token in the loss, ``[N]``; 0 where it does not train."""
    weight, batch = prepared.row_weights, prepared.batch
    if prepared.multiplier is not None:
        weight = product(prepared.multiplier, weight, batch)
    if weight.dim() != 1:
        weight = per_token(weight.expand(batch.num_rows, 1), batch)
    return torch.where(trains, weight, 0)


def _update(prepared: Prepared, log_probs: Tensor, old_log_probs: Tensor, weight: Tensor, scale: Tensor) -> Table:
    """Ratio, window, gain and gradient of each token. The gradient is the loss's, so it tells what was clipped."""
    rows, batch = prepared.spans, prepared.batch
    window = prepared.window.spelled_out(batch.spans, batch.num_tokens)
    objective = replace(prepared.objective, kl=None)
    current = log_probs.clone().requires_grad_()
    objective.loss(replace(prepared, objective=objective), current).loss.backward()
    assert current.grad is not None
    gradient = current.grad * scale

    log_ratio = objective.ratio(batch.spans, log_probs, old_log_probs).per_token(batch.spans, log_probs)
    if objective.gain is not None:
        weight = weight * objective.gain(log_ratio, window, prepared.signal)
    # A soft surrogate has temperatures in place of bounds.
    bounds = (window.low, window.high) if window.surrogate in ("clip", "weighted") else (-torch.inf, torch.inf)
    low, high = (torch.as_tensor(bound).expand(log_ratio.shape) for bound in bounds)
    trains = ops.spread(torch.ones(batch.num_rows, dtype=torch.bool), rows, batch.tokens)
    paid = trains & (weight != 0) & (batch.flat(prepared.advantages) != 0)
    stopped = paid & (gradient == 0)
    bounded = trains & ((log_ratio < low) | (log_ratio > high)) & (window.surrogate == "weighted")
    nothing = torch.full_like(log_ratio, torch.nan)
    return {
        "ratio": torch.where(trains, log_ratio.exp(), nothing),
        "low": torch.where(trains & low.isfinite(), low.exp(), nothing),
        "high": torch.where(trains & high.isfinite(), high.exp(), nothing),
        "weight": weight,
        "clipped": torch.where(stopped, STOPPED, torch.where(bounded, BOUNDED, FREE)).to(torch.uint8),
        "gradient": gradient,
    }


def _differences(run: Run, tables: dict[str, Table]) -> list[str]:
    """Where the trainer's own advantages are not those computed here."""
    name = run.settings.get("method")
    if run.advantages is None or name not in tables:
        return []
    ours, theirs = tables[name]["advantage"], _numpy(run.advantages)
    apart = int((np.abs(ours - theirs) > 1e-3 * np.maximum(1, np.abs(ours))).sum())
    if not apart:
        return []
    return [f"The advantages that the trainer wrote differ from those of {name} at {apart} of {ours.size} tokens."]
