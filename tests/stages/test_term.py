"""Terms against their formulas, with their gradients, denominators and partitions."""

import dataclasses
import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch

PIECES = [[4, 0, 2], [11, 1], [3, 5, 6, 7, 8, 9, 10]]


def batch_with_reference(seed=0):
    batch, current = naive.random_batch(seed)
    ref = current.reshape(-1) + 0.3 * torch.randn(84, dtype=torch.float64, generator=ragged.generator(1))
    return batch.with_inputs(ref_log_probs=ref), current


def only(term, **changes):
    """An objective in which the term alone has a gradient."""
    return tc.Objective(tc.credit.constant(0.0), terms=(term,), **changes)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("mean", ["token_mean", "sequence_mean"])
def test_kl(estimator, mean):
    batch, current = batch_with_reference()
    objective = only(tc.term.kl(0.7, estimator), aggregation=getattr(tc.aggregation, mean)())

    def formula(batch, log_probs):
        u = log_probs - batch.ref_log_probs
        each = {"k1": u, "k2": u**2 / 2, "k3": (-u).exp() + u - 1, "abs": u.abs()}[estimator]
        return 0.7 * getattr(naive, mean)(batch, [[each[t] for t in tokens] for tokens in naive.rows_of(batch)])

    out = naive.check(objective, batch, current, formula)
    torch.testing.assert_close(0.7 * out.metrics["kl"], out.loss.detach())
    assert out.metrics["policy_loss"] == 0


STUDENT, TEACHER = ([1.0, 0, -1, 0.5], [0.2, 0.8, -0.5, 0])
REVERSE_KL = [0.212648109, -0.200765513, -0.054613199, 0.042730603]
FORWARD_KL = [0.232295198, -0.266026697, -0.055874821, 0.089606321]


@pytest.mark.parametrize(
    ("name", "expected"), [("k1", [0.0] * 4), ("k2", REVERSE_KL), ("k3", FORWARD_KL), ("advantage", REVERSE_KL)]
)
def test_expected_gradient_over_sampled_tokens(name, expected):
    """Of a KL's estimators over tokens of the current policy: what it is that each of them minimizes."""
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (STUDENT, TEACHER))
    student.requires_grad_()
    log_probs, given = student.log_softmax(0), teacher.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(4):
        batch = tc.Rollouts(
            torch.tensor([token]),
            torch.tensor([0, 1]),
            torch.tensor([0]),
            torch.tensor([1.0], dtype=torch.float64),
            old_log_probs=log_probs[token : token + 1].detach(),
        )
        aggregation = tc.aggregation.token_sum()
        if name == "advantage":
            batch = batch.with_inputs(teacher_log_probs=given[token : token + 1])
            objective = tc.Objective(tc.credit.distilled(), aggregation=aggregation)
        else:
            batch = batch.with_inputs(ref_log_probs=given[token : token + 1])
            objective = only(tc.term.kl(1.0, name), aggregation=aggregation)
        loss = objective.loss(objective.prepare(batch), log_probs[token : token + 1]).loss
        total = total + log_probs[token].exp().detach() * loss
    gradient = torch.autograd.grad(total, student)[0]
    assert gradient.tolist() == pytest.approx(expected, abs=2e-9)


def test_kl_has_no_gradient_beyond_its_limit():
    batch, current = batch_with_reference()
    limit = 0.02
    objective = only(tc.term.kl(1.0, "k3", limit=limit), aggregation=tc.aggregation.token_sum())
    seen = set()

    def formula(batch, log_probs):
        u = log_probs - batch.ref_log_probs
        total = 0.0
        for t in (t for tokens in naive.rows_of(batch) for t in tokens):
            value = (-u[t]).exp() + u[t] - 1
            seen.add(value.item() > limit)
            total = total + value.clamp(max=limit)
        return total

    naive.check(objective, batch, current, formula)
    assert seen == {True, False}


def test_kl_to_another_policy_and_with_another_mean():
    batch, current = naive.random_batch()
    term = tc.term.kl(0.5, "k1", to="old_log_probs", aggregation=tc.aggregation.sequence_sum(10))

    def formula(batch, log_probs):
        rows = [tokens for tokens in naive.rows_of(batch) if tokens]
        return 0.5 * sum(log_probs[t] - batch.old_log_probs[t] for row in rows for t in row) / (10 * len(rows))

    naive.check(only(term, aggregation=tc.aggregation.token_mean()), batch, current, formula)


