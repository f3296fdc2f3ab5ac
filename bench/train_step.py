"""Measure the update of a training step of the trainer with the loss from hidden states and from all logits, in turns.

Rollouts are random, of the model and the settings of ``make train``. Linux only: the peak of memory is the kernel's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import tokcredit as tc
import torch
from tokcredit.train import ObjectiveSettings, OptimizerSettings, Settings
from tokcredit.train.clock import Clock
from tokcredit.train.collectors import ForwardPass
from tokcredit.train.experiment import resolved
from tokcredit.train.scoring import left_padded
from tokcredit.train.trainer import Trainer


def rollouts(trainer: Trainer, rows: int, length: int) -> tc.Rollouts:
    """Return random responses of one length in groups of eight."""
    ids = len(trainer.tokenizer)
    texts = [f"What is {i} + {i + 1}?" for i in range(rows // 8) for _ in range(8)]
    prompts = left_padded([trainer.tokenizer(text).input_ids for text in texts], -1, torch.device("cpu"))[0]
    return tc.Rollouts(
        torch.randint(3, ids, (rows * length,)),
        torch.arange(rows + 1) * length,
        torch.arange(rows) // 8,
        torch.rand(rows),
        extras={"prompt_tokens": prompts},
    )


def measured(trainer: Trainer, batch: tc.Rollouts) -> tuple[float, float]:
    """Return the seconds of an update and the most memory of the process during it, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
    start = time.perf_counter()
    trainer.learner.update(batch, 1, Clock())
    seconds = time.perf_counter() - start
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="tempo")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.manual_seed(0)
    optimizer = OptimizerSettings(micro_batch=given.micro_batch)
    settings = Settings(
        ObjectiveSettings(given.method), optimizer=optimizer, model=given.model, tasks=("addition(digits=1)",)
    )
    trainer = Trainer(resolved(settings))
    batch = rollouts(trainer, given.rows, given.length)
    found: dict[str, list[tuple[float, float]]] = {"hidden states": [], "all logits": []}
    for number in range(given.rounds + 1):
        for name, results in found.items():
            layer = ForwardPass.layer if name == "hidden states" else None
            with mock.patch.object(ForwardPass, "layer", layer):
                result = measured(trainer, batch)
            if number:  # the first round makes the optimizer's state
                results.append(result)
    for name, results in found.items():
        seconds, peaks = zip(*results, strict=True)
        tokens = batch.num_tokens / statistics.median(seconds)
        print(json.dumps({"loss from": name, "tokens per second": round(tokens, 1), "peak MiB": round(max(peaks))}))


if __name__ == "__main__":
    main()
