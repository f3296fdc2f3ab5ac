import dataclasses
import math

import naive
import pytest
import ragged
import tokcredit as tc
import torch
from tokcredit.methods.ba import balanced
from tokcredit.methods.divergence_weighted import divergence
from tokcredit.methods.tempo import tempo_credit

pytestmark = pytest.mark.usefixtures("device")


def mixture(**changes):
    return dataclasses.replace(
        tc.Objective(
            credit=tempo_credit(),
            ratio=tc.ratio.cumulative(),
            clip=tc.clip.growing(0.025, 0.05, 0.5),
            aggregation=balanced(),
        ),
        **changes,
    )


@pytest.mark.parametrize(("on", "low"), [("probability", -0.05), ("binary_kl", -0.01), ("difference", -0.1)])
def test_a_gate_compares_the_token_whatever_the_ratio_is(on, low):
    """Also where the ratio is one of the row: the gate looks at the token's own log-probs, old and current."""

    def formula(batch, log_probs):
        advantages, losses = naive.group_advantages(batch), []
        for r, tokens in enumerate(naive.rows_of(batch)):
            old = [batch.old_log_probs[t].item() for t in tokens]
            new = [log_probs[t].item() for t in tokens]
            ratio = math.exp(sum(b - a for a, b in zip(old, new, strict=True)) / max(len(tokens), 1))
            row = []
            for t, before, now in zip(tokens, old, new, strict=True):
                p, q = math.exp(before), math.exp(now)
                kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
                at = {"probability": q - p, "binary_kl": math.copysign(kl, now - before), "difference": now - before}[
                    on
                ]
                stopped = (at < low and advantages[r] < 0) or (at > -low and advantages[r] > 0)
                row.append(-advantages[r] * (0 if stopped else ratio) * log_probs[t])
            losses.append(row)
        return naive.sequence_mean(batch, losses)

    batch, current = naive.random_batch()
    current = current.clamp(max=-1e-3)
    objective = tc.Objective(ratio=tc.ratio.sequence(), clip=tc.clip.gated(on, low, -low))
    naive.check(objective, batch, current, formula)


def test_any_mixture_is_the_product_of_its_stages():
    """Tree credit, prefix ratio, growing window and balanced weights, each written naively."""

    def formula(batch, log_probs):
        advantages = tc.methods.tempo().prepare(batch).advantages.reshape(-1)
        outcome = naive.group_advantages(batch)
        losses = []
        for tokens in naive.rows_of(batch):
            total, row = 0.0, []
            for position, t in enumerate(tokens, start=1):
                total += (log_probs[t] - batch.old_log_probs[t]).item()
                q = (total + log_probs[t] - log_probs[t].detach()).exp()
                s = torch.tensor(position).double().sqrt()
                row.append(naive.clipped(advantages[t].item(), q, (-0.025 * s).exp(), (0.05 * s).exp()))
            losses.append(row)
        total = 0.0
        for rows in naive.group_rows(batch):
            rows = [r for r in rows if losses[r]]
            for sign in (1, -1):
                side = [r for r in rows if outcome[r] * sign > 0]
                if side:
                    tokens = sum(len(losses[r]) for r in side)
                    total = total + len(side) / len(rows) * sum(sum(losses[r]) for r in side) / tokens
        return total / batch.num_groups

    for seed in range(3):
        naive.check(mixture(), *naive.random_batch(seed), formula)


