"""The tables of one prompt in few bytes: numbers are rounded, shared tokens are stored once, and the rest is deflated.

The page decodes a blob with ``DecompressionStream``. It is base64 of deflated bytes, which hold a little-endian uint32
(the length of the manifest), the manifest in JSON, and the columns that the manifest points to.

A column of per-token numbers holds integers times ``10 ** -decimals``: one number (``all``), one per rollout (``row``),
or one per token from byte ``at`` on. The latter are byte planes of ``bytes`` bytes per number, all low bytes first;
with ``delta`` they are differences from one number to the next, modulo the width. The smallest integer of the width
stands for NaN.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from typing import Any

import numpy as np

from tokcredit.report.data import Data, Table
from tokcredit.report.vocabulary import visible

LOG_PROB, RATIO, WEIGHT = 2, 3, 3
PROMPT, ANSWER = 20_000, 2_000
RESPONSE, BRANCH, TRAINS, CLIP, BARRIER = 1, 2, 4, 8, 32


def blob(x: bytes) -> str:
    """Return bytes deflated and encoded in base64.

    Args:
        x: The bytes.
    """
    return base64.b64encode(zlib.compress(x, 9)).decode()


def decimals_for(x: Any, digits: int = 4) -> int:
    """Return the number of decimals, from 0 to 8, that gives the largest finite number this many digits.

    Args:
        x: The numbers.
        digits: Wanted digits.
    """
    largest = float(np.abs(x[np.isfinite(x)]).max(initial=0))
    return min(8, max(0, digits - 1 - math.floor(math.log10(largest)))) if largest else 0


class _Columns:
    """The columns of one group; equal ones are stored once."""

    def __init__(self, row: Any) -> None:
        self.row, self.first = row, np.flatnonzero(np.diff(row, prepend=-1))
        self.parts: list[bytes] = []
        self.entries: list[Table] = []
        self.known: dict[Any, int] = {}
        self.size = 0

    def put(self, x: Any, decimals: int = 0) -> int:
        """Add a column of numbers, one per token, with so many decimals if four bytes hold them. Return its index."""
        finite = np.isfinite(x)
        largest = float(np.abs(np.where(finite, x, 0)).max(initial=0))
        while decimals and largest * 10.0**decimals >= 2**31 - 1:
            decimals -= 1
        scaled = np.rint(np.where(finite, x, 0).astype(np.float64) * 10.0**decimals)
        width = next((w for w in (1, 2, 4) if np.abs(scaled).max(initial=0) < 2 ** (8 * w - 1)), 4)
        lowest = -(2 ** (8 * width - 1))
        integers = np.where(finite, np.clip(scaled, lowest + 1, -lowest - 1), lowest).astype(np.int64)
        key = (decimals, width, integers.tobytes())
        if key not in self.known:
            self.known[key] = len(self.entries)
            self.entries.append(self._entry(integers, decimals, width, lowest))
        return self.known[key]

    def _entry(self, integers: Any, decimals: int, width: int, lowest: int) -> Table:
        entry: Table = {"decimals": decimals}
        if not integers.size:
            return {**entry, "all": None}
        heads = integers[self.first]
        if (integers == heads[0]).all():
            return {**entry, "all": None if heads[0] == lowest else int(heads[0])}
        number = np.searchsorted(self.first, np.arange(integers.size), side="right") - 1
        if (integers == heads[number]).all():
            per_row = np.full(int(self.row[-1]) + 1, lowest)
            per_row[self.row[self.first]] = heads
            return {**entry, "row": [None if x == lowest else int(x) for x in per_row]}
        planes = _planes(integers, width)
        steps = _planes(np.diff(integers, prepend=0), width)
        # Curves are smaller as steps, noise as it is.
        delta = len(zlib.compress(steps, 1)) < len(zlib.compress(planes, 1))
        return {**entry, "at": self.raw(steps if delta else planes), "bytes": width, "delta": delta}

    def raw(self, data: bytes) -> int:
        """Add bytes and return where they begin."""
        at = self.size
        self.parts.append(data)
        self.size += len(data)
        return at


def _planes(integers: Any, width: int) -> bytes:
    """Return byte planes, all low bytes first; numbers outside of the range wrap around."""
    numbers = integers.astype(f"<i{width}").view(np.uint8).reshape(-1, width)
    return np.ascontiguousarray(numbers.T).tobytes()


def vocabulary(data: Data) -> tuple[list[str], Any]:
    """Return the texts of the tokens that occur, most frequent first, and the place of every token among them.

    Args:
        data: The tables.
    """
    ids, inverse, counts = np.unique(data.tokens["token"], return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    return data.run.vocabulary.texts(ids[order].tolist()), place[inverse]


def group_blob(data: Data, group: int, words: Any, decimals: dict[str, int], log_prob: int = LOG_PROB) -> str:
    """Return everything that the page shows of one prompt, as a blob.

    Args:
        data: The tables.
        group: Number of the prompt.
        words: Place of every token, from :func:`vocabulary`.
        decimals: Decimals of the advantages of each objective.
        log_prob: Decimals of log-probs.
    """
    rows = np.flatnonzero(data.rollouts["group"] == group)
    spans = [slice(b, b + n) for b, n in zip(data.rollouts["begin"][rows], data.rollouts["length"][rows], strict=True)]
    take = np.concatenate([np.arange(s.start, s.stop) for s in spans]) if spans else np.zeros(0, np.int64)
    local = {int(row): number for number, row in enumerate(rows)}
    columns = _Columns(np.array([local[r] for r in data.tokens["rollout"][take].tolist()], dtype=np.int64))

    nodes = np.flatnonzero(data.nodes["group"] == group)
    number = {int(v): i for i, v in enumerate(nodes)} | {-1: -1}
    tokens = _node_tokens(data, rows, nodes, words)
    wide = 4 if tokens.size and tokens.max() >= 2**16 else 2
    manifest = {
        "prompt": visible(data.groups["prompt"][group], PROMPT),
        "rows": [
            {
                "reward": _plain(data.rollouts["reward"][r]),
                "length": int(data.rollouts["length"][r]),
                "leaf": number[int(data.rollouts["leaf"][r])],
                "turns": _turns(data, int(r)),
            }
            for r in rows
        ],
        "nodes": {
            "parent": [number[int(v)] for v in data.nodes["parent"][nodes]],
            **{name: data.nodes[name][nodes].tolist() for name in ("depth", "length", "count")},
            **{name: [_plain(x) for x in data.nodes[name][nodes]] for name in ("value", "before")},
        },
        "words": {"at": columns.raw(tokens.astype(f"<u{wide}").tobytes()), "bytes": wide},
        "log_prob": columns.put(data.tokens["log_prob"][take], log_prob),
        "methods": {name: _method(columns, data, name, take, rows, group, decimals[name]) for name in data.methods},
    }
    manifest["columns"] = columns.entries
    head = json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return blob(len(head).to_bytes(4, "little") + head + b"".join(columns.parts))


def _turns(data: Data, row: int) -> list[Table]:
    if data.turns is None:
        return []
    own = np.flatnonzero(data.turns["rollout"] == row)
    whole = [data.turns[name][own].tolist() for name in ("begin", "end", "state")]
    return [
        {"begin": begin, "end": end, "state": state, "reward": _plain(data.turns["reward"][i])}
        | {"answer": visible(data.turns["answer"][i], ANSWER)}
        for begin, end, state, i in zip(*whole, own, strict=True)
    ]


def _method(columns: _Columns, data: Data, name: str, take: Any, rows: Any, group: int, decimals: int) -> Table:
    table = data.methods[name]
    flags = data.tokens["response"][take] * RESPONSE + data.tokens["branch"][take] * BRANCH
    ratio = _ratio_decimals(table, take)
    flags = flags + table["trains"][take] * TRAINS + table["clipped"][take].astype(np.int64) * CLIP
    of_pairs = {}
    if name in data.with_margin:
        flags = flags + table["barrier"][take] * BARRIER
        of_pairs = {
            "log_ratio": columns.put(table["log_ratio"][take], RATIO),
            "score": [_plain(x) for x in table["score"][rows]],
            "margin": _plain(table["margin"][group]),
        }
    return {
        "advantage": columns.put(table["advantage"][take], decimals),
        "weight": columns.put(table["weight"][take], WEIGHT),
        **{field: columns.put(table[field][take], ratio) for field in ("ratio", "low", "high")},
        "flags": columns.put(flags),
        "median": [_plain(x) for x in table["median"][rows]],
        "largest": [_plain(x) for x in table["largest"][rows]],
        "has_gradient": [bool(x) for x in table["has_gradient"][rows]],
        **of_pairs,
    }


def _ratio_decimals(table: Table, take: Any) -> int:
    """Return five decimals where the bounds are too close to 1 for three, else three."""
    width = np.abs(table["high"][take] - 1)
    return RATIO + 2 if width[np.isfinite(width)].min(initial=1) < 0.005 else RATIO


def _node_tokens(data: Data, rows: Any, nodes: Any, words: Any) -> Any:
    """Return the tokens of the nodes, one node after the other, each read from one rollout through it."""
    source = {}
    parent = data.nodes["parent"]
    for r in rows:
        v = int(data.rollouts["leaf"][r])
        while v >= 0 and v not in source:
            source[v] = int(data.rollouts["begin"][r])
            v = int(parent[v])
    starts = [source[int(v)] + int(data.nodes["depth"][v]) for v in nodes]
    parts = [words[a : a + int(data.nodes["length"][v])] for a, v in zip(starts, nodes, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _plain(x: Any) -> float | None:
    """Return a number for JSON, with six significant digits, or None if it is not finite."""
    return float(f"{x:.6g}") if math.isfinite(x) else None
