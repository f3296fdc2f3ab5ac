"""Prefix sharing by brute force: what every tree, value and token credit must agree with."""


def sharers(sequences, groups, i, t):
    """Rows of i's group that begin with the first t tokens of row i."""
    prefix = sequences[i][:t]
    return [k for k, s in enumerate(sequences) if groups[k] == groups[i] and s[:t] == prefix]


def mean_after(sequences, groups, rewards, i, t):
    rows = sharers(sequences, groups, i, t)
    return sum(rewards[k] for k in rows) / len(rows)


def is_branch(sequences, groups, i, t):
    """Whether a row that shared the t tokens before takes another token than row i, or ends."""
    return len(sharers(sequences, groups, i, t + 1)) < len(sharers(sequences, groups, i, t))


def moments(groups, rewards, i):
    own = [r for r, g in zip(rewards, groups, strict=True) if g == groups[i]]
    if len(own) == 1:
        return 0.0, 1.0
    mean = sum(own) / len(own)
    return mean, (sum((r - mean) ** 2 for r in own) / (len(own) - 1)) ** 0.5


def mean_of_children(sequences, groups, rewards, i, t):
    """Value of the node that holds the first t tokens of row i: mean over its children and the rows ending there."""
    rows = sharers(sequences, groups, i, t)
    while all(len(sequences[k]) > t for k in rows) and len({sequences[k][t] for k in rows}) == 1:
        t += 1
    terms = [rewards[k] for k in rows if len(sequences[k]) == t]
    for token in sorted({sequences[k][t] for k in rows if len(sequences[k]) > t}):
        k = next(k for k in rows if len(sequences[k]) > t and sequences[k][t] == token)
        terms.append(mean_of_children(sequences, groups, rewards, k, t + 1))
    return sum(terms) / len(terms)
