"""TRL's ``GRPOTrainer`` with any method, on sums of two digits.

Install and run::

    pip install . trl  # in a clone of tokcredit
    python examples/trl_sums.py --method tempo
"""

import argparse
import random

from datasets import Dataset
from tokcredit.adapters.trl import CreditGRPOTrainer
from trl import GRPOConfig


def exact(completions, answer, **columns):
    """Return 1 for each completion that begins with the right sum, else 0."""
    return [float(text.strip().startswith(right)) for text, right in zip(completions, answer, strict=True)]


def main(model, method, steps, output, cpu):
    """Train a model with a published method."""
    random.seed(0)
    pairs = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(256)]
    data = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "answer": [str(a + b) for a, b in pairs]})
    args = GRPOConfig(
        output,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=8,
        num_iterations=2,
        max_completion_length=8,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=cpu,
        bf16=not cpu,
    )
    trainer = CreditGRPOTrainer(model, exact, args, method=method, train_dataset=data)
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--method", default="tempo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="runs/trl-sums")
    parser.add_argument("--cpu", action="store_true")
    main(**vars(parser.parse_args()))
