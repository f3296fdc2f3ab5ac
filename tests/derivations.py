"""Seeded rollouts that look like a model's: derivations of a sum of products that branch, err and vary in length.

A row is a walk over steps. Each step has several phrasings, of which the first is the likeliest, so that rows share
prefixes and branch where one is phrased otherwise or goes wrong. The reward is 1 for the right answer, and 0.1 for an
answer in the right form.
"""

import json
import math
import random

import torch
from tokcredit import Rollouts

OPENINGS = ("Let's work through it step by step.\n", "First, the products.\n", "We need two products and their sum.\n")
PRODUCTS = (
    "The product of {a} and {b} is {c}.\n",
    "{a} × {b} = {c}\n",
    "Multiply: {a} times {b} gives {c}.\n",
    "{b} copies of {a} make {c}.\n",
)
CHECKS = (
    "Check: {c} / {a} = {b}, which holds.\n",
    "Wait, let me verify that: {a} × {b} is {c}. Yes.\n",
    "That looks right so far, and I carry {c} forward.\n",
    "Hmm, is {c} plausible? Between {low} and {high}, so yes.\n",
)
ENDINGS = (
    "Adding up: {x} + {y} = {z}.\nAnswer: {z}",
    "So {x} plus {y} is {z}.\nAnswer: {z}",
    "Therefore the answer is {z}",
)


def _derivation(rng, problem, length):
    """Return the text of one rollout and its reward."""
    a, b, c, d = problem

    def say(choices, weights=None, **words):
        return rng.choices(choices, weights or [8, *[2] * (len(choices) - 1)])[0].format(**words)

    def product(x, y):
        wrong = rng.random() < 0.22
        return x * y + (rng.choice((-10, -1, 1, 10, x)) if wrong else 0)

    pieces = [say(OPENINGS)]
    first = product(a, b)
    pieces.append(say(PRODUCTS, a=a, b=b, c=first))
    second = product(c, d)
    pieces.append(say(PRODUCTS, a=c, b=d, c=second))
    size = lambda: sum(map(len, pieces)) / 3  # noqa: E731
    while size() < length - 30:
        x, y, z = rng.choice(((a, b, first), (c, d, second)))
        pieces.append(say(CHECKS, [1] * 4, a=x, b=y, c=z, low=z - rng.randint(1, 50), high=z + rng.randint(1, 50)))
    total = first + second
    pieces.append(say(ENDINGS, x=first, y=second, z=total))
    right = total == a * b + c * d
    return "".join(pieces), 1.0 if right else 0.1 if "Answer:" in pieces[-1] else 0.0


def tokenizer(texts, size=900):
    """Return a byte-level BPE tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def rows(groups=4, rollouts=8, length=90, seed=0):
    """Return prompt, group, text and reward of each rollout."""
    rng = random.Random(seed)
    out = []
    for group in range(groups):
        problem = [rng.randint(11, 99) for _ in range(4)]
        prompt = "Compute {} × {} + {} × {}. Show your work.".format(*problem)
        for _ in range(rollouts):
            text, reward = _derivation(rng, problem, length * rng.uniform(0.75, 1.25) if rng.random() < 0.8 else length)
            out.append({"group": group, "prompt": prompt, "text": text, "reward": reward})
    return out


def write(folder, step=10, method="tempo", extra=(), **size):
    """Write a run folder as the trainer does, with one file of rollouts and the tokenizer; return the file's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tokcredit as tc

    data = rows(**size) + list(extra)
    words = tokenizer([row["text"] for row in data[:256]] + [row["prompt"] for row in data[::8]])
    rng = random.Random(1)
    end = words.eos_token_id
    ids = [[*words.encode(row["text"], add_special_tokens=False), end] for row in data]
    # A token's log-prob depends on the token and the one before it; most are close to 0.
    sure = {}

    def log_prob(before, token):
        key = before, token
        if key not in sure:
            sure[key] = -rng.expovariate(1 / (0.02 if rng.random() < 0.7 else 0.9))
        return sure[key]

    old = [[log_prob(a, b) for a, b in zip([-1, *row[:-1]], row, strict=True)] for row in ids]
    new = [
        [x + rng.gauss(0.0015 if r["reward"] > 0.5 else -0.0015, 0.02 + 0.12 * min(1, -x)) for x in row]
        for row, r in zip(old, data, strict=True)
    ]
    batch = Rollouts(
        torch.tensor([t for row in ids for t in row]),
        torch.tensor([0, *map(len, ids)]).cumsum(0),
        torch.tensor([r["group"] for r in data]),
        torch.tensor([r["reward"] for r in data]),
    )
    objective = tc.methods.load(method)
    advantages = objective.prepare(batch).advantages
    cut = lambda x: [x[a:b].tolist() for a, b in zip(batch.begin, batch.end, strict=True)]  # noqa: E731
    ints, floats, flags = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())
    table = pa.table(
        {
            "step": pa.array([step] * len(data), pa.int64()),
            "group": pa.array([r["group"] for r in data], pa.int64()),
            "task": ["sum_of_products"] * len(data),
            "prompt": [r["prompt"] for r in data],
            "completion": [r["text"] for r in data],
            "reward": pa.array([r["reward"] for r in data], pa.float32()),
            "prompt_tokens": pa.array([words.encode(r["prompt"]) for r in data], ints),
            "tokens": pa.array(ids, ints),
            "response_mask": pa.array([[True] * len(row) for row in ids], flags),
            "rollout_log_probs": pa.array(old, floats),
            "old_log_probs": pa.array(old, floats),
            "log_probs": pa.array(new, floats),
            "entropies": pa.array([[-x * math.exp(x) for x in row] for row in old], floats),
            "advantages": pa.array(cut(advantages), floats),
        }
    )
    settings = {
        "version": tc.__version__,
        "method": method,
        "objective": repr(objective),
        "model": "example",
        "tokenizer": "tokenizer",
    }
    table = table.replace_schema_metadata({"tokcredit": json.dumps(settings)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollouts-{step:06d}.parquet"
    pq.write_table(table, path)
    words.save_pretrained(folder / "tokenizer")
    return path
