"""Figures of a whole run, computed from its tables: what the charts draw and the first lines of a report say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from tokcredit.report.data import CLIPPED, Data, Table

BINS = 48
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarize(data: Data) -> Table:
    """Return the figures of a run.

    Args:
        data: The tables.

    Returns:
        ``groups``: number of prompts, ``equal_rewards``: number of prompts whose rewards are all equal; ``rollouts``;
        ``tokens``; ``distinct``: number of tokens of the prefix trees; ``reward``: the mean reward; ``means``:
        histogram of the prompts' mean rewards; ``edges``: bins of positions and lengths; ``lengths``: histograms of the
        response tokens of rollouts above and below their prompt's mean reward; ``branches``: fraction of branch tokens
        by position; ``branch_fraction``: that of all tokens; ``methods``: for each objective the figures of
        :func:`method_figures`.
    """
    rows, tokens, groups = data.rollouts, data.tokens, data.groups
    longest = int(rows["length"].max(initial=0))
    edges, growing = _edges(longest), _growing(longest)
    where = _bin(tokens["position"], growing)
    return {
        "groups": len(groups["prompt"]),
        "equal_rewards": int((~groups["differ"]).sum()),
        "rollouts": len(rows["reward"]),
        "tokens": len(tokens["token"]),
        "distinct": int(data.nodes["length"].sum()),
        "reward": float(rows["reward"].mean()) if len(rows["reward"]) else 0.0,
        "edges": edges.tolist(),
        "means": _means(groups["mean"]),
        "lengths": _lengths(data, edges),
        "branches": {
            "edges": growing.tolist(),
            "fraction": _mean_by(tokens["branch"].astype(float), where, len(growing) - 1),
        },
        "branch_fraction": float(tokens["branch"].mean()) if len(tokens["branch"]) else 0.0,
        "methods": {name: method_figures(data, name, edges) for name in data.methods},
    }


def method_figures(data: Data, name: str, edges: Any) -> Table:
    """Return the figures of one objective over its training tokens.

    Args:
        data: The tables.
        name: Name of the objective.
        edges: Bins of positions, ascending.

    Returns:
        ``token_level``: fraction of tokens whose advantage differs from the median of their rollout;
        ``token_level_advantage``: the sum of these differences over the sum of ``|A|``; ``has_gradient``: fraction of
        rollouts that can have a gradient; ``effective``: effective sample size over the number of tokens,
        ``(sum q)^2 / (n sum q^2)`` of the ratios q, which is 1 when all are equal; ``clipped``: fraction of tokens that
        the clip leaves without gradient; ``scale``: the 0.99-quantile of ``|A|``, the advantage of the strongest
        colour; ``advantages``: a histogram; ``ratios``: quantiles, bounds and clipped fraction by position; ``signs``:
        fractions of rollouts, tokens and ``|A| * weight`` in rollouts with a positive and with a negative median.
        ``effective``, ``clipped`` and ``ratios`` are None where ratios are unknown or the objective has none.
        A preference objective also has the figures of :func:`pair_figures`.
    """
    table = data.methods[name]
    trains, rollout = table["trains"], data.tokens["rollout"]
    advantage = table["advantage"][trains].astype(float)
    median = table["median"][rollout[trains]].astype(float)
    distance = np.abs(advantage - median)
    apart = distance > 1e-6 * np.maximum(1, np.abs(median))
    ratio = table["ratio"][trains].astype(float)
    known = np.isfinite(ratio)
    q = ratio[known]
    scale = float(np.quantile(np.abs(advantage), 0.99)) if advantage.size else 0.0
    return {
        "token_level": _fraction(apart.sum(), apart.size),
        "token_level_advantage": _fraction(distance[apart].sum(), np.abs(advantage).sum()),
        "has_gradient": _fraction(table["has_gradient"].sum(), table["has_gradient"].size),
        "effective": _fraction(q.sum() ** 2, q.size * (q**2).sum()) if q.size else None,
        "clipped": _fraction((table["clipped"][trains] == CLIPPED).sum(), trains.sum()) if q.size else None,
        "scale": scale or float(np.abs(advantage).max(initial=0)) or 1.0,
        "advantages": _histogram(advantage),
        "ratios": _ratios(data, table, edges) if q.size else None,
        "signs": _signs(data, table),
        **(pair_figures(table) if name in data.with_margin else {}),
    }


def pair_figures(table: Table) -> Table:
    """Return the figures that only preference objectives have.

    Args:
        table: Columns of the objective.

    Returns:
        ``margin``: mean margin of the pairs; ``accuracy``: fraction of pairs with a margin above 0, both None where
        margins are unknown; ``log_ratio_scale``: the 0.99-quantile of the absolute log-ratio, that of the strongest
        colour; ``barrier``: fraction of the training tokens that count in the barrier.
    """
    margin, log_ratio = (x[np.isfinite(x)].astype(float) for x in (table["margin"], table["log_ratio"]))
    return {
        "margin": float(margin.mean()) if margin.size else None,
        "accuracy": float((margin > 0).mean()) if margin.size else None,
        "log_ratio_scale": (float(np.quantile(np.abs(log_ratio), 0.99)) if log_ratio.size else 0.0) or 1.0,
        "barrier": _fraction(table["barrier"].sum(), table["trains"].sum()),
    }


def _fraction(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _edges(longest: int) -> Any:
    return np.unique(np.linspace(0, max(longest, 1), min(BINS, max(longest, 1)) + 1).round().astype(np.int64))


def _growing(longest: int) -> Any:
    """Return edges of bins that widen with the position, because rollouts branch early."""
    return np.unique(np.geomspace(1, max(longest, 1) + 1, min(BINS, max(longest, 1)) + 1).round().astype(np.int64)) - 1


def _bin(position: Any, edges: Any) -> Any:
    return np.searchsorted(edges, position, side="right") - 1


def _mean_by(x: Any, where: Any, bins: int) -> list[float | None]:
    count = np.bincount(where, minlength=bins)
    total = np.bincount(where, weights=x, minlength=bins)
    return [float(t / c) if c else None for t, c in zip(total, count, strict=True)]


def _means(mean: Any) -> Table:
    edges = np.linspace(mean.min(initial=0), mean.max(initial=1), 21)
    return {"edges": edges.tolist(), "counts": np.histogram(mean, edges)[0].tolist()}


def _lengths(data: Data, edges: Any) -> Table:
    rows = data.rollouts
    centred = rows["reward"] - data.groups["mean"][rows["group"]]
    # Mean and reward are both exact to far more digits than a reward carries.
    sign = np.where(np.abs(centred) > 1e-9, np.sign(centred), 0)
    trained = np.bincount(data.tokens["rollout"][data.tokens["response"]], minlength=len(sign))
    counts = {name: np.histogram(trained[sign == s], edges)[0].tolist() for name, s in (("above", 1), ("below", -1))}
    means = {
        f"mean_{name}": _fraction(trained[sign == s].sum(), (sign == s).sum())
        for name, s in (("above", 1), ("below", -1))
    }
    return {**counts, **means}


def _histogram(advantage: Any) -> Table:
    """Return 41 bins around 0, with 0 in the middle of one."""
    bound = float(np.abs(advantage).max(initial=0)) or 1.0
    edges = np.linspace(-bound, bound, 42)
    return {"edges": edges.tolist(), "counts": np.histogram(advantage, edges)[0].tolist()}


def _ratios(data: Data, table: Table, edges: Any) -> Table:
    use = table["trains"] & np.isfinite(table["ratio"])
    where = _bin(data.tokens["position"][use], edges)
    order = np.argsort(where, kind="stable")
    stops = np.searchsorted(where[order], np.arange(len(edges)))
    columns = {name: table[name][use][order].astype(float) for name in ("ratio", "low", "high")}
    clipped = (table["clipped"][use][order] == CLIPPED).astype(float)
    spans = list(pairwise(stops))

    def each(measure: Any, x: Any) -> list[Any]:
        return [measure(x[a:b]) if b > a and np.isfinite(x[a]) else None for a, b in spans]

    return {
        "quantiles": each(lambda x: np.quantile(x, QUANTILES).tolist(), columns["ratio"]),
        "low": each(lambda x: float(x.mean()), columns["low"]),
        "high": each(lambda x: float(x.mean()), columns["high"]),
        "clipped": each(lambda x: float(x.mean()), clipped),
    }


def _signs(data: Data, table: Table) -> Table:
    rollout, trains = data.tokens["rollout"], table["trains"]
    size = len(data.rollouts["reward"])
    tokens = np.bincount(rollout[trains], minlength=size)
    weighted = np.bincount(rollout, weights=np.abs(table["advantage"] * table["weight"]) * trains, minlength=size)
    sign = np.where(tokens > 0, np.sign(table["median"]), 0)
    counted = sign != 0

    def fractions(x: Any) -> list[float]:
        return [_fraction(x[sign == s].sum(), x[counted].sum()) for s in (1, -1)]

    return {"rollouts": fractions(np.ones(size)), "tokens": fractions(tokens), "weighted": fractions(weighted)}
