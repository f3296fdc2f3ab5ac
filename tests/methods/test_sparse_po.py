import math

import golden_pair
import naive
import pytest
import tokcredit as tc
import torch
from golden_pair import softplus, total
from tokcredit.methods.sparse_po import MaskNetwork, activation_masks, sparsity
from tokcredit.stages.link import logistic
from tokcredit.stages.pair import sequential_kl
from tokcredit.stages.token_score import given
from tokcredit.stages.token_weights import scored

MASKS = {"reward_masks": [0.5, 0.0, 1.2], "divergence_masks": [0.3, 1.0, 0.0]}
ROWS = [
    [-0.009263808, 0.006772386, 0.002491422],
    [-0.006707560, 0.003294926, 0.003412634],
    [-0.012512109, -0.034011439, 0.046523549],
]


def loss_of_pair(d, divergence, m, n, chosen, rejected, l1=(0.0, 0.0)):
    """The formula for one pair, with the masks m of log-ratios and n of divergences."""
    u = total(m * d, chosen) - total(m * d, rejected)
    delta = total(n * divergence, rejected) - total(n * divergence, chosen)
    norms = sum(c * total(x.abs(), chosen + rejected) for c, x in zip(l1, (m, n), strict=True))
    return softplus(-0.7 * (u - delta)) + norms


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_formula(learned, independent):
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs", *MASKS})
    objective = tc.methods.sparse_po(0.7, learned, independent, *((0.02, 0.03) if learned else ()))
    names = {"reward_masks", *(["divergence_masks"] if independent else [])}
    assert objective.required_inputs == {"ref_log_probs"} | (set() if learned else names)
    assert set(objective.variables) == {"log_probs", "ref_forward_kl"} | (names if learned else set())

    def formula(batch, log_probs, ref_forward_kl, **variables):
        d = log_probs - batch.ref_log_probs.nan_to_num()
        own = variables if learned else {name: batch.extras[name].nan_to_num() for name in MASKS}
        m, n = own["reward_masks"], own["divergence_masks" if independent else "reward_masks"]
        l1 = [(0.02, 0.03), (0.025, 0.0)][not independent] if learned else (0.0, 0.0)
        return golden_pair.mean_of_pairs(batch, lambda a, b: loss_of_pair(d, ref_forward_kl, m, n, a, b, l1))

    naive.check(objective, batch, current, formula)


def test_by_hand():
    """Masks of log-ratios 0.110753 -0.160904 | -0.183495 and of divergences 0.010598 0.042725 | 0.026051."""
    objective = tc.methods.sparse_po(independent=True)
    out = golden_pair.check_logits(objective, 0.6772026100, ROWS, golden_pair.logits_pair(**MASKS))
    assert out.metrics["margin_mean"].item() == pytest.approx(0.2755704544 + 0.0459044983, abs=1e-9)


def test_golden_vector_of_learned_masks():
    masks = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in MASKS.items()}
    objective = tc.methods.sparse_po(learned=True, independent=True)
    golden_pair.check_logits(objective, 0.6772026100, ROWS, **masks)
    expected = [-0.005448623, 0.007915900, -0.009027298], [-0.000521398, -0.002101916, 0.001281595]
    for x, gradient in zip(masks.values(), expected, strict=True):
        assert x.grad.tolist() == pytest.approx(gradient, abs=6e-10)
    penalized = tc.methods.sparse_po(learned=True, independent=True, l1_reward=0.1, l1_divergence=0.2)
    batch, policy, reference = golden_pair.logits_pair()
    out = penalized.loss(
        penalized.prepare(batch),
        tc.log_probs.from_logits(policy, batch.tokens),
        ref_forward_kl=tc.divergence.between(policy, reference, "forward_kl"),
        **masks,
    )
    assert out.loss.item() == pytest.approx(0.6772026100 + 0.1 * 1.7 + 0.2 * 1.3)
    assert out.metrics["reward_masks_l1_mean"].item() == pytest.approx(1.7)


@pytest.mark.parametrize(("divergence", "other"), [(1.0, "tdpo1"), (0.0, "dpo")])
def test_limit_cases(divergence, other):
    """Masks of 1 are TDPO1; without divergences it is DPO."""
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    ones = torch.ones(batch.num_tokens, dtype=torch.float64)
    batch = batch.with_inputs(reward_masks=ones, divergence_masks=divergence * ones)
    naive.check_same((tc.methods.sparse_po(independent=True), tc.methods.load(other)), batch, current)


def test_all_masks_0_are_a_constant():
    batch, policy, reference = golden_pair.logits_pair(reward_masks=[0.0] * 3)
    objective = tc.methods.sparse_po()
    divergence = tc.divergence.between(policy, reference, "forward_kl")
    log_probs = tc.log_probs.from_logits(policy, batch.tokens)
    loss = objective.loss(objective.prepare(batch), log_probs, ref_forward_kl=divergence).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and not policy.grad.any()


