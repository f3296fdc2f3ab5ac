"""Measure plans beside TRL's TreeRow, and a training step on the prefix tree beside separate rows."""

from __future__ import annotations

import itertools

import numpy as np
import tokcredit as tc
import torch
from harness import Table, close, main
from incumbents import TreeRow, areal_tries
from transformers import LlamaConfig, LlamaForCausalLM
from tree import workload

BUDGET = 750


def packed(contexts, rows):
    """A batch of rows with contexts of any length."""
    width = max(map(len, contexts))
    prompts = torch.tensor([[-1] * (width - len(c)) + c for c in contexts])
    return tc.Rollouts(
        torch.tensor([t for row in rows for t in row]),
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        torch.zeros(len(rows), dtype=torch.int64),
        torch.zeros(len(rows)),
        extras={"prompt_tokens": prompts},
    )


def one_prompt(generator, rows, prompt, length):
    """Responses to one prompt."""
    text = draw(generator, prompt)
    return packed([text] * rows, [draw(generator, length) for _ in range(rows)])


def agent(generator, episodes, steps, prompt, length):
    """Episodes that send their history again at every step: half a step is the policy's, half is a reply."""
    text, contexts, rows = draw(generator, prompt), [], []
    for _ in range(episodes):
        history = text
        for _ in range(steps):
            contexts.append(history)
            rows.append(draw(generator, length // 2))
            history = history + rows[-1] + draw(generator, length // 2)
    return packed(contexts, rows)


def branching(generator, widths, prompt, length):
    """All paths of a tree that branches at every level."""
    text, level = draw(generator, prompt), [[]]
    for width in widths:
        level = [path + draw(generator, length) for path in level for _ in range(width)]
    return packed([text] * len(level), level)


def draw(generator, count):
    return torch.randint(0, 1_000, (count,), generator=generator).tolist()


def model(layers):
    """A random model with the layers of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def by_rows(net, batch, size=8):
    """Loss of separate rows, right-padded micro-batches, each with its backward pass."""
    prompts, tokens = batch.input("prompt_tokens"), batch.tokens.split(batch.sizes.tolist())
    texts = [torch.cat([p[p >= 0], row]) for p, row in zip(prompts, tokens, strict=True)]
    total = 0.0
    for first in range(0, len(texts), size):
        part, own = texts[first : first + size], batch.sizes[first : first + size].tolist()
        ids = torch.nn.utils.rnn.pad_sequence(part, True)
        lengths = torch.tensor([len(x) for x in part])[:, None]
        place = torch.arange(ids.shape[1])
        hidden = net.model(ids, attention_mask=(place < lengths).long(), use_cache=False).last_hidden_state[:, :-1]
        wanted = (place >= lengths - torch.tensor(own)[:, None]) & (place < lengths)
        target = ids.masked_fill(~wanted, -1)[:, 1:]
        loss = tc.head.log_probs_and_entropies(hidden, net.lm_head.weight, target)[0].sum()
        loss.backward()
        total += float(loss.detach())
    net.zero_grad()
    return torch.tensor(total)


def on_tree(net, batch, budget=BUDGET):
    """The same on the prefix tree, plan included."""
    total = 0.0
    for part in tc.packing.pack(batch, budget):
        loss = tc.packing.forward(net, part).log_probs.sum()
        loss.backward()
        total += float(loss.detach())
    net.zero_grad()
    return torch.tensor(total)


def trl_rows(samples):
    """TRL's planner on one rank."""
    row = TreeRow()
    for sample in samples:
        row.add(sample)
    return row.pack()


def sorted_rows(samples):
    """AReaL-DTA's method, with NumPy: sort the rows and compare neighbours. It finds segments, without places."""
    rows = sorted(sample["input_ids"].numpy().astype(">i4").tobytes() for sample in samples)
    arrays = [np.frombuffer(row, ">i4") for row in rows]
    shared = [0]
    for a, b in itertools.pairwise(arrays):
        n = min(len(a), len(b))
        different = a[:n] != b[:n]
        first = int(different.argmax())
        shared.append(first if n and different[first] else n)
    return np.array(shared), np.array([len(x) for x in arrays])


def tries(samples):
    """AReaL's tries, without masks, from its padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence([x["input_ids"] for x in samples], True)
    lengths = torch.tensor([len(x["input_ids"]) for x in samples])
    data = {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None]}
    planner = areal_tries()
    return lambda: planner(data, ids.numel())[1]


def samples_of(batch):
    """The samples of TRL's planner."""
    prompts, tokens = batch.input("prompt_tokens"), batch.tokens.split(batch.sizes.tolist())
    made = []
    for prompt, row in zip(prompts, tokens, strict=True):
        prompt = prompt[prompt >= 0]
        ids = torch.cat([prompt, row])
        mask = (torch.arange(len(ids)) >= len(prompt)).long()
        made.append({"input_ids": ids, "completion_mask": mask, "old_log_probs": torch.zeros(len(ids))})
        made[-1] |= {"advantage": 1.0, "group_id": 0}
    return made


def run(table: Table, quick: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plans = {"16 x (4,096 + 512)": one_prompt(generator, 16, 4_096, 512)}
    if not quick:
        plans |= {
            "6-6-6 tree, 216 leaves": branching(generator, (6, 6, 6), 60, 16),
            "agent 8 x 10, 392,000": agent(generator, 8, 10, 2_000, 600),
        }
    for name, batch in plans.items():
        samples, plan = samples_of(batch), tc.packing.pack(batch)
        areal = tries(samples)
        shared, lengths = sorted_rows(samples)
        assert plan.num_places <= int((lengths - shared).sum()) == sum(areal()) <= len(trl_rows(samples)["input_ids"])
        table.measure(
            "plan",
            name,
            lambda: (),
            8 * plan.num_tokens,
            {
                "tokcredit": lambda b=batch: tc.packing.pack(b),
                "TRL TreeRow": lambda s=samples: trl_rows(s),
                "AReaL, tries": areal,
                "segments only, NumPy": lambda s=samples: sorted_rows(s),
            },
            targets={"TRL TreeRow": 10, "AReaL, tries": 10},
        )
    rows, length = (128, 1_024) if quick else (1_024, 9_200)
    batch = workload(rows, length, 16)
    batch = batch.with_inputs(prompt_tokens=torch.ones(rows, 1, dtype=torch.int64))
    plan = tc.packing.pack(batch)
    written = [torch.empty_like(getattr(plan.arrays, x)) for x in ("tokens", "source", "target", "index")]
    table.measure(
        "plan",
        f"{rows} x {length}",
        lambda: (),
        sum(x.nbytes for x in written),
        {"tokcredit": lambda: tc.packing.pack(batch), "write the arrays": lambda: [x.fill_(1) for x in written]},
        targets={"write the arrays": 0.25},
    )
    # The layers of the second and third case are fewer, so that separate rows take less than a minute.
    steps = {"8 x (128 + 32)": (one_prompt(generator, 8, 128, 32), 1 if quick else 30)}
    if not quick:
        steps |= {
            "agent 4 x 6, 120 + 60": (agent(generator, 4, 6, 120, 60), 12),
            "6-6-6 tree, 60 + 16": (branching(generator, (6, 6, 6), 60, 16), 6),
        }
    for name, (batch, layers) in steps.items():
        net, plan = model(layers), tc.packing.pack(batch, BUDGET)
        table.measure(
            "forward and backward",
            f"{name}, {layers} layers, {plan.num_tokens / plan.num_places:.1f} x",
            lambda: (),
            4 * sum(p.numel() for p in net.parameters()),
            {"tree": lambda n=net, b=batch: on_tree(n, b), "rows": lambda n=net, b=batch: by_rows(n, b)},
            close(rtol=1e-5),
        )


if __name__ == "__main__":
    main(run)
