import dataclasses
import math

import golden_pair
import naive
import pytest
import ragged
import tokcredit as tc
import torch
from tokcredit.methods.cdpo import by_position
from tokcredit.methods.t_reg import regularized
from tokcredit.methods.tab_po import barrier

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()


def pairs(seed=0, **per_token):
    g = ragged.generator(seed)
    tokens = torch.randint(0, 9, (2, 3, 4), generator=g)
    ref = torch.rand(2, 3, 4, generator=g, dtype=torch.float64).log()
    other = MASK.roll(1, 0)
    return tc.Rollouts.from_pairs(tokens[0], tokens[1], MASK, other, ref_log_probs=tuple(ref), **per_token)


def log_probs_for(batch, seed=3):
    return torch.rand(batch.shape, dtype=torch.float64, generator=ragged.generator(seed)).log()


def naive_loss(batch, log_probs, beta=0.1, weights=None, reference=True, mean=False):
    """DPO's loss as its formula: rows 2i are chosen, rows 2i + 1 rejected."""
    scores = []
    for tokens in naive.rows_of(batch):
        total = 0.0
        for t in tokens:
            x = log_probs[t] - (batch.ref_log_probs[t] if reference else 0)
            total = total + (x if weights is None else weights[t] * x)
        scores.append(total / len(tokens) if mean else total)
    z = [beta * (scores[i] - scores[i + 1]) for i in range(0, len(scores), 2)]
    return sum(torch.log1p((-x).exp()) for x in z) / len(z)


def test_pairs_are_groups_of_two_rows():
    batch = pairs()
    assert batch.rewards.tolist() == [1, 0] * 3 and batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(batch.shaped(batch.response_mask)[0::2], MASK)
    assert torch.equal(batch.shaped(batch.response_mask)[1::2], MASK.roll(1, 0))
    assert batch.shape == (6, 4)


def test_inputs_of_pairs_go_where_they_belong():
    one, two = torch.rand(3, 4), torch.rand(3, 4)
    batch = pairs(entropies=(one, two), reverse_kl=(two, one))
    assert torch.equal(batch.shaped(batch.entropies)[0::2], one)
    assert torch.equal(batch.extras["reverse_kl"][1::2], one) and "entropies" not in batch.extras


def test_malformed_pairs_are_refused():
    tokens = torch.ones(3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"rejected: expected \[3, 4\] for chosen and rejected, got .*\[3, 5\]"):
        tc.Rollouts.from_pairs(tokens, torch.ones(3, 5, dtype=torch.long), MASK, MASK)
    with pytest.raises(ValueError, match="rejected_mask: expected"):
        tc.Rollouts.from_pairs(tokens, tokens, MASK, MASK[:2])
    with pytest.raises(ValueError, match="entropies: expected"):
        tc.Rollouts.from_pairs(tokens, tokens, MASK, MASK, entropies=(torch.ones(3, 4), torch.ones(3, 3)))
    with pytest.raises(ValueError, match="did you mean entropies"):
        tc.Rollouts.from_pairs(tokens, tokens, MASK, MASK, entropy=(torch.ones(3, 4), torch.ones(3, 4)))


