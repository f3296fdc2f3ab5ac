import dataclasses

import pytest
import torch
from tokcredit.methods.spo_tree import edges
from tokcredit.train import SamplingSettings, tiny
from tokcredit.train.experiment import resolved
from tokcredit.train.trainer import Trainer

WIDTHS = (3, 2, 2)
pytestmark = pytest.mark.usefixtures("uniform")


def trainer(settings, **changes):
    sampling = SamplingSettings(prompts=2, max_tokens=7, widths=WIDTHS, **changes)
    return Trainer(resolved(settings("spo_tree", sampling=sampling)))


def test_edges_hang_together(settings):
    made = trainer(settings)
    collection = made.rollout_collector.collect(1)
    batch, words = collection.batch, tiny.tokenizer()
    node, parent = batch.extras["node_ids"].tolist(), batch.extras["parent_ids"].tolist()
    assert len(set(node)) == len(node)
    spans = list(zip(batch.begin.tolist(), batch.end.tolist(), strict=True))
    rows = {
        n: (batch.tokens[b:e].tolist(), batch.response_mask[b:e].tolist())
        for n, (b, e) in zip(node, spans, strict=True)
    }
    end = words.eos_token_id
    leaves, depths = [], {}
    for i, (n, p) in enumerate(zip(node, parent, strict=True)):
        tokens, mask = rows[n]
        above = rows[p][0] if p >= 0 else []
        depths[n] = depths[p] + 1 if p >= 0 else 0
        own = tokens[len(above) :]
        assert tokens[: len(above)] == above and mask == [False] * len(above) + [True] * len(own)
        # A third of seven tokens, rounded down, on each level; the last has what is left.
        limit = 2 if depths[n] < 2 else 3
        assert 1 <= len(own) <= limit and end not in own[:-1]
        children = [m for m, q in zip(node, parent, strict=True) if q == n]
        if own[-1] == end or depths[n] == 2:
            leaves.append(n)
            assert not children
            text = words.decode(tokens, skip_special_tokens=True)
            assert batch.rewards[i].item() == torch.tensor(collection.problems[i].reward(text)).item()
        else:
            assert len(children) == WIDTHS[depths[n] + 1]
    assert sum(p < 0 for p in parent) == 2 * WIDTHS[0]
    assert len(collection.outcomes) == len(leaves) and {depths[n] for n in leaves} == {0, 1, 2}
    for i, p in enumerate(parent):
        assert p < 0 or batch.group_ids[i] == batch.group_ids[node.index(p)]


def test_credit_of_a_grown_tree(settings):
    made = trainer(settings)
    batch = made.rollout_collector.collect(1).batch
    node, parent = batch.extras["node_ids"].tolist(), batch.extras["parent_ids"].tolist()
    group = batch.group_ids.tolist()

    def value(n):
        below = [value(m) for m, p in zip(node, parent, strict=True) if p == n]
        return sum(below) / len(below) if below else batch.rewards[node.index(n)].item()

    advantages = edges()(batch)[:, 0].tolist()
    for i, (n, p) in enumerate(zip(node, parent, strict=True)):
        siblings = [m for m, q, g in zip(node, parent, group, strict=True) if q == p and g == group[i]]
        expected = value(n) - sum(map(value, siblings)) / len(siblings)
        assert abs(advantages[i] - expected) < 1e-6
    assert any(advantages)


def test_paths_are_read_but_not_trained(settings):
    made = trainer(settings)
    batch = made.learner.with_inputs(made.rollout_collector.collect(1).batch, frozenset({"old_log_probs"}))
    own, old = batch.response_mask, batch.old_log_probs
    torch.testing.assert_close(batch.rollout_log_probs[own], old[own], atol=1e-4, rtol=1e-4)
    prepared = made.objective.prepare(batch, progress=0.0)
    log_probs = old.clone().requires_grad_()
    made.objective.loss(prepared, log_probs).loss.backward()
    assert not log_probs.grad[~own].any() and log_probs.grad[own].any()


def test_a_segment_can_be_given(settings):
    batch = trainer(settings, segment=1).rollout_collector.collect(1).batch
    root = batch.extras["parent_ids"] < 0
    assert batch.lengths[root].unique().tolist() == [1]


@pytest.mark.parametrize(("tokens", "segment"), [(2, 0), (6, 3), (1, 0)])
def test_levels_must_fit(settings, tokens, segment):
    sampling = SamplingSettings(prompts=2, max_tokens=tokens, widths=WIDTHS, segment=segment)
    with pytest.raises(ValueError, match=r"segment: expected less than . tokens above the last of 3 levels"):
        Trainer(resolved(settings("spo_tree", sampling=sampling)))


@pytest.mark.parametrize("tokens", [3, 4, 5, 8])
def test_no_path_is_longer_than_a_reply(settings, tokens):
    sampling = SamplingSettings(prompts=2, max_tokens=tokens, widths=(2, 1, 1))
    made = Trainer(resolved(settings("spo_tree", sampling=sampling)))
    made.context.sampler.endless = True
    batch = made.rollout_collector.collect(1).batch
    assert int((batch.end - batch.begin).max()) == tokens


def test_a_step_can_be_sampled_again(settings):
    made = trainer(settings)
    first, again, other = (made.rollout_collector.collect(n).batch.tokens for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert dataclasses.asdict(made.settings)["sampling"]["widths"] == WIDTHS
