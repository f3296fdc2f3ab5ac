"""The toy encoder of the golden vectors, and random models of the families."""

import math

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 3, "vocab_size": 30}
FAMILIES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def classifier(family, seed=0, **sizes):
    config, model = FAMILIES[family]
    made = model(config(**{**SIZES, **sizes}, max_position_embeddings=40, num_labels=3)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(1 + 0.2 * noise if name.endswith("LayerNorm.weight") else 0.6 * noise)
    return made


def causal(seed=0, vocabulary=20):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


class Given(torch.nn.Module):
    """Embeddings that are the same whatever the ids are."""

    def __init__(self, x):
        super().__init__()
        self.x, self.word_embeddings = x, torch.nn.Embedding(5, 4, dtype=x.dtype)

    def forward(self, input_ids=None, **_):
        return self.x.expand(len(input_ids), -1, -1)


def golden():
    """The encoder of the golden vectors, in the numbering of its description."""
    config = BertConfig(
        hidden_size=4,
        num_attention_heads=2,
        intermediate_size=6,
        num_hidden_layers=2,
        vocab_size=5,
        num_labels=2,
        layer_norm_eps=1e-12,
    )
    model = BertForSequenceClassification(config).double().eval()

    def linear(module, weight, bias):
        for i in range(module.weight.shape[0]):
            module.bias[i] = 0.1 * math.cos(bias + i)
            for j in range(module.weight.shape[1]):
                module.weight[i, j] = 0.5 * math.sin(weight + 3 * i + j)

    def norm(module, k):
        for i in range(len(module.weight)):
            module.weight[i], module.bias[i] = 1 + 0.1 * math.cos(k + i), 0.1 * math.sin(k + i)

    with torch.no_grad():
        for number, layer in enumerate(model.bert.encoder.layer):
            own, k = layer.attention.self, 100 * number
            parts = (own.query, own.key, own.value, layer.attention.output.dense)
            for first, part in zip((1, 3, 5, 7), parts, strict=True):
                linear(part, k + first, k + first + 1)
            norm(layer.attention.output.LayerNorm, k + 9)
            linear(layer.intermediate.dense, k + 11, k + 12)
            linear(layer.output.dense, k + 13, k + 14)
            norm(layer.output.LayerNorm, k + 15)
        linear(model.bert.pooler.dense, 201, 202)
        linear(model.classifier, 203, 204)
        x = torch.tensor([[math.sin(1 + i + 2 * j) for j in range(4)] for i in range(3)], dtype=torch.float64)
    model.bert.embeddings = Given(x)
    return model