@pytest.mark.parametrize("reference", ["ref_log_probs", None])
@pytest.mark.parametrize("normalization", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_formula(reference, normalization, weighted):
    batch = pairs(entropies=tuple(torch.rand(2, 3, 4, dtype=torch.float64, generator=ragged.generator(8))))
    raised = (tc.token_weights.raised(tc.token_score.given("entropies"), 2.0),) if weighted else ()
    objective = tc.Preference(raised, reference, normalization, tc.link.logistic(0.7))

    def formula(batch, log_probs):
        weights = 1 + 2 * batch.entropies if weighted else None
        return naive_loss(batch, log_probs, 0.7, weights, reference is not None, normalization == "mean")

    naive.check(objective, batch, log_probs_for(batch), formula)
    assert objective.required_inputs == ({"entropies"} if weighted else set()) | ({reference} - {None})


def test_the_row_with_the_higher_reward_is_chosen():
    batch = pairs()
    current = log_probs_for(batch)
    swapped = dataclasses.replace(batch, rewards=1 - batch.rewards)
    a, b = (tc.methods.dpo().loss(tc.methods.dpo().prepare(x), current) for x in (batch, swapped))
    torch.testing.assert_close(a.metrics["margin_mean"], -b.metrics["margin_mean"])
    assert a.loss != b.loss


def test_metrics():
    batch = pairs()
    current = log_probs_for(batch)
    out = tc.methods.dpo().loss(tc.methods.dpo().prepare(batch), current)
    difference = (current.reshape(-1) - batch.ref_log_probs).where(batch.response_mask, 0).view(6, 4).sum(1)
    margins = difference[0::2] - difference[1::2]
    expected = {
        "loss": out.loss,
        "score_chosen_mean": difference[0::2].mean(),
        "score_rejected_mean": difference[1::2].mean(),
        "margin_mean": margins.mean(),
        "accuracy_mean": (margins > 0).double().mean(),
        "pairs": torch.tensor(3.0),
        "tokens": batch.response_mask.double().sum(),
    }
    assert set(out.metrics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name].double(), value.detach().double())


def test_losses_of_a_partition_add_up():
    batch = pairs()
    objective, current = tc.methods.dpo(), log_probs_for(batch)
    prepared = objective.prepare(batch)
    x, y = current.clone().requires_grad_(), current.clone().requires_grad_()
    whole = objective.loss(prepared, x).loss
    parts = [objective.loss(prepared.select(rows), y[rows]).loss for rows in ([3, 2], [0, 4, 5, 1])]
    whole.backward()
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(y.grad, x.grad)
    assert x.grad.any()


def test_half_a_pair_is_refused():
    prepared = tc.methods.dpo().prepare(pairs())
    for rows in ([0], [0, 2], [1, 2, 3], [0, 1, 1], torch.tensor([True, False, True, True, False, False])):
        with pytest.raises(ValueError, match="rows: expected both rows of each pair once, got"):
            prepared.select(rows)
        with pytest.raises(ValueError, match="rows: expected both rows of each pair once, got"):
            prepared.minibatch(rows)
    with pytest.raises(ValueError, match="rows: expected numbers from 0 to 5, got 6"):
        prepared.select([0, 6])
    assert prepared.select([]).batch.num_rows == 0


def test_groups_that_are_no_pairs_are_refused():
    three = tc.Rollouts(torch.arange(3), torch.arange(4), torch.zeros(3).long(), torch.tensor([1.0, 0.0, 0.5]))
    objective = tc.Preference(reference=None)
    with pytest.raises(ValueError, match="group_ids: expected pairs, groups of two rows, got a group of 3"):
        objective.prepare(three)
    with pytest.raises(
        ValueError, match="rewards: expected a higher reward for the chosen row of each pair, got equal"
    ):
        objective.prepare(equal_pair())
    with pytest.raises(ValueError, match="ref_log_probs: expected in the batch because the objective reads it"):
        tc.methods.dpo().prepare(three.select([0, 1]))


def equal_pair():
    return tc.Rollouts(torch.arange(2), torch.arange(3), torch.zeros(2).long(), torch.tensor([1.0, 1.0]))


def test_pairs_in_any_order():
    batch, order = pairs(), [4, 1, 2, 5, 0, 3]
    objective, current = tc.methods.dpo(), log_probs_for(batch)
    a = objective.loss(objective.prepare(batch), current).loss
    b = objective.loss(objective.prepare(batch.select(order)), current[order]).loss
    torch.testing.assert_close(a, b)


def test_several_ranks():
    batch = pairs()
    objective, current = tc.methods.dpo(), log_probs_for(batch)
    given = {"global_num_groups": 3, "dp_size": 2}
    parts = [
        objective.loss(objective.prepare(batch.select(r), **given), current[r]).loss for r in ([0, 1], [2, 3, 4, 5])
    ]
    torch.testing.assert_close(sum(parts) / 2, objective.loss(objective.prepare(batch), current).loss)
    with pytest.raises(
        ValueError, match="global_num_groups: expected the number of pairs over all ranks because dp_size is 2"
    ):
        objective.prepare(batch, dp_size=2)
    prepared = objective.prepare(batch)
    mini = prepared.minibatch([0, 1])
    torch.testing.assert_close(
        objective.loss(mini, current[:2]).loss, 3 * objective.loss(prepared.select([0, 1]), current[:2]).loss
    )