def test_terms_and_metrics_cover_the_tokens_that_train():
    """Half of the tokens train, so the KL term and the metrics are those of that half, whatever the ratio sums over."""
    g = torch.Generator().manual_seed(5)
    entropies = torch.rand(12, 7, generator=g)
    batch, current = naive.random_batch(entropies=entropies, ref_log_probs=-torch.rand(12, 7, generator=g).double())
    half = tc.filters.top_share(0.5, tc.token_score.given("entropies"), per_row=True)
    plain = tc.mix("dapo", filters=half, terms="kl(0.1)")
    scanned = tc.mix("ctpo", filters=half, terms="kl(0.1)")
    outs = [o.loss(o.prepare(batch), current) for o in (plain, scanned)]
    torch.testing.assert_close(outs[0].metrics["kl"], outs[1].metrics["kl"])
    trained = plain.prepare(batch).mask.sum()
    assert outs[0].metrics["tokens"] == outs[1].metrics["tokens"] == trained < batch.response_mask.sum()
    log_probs = current.clone().requires_grad_()
    scanned.loss(scanned.prepare(batch), log_probs).loss.backward()
    assert not log_probs.grad[~batch.shaped(scanned.prepare(batch).mask)].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_sums_and_positions_count_tokens_that_do_not_train(scaled):
    """The cumulative ratio with growing bounds, where only half of the tokens of each row train."""
    batch, current = naive.random_batch(entropies=torch.rand(12, 7, generator=ragged.generator(5)))
    objective = mixture(
        credit=tc.credit.group_normalized(),
        filters=(tc.filters.top_share(0.5, tc.token_score.given("entropies"), per_row=True),),
        aggregation=tc.aggregation.token_mean(),
        scales=(divergence(strength=1.0, slope=2.0),) if scaled else (),
    )

    def formula(batch, log_probs):
        advantages, entropies = naive.group_advantages(batch), batch.entropies.tolist()
        losses = []
        for r, tokens in enumerate(naive.rows_of(batch)):
            kept = sorted(tokens, key=lambda t: -entropies[t])[: math.ceil(0.5 * len(tokens))]
            total = 0.0
            for position, t in enumerate(tokens, start=1):
                total += (log_probs[t] - batch.old_log_probs[t]).item()
                if t not in kept:
                    continue
                q = (total + log_probs[t] - log_probs[t].detach()).exp()
                s = math.sqrt(position)
                moved = math.exp(total) - 1 - total
                a = advantages[r] * (0.5 + 1 / (1 + math.exp(-2 * moved)) if scaled else 1)
                losses.append(naive.clipped(a, q, math.exp(-0.025 * s), math.exp(0.05 * s)))
        return sum(losses) / len(losses)

    naive.check(objective, batch, current, formula)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_rollout_importance_weights(whole_rows, masked):
    engine = -torch.rand(12, 7, dtype=torch.float64, generator=ragged.generator(3))
    engine[0, 0] = float("nan")
    batch, current = naive.random_batch(rollout_log_probs=engine)
    if masked:
        stage = tc.token_weights.importance("sum" if whole_rows else "token", 0.5, 1.5, "zero")
    else:
        stage = tc.token_weights.importance("sum" if whole_rows else "token", high=1.3)

    def formula(batch, log_probs):
        losses = naive.ppo(batch, log_probs, naive.group_advantages(batch), 0.8, 1.2)
        weighed = []
        for tokens, row in zip(naive.rows_of(batch), losses, strict=True):
            d = [batch.old_log_probs[t] - batch.rollout_log_probs[t] for t in tokens]
            d = [torch.zeros_like(x) if x.isnan() else x for x in d]
            ratios = [sum(d).exp()] * len(d) if whole_rows and d else [x.exp() for x in d]
            if masked:
                ratios = [float(q) if 0.5 <= q <= 1.5 else 0.0 for q in ratios]
            else:
                ratios = [min(float(q), 1.3) for q in ratios]
            weighed.append([w * x for w, x in zip(ratios, row, strict=True)])
        return naive.sequence_mean(batch, weighed)

    naive.check(dataclasses.replace(tc.methods.grpo(), token_weights=(stage,)), batch, current, formula)


def test_row_and_token_weights_multiply():
    engine = -torch.rand(12, 7, dtype=torch.float64, generator=ragged.generator(3))
    batch, _ = naive.random_batch(rollout_log_probs=engine)
    row, token = tc.token_weights.importance("sum", high=1.3), tc.token_weights.importance(high=1.3)
    both = dataclasses.replace(tc.methods.grpo(), token_weights=(row, token)).prepare(batch).multiplier
    expected = row(batch, None) * batch.shaped(token(batch, None))
    mask = batch.shaped(batch.response_mask)
    torch.testing.assert_close(batch.shaped(both)[mask], expected[mask])


