"""Plans by a trie of dictionaries: what :mod:`tokcredit.blocks.tree_pack` must agree with."""

from itertools import combinations, pairwise


def full_rows(contexts, rows, wanted):
    """Tokens of each full row up to its last wanted one, and the position of its first own token."""
    out = []
    for context, row, mask in zip(contexts, rows, wanted, strict=True):
        last = max((t + 1 for t, want in enumerate(mask) if want), default=None)
        out.append(None if last is None else ([*context, *row[:last]], len(context)))
    return out


def distinct(full, rows):
    """Prefixes of some rows in depth-first order, with children by first appearance in the batch."""
    children = {(): []}
    for tokens, _ in filter(None, full):
        for t in range(len(tokens)):
            prefix = tuple(tokens[: t + 1])
            if prefix not in children:
                children[prefix] = []
                children[prefix[:-1]].append(prefix)
    own = {tuple(full[r][0][: t + 1]) for r in rows for t in range(len(full[r][0]))}
    order, stack = [], [()]
    while stack:
        prefix = stack.pop()
        order += [prefix] if prefix in own else []
        stack.extend(reversed(children[prefix]))
    return order


def bin_arrays(contexts, rows, wanted, chosen):
    """The arrays of one bin with the rows ``chosen``, ascending."""
    full = full_rows(contexts, rows, wanted)
    order = distinct(full, chosen)
    inner = {prefix[:-1] for prefix in order}
    place = {prefix: i for i, prefix in enumerate(p for p in order if p in inner)}
    wants = {}
    for r in chosen:
        tokens, begin = full[r]
        for t, want in enumerate(wanted[r][: len(tokens) - begin]):
            if want:
                wants.setdefault(tuple(tokens[: begin + t + 1]), []).append((r, t))
    predictions = [prefix for prefix in order if prefix in wants]
    index = {key: q for q, prefix in enumerate(predictions) for key in wants[prefix]}
    ends = sorted(chosen, key=lambda r: (order.index(tuple(full[r][0])), r))
    return {
        "rows": ends,
        "tokens": [prefix[-1] for prefix in place],
        "position_ids": [len(prefix) - 1 for prefix in place],
        "parent": [place.get(prefix[:-1], -1) for prefix in place],
        "end": [i + sum(other[: len(p)] == p for other in place) for p, i in place.items()],
        "source": [place[prefix[:-1]] for prefix in predictions],
        "target": [prefix[-1] for prefix in predictions],
        "index": [index.get((r, t), -1) for r in ends for t in range(len(rows[r]))],
    }


def segments(parent):
    """First places of maximal runs of places in which only the last one may have several children."""
    count = {p: parent.count(p) for p in parent}
    return [i for i, p in enumerate(parent) if p < 0 or p != i - 1 or count[p] > 1]


def places(contexts, rows, wanted, chosen):
    """Places of a bin with these rows."""
    return len(bin_arrays(contexts, rows, wanted, sorted(chosen))["tokens"])


def fewest(contexts, rows, wanted, order, budget, bin_cost):
    """The smallest number of places plus ``bin_cost`` per bin, over all cuts of the rows in this order."""
    best = None
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            edges = [0, *cuts, len(order)]
            sizes = [places(contexts, rows, wanted, order[a:b]) for a, b in pairwise(edges)]
            if max(sizes) <= budget:
                cost = sum(sizes) + bin_cost * len(sizes)
                best = cost if best is None else min(best, cost)
    return best