def test_nan_where_the_mask_is_false_reaches_nothing():
    batch = pairs()
    objective = tc.methods.dpo()
    clean = log_probs_for(batch)
    dirty = clean.masked_fill(~batch.shaped(batch.response_mask), math.nan).requires_grad_()
    out = objective.loss(objective.prepare(batch), dirty)
    out.loss.backward()
    torch.testing.assert_close(out.loss, objective.loss(objective.prepare(batch), clean).loss)
    assert dirty.grad.isfinite().all() and not dirty.grad[~batch.shaped(batch.response_mask)].any()


PAIRED = sorted(set(tc.methods.names()) - set(naive.OF_GROUPS))


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [0.0, 1.0]])
@pytest.mark.parametrize("name", PAIRED)
def test_an_empty_response_has_a_score_of_0(name, rewards):
    """The other response trains as before: the chosen one is raised, or the rejected one lowered."""
    objective = tc.methods.load(name)
    mask = torch.tensor([[True] * 4, [False] * 4])
    batch = tc.Rollouts.from_padded(torch.zeros(2, 4).long(), mask, torch.zeros(2).long(), torch.tensor(rewards))
    batch = naive.with_inputs(batch, objective.required_inputs)
    if name == "cdpo":  # by default its synthetic tokens are the same in both rows
        batch = batch.with_inputs(contrastive_log_probs=torch.full((8,), -2.0))
    out, grad = naive.gradient(objective, batch, log_probs_for(batch))
    assert out.loss.isfinite() and all(x.isfinite() for x in out.metrics.values())
    assert out.metrics[f"score_{'rejected' if rewards[0] else 'chosen'}_mean"] == 0
    assert not grad[1].any() and ((grad[0] < 0) == bool(rewards[0])).all() and grad[0].all()


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sigmoid_norm", "tgdpo", "tdpo1", "tdpo2", "cdpo", "mapl"])
def test_two_equal_responses_have_a_margin_of_0(name):
    """Their gradients are opposite, so that those of a model cancel."""
    objective = tc.methods.load(name)
    mask = torch.ones(2, 4, dtype=torch.bool)
    batch = tc.Rollouts.from_padded(torch.zeros(2, 4).long(), mask, torch.zeros(2).long(), torch.tensor([1.0, 0.0]))
    same = {"ref_log_probs": -torch.rand(4).repeat(2), "aligned_log_probs": -torch.ones(8)}
    batch = batch.with_inputs(**same, contrastive_log_probs=torch.full((8,), -math.inf))
    batch = naive.with_inputs(batch, objective.required_inputs)
    if name == "tgdpo":  # weights of chosen and rejected tokens differ
        batch = batch.with_inputs(aligned_log_probs=batch.ref_log_probs)
    current = log_probs_for(batch)[:1].repeat(2, 1)
    out, grad = naive.gradient(objective, batch, current)
    assert out.metrics["margin_mean"] == 0 and out.metrics["accuracy_mean"] == 0
    zero = torch.zeros(1)
    assert out.loss.item() == pytest.approx(objective.link(zero, zero).item())
    torch.testing.assert_close(grad[0], -grad[1])
    assert grad[0].all()


