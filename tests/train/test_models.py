"""Real architectures of transformers, tiny and random: those whose rows cannot share a prompt are refused by name."""

import pytest
import torch
from tokcredit import Rollouts
from tokcredit.train import models, tiny
from tokcredit.train.scoring import left_padded, score
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = tiny.tokenizer()
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SHARED = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"head_dim": 16, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "gpt_oss": {"head_dim": 16, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
}
NOT_SHARED = {
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 4, "expand": 2},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**MIXED, **HEADS, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "minimax": {**MIXED, "head_dim": 16},
}


@pytest.fixture
def saved(tmp_path):
    """Writes a random model of an architecture into a folder."""

    def write(kind, settings):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SIZES, **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        WORDS.save_pretrained(tmp_path)
        return str(tmp_path)

    return write


@pytest.mark.parametrize("kind", NOT_SHARED)
def test_refused_by_name(saved, kind):
    folder = saved(kind, NOT_SHARED[kind])
    with pytest.raises(ValueError, match=rf"model: expected a model whose cache .*, got .* \({kind}\)"):
        models.load(folder)


@pytest.mark.parametrize("kind", SHARED)
def test_rows_share_the_prompt(saved, kind):
    """Log-probs are those of each row alone, with prompts longer and shorter than a sliding window."""
    network, _ = models.load(saved(kind, SHARED[kind]))
    prompts, rows = (
        [[5, 6, 7, 8, 9, 10, 11], [12, 13], [5, 6, 7, 8, 9, 10, 11]],
        [[20, 21, 22], [23], [24, 25, 20, 6, 7]],
    )
    batch = Rollouts(
        torch.tensor([token for row in rows for token in row]),
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3),
        extras={"prompt_tokens": left_padded(prompts, -1, torch.device("cpu"))[0]},
    )
    found = score(network, batch)[0].split([len(row) for row in rows])
    for prompt, row, log_probs in zip(prompts, rows, found, strict=True):
        logits = network(torch.tensor([prompt + row]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-4)


def test_folders_without_a_model_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tokcredit.train.models.AutoTokenizer", None)  # the hub is not asked
    for name in (f"{tmp_path}/nowhere", "./nowhere", "runs/a/model"):
        with pytest.raises(ValueError, match=f"^model: expected smollm2, .*, got '{name}', which is no folder$"):
            models.load(name)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=f"got {tmp_path}/run, which has none$"):
        models.load(f"{tmp_path}/run")
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model/config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"got {tmp_path}/run, which has none; did you mean {tmp_path}/run/model\?$"):
        models.load(f"{tmp_path}/run")


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_named_in_one_line(saved, tmp_path, broken):
    folder = saved("llama", {})
    (tmp_path / broken).write_bytes(b"{")
    with pytest.raises(ValueError, match=r"^model: expected .*, got '.*'.*: .+") as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)
