"""What the comparisons with TRL's trainers share: settings, the model that they start from, and their gradients."""

import os
from dataclasses import dataclass, field

import tiny
import torch
from transformers import TrainerCallback

SETTINGS = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    lr_scheduler_type="constant",
    optim="sgd",
    max_grad_norm=0.0,
    report_to=[],
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
)


@dataclass
class Gradients(TrainerCallback):
    """The gradient of each optimizer step, flat."""

    steps: list = field(default_factory=list)

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone())


def start(folder):
    """Path of the model, because TRL loads the reference model by its path."""
    path = f"{folder}/start"
    if not os.path.exists(path):
        tiny.model().save_pretrained(path)
    return path
