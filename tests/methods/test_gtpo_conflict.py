import naive
import pytest
import tokcredit as tc
import torch
from tokcredit.methods.gtpo_conflict import conflict, entropy_penalized


def shared(batch, tokens, advantages, rows, r, t, order):
    """Whether rows of both signs have what row r has from its start (or, reversed, its end) to token t."""
    begin, end = batch.begin.tolist(), batch.end.tolist()
    texts = [batch.tokens[begin[i] : end[i]].tolist()[::order] for i in range(batch.num_rows)]
    k = t - begin[r] if order == 1 else end[r] - 1 - t
    signs = {advantages[i] > 0 for i in rows if texts[i][: k + 1] == texts[r][: k + 1] and advantages[i]}
    return len(signs) == 2


@pytest.mark.parametrize("divided", [False, True])
def test_formula(divided):
    def formula(batch, log_probs):
        tokens, advantages = naive.rows_of(batch), naive.group_advantages(batch)
        signs = list(advantages)
        for r, row in enumerate(tokens):
            mean = sum(batch.entropies[t].item() for t in row) / max(len(row), 1)
            advantages[r] = 0.0 if mean > 0.65 or not row else advantages[r] - 1.5 * mean
        losses, both, turned = [[] for _ in tokens], 0, 0
        for rows in naive.counted_rows(batch):
            for r in rows:
                found = [[shared(batch, tokens, signs, rows, r, t, order) for order in (1, -1)] for t in tokens[r]]
                factor = 2.0 if signs[r] > 0 else 0.0
                turned += signs[r] > 0 > advantages[r]
                count = max(sum(map(any, found)), 1) if divided else 1
                both += sum(map(any, found))
                losses[r] = [
                    -advantages[r] * factor ** sum(x) / count * (log_probs[t] - log_probs[t].detach()).exp()
                    for t, x in zip(tokens[r], found, strict=True)
                ]
        assert both > 10 and turned, "no row whose advantage the penalty makes negative"
        return naive.sequence_mean(batch, losses)

    batch, current = naive.random_batch(groups=2, size=8)
    batch = naive.with_inputs(batch, {"entropies"})
    naive.check(tc.methods.gtpo_conflict(1.5, 0.65, divided), batch, current, formula)


def weights(texts, signs):
    width = max(map(len, texts))
    tokens = torch.tensor([[ord(c) for c in text.ljust(width)] for text in texts])
    mask = tokens != ord(" ")
    signs = torch.tensor(signs, dtype=torch.float64)
    batch = tc.Rollouts.from_padded(tokens, mask, torch.zeros(len(texts), dtype=torch.long), signs)
    found = batch.shaped(conflict()(batch, signs[:, None]))
    return [row[m].tolist() for row, m in zip(found, mask, strict=True)]


def test_by_hand():
    assert weights(["abcd", "abxd", "aycd"], [1.0, -1.0, 1.0]) == [[2, 2, 1, 2], [0, 0, 1, 0], [2, 1, 1, 2]]
    # The release also takes the second token of the second row, whose prefixes differ: 0 at c of "acf".
    assert weights(["abe", "acf", "zcg"], [1.0, -1.0, 1.0]) == [[2, 1, 1], [0, 1, 1], [1, 1, 1]]
    # In both: 4 and 0; rows of other lengths are compared from their ends.
    assert weights(["a", "a"], [1.0, -1.0]) == [[4], [0]]
    assert weights(["abz", "cz"], [1.0, -1.0]) == [[1, 1, 2], [1, 0]]
    # The reward of the last row is the mean of the group: it is neither good nor bad.
    assert weights(["ab", "ac", "ad"], [1.0, -1.0, 0.0]) == [[2, 1], [0, 1], [1, 1]]


def test_rows_of_high_entropy_do_not_train():
    batch, _ = naive.two_rows(recorded_advantages=torch.zeros(2, 5))
    batch = batch.with_inputs(entropies=torch.tensor([[0.6] * 5, [0.8] * 5], dtype=torch.float64).view(-1))
    found = entropy_penalized(naive.fixed())(batch)
    assert found[:, 0].tolist() == pytest.approx([1 - 0.06, 0])


def test_defaults():
    assert tc.methods.gtpo_conflict() == tc.Objective(
        entropy_penalized(tc.credit.group_normalized(), 0.1, 0.7),
        token_weights=(conflict(False),),
        ratio=tc.ratio.one(),
        clip=tc.clip.unclipped(),
        aggregation=tc.aggregation.sequence_mean(),
    )
