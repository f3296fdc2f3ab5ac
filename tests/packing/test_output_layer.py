import pytest
import tokcredit as tc
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from tokcredit.packing.output_layer import output_layer
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(12).view(2, 6)


def adapted(tied=False, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **SIZES)).double().eval()
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lm_head", "q_proj"], **settings)
    peft.inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def from_logits(model):
    return tc.log_probs.with_entropies(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def from_hidden(model):
    layer = output_layer(model)
    hidden = model.base_model(IDS).last_hidden_state[:, :-1].flatten(0, 1)
    return tc.head.log_probs_and_entropies(hidden, layer.weight, IDS[:, 1:].flatten(), layer.bias, **layer.settings)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_lora_of_the_output_layer_has_the_gradients_of_the_logits(tied):
    model = adapted(tied)
    trained = [p for name, p in model.named_parameters() if "lora_" in name and "lm_head" in name]
    assert len(trained) == 2
    found = []
    for function in (from_logits, from_hidden):
        log_probs, entropies = function(model)
        gradients = torch.autograd.grad((log_probs * torch.arange(10.0) + 0.3 * entropies).sum(), trained)
        found.append((log_probs, entropies, *gradients))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(g.abs().max() > 1e-3 for g in found[0][2:])


def test_an_adapter_that_is_switched_off_or_merged():
    model = adapted()
    layer = model.get_output_embeddings()
    with torch.no_grad():
        adapter = output_layer(model).weight - layer.base_layer.weight
        assert adapter.abs().max() > 0.1
        layer.enable_adapters(False)
        assert output_layer(model).weight is layer.base_layer.weight
        layer.enable_adapters(True)
        layer.merge()
        assert output_layer(model).weight is layer.base_layer.weight
        torch.testing.assert_close(from_hidden(model)[0], from_logits(model)[0], rtol=1e-9, atol=1e-11)


def test_adapters_that_are_no_sum_of_weights_take_the_logits():
    assert output_layer(adapted(use_dora=True)) is None