def test_entropy_has_a_gradient_to_the_entropies():
    batch, current = naive.random_batch()
    entropies = torch.rand(12, 7, dtype=torch.float64, generator=ragged.generator(6))
    entropies[~batch.shaped(batch.response_mask)] = math.nan
    entropies.requires_grad_()
    objective = only(tc.term.entropy(0.25), aggregation=tc.aggregation.token_mean())
    assert objective.variables == ("log_probs", "entropies") and objective.required_inputs == frozenset()
    log_probs = current.clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), log_probs, entropies=entropies)
    out.loss.backward()
    tokens = [t for row in naive.rows_of(batch) for t in row]
    mean = entropies.detach().reshape(-1)[tokens].mean()
    torch.testing.assert_close(out.loss, -0.25 * mean)
    torch.testing.assert_close(out.metrics["entropy_bonus"], mean)
    mask = batch.shaped(batch.response_mask)
    assert torch.equal(entropies.grad[mask], torch.full((len(tokens),), -0.25 / len(tokens), dtype=torch.float64))
    assert not entropies.grad[~mask].any() and not log_probs.grad.any()


def test_further_variables_are_asked_for_by_name():
    batch, current = naive.random_batch()
    objective = only(tc.term.entropy(0.25))
    prepared = objective.prepare(batch)
    with pytest.raises(
        TypeError, match="entropies: expected by name because the objective differentiates it, got none"
    ):
        objective.loss(prepared, current)
    with pytest.raises(ValueError, match=r"entropies: expected \[12, 7\], got \[84\]"):
        objective.loss(prepared, current, entropies=current.reshape(-1))
    with pytest.raises(TypeError, match="values: expected entropies, got values"):
        objective.loss(prepared, current, entropies=current, values=current)
    plain = tc.Objective()
    with pytest.raises(TypeError, match="entropies: expected no further variable, got entropies"):
        plain.loss(plain.prepare(batch), current, entropies=current)


def test_nll_of_chosen_rows_has_a_denominator_of_its_own():
    """The log-likelihood of the rows with a positive advantage, averaged over their tokens alone."""
    batch, current = naive.random_batch()

    @dataclasses.dataclass(frozen=True)
    class positive(tc.filters.Filter):
        def __call__(self, batch, advantages):
            return batch.rewards[:, None] > 0.5

    objective = only(tc.term.nll(0.3, where=positive()), aggregation=tc.aggregation.token_mean())

    def formula(batch, log_probs):
        tokens = [t for r, row in enumerate(naive.rows_of(batch)) if batch.rewards[r] > 0.5 for t in row]
        assert 0 < len(tokens) < int(batch.lengths.sum())
        return -0.3 * sum(log_probs[t] for t in tokens) / len(tokens)

    out = naive.check(objective, batch, current, formula)
    torch.testing.assert_close(0.3 * out.metrics["nll"], out.loss.detach())


@pytest.mark.parametrize("mean", [None, tc.aggregation.token_mean(), tc.aggregation.sequence_mean()])
def test_a_partition_adds_up(mean):
    batch, current = batch_with_reference()
    batch = naive.with_inputs(batch, {"entropies"})
    terms = (
        tc.term.kl(0.5, "k3", aggregation=mean),
        tc.term.entropy(0.2, aggregation=mean),
        tc.term.nll(0.1, where=tc.filters.improbable(0.6), aggregation=mean),
    )
    objective = tc.mix("ctpo", terms=terms)
    entropies = batch.shaped(batch.entropies)
    prepared = objective.prepare(batch)
    x, h = current.clone().requires_grad_(), entropies.clone().requires_grad_()
    whole = objective.loss(prepared, x, entropies=h)
    whole.loss.backward()
    y, k = current.clone().requires_grad_(), entropies.clone().requires_grad_()
    parts = [objective.loss(prepared.select(rows), y[rows], entropies=k[rows]) for rows in PIECES]
    sum(p.loss for p in parts).backward()
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for name in ("kl", "entropy_bonus", "nll", "policy_loss", "tokens"):
        torch.testing.assert_close(sum(p.metrics[name] for p in parts), whole.metrics[name])
        assert whole.metrics[name] != 0
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(k.grad, h.grad)


