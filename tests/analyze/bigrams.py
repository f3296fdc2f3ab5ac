"""Models whose next token depends on the last token alone, as a table says: what they write is known beforehand."""

import torch
from tokcredit.analyze.study import Pair
from tokcredit.train import tiny
from tokcredit.train.sampler import end_tokens
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token


def ids(*texts):
    return [TOKENIZER.convert_tokens_to_ids(text) for text in texts]


def scripted(following, otherwise):
    """A model that follows a table.

    Args:
        following: For some tokens, the tokens that may follow, the likelier one first; no other has a probability that
            is ever drawn.
        otherwise: The same for all other tokens.
    """
    size = len(TOKENIZER)
    logits = torch.zeros(size, size)
    for state in range(size):
        for rank, token in enumerate(ids(*following.get(TOKENIZER.convert_ids_to_tokens(state), otherwise))):
            logits[state, token] = 60 - 0.25 * rank
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 128))
        model.model.norm.weight.fill_(128**-0.5)
        model.lm_head.weight[:, :size].copy_(logits.T)
    return model


def as_pair(first, second):
    ends = torch.tensor(end_tokens(first, TOKENIZER))
    return Pair(first, second, TOKENIZER, len(TOKENIZER), ends)
