from dataclasses import dataclass

import causal
import pytest
import tokcredit as tc
import torch
from tokcredit.stages.credit import Credit

WEIGHTS = torch.linspace(-1.0, 2.0, sum(len(row) for _, row in causal.ROWS))


def gradients(model, log_probs, entropies):
    model.zero_grad()
    (WEIGHTS @ log_probs + WEIGHTS.flip(0) @ entropies).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", causal.MODELS)
def test_packed_rows_are_rows_alone(kind):
    model = causal.model(kind)
    plan = tc.packing.pack(causal.batch())
    found = tc.packing.forward(model, plan.part(0), temperature=0.8)
    back = torch.argsort(torch.cat([plan.batch.selection([r]).tokens for r in plan.part(0).rows]))
    found = [x[back] for x in found]
    expected = list(causal.alone(model, temperature=0.8))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    ours, theirs = gradients(model, *found), gradients(model, *expected)
    assert ours.keys() == theirs.keys()
    scale = max(float(x.abs().max()) for x in theirs.values())
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name] / scale, x / scale, atol=1e-5, rtol=1e-4, msg=name)


def test_log_probs_of_a_plan_in_bins():
    model = causal.model("llama")
    batch = causal.batch()
    plan = tc.packing.pack(batch, budget=11)
    assert plan.num_bins == 3
    found = tc.packing.log_probs(model, plan, temperature=1.3)
    with torch.no_grad():
        for ours, theirs in zip(found, causal.alone(model, temperature=1.3), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert not found.log_probs.requires_grad


def test_gradients_of_bins_add_up_to_those_of_one():
    """A prefix that is forwarded in two bins gets its gradient from both."""
    model, batch = causal.model("llama"), causal.batch()
    results = []
    for budget in (None, 11):
        model.zero_grad()
        for part in tc.packing.pack(batch, budget):
            chosen = batch.selection(part.rows).tokens
            out = tc.packing.forward(model, part)
            (WEIGHTS[chosen] @ out.log_probs).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, atol=1e-4 * float(x.abs().max()), rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_attend_along_the_tree(reentrant):
    model, part = causal.model("llama"), tc.packing.pack(causal.batch()).part(0)
    model.train()
    results = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = tc.packing.forward(model, part)
        results.append(gradients(model, out.log_probs, out.entropies))
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, msg=name)
    assert model.config._attn_implementation == "sdpa"


def test_masks_inside_rows():
    mask = torch.arange(WEIGHTS.numel()) % 3 > 0
    model = causal.model("llama")
    plan = tc.packing.pack(causal.batch(wanted=mask))
    assert plan.num_predictions < tc.packing.pack(causal.batch()).num_predictions
    found, (expected, _) = tc.packing.log_probs(model, plan).log_probs, causal.alone(model)
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=1e-5)
    assert not found[~mask].any()


def test_a_part_without_rows_takes_part_in_the_backward_pass():
    model = causal.model("llama")
    plan = tc.packing.pack(causal.batch([causal.ROWS[0]]), ranks=2)
    part = plan.for_rank(1)[0]
    assert not part.rows.size
    out = tc.packing.forward(model, part)
    assert out.log_probs.shape == (0,)
    out.log_probs.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None and not model.model.embed_tokens.weight.grad.any()


def test_a_host_calls_the_model_itself():
    model, part = causal.model("mistral"), tc.packing.pack(causal.batch()).part(0)
    with tc.packing.attention(model, part) as arguments:
        logits = model(**arguments).logits[0]
    assert model.config._attn_implementation == "sdpa"
    log_probs = logits[part.source].log_softmax(-1).gather(1, part.target[:, None])[:, 0]
    torch.testing.assert_close(part.to_rows(log_probs), tc.packing.forward(model, part).log_probs)


def test_stock_attention_never_sees_positions_of_a_tree(monkeypatch):
    """Without a mask, transformers takes a jump of positions for the start of another sequence, and says nothing."""
    model, part = causal.model("llama"), tc.packing.pack(causal.batch()).part(0)
    tc.packing.forward(model, part)
    seen = []
    layer = type(model.model.layers[0].self_attn)
    forward = layer.forward

    def spy(self, *given, **named):
        seen.append(self.config._attn_implementation)
        return forward(self, *given, **named)

    monkeypatch.setattr(layer, "forward", spy)
    tc.packing.forward(model, part).log_probs.sum().backward()
    assert seen == ["tokcredit_tree"] * 2


@dataclass(frozen=True)
class planted(Credit):
    def __call__(self, batch):
        return batch.input("advantages")


# Three rows through one token, advantages 1, -1 and 0.5: the sum of the slopes of the clipped surrogate.
SLOPES = {1.3: 1.3, 1.0: -0.5, 0.7: -1.05}


@pytest.mark.parametrize("ratio", SLOPES)
def test_a_shared_token_keeps_one_loss_term_per_row(ratio):
    batch = causal.batch([([5], [20])] * 3)
    part = tc.packing.pack(batch).part(0)
    per_prediction = torch.tensor([ratio]).log().requires_grad_()
    objective = tc.Objective(planted(), clip=tc.clip.ppo(0.2, 0.2), aggregation=tc.aggregation.token_sum())
    batch = batch.with_inputs(old_log_probs=torch.zeros(3), advantages=torch.tensor([1.0, -1.0, 0.5]))
    prepared = objective.prepare(batch)
    objective.loss(prepared, part.to_rows(per_prediction)).loss.backward()
    assert per_prediction.grad.item() == pytest.approx(SLOPES[ratio])
