"""Episodes, and batches that hold them in any number of rows."""

import tokcredit as tc
import torch
from tokcredit.rollouts import FIELDS


def decided(batch):
    """For each row of a batch its decision tokens, and their positions."""
    flat = batch.spans.mask.tolist()
    return [[t for t in range(b, e) if flat[t]] for b, e in zip(batch.begin.tolist(), batch.end.tolist(), strict=True)]


def cut(batch, current, draw, padded, shuffled):
    """The trajectories of a batch of one row each in another layout.

    ``draw(low, high)`` decides where rows are cut and how many masked tokens, whose numbers mean nothing, lie between.

    Returns the batch, the log-probs in its layout, and for each decision token of the batch, row by row, its position.
    """
    pieces = []
    for r, tokens in enumerate(decided(batch)):
        bounds = sorted(draw(0, len(tokens)) for _ in range(draw(0, 3)))
        own = [tokens[a:b] for a, b in zip([0, *bounds], [*bounds, len(tokens)], strict=True)]
        pieces += [(r, k, part) for k, part in enumerate(own)]
    if shuffled:  # rows of several trajectories take turns
        pieces.sort(key=lambda piece: (piece[1], piece[0]))
    rows = []
    for _, _, part in pieces:
        row = [-1] * draw(0, 1)
        for t in part:
            row += [t] + [-1] * (draw(0, 4) == 0)
        rows.append(row)
    width = max(map(len, rows), default=0)
    if padded:
        rows = [row + [-1] * (width - len(row)) for row in rows]
    source = torch.tensor([t for row in rows for t in row], dtype=torch.long)
    mask, at = source >= 0, source.clamp(min=0)
    lengths = torch.tensor([0, *map(len, rows)])

    def moved(x):
        found = x.reshape(-1, *x.shape[2:])[at] if x is current else x[at]
        if found.is_floating_point():
            found[~mask] = float("nan")
        elif found.dtype in (torch.int32, torch.int64):
            found[~mask] = torch.randint(0, 3, found.shape)[~mask]
        return found

    first = torch.tensor([r for r, _, _ in pieces])
    fields = {name: moved(batch.input(name)) for name in FIELDS if batch.has_input(name)}
    if "token_rewards" in fields:
        fields["token_rewards"][~mask] = 0
    made = tc.Rollouts(
        moved(batch.tokens),
        tc.Spans.from_padded(lengths[1:], width) if padded else lengths.cumsum(0),
        batch.group_ids[first],
        batch.rewards[first],
        mask,
        **fields,
        extras={
            name: moved(batch.input(name)) if tc.inputs.get(name).per == "token" else x[first]
            for name, x in batch.extras.items()
        },
        trajectory_ids=first * 3 + 5,
        shape=(len(rows), width) if padded else None,
    )
    place = torch.full((batch.num_tokens,), -1, dtype=torch.long)
    place[source[mask]] = mask.nonzero()[:, 0]
    order = [t for row in decided(batch) for t in row]
    return made, made.shaped(moved(current)), place[order], torch.tensor(order, dtype=torch.long)
