"""The policy of a run: the model that is trained, on its device."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from tokcredit.train import models
from tokcredit.train.settings import Settings


def load(settings: Settings, accelerator: Accelerator) -> tuple[Any, Any]:
    """Return the model that is trained and its tokenizer.

    Args:
        settings: Settings of the run.
        accelerator: Devices and precision.

    Raises:
        ValueError: There is no such model.
    """
    with accelerator.main_process_first():
        model, tokenizer = models.load(settings.model)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    # The wrapper that converts outputs to float32 would copy all logits.
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer


def load_teacher(settings: Settings, tokenizer: Any, accelerator: Accelerator) -> Any:
    """Return the teacher of a distilling method.

    Args:
        settings: Settings of the run, which name a teacher.
        tokenizer: Tokenizer of the policy.
        accelerator: Devices.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    assert settings.teacher is not None
    teacher, words = models.load(settings.teacher)
    if words.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher: expected the tokens of {settings.model}, got {settings.teacher}")
    return teacher.to(accelerator.device)
