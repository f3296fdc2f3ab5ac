"""The policy of a run: the model that is trained, on its device."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator

from tokcredit import inputs
from tokcredit.train import adapter, models
from tokcredit.train.ranks import Ranks
from tokcredit.train.settings import Settings


def load(settings: Settings, accelerator: Accelerator) -> tuple[Any, Any]:
    """Return the model that is trained, with its adapter if it has one, and its tokenizer.

    Args:
        settings: Settings of the run.
        accelerator: Devices and precision.

    Raises:
        ValueError: There is no such model, or the adapter does not fit it.
    """
    ranks = Ranks(accelerator)
    # The main process goes first, because it may have to make or download the model.
    first = ranks.on_main(lambda: models.load(settings.model))
    model, tokenizer = ranks.together(lambda: first or models.load(settings.model))
    if settings.adapter is not None:
        adapter.add(model, settings.adapter, settings.seed)
        adapter.keep_apart(model, accelerator)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    # The wrapper that converts outputs to float32 would copy all logits.
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer


def reference(objective: Any, model: Any, known: frozenset[str] = frozenset()) -> Any:
    """Return the reference policy, or None if nothing of it has to be computed.

    Args:
        objective: The objective.
        model: The policy before its first step. With an adapter it is the reference too, with the adapter switched off.
        known: Names of inputs that need not be computed.
    """
    of_reference = inputs.names("reference") | inputs.names("ref_turn_answers")
    read = (objective.required_inputs | set(objective.variables)) & of_reference
    if not read - known:
        return None
    return model if adapter.has_one(model) else copy.deepcopy(model)


def beside(option: str, source: str | None, settings: Settings, model: Any, tokenizer: Any) -> Any:
    """Return another model with the tokens of the policy, on its device, or None without one.

    Args:
        option: Name of the setting, for errors.
        source: A model as :func:`tokcredit.train.models.load` takes it, or None.
        settings: Settings of the run.
        model: The policy, on its device.
        tokenizer: Tokenizer of the policy.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    if source is None:
        return None
    return models.beside(option, source, tokenizer, settings.model).to(model.device)


def another(option: str, source: str, settings: Settings, model: Any, tokenizer: Any) -> Any:
    """Return a model that is trained beside the policy, with an adapter of its own if the policy has one.

    Args:
        option: Name of the setting, for errors.
        source: ``initial`` for a copy of the policy, or a model as :func:`tokcredit.train.models.load` takes it.
        settings: Settings of the run.
        model: The policy before the first step, on its device.
        tokenizer: Tokenizer of the policy.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    if source == "initial":
        return copy.deepcopy(model)
    made = beside(option, source, settings, model, tokenizer)
    if settings.adapter is not None:
        adapter.add(made, settings.adapter, settings.seed)
    return made