def test_terms_cover_only_rows_that_train():
    """Denominators of terms without ``where`` are those of the tokens that train."""
    batch, current = batch_with_reference()
    filters = (tc.filters.improbable(0.6),)
    objective = only(tc.term.kl(1.0, "k1"), filters=filters, aggregation=tc.aggregation.token_mean())

    def formula(batch, log_probs):
        kept = [t for row in naive.rows_of(batch) for t in row if batch.old_log_probs[t] < math.log(0.6)]
        return sum(log_probs[t] - batch.ref_log_probs[t] for t in kept) / len(kept)

    naive.check(objective, batch, current, formula)


def test_rows_without_advantage_have_a_gradient_from_terms():
    batch, _ = batch_with_reference()
    batch = tc.Rollouts.from_padded(
        batch.shaped(batch.tokens),
        batch.shaped(batch.response_mask),
        batch.group_ids,
        torch.ones(12),
        old_log_probs=batch.shaped(batch.old_log_probs),
        ref_log_probs=batch.shaped(batch.ref_log_probs),
    )
    assert not tc.methods.grpo().prepare(batch).has_gradient.any()
    assert torch.equal(tc.mix("grpo", terms="kl(0.1)").prepare(batch).has_gradient, batch.lengths > 0)
    assert not tc.mix("grpo", terms="kl(0.0)").prepare(batch).has_gradient.any()


@pytest.mark.parametrize("on_policy", [False, True])
def test_corrected_kl(on_policy):
    """The value is q k3, and the gradient q u, that of the KL if tokens come from the old policy."""
    batch, current = batch_with_reference()
    old = batch.old_log_probs
    if on_policy:
        batch = dataclasses.replace(batch, old_log_probs=None)

    def formula(batch, log_probs):
        u = log_probs - batch.ref_log_probs
        q = 1.0 if on_policy else (log_probs - old).exp().detach()
        value, pull = q * ((-u).exp() + u - 1).detach(), q * u**2 / 2
        each = value + pull - pull.detach()
        return 0.7 * naive.token_mean(batch, [[each[t] for t in tokens] for tokens in naive.rows_of(batch)])

    naive.check(only(tc.term.kl(0.7, "k3_corrected"), aggregation=tc.aggregation.token_mean()), batch, current, formula)


def test_corrected_kl_by_hand():
    batch, current = naive.two_rows()
    variable = current.clone().requires_grad_()
    objective = only(tc.term.kl(1.0, "k3_corrected"), aggregation=tc.aggregation.token_sum())
    out = objective.loss(objective.prepare(batch), variable)
    out.loss.backward()
    values = [0.050299, 0.088392, 0.007253, 0.193147, 0.093505, 1.339483, 0.106617]
    assert out.loss.item() == pytest.approx(sum(values), abs=1e-5)
    slopes = [0.350299, -0.911608, -0.103858, 0.693147, -0.306495, -0.460517, 0.517728]
    assert variable.grad[batch.shaped(batch.response_mask)].tolist() == pytest.approx(slopes, abs=1e-6)


@pytest.mark.parametrize("over_all", [False, True])
def test_kl_of_some_tokens(over_all):
    """A filter decides where it acts; the mean is over these tokens, or over all that train."""
    batch, current = batch_with_reference()
    batch = naive.with_inputs(batch, {"planning_tokens"})
    term = tc.term.kl(0.7, "k2", where=tc.filters.marked("planning_tokens"), over_all=over_all)

    def formula(batch, log_probs):
        tokens = [t for row in naive.rows_of(batch) for t in row]
        chosen = [t for t in tokens if batch.input("planning_tokens")[t]]
        total = sum((log_probs[t] - batch.ref_log_probs[t]) ** 2 / 2 for t in chosen)
        return 0.7 * total / len(tokens if over_all else chosen)

    naive.check(only(term, aggregation=tc.aggregation.token_mean()), batch, current, formula)


def test_tokens_of_a_term_are_chosen_once():
    """In a mini-batch the term acts on the tokens chosen in the whole batch; denominators are the mini-batch's."""
    batch, current = naive.random_batch()
    objective = tc.methods.kl_cov(1.0, 0.1)
    whole = objective.prepare(batch)
    for rows in ([0, 3, 5], [2, 7]):
        selected, own = whole.select(rows), whole.minibatch(rows)
        assert torch.equal(selected.terms[0][0], own.terms[0][0])
        losses = [objective.loss(part, current[rows]).metrics["kl_old"] for part in (selected, own)]
        share = selected.lengths.sum() / whole.lengths.sum()
        torch.testing.assert_close(losses[0], losses[1] * share)
    assert sum(int(whole.select([r]).terms[0][0].sum()) for r in range(12)) == 6


