"""GRPO training in which every completion is written down beforehand, so that two trainers see the same batches.

Run as a script by ``torch.distributed.run``, it trains on this rank and rank 0 saves what it ends with.
"""

import os
import sys

import tiny
import tokcredit as tc
import torch
import trl
from datasets import Dataset
from tokcredit.adapters.trl import CreditGRPOTrainer
from trl_run import SETTINGS, Gradients, start

GENERATIONS = 4
PROMPTS = ["1+2=", "3+4=", "5+5=", "0+9="]


def rollout(prompts, trainer):
    """Completion, tool mask and engine log-probs of a row, from its number over all ranks and the generation."""
    ids, masks, engine = [], [], []
    trainer.generations = getattr(trainer, "generations", 0) + 1
    first = trainer.accelerator.process_index * len(prompts)
    for row in range(first, first + len(prompts)):
        g = torch.Generator().manual_seed(1000 * trainer.generations + row)
        length = int(torch.randint(2, 9, (1,), generator=g))
        tokens = torch.randint(4, 7, (length,), generator=g)
        tokens[-1] = 1 if row % 3 else 5  # some rows stop, some are cut off
        ids.append(tokens.tolist())
        masks.append([1, *(torch.rand(length - 1, generator=g) > 0.2).int().tolist()])
        noise = -2 + 0.3 * torch.randn(length, generator=g)
        engine.append([None if row == 2 and t == 1 else x for t, x in enumerate(noise.tolist())])
    prompt_ids = trainer.processing_class(prompts).input_ids
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": engine, "env_mask": masks}


def reward(completion_ids, **columns):
    return [(sum(ids) % 7) / 3 + (len(ids) > 4) for ids in completion_ids]


def sometimes(completion_ids, **columns):
    return [None if sum(ids) % 4 == 0 else len(ids) / 2 for ids in completion_ids]


def of_tokens(completion_ids, **columns):
    """A reward of each token, of every other completion the whole."""
    return [[t / 8 for t in ids] if sum(ids) % 2 else len(ids) / 4 for ids in completion_ids]


def arguments(output_dir, **settings):
    defaults = dict(
        steps_per_generation=4,
        num_iterations=2,
        num_generations=GENERATIONS,
        max_completion_length=10,
        max_steps=4,
        learning_rate=0.004,
    )
    return trl.GRPOConfig(str(output_dir), **(SETTINGS | defaults | settings))


def train(kind, args, rewards=reward, prepare=None, **keywords):
    """Trainer, and the gradients of its steps."""
    gradients = Gradients()
    data = Dataset.from_dict({"prompt": PROMPTS * 8})
    trainer = kind(
        start(args.output_dir),
        rewards,
        args,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        rollout_func=rollout,
        callbacks=[gradients],
        **keywords,
    )
    if prepare:
        prepare(trainer)
    trainer.train()
    return trainer, gradients.steps


class ScriptedEngine:
    """Stands where TRL keeps its vLLM engine; the completions come from :func:`rollout`."""

    def __init__(self, **settings):
        self.sync_weights = lambda: None


def with_scripted_engine(monkeypatch):
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", ScriptedEngine)


DENSE = tc.Objective(tc.credit.whitened(tc.credit.returns(discount=0.5)))
# One reads the tree, one counts groups, one compares groups by entropies, one reads rewards of tokens.
METHODS = ("tempo", "ba", "gspo", "canon", "dense")
ROWS = {"whole": 16, "straddling": 12}  # of a generation batch: groups of four whole, or cut, on two ranks


def main(folder):
    ranks, results = int(os.environ.get("WORLD_SIZE", 1)), {}
    for method in METHODS:
        for name, rows in ROWS.items():
            args = arguments(folder, per_device_train_batch_size=rows // ranks // 2, steps_per_generation=2)
            chosen = {"rewards": of_tokens, "objective": DENSE} if method == "dense" else {"method": method}
            trainer, steps = train(CreditGRPOTrainer, args, **chosen)
            history = trainer.state.log_history[:-1]
            results[method, name] = {"steps": steps, "history": history, "table": list(trainer._logs["advantages"])}
    if trainer.accelerator.is_main_process:
        torch.save(results, f"{folder}/results.pt")
    trainer.accelerator.wait_for_everyone()  # no rank leaves while another still speaks to it


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # once in some fifty runs two ranks wait for ever when gloo's threads and the interpreter end