def test_nan_reaches_learned_masks_only_where_a_token_trains():
    batch, current = naive.random_pairs()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    mask = batch.shaped(batch.response_mask)
    objective = tc.methods.sparse_po(learned=True)

    def gradients(log_probs):
        further = naive.further(objective, current)
        leaves = [log_probs.clone(), *(x.masked_fill(~mask, math.nan) for x in further.values())]
        leaves = [x.requires_grad_() for x in leaves]
        named = dict(zip(further, leaves[1:], strict=True))
        return torch.autograd.grad(objective.loss(objective.prepare(batch), leaves[0], **named).loss, leaves)

    for x in gradients(current.masked_fill(~mask, math.nan)):
        assert x.isfinite().all() and not x[~mask].any() and x[mask].any()
    row, column = mask.nonzero()[3].tolist()
    dirty = current.clone()
    dirty[row, column] = math.nan
    assert all(x[row, column].isnan() and not x[~mask].any() for x in gradients(dirty))


def test_masks_from_activations():
    spans = tc.Spans(torch.tensor([0, 5, 6]), torch.tensor([5, 6, 8]), 8, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]).bool())
    x = torch.tensor([9.0, 0.2, -0.1, 0.5, 0.3, 4.0, 2.0, 2.0])
    expected = torch.tensor([0, 0.5, 0, 1, 2 / 3, 1, 1, 1])
    wide = torch.stack([x - 1, x + 1], 1)  # two features with this mean
    torch.testing.assert_close(activation_masks({"mlp": [wide]}, spans), expected)
    reversed_ = torch.tensor([0, 0.5, 1, 0, 1 / 3, 1, 1, 1])
    found = activation_masks({"mlp": [wide, -wide], "residual": [wide]}, spans)
    torch.testing.assert_close(found, ((expected + reversed_) / 2 + expected) / 2)
    with pytest.raises(ValueError, match="activations: expected at least one of each kind"):
        activation_masks({"mlp": []}, spans)
    for wrong in (torch.zeros(7, 2), torch.zeros(8), torch.zeros(8, 0)):
        with pytest.raises(ValueError, match=r"mlp: expected float \[8, features\], got"):
            activation_masks({"mlp": [wrong]}, spans)
    with pytest.raises(TypeError, match="mlp: expected a float tensor, got int64"):
        activation_masks({"mlp": [wide.long()]}, spans)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_activation_that_is_no_number_shows_in_the_masks(value):
    """Beneath the mask of the rows it reaches nothing."""
    spans = tc.Spans(torch.tensor([0, 3]), torch.tensor([3, 6]), 6, torch.tensor([0, 1, 1, 1, 1, 1]).bool())
    x = torch.tensor([value, 0.0, 1.0, value, 2.0, 2.0])[:, None]
    masks = activation_masks({"mlp": [x]}, spans)
    assert masks[:3].tolist() == [0.0, 0.0, 1.0] and masks[3].isnan()


def test_the_network_of_masks():
    network = MaskNetwork(2, 3).double().eval()
    assert network.mix.weight.tolist() == [[0.5, 0.5]]
    weights = [[0.5, -0.2, 0.1], [-0.3, 0.4, 0.2]], [0.1, 0.05]
    with torch.no_grad():
        for layer, w, b in zip(network.of_layer, *weights, strict=True):
            layer.weight.copy_(torch.tensor([w]))
            layer.bias.fill_(b)
        network.mix.weight.copy_(torch.tensor([[0.6, 0.7]]))
    states = torch.tensor([[[1.0, 2.0, -1.0]], [[0.0, 1.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    masks = network(states)
    assert masks.tolist() == pytest.approx([0.3717480824], abs=1e-7)  # weights are rounded to float32
    masks.sum().backward()
    assert network.mix.weight.grad[0].tolist() == pytest.approx([0, 0.531068689], abs=1e-7) and states.grad is None


def test_a_network_of_nothing_is_refused():
    for settings, name in (((0, 3), "layers"), ((2, 0), "width"), ((2, 3, 1.0), "dropout")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            MaskNetwork(*settings)
    with pytest.raises(ValueError, match="states: expected 2, one of each layer, got 1"):
        MaskNetwork(2, 3)([torch.zeros(1, 3)])


def test_norms_of_masks_that_are_not_learned_are_refused():
    with pytest.raises(ValueError, match="sparse_po: l1_divergence: expected 0 because masks are not learned, got 0"):
        tc.methods.sparse_po(l1_divergence=0.1)


def test_defaults():
    masks = (scored(given("reward_masks")),)
    assert tc.methods.sparse_po() == tc.Preference(
        masks, link=logistic(0.1), divergence=sequential_kl(1.0, masks, True, None)
    )
    learned = tc.methods.sparse_po(learned=True, l1_reward=0.002)
    assert learned == tc.Preference(
        link=logistic(0.1),
        divergence=sequential_kl(learned_weights="reward_masks"),
        pair_terms=(sparsity("reward_masks", 0.001),),
        learned_weights="reward_masks",
    )
