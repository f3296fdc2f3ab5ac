"""Tiny random models of transformers, and rows that share tokens."""

import tokcredit as tc
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, **BOTH},
    "mistral": {"sliding_window": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, **BOTH},
    "gemma3_text": {"head_dim": 8, **BOTH},
    "gpt2": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **BOTH},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
}


def model(kind, **settings):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **MODELS.get(kind, {}), **settings}))
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return made.eval()


PROMPT = [5, 6, 7, 8, 9]
ROWS = [
    (PROMPT, [20, 21, 22, 23, 24, 25]),
    (PROMPT, [20, 21, 22, 30, 31]),
    (PROMPT, [20, 21]),  # a prefix of the first
    (PROMPT, [20, 21, 22, 30, 31]),  # equal to the second
    ([*PROMPT, 20, 21, 22], [33, 34]),  # a later step
    ([40, 41], [42, 43, 44]),
]


def batch(rows=ROWS, wanted=None):
    width = max(len(context) for context, _ in rows)
    tokens = torch.tensor([t for _, row in rows for t in row])
    return tc.Rollouts(
        tokens,
        torch.tensor([0, *(len(row) for _, row in rows)]).cumsum(0),
        torch.tensor([0, 0, 0, 1, 1, 2][: len(rows)]),
        torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0][: len(rows)]),
        wanted,
        extras={"prompt_tokens": torch.tensor([[-1] * (width - len(context)) + context for context, _ in rows])},
    )


def alone(model, rows=ROWS, temperature=1.0):
    """Log-probs and entropies of the tokens of each row, one forward pass per row."""
    found = []
    for context, row in rows:
        logits = model(torch.tensor([context + row]), use_cache=False).logits[0, len(context) - 1 : -1]
        log_p = (logits / temperature).log_softmax(-1)
        found.append((log_p.gather(1, torch.tensor(row)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
    return (torch.cat(x) for x in zip(*found, strict=True))
