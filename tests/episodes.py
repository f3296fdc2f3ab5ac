"""Episodes, and batches that hold them in any number of rows."""

import tokcredit as tc
import torch
from tokcredit.rollouts import FIELDS


def decided(batch):
    """For each row of a batch its decision tokens, and their positions."""
    flat = batch.spans.mask.tolist()
    return [[t for t in range(b, e) if flat[t]] for b, e in zip(batch.begin.tolist(), batch.end.tolist(), strict=True)]


def parts(trajectories, draw, shuffled):
    """Some lists of positions cut anywhere: the trajectory and the positions of each part."""
    found = []
    for r, tokens in enumerate(trajectories):
        bounds = sorted(draw(0, len(tokens)) for _ in range(draw(0, 3)))
        own = [tokens[a:b] for a, b in zip([0, *bounds], [*bounds, len(tokens)], strict=True)]
        found += [(k, r, part) for k, part in enumerate(own)]
    if shuffled:  # rows of several trajectories take turns
        found.sort(key=lambda part: part[:2])
    return [part[1:] for part in found]


def cut(batch, current, draw, padded, shuffled):
    """The trajectories of a batch of one row each in another layout.

    ``draw(low, high)`` decides where rows are cut and how many masked tokens, whose numbers mean nothing, lie between.

    Returns the batch, the log-probs in its layout, and for each decision token of the batch, row by row, its position.
    """
    rows, of = [], []
    for r, part in parts(decided(batch), draw, shuffled):
        row = [(-1, False)] * draw(0, 1)
        for t in part:
            row += [(t, True)] + [(-1, False)] * (draw(0, 4) == 0)
        rows.append(row)
        of.append(r)
    return laid_out(batch, current, rows, of, padded)


def cut_in_context(batch, current, draw, padded, shuffled):
    """As :func:`cut`, with ``context_keys``: masked tokens are those of the trajectory.

    Rows leave out some that the policy did not choose, and repeat some that came before.
    """
    chosen, begin = batch.response_mask.tolist(), batch.begin.tolist()
    whole = [list(range(b, e)) for b, e in zip(begin, batch.end.tolist(), strict=True)]
    rows, of, seen = [], [], []
    for r, part in parts(whole, draw, shuffled):
        while part and part[0] > begin[r] and not chosen[part[0]] and draw(0, 1):
            part = part[1:]
        first = max(part[0] - draw(0, 3), begin[r]) if part else begin[r]
        repeated = range(first, part[0]) if part else ()
        rows.append([*((t, False) for t in repeated), *((t, chosen[t]) for t in part)])
        of.append(r)
        seen.append([batch.group_ids[r].item(), *batch.tokens[begin[r] : first].tolist()])
    edges = torch.tensor([0, *map(len, seen)]).cumsum(0)
    keys = tc.tree.context_keys(torch.tensor([t for context in seen for t in context]), tc.Spans.from_cu_seqlens(edges))
    return laid_out(batch, current, rows, of, padded, batch.tokens, context_keys=keys)


def laid_out(batch, current, rows, of, padded, tokens=None, **further):
    """A batch of rows, lists of positions (-1 for no token) and of whether the policy chose the token there."""
    lengths, width = torch.tensor([0, *map(len, rows)]), max(map(len, rows), default=0)
    if padded:
        rows = [row + [(-1, False)] * (width - len(row)) for row in rows]
    source = torch.tensor([t for row in rows for t, _ in row], dtype=torch.long)
    mask, at = torch.tensor([x for row in rows for _, x in row], dtype=torch.bool), source.clamp(min=0)

    def moved(x):
        found = x.reshape(-1, *x.shape[2:])[at] if x is current else x[at]
        if found.is_floating_point():
            found[~mask] = float("nan")
        elif found.dtype in (torch.int32, torch.int64):
            found[~mask] = torch.randint(0, 3, found.shape)[~mask]
        return found

    first = torch.tensor(of)
    fields = {name: moved(batch.input(name)) for name in FIELDS if batch.has_input(name)}
    if "token_rewards" in fields:
        fields["token_rewards"][~mask] = 0
    made = tc.Rollouts(
        moved(batch.tokens) if tokens is None else tokens[at],
        tc.Spans.from_padded(lengths[1:], width) if padded else lengths.cumsum(0),
        batch.group_ids[first],
        batch.rewards[first],
        mask,
        **fields,
        extras={
            name: moved(batch.input(name)) if tc.inputs.get(name).per == "token" else x[first]
            for name, x in batch.extras.items()
        }
        | further,
        trajectory_ids=first * 3 + 5,
        shape=(len(rows), width) if padded else None,
    )
    place = torch.full((batch.num_tokens,), -1, dtype=torch.long)
    place[source[mask]] = mask.nonzero()[:, 0]
    order = [t for row in decided(batch) for t in row]
    return made, made.shaped(moved(current)), place[order], torch.tensor(order, dtype=torch.long)
