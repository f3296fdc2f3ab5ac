"""Models in which tokens of one branch would reach another one are refused by name."""

import causal
import pytest
import tokcredit as tc
import torch

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NAMED = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"full or sliding attention, got conv \(lfm2\)"),
    "qwen3_next": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "shared_expert_intermediate_size": 16,
            **LINEAR,
            **causal.EXPERTS,
        },
        "got linear_attention",
    ),
    "mamba": ({"state_size": 4}, "mamba"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}, "jamba"),
}


@pytest.fixture(scope="module")
def part():
    return tc.packing.pack(causal.batch()).part(0)


@pytest.mark.parametrize("kind", NAMED)
def test_refused_by_name(part, kind):
    settings, message = NAMED[kind]
    with pytest.raises(ValueError, match=rf"^model: expected .*{message}"):
        tc.packing.forward(causal.model(kind, **settings), part)


def test_a_layer_that_mixes_neighbours_is_found_whatever_its_name(part):
    """The leak test has no tolerance, so the smallest influence is seen."""
    model = causal.model("llama")
    tc.packing.forward(model, part)
    mixed = causal.model("llama")
    mlp = mixed.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x + 1e-4 * x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None])
    with pytest.raises(ValueError, match="a token changes hidden states of other branches"):
        tc.packing.forward(mixed, part)
    mlp.forward = lambda x: plain(x + x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None])
    with pytest.raises(ValueError, match="log-probs of packed rows differ by"):
        tc.packing.check(mixed)


def test_active_dropout(part):
    model = causal.model("gpt2")
    tc.packing.forward(model, part)
    with pytest.raises(ValueError, match=r"no active dropout, got 0.1 in transformer\.drop"):
        tc.packing.forward(model.train(), part)
    attending = causal.model("llama", attention_dropout=0.2)
    tc.packing.forward(attending, part)
    with pytest.raises(ValueError, match=r"without dropout, .* got dropout 0\.2"):
        tc.packing.forward(attending.train(), part)


def test_a_window_that_does_not_reach_the_attention(part):
    model = causal.model("qwen3")
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(ValueError, match="sliding window of layer 1 to be passed to its attention, got None"):
        tc.packing.forward(model, part)


def test_a_second_sequence(part):
    model = causal.model("llama")
    with (
        tc.packing.attention(model, part) as arguments,
        pytest.raises(ValueError, match="without dropout, position bias and cache, for one sequence"),
    ):
        model(**{**arguments, "input_ids": arguments["input_ids"].repeat(2, 1)})
    with tc.packing.attention(model, part), pytest.raises(ValueError, match=r"tree_mask: .* got None"):
        model(torch.tensor([[1, 2]]))


def test_unknown_kind(part):
    with pytest.raises(ValueError, match="attention: expected auto, flex or dense, got 'eager'"):
        tc.packing.forward(causal.model("llama"), part, attention="eager")
