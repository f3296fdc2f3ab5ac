"""Every method trains the same on the prefix tree as on separate rows."""

import dataclasses

import causal
import naive
import pytest
import tokcredit as tc
import torch

ROWS = [*causal.ROWS[:3], (causal.PROMPT, [20, 21, 22, 30]), *causal.ROWS[4:]]
NAMES = [n for n in tc.methods.names() if set(tc.methods.load(n).variables) <= {"log_probs", "entropies"}]


@pytest.fixture(scope="module")
def computed():
    """A batch of pairs, and its log-probs and entropies on the tree and row by row, with their graphs."""
    model = causal.model("llama")
    tokens = sum(len(row) for _, row in ROWS)
    batch = tc.Rollouts(
        causal.batch(ROWS).tokens,
        causal.batch(ROWS).cu_seqlens,
        torch.arange(6) // 2,
        torch.tensor([1.0, 0.0] * 3),
        torch.arange(tokens) % 7 != 3,
        old_log_probs=-torch.rand(tokens, generator=torch.Generator().manual_seed(0)) * 3,
        extras=dict(causal.batch(ROWS).extras),
    )
    plan = tc.packing.pack(batch)
    part = plan.part(0)
    out = tc.packing.forward(model, part)
    back = torch.cat([batch.selection([r]).tokens for r in part.rows]).argsort()
    packed = {"log_probs": out.log_probs[back], "entropies": out.entropies[back]}
    alone = dict(zip(("log_probs", "entropies"), causal.alone(model, ROWS), strict=True))
    assert plan.num_predictions < int(batch.response_mask.sum())
    # Synthetic inputs are of a vocabulary of five tokens.
    return model, dataclasses.replace(batch, tokens=batch.tokens % 5), packed, alone


@pytest.mark.parametrize("name", NAMES)
def test_the_same_loss_and_gradient(computed, name):
    model, batch, *both = computed
    objective = tc.methods.load(name)
    batch = naive.with_inputs(batch, objective.required_inputs)
    prepared = objective.prepare(batch, progress=0.5 if objective.is_scheduled else None)
    results = []
    for found in both:
        model.zero_grad()
        first, *others = objective.variables
        loss = objective.loss(prepared, found[first], **{other: found[other] for other in others}).loss
        loss.backward(retain_graph=True)
        results.append((loss.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters()])))
    (packed, ours), (alone, theirs) = results
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)