def test_terms_on_some_tokens_over_several_ranks():
    """How many of these tokens other ranks have is known in the whole batch only."""
    batch, _ = batch_with_reference()
    batch = naive.with_inputs(batch, {"expert"})
    term = tc.term.nll(0.1, where=tc.filters.marked("expert"))
    with pytest.raises(ValueError, match=r"terms: expected over_all=True .* dp_size is 2 .* nll"):
        tc.Objective(terms=(term,)).prepare(batch, dp_size=2, batch_num_tokens=48, global_batch_size=11)
    chord = tc.methods.chord()
    prepared = chord.prepare(batch, dp_size=2)
    with pytest.raises(ValueError, match="dp_size is 2"):
        prepared.select([0, 1, 2]).with_denominators(dp_size=2, batch_num_tokens=48, global_batch_size=11)


def test_two_kl_terms():
    batch, current = batch_with_reference()
    objective = dataclasses.replace(tc.methods.dro(), terms=(*tc.methods.dro().terms, tc.term.kl(0.1)))
    metrics = objective.loss(objective.prepare(batch), current).metrics
    assert metrics["kl"] > 0 and metrics["kl_old"] > 0 and metrics["kl"] != metrics["kl_old"]


def test_rows_that_only_a_term_moves():
    """Rows without advantage need a pass if a term acts on one of their tokens, and only then."""
    batch, _ = naive.random_batch()
    batch = batch.with_rewards(torch.ones(12, dtype=torch.float64))
    prepared = tc.methods.kl_cov(1.0, 0.05).prepare(batch)
    chosen = batch.shaped(prepared.terms[0][0]).any(1)
    assert torch.equal(prepared.has_gradient, chosen) and 0 < chosen.sum() < 12


def test_value_by_hand():
    """Squares 0.01, 0.09, 0, 0.64 of the values, and 0.09, 0.09, 0, 0.09 of those held within 0.2 of the old ones.

    Where the held square is larger, as at the first token, there is no gradient. NaN lies beneath the masked token.
    """

    def tokens(*x):
        return torch.tensor([*x[:2], math.nan, *x[2:]], dtype=torch.float64)

    batch = tc.Rollouts(
        torch.arange(5),
        torch.tensor([0, 5]),
        torch.tensor([0]),
        torch.tensor([0.0]),
        torch.tensor([True, True, False, True, True]),
        extras={"values": tokens(0.5, 0.6, 0.4, 0.8), "value_targets": tokens(1, 0.2, 0.4, 0.9)},
    )
    objective = only(tc.term.value(0.5), aggregation=tc.aggregation.token_mean())
    values = tokens(0.9, 0.5, 0.4, 0.1).requires_grad_()
    out = objective.loss(objective.prepare(batch), torch.zeros(5, dtype=torch.float64), values=values)
    out.loss.backward()
    assert out.metrics["value_loss"].item() == pytest.approx(0.1025)
    assert out.loss.item() == pytest.approx(0.5 * 0.1025)
    assert values.grad.tolist() == pytest.approx([0, 0.5 * 0.3 / 4, 0, 0, 0.5 * -0.8 / 4])
    assert tc.mix("ppo", terms="value").required_inputs == {"values", "value_targets"}


def test_value_formula():
    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"values", "value_targets"})
    values = batch.input("values").nan_to_num() + 0.3 * torch.randn(
        84, dtype=torch.float64, generator=ragged.generator(2)
    )
    old, target = batch.extras["values"], batch.extras["value_targets"]
    x = values.clone().requires_grad_()
    each = torch.maximum((x - target) ** 2, (x.clamp(old - 0.2, old + 0.2) - target) ** 2) / 2
    expected = naive.sequence_mean(batch, [[each[t] for t in row] for row in naive.rows_of(batch)])
    expected.backward()
    objective = only(tc.term.value(1.0))
    variable = batch.shaped(values).clone().requires_grad_()
    out = objective.loss(objective.prepare(batch), current, values=variable)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(variable.grad.reshape(-1), x.grad.nan_to_num())
