"""Figures of a whole run, from the tables: what the charts draw and the first lines say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from tokcredit.report.data import STOPPED, Data, Table

BINS = 48
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarize(data: Data) -> Table:
    """Figures of the run.

    Returns:
        ``groups``: how many, and ``silent`` ones, whose rewards are all equal, so that no rollout beats another;
        ``rollouts``, ``tokens``, mean ``reward``; ``means``: histogram of the prompts' mean rewards; ``edges``: of the
        bins of positions and lengths; ``lengths``: histograms of trained tokens of the rollouts above and below their
        prompt's mean reward; ``branches``: share of branch tokens by position; ``methods``: per method the figures of
        :func:`method_figures`.
    """
    rows, tokens, groups = data.rollouts, data.tokens, data.groups
    longest = int(rows["length"].max(initial=0))
    edges, growing = _edges(longest), _growing(longest)
    where = _bin(tokens["position"], growing)
    return {
        "groups": len(groups["prompt"]),
        "silent": int((~groups["signal"]).sum()),
        "rollouts": len(rows["reward"]),
        "tokens": len(tokens["token"]),
        "reward": float(rows["reward"].mean()) if len(rows["reward"]) else 0.0,
        "edges": edges.tolist(),
        "means": _means(groups["mean"]),
        "lengths": _lengths(data, edges),
        "branches": {
            "edges": growing.tolist(),
            "share": _mean_by(tokens["branch"].astype(float), where, len(growing) - 1),
        },
        "branch_share": float(tokens["branch"].mean()) if len(tokens["branch"]) else 0.0,
        "methods": {name: method_figures(data, table, edges) for name, table in data.methods.items()},
    }


def method_figures(data: Data, table: Table, edges: Any) -> Table:
    """Figures of one method over the training tokens.

    Returns:
        ``beyond``: share of tokens whose advantage is not their rollout's constant, and ``beyond_credit``: the sum of
        these distances over the sum of ``|A|``; ``moves``: share of rollouts that can move the policy; ``effective``:
        ``(sum q)^2 / (n sum q^2)`` of the ratios, 1 when all are equal; ``clipped``: share of tokens whose gradient
        the clip stops; ``scale``: the 0.99-quantile of ``|A|``, where colours saturate; ``advantages``: histogram;
        ``ratios``: quantiles, window and clipped share by position, or None; ``signs``: shares of rollouts, tokens and
        weighted credit of the rollouts that are paid more than nothing and of those that are paid less.
    """
    trains, rollout = table["trains"], data.tokens["rollout"]
    advantage = table["advantage"][trains].astype(float)
    constant = table["constant"][rollout[trains]].astype(float)
    distance = np.abs(advantage - constant)
    apart = distance > 1e-6 * np.maximum(1, np.abs(constant))
    ratio = table["ratio"][trains].astype(float)
    known = np.isfinite(ratio)
    q = ratio[known]
    scale = float(np.quantile(np.abs(advantage), 0.99)) if advantage.size else 0.0
    return {
        "beyond": _share(apart.sum(), apart.size),
        "beyond_credit": _share(distance[apart].sum(), np.abs(advantage).sum()),
        "moves": _share(table["moves"].sum(), table["moves"].size),
        "effective": _share(q.sum() ** 2, q.size * (q**2).sum()) if q.size else None,
        "clipped": _share((table["clipped"][trains] == STOPPED).sum(), trains.sum()) if q.size else None,
        "scale": scale or float(np.abs(advantage).max(initial=0)) or 1.0,
        "advantages": _histogram(advantage),
        "ratios": _ratios(data, table, edges) if q.size else None,
        "signs": _signs(data, table),
    }


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _edges(longest: int) -> Any:
    return np.unique(np.linspace(0, max(longest, 1), min(BINS, max(longest, 1)) + 1).round().astype(np.int64))


def _growing(longest: int) -> Any:
    """Edges of bins that widen with the position, because rollouts part early."""
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
        f"mean_{name}": _share(trained[sign == s].sum(), (sign == s).sum()) for name, s in (("above", 1), ("below", -1))
    }
    return {**counts, **means}


def _histogram(advantage: Any) -> Table:
    """41 bins around 0, the middle one on it."""
    bound = float(np.abs(advantage).max(initial=0)) or 1.0
    edges = np.linspace(-bound, bound, 42)
    return {"edges": edges.tolist(), "counts": np.histogram(advantage, edges)[0].tolist()}


def _ratios(data: Data, table: Table, edges: Any) -> Table:
    use = table["trains"] & np.isfinite(table["ratio"])
    where = _bin(data.tokens["position"][use], edges)
    order = np.argsort(where, kind="stable")
    stops = np.searchsorted(where[order], np.arange(len(edges)))
    columns = {name: table[name][use][order].astype(float) for name in ("ratio", "low", "high")}
    stopped = (table["clipped"][use][order] == STOPPED).astype(float)
    spans = list(pairwise(stops))

    def each(measure: Any, x: Any) -> list[Any]:
        return [measure(x[a:b]) if b > a and np.isfinite(x[a]) else None for a, b in spans]

    return {
        "quantiles": each(lambda x: np.quantile(x, QUANTILES).tolist(), columns["ratio"]),
        "low": each(lambda x: float(x.mean()), columns["low"]),
        "high": each(lambda x: float(x.mean()), columns["high"]),
        "clipped": each(lambda x: float(x.mean()), stopped),
    }


def _signs(data: Data, table: Table) -> Table:
    rollout, trains = data.tokens["rollout"], table["trains"]
    size = len(data.rollouts["reward"])
    tokens = np.bincount(rollout[trains], minlength=size)
    credit = np.bincount(rollout, weights=np.abs(table["advantage"] * table["weight"]) * trains, minlength=size)
    sign = np.sign(table["constant"]) * (tokens > 0)
    counted = sign != 0

    def shares(x: Any) -> list[float]:
        return [_share(x[sign == s].sum(), x[counted].sum()) for s in (1, -1)]

    return {"rollouts": shares(np.ones(size)), "tokens": shares(tokens), "credit": shares(credit)}