MASKED = (tc.token_weights.scored(tc.token_score.given("reward_masks")),)
WEIGHTLESS = {
    "token_weights": (tc.Preference(MASKED), "log_probs"),
    "divergence": (tc.methods.sparse_po(), "ref_forward_kl"),
    "barrier": (tc.Preference(MASKED, pair_terms=(barrier(threshold=2.0),)), "log_probs"),
    "by_position": (tc.Preference(MASKED, pair_terms=(by_position(4),)), "log_probs"),
    "regularized": (tc.Preference(MASKED, pair_terms=(regularized(),)), "log_probs"),
}


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("name", WEIGHTLESS)
def test_a_token_of_weight_0_does_not_count(name, value):
    """Whatever the variable is at the token, as in a supervised objective."""
    objective, poisoned = WEIGHTLESS[name]
    batch = naive.with_inputs(naive.random_pairs(pairs=3, length=4)[0], {*objective.required_inputs, "reward_masks"})
    at = batch.response_mask.nonzero()[:, 0].tolist()
    for t in at[:1] + at[-1:]:  # of a chosen and of a rejected row
        batch.extras["reward_masks"][t] = 0.0
        if name == "regularized":
            batch.extras["worse_log_probs"][t] = batch.extras["better_log_probs"][t]

    def evaluated(x):
        given = {k: -log_probs_for(batch, i) for i, k in enumerate(objective.variables)}
        given["log_probs"] = -given["log_probs"]
        for t in at[:1] + at[-1:]:
            given[poisoned].view(-1)[t] = x
        given = {k: v.requires_grad_() for k, v in given.items()}
        loss = objective.loss(
            objective.prepare(batch), given["log_probs"], **{k: given[k] for k in objective.variables[1:]}
        ).loss
        return loss, *torch.autograd.grad(loss, tuple(given.values()))

    for clean, dirty in zip(evaluated(-1.0), evaluated(value), strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean)


@pytest.mark.parametrize("term", [barrier(0.0, 2.0), regularized(0.0), by_position(4, coefficient=0.0)])
def test_a_term_with_a_coefficient_of_0_adds_nothing(term):
    """Also where it is infinite or NaN."""
    objective = tc.Preference(link=tc.link.hinge(), pair_terms=(term,))
    batch, clean = naive.random_pairs(pairs=3, length=4)
    batch = naive.with_inputs(batch, objective.required_inputs)
    for value in (-math.inf, -1.0):
        current = clean.clone()
        current.view(-1)[int(batch.response_mask.nonzero()[-1])] = value
        naive.check_same((objective, tc.Preference(link=tc.link.hinge())), batch, current)


def test_likelihood_of_chosen_responses():
    """A mean over the tokens of each response, and over the pairs; 0 for an empty one."""
    objective = tc.mix("dpo", pair_terms="chosen_nll(0.3)")
    batch, current = naive.random_pairs(1)
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    empty = torch.arange(batch.num_tokens) // batch.shape[1] == int(batch.rewards.argmax())
    batch = batch.with_mask(batch.response_mask & ~empty)

    def formula(batch, log_probs):
        d = log_probs - batch.ref_log_probs

        def loss(chosen, rejected):
            likelihood = golden_pair.total(log_probs, chosen) / max(len(chosen), 1)
            margin = golden_pair.total(d, chosen) - golden_pair.total(d, rejected)
            return golden_pair.softplus(-0.1 * margin) - 0.3 * likelihood

        return golden_pair.mean_of_pairs(batch, loss)

    naive.check(objective, batch, current, formula)


def test_a_divergence_of_strength_0_adds_nothing():
    batch = pairs()
    divergence = torch.full(batch.shape, math.inf, dtype=torch.float64, requires_grad=True)
    objective = tc.methods.tdpo2(alpha=0.0)
    current = log_probs_for(batch)
    loss = objective.loss(objective.prepare(batch), current, ref_forward_kl=divergence).loss
    plain = tc.methods.dpo()
    torch.testing.assert_close(loss, plain.loss(plain.prepare(batch), current).loss)
    assert not torch.autograd.grad(loss, divergence)[0].any()


def test_combinations_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="pair_terms: expected none because of levels"):
        tc.mix("mapl", pair_terms="barrier()")
    with pytest.raises(TypeError, match="divergence: expected a divergence stage or None"):
        tc.Preference(divergence=tc.link.hinge())
    with pytest.raises(ValueError, match="learned_weights: "):
        tc.Preference(learned_weights="reward_mask")