def test_filtered_rows_leave_the_denominators():
    batch, current = naive.random_batch()
    batch = dataclasses.replace(batch, rewards=torch.where(batch.group_index == 0, 1.0, batch.rewards))
    plain = tc.methods.dapo()
    chosen = dataclasses.replace(plain, filters=(tc.filters.nonzero_advantage(),))
    a, b = plain.prepare(batch), chosen.prepare(batch)
    ratio = batch.lengths.sum() / batch.lengths[a.has_gradient].sum()
    assert ratio > 1
    torch.testing.assert_close(chosen.loss(b, current).loss, plain.loss(a, current).loss * ratio, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("method", ["grpo", "ba"])
def test_kl_term(estimator, method):
    batch, current = naive.random_batch()
    ref = current + 0.3 * torch.randn(current.shape, dtype=torch.float64, generator=ragged.generator(1))
    batch = dataclasses.replace(batch, ref_log_probs=ref.reshape(-1))
    plain = tc.methods.load(method)
    objective = dataclasses.replace(plain, terms=(tc.term.kl(0.1, estimator),))

    def formula(batch, log_probs):
        u = log_probs - batch.ref_log_probs
        each = {"k1": u, "k2": u**2 / 2, "k3": (-u).exp() + u - 1, "abs": u.abs()}[estimator]
        losses = [[0.1 * each[t] for t in tokens] for tokens in naive.rows_of(batch)]
        kl = (naive.sequence_mean if method == "grpo" else naive.token_mean)(batch, losses)
        return kl + plain.loss(plain.prepare(batch), log_probs.view(current.shape)).loss

    out = naive.check(objective, batch, current, formula)
    value = formula(batch, current.reshape(-1)) - plain.loss(plain.prepare(batch), current).loss
    torch.testing.assert_close(0.1 * out.metrics["kl"], value, rtol=1e-6, atol=1e-9)
    assert objective.required_inputs == {"ref_log_probs"}


def test_minibatch_counts_its_own_rows():
    batch, current = naive.random_batch()
    rows = torch.arange(6)
    for name in ("dapo", "grpo", "ba"):
        objective = tc.methods.load(name)
        part = objective.prepare(batch).minibatch(rows)
        alone = objective.prepare(batch.select(rows))
        alone = dataclasses.replace(alone, credit=part.credit, signs=part.signs).with_denominators()
        torch.testing.assert_close(objective.loss(part, current[rows]).loss, objective.loss(alone, current[rows]).loss)
        assert not torch.equal(part.row_weights, objective.prepare(batch).select(rows).row_weights)


def test_missing_inputs_and_denominators_are_errors():
    batch, current = naive.random_batch()
    objective = dataclasses.replace(tc.methods.grpo(), terms=(tc.term.kl(),))
    with pytest.raises(ValueError, match="ref_log_probs: expected in the batch"):
        objective.prepare(batch)
    with pytest.raises(
        ValueError, match="global_batch_size: expected the number over all ranks because dp_size is 2, got None"
    ):
        tc.methods.grpo().prepare(batch, dp_size=2)
    with pytest.raises(ValueError, match="global_num_groups: expected"):
        tc.methods.ba().prepare(batch, batch_num_tokens=9, global_batch_size=3, dp_size=2)
    with pytest.raises(ValueError, match=r"log_probs: expected \[12, 7\], got \[12, 6\]"):
        tc.methods.grpo().loss(tc.methods.grpo().prepare(batch), current[:, 1:])
    summed = tc.methods.dr_grpo()
    with pytest.raises(
        ValueError, match=r"aggregation: expected a length in sequence_sum.* because dp_size is 2, got None"
    ):
        summed.prepare(batch, batch_num_tokens=9, global_batch_size=9, dp_size=2)


METRICS = {
    *("loss", "policy_loss", "ratio_mean", "kl_k3_mean", "nonfinite_log_probs", "tokens"),
    *("clip_low_fraction", "clip_high_fraction", "clip_cap_fraction"),
}


def test_metrics_against_their_formulas():
    batch, current = naive.random_batch()
    objective = tc.mix("grpo", clip="ppo(0.1, 0.15, cap=1.3)", terms="kl(0.5, to='old_log_probs')")
    out = objective.loss(objective.prepare(batch), current.requires_grad_())
    assert set(out.metrics) == METRICS | {"kl_old"}
    assert all(m.dim() == 0 and not m.requires_grad for m in out.metrics.values())
    tokens = [t for row in naive.rows_of(batch) for t in row]
    advantages = dict(enumerate(naive.group_advantages(batch)))
    difference = (current.detach().reshape(-1) - batch.old_log_probs)[tokens]
    of_token = torch.tensor([advantages[t // 7] for t in tokens])
    q = difference.exp()
    low, high = (of_token < 0) & (q < 0.9), (of_token > 0) & (q > 1.15)
    expected = {
        "ratio_mean": q.mean(),
        "kl_k3_mean": (q - 1 - difference).mean(),
        "clip_low_fraction": low.double().mean(),
        "clip_high_fraction": high.double().mean(),
        "clip_cap_fraction": ((of_token < 0) & (q > 1.3)).double().mean(),
        "tokens": torch.tensor(len(tokens)).double(),
        "nonfinite_log_probs": torch.tensor(0.0).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name].double(), value.double(), rtol=1e-9, atol=1e-12, msg=name)
        assert name == "nonfinite_log_probs" or value > 0, f"{name}: 0 proves nothing"
    torch.testing.assert_close(out.metrics["loss"], out.metrics["policy_loss"] + 0.5 * out.metrics["kl_old"])
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())


def test_metrics_are_computed_when_they_are_read():
    batch, current = naive.random_batch()
    objective = tc.methods.ctpo()
    out = objective.loss(objective.prepare(batch), current)
    assert out.metrics._values is None
    assert len(out.metrics) == len(METRICS) and out.metrics._values is not None
    assert out.metrics["tokens"] is out.metrics["tokens"]


def test_loss_compiles_without_graph_breaks():
    batch, current = naive.random_batch()
    objective = mixture()
    prepared = objective.prepare(batch)

    def f(x):
        return objective.loss(prepared, x).loss

    x = current.clone().requires_grad_()
    (eager,) = torch.autograd.grad(f(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", tc.methods.names())
def test_empty_batch(name):
    batch = tc.Rollouts(
        torch.zeros(0, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0),
    )
    objective = tc.methods.load(name)
    batch = naive.with_inputs(batch, objective.required_inputs)
    log_probs = torch.zeros(0, requires_grad=True)
    out = naive.loss_of(objective, objective.prepare(batch, progress=0.5), log_probs)
    out.loss.backward()
    assert out.loss == 0
