"""Pieces of rows as the loop that defines them."""


def pieces(marks, begin, end, cut):
    """``begin``, ``end``, ``row`` and ``at`` of each piece, and the number of each row's first piece."""
    found, offsets = [], [0]
    for r, (b, e) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        marked = [t for t in range(b, e) if marks[t]]
        if cut == "before":
            borders = [b, *marked, e]
            found += zip(borders[:-1], borders[1:], [r] * (len(marked) + 1), [-1, *marked], strict=True)
        elif cut == "after":
            borders = [b, *(t + 1 for t in marked), e]
            found += zip(borders[:-1], borders[1:], [r] * (len(marked) + 1), [*marked, -1], strict=True)
        else:
            first = [t for t in marked if t - 1 not in marked]
            last = [t for t in marked if t + 1 not in marked]
            found += [(f, t + 1, r, f) for f, t in zip(first, last, strict=True)]
        offsets.append(len(found))
    return found, offsets
