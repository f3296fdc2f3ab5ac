"""A language model whose next token follows a written table, so that what it says is known on every processor.

Embeddings are one-hot and the last layer holds the table of logits by the previous token. Attention and MLP layers add
a little that depends on everything before: enough to see in log-probs, too little to change the most probable token.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 128
DIGITS = "0123456789"
# The logit of every token that the table does not name is 0.
ADDING = {
    **{
        d: {**dict.fromkeys(DIGITS, 4.0), ";": 5.0, ">": 4.5, "<end>": 4.0, str((int(d) + 1) % 10): 7.0} for d in DIGITS
    },
    ";": {**dict.fromkeys(DIGITS, 5.0), "3": 7.0},
    ">": {**dict.fromkeys(DIGITS, 5.0), "7": 7.0},
    "=": {**dict.fromkeys(DIGITS, 5.0), "4": 7.0},
    "a": {"b": 9.0},
    "b": {"c": 9.0},
    "c": {"<end>": 9.0},
    "d": {"<unk>": 9.0},
    "<unk>": {"a": 9.0},
}
"""Digits count up; steps end in ``;``."""
TALKING = {
    "=": {"<tool>": 9.0},
    "<tool>": {"add": 7.0, "sub": 6.0, "mul": 6.0},
    **{name: {"(": 9.0} for name in ("add", "sub", "mul")},
    "(": {**dict.fromkeys("234", 6.0), "1": 7.0},
    **{d: {",": 9.0} for d in "1234"},
    ",": {**dict.fromkeys("67890", 6.0), "5": 7.0},
    **{d: {")": 9.0} for d in "567890"},
    ")": {"</tool>": 9.0},
    "</result>": {"<tool>": 7.0, "<answer>": 5.5},
    "<answer>": {"x": 9.0},
    "x": {"</answer>": 9.0},
    "</answer>": {"<end>": 9.0},
}
"""One call of a tool after the other, and sometimes an answer."""


def model(words, table):
    """The model of a table of logits, for a tokenizer with one token per word of the table."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.04)
            layer.mlp.down_proj.weight.mul_(0.04)
        network.model.embed_tokens.weight.zero_()[:, : len(words)].fill_diagonal_(1)
        network.lm_head.weight.zero_()
        for before, logits in table.items():
            for after, logit in logits.items():
                row, column = words.convert_tokens_to_ids([after, before])
                network.lm_head.weight[row, column] = logit / WIDTH**0.5
    return network
