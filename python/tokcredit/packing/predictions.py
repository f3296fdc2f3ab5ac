"""Log-probs, entropies and hidden states of the predictions of a plan."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokcredit.blocks import head
from tokcredit.blocks import log_probs as logits_of
from tokcredit.blocks.tree_pack import TreePack, TreePart, pack
from tokcredit.packing import tree_attention
from tokcredit.packing.output_layer import OutputLayer, body, output_layer
from tokcredit.packing.tree_attention import Kind
from tokcredit.rollouts import Rollouts

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_checked: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


class PerToken(NamedTuple):
    """Numbers of the tokens of the rows of a part or a plan.

    Attributes:
        log_probs: float, in the layout of the rows, nats; 0 where the token is not wanted.
        entropies: float, entropies of the next-token distributions, nats; 0 where the token is not wanted.
    """

    log_probs: Tensor
    entropies: Tensor


class Predicted(NamedTuple):
    """What a model predicts at the places of a part.

    Attributes:
        hidden_states: float ``[Q, d]``, the final hidden states from which the targets are predicted, or None.
        logits: float ``[Q, V]``, or None.
    """

    hidden_states: Tensor | None
    logits: Tensor | None


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of a matrix, with a gradient that is added up in a fixed order.

    Args:
        x: float ``[M, d]``.
        index: int64 ``[Q]``.
    """
    return torch.nn.functional.embedding(index, x)


def predict(
    model: Any, part: TreePart, *, hidden_states: bool = True, logits: bool = False, attention: Kind = "auto"
) -> Predicted:
    """Return hidden states and logits of the predictions of a part, with gradient.

    The first time, :func:`check` runs.

    Args:
        model: Causal language model of transformers.
        part: A bin of a plan.
        hidden_states: Whether to return hidden states.
        logits: Whether to return logits; without them the output layer of the model is not computed.
        attention: As in :func:`attention`.

    Raises:
        ValueError: Packed rows would not be what they are alone.
    """
    check_once(model, part, attention)
    return _predict(model, part, hidden_states, logits, attention)


def check_once(model: Any, part: TreePart, attention: Kind = "auto") -> None:
    """Run :func:`check` if it did not yet run for the model and the device of the part.

    Args:
        model: Causal language model of transformers.
        part: A bin of a plan.
        attention: As in :func:`attention`.

    Raises:
        ValueError: Packed rows would not be what they are alone.
    """
    known = _checked.setdefault(model, set())
    device = f"{attention} on {part.tokens.device.type}"
    if device not in known:
        check(model, attention)
        known.add(device)


def _predict(model: Any, part: TreePart, hidden_states: bool, logits: bool, attention: Kind) -> Predicted:
    with tree_attention.attention(model, part, attention) as arguments:
        if not logits:
            return Predicted(gather(body(model)(**arguments)[0][0], part.source), None)
        out = model(**arguments, output_hidden_states=hidden_states)
    hidden = gather(out.hidden_states[-1][0], part.source) if hidden_states else None
    return Predicted(hidden, gather(out.logits[0], part.source))


def scores(
    predicted: Predicted, target: Tensor, layer: OutputLayer | None, temperature: float, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each prediction's target and the entropy of its distribution, ``[Q]`` each, with gradient.

    Args:
        predicted: From :func:`predict`.
        target: int64 ``[Q]``.
        layer: Output layer of the model, which predictions without logits need.
        temperature: Logits are divided by it.
        overwrite: Whether the backward pass may write over the logits; only if nothing else reads them.
    """
    if predicted.logits is not None:
        return logits_of.with_entropies(predicted.logits, target, temperature, overwrite)
    assert layer is not None and predicted.hidden_states is not None
    settings = {"temperature": temperature, **layer.settings}
    found = head.log_probs_and_entropies(predicted.hidden_states, layer.weight, target, layer.bias, **settings)
    log_probs, entropies = found
    return log_probs, entropies


def _scored(model: Any, part: TreePart, temperature: float, attention: Kind) -> tuple[Tensor, Tensor]:
    layer = output_layer(model)
    predicted = predict(model, part, hidden_states=layer is not None, logits=layer is None, attention=attention)
    found = scores(predicted, part.target, layer, temperature, overwrite=True)
    if part.source.numel():
        return found
    # Keeps the graph, so that a process without rows takes part in the collectives of the backward pass.
    kept = next(x for x in predicted if x is not None).sum() * 0
    return found[0] + kept, found[1] + kept


def forward(model: Any, part: TreePart, temperature: float = 1.0, attention: Kind = "auto") -> PerToken:
    """Return log-probs and entropies of the tokens of a part's rows, with gradient, from one forward pass.

    Rows that share tokens get the same numbers, and the gradient of a shared token is the sum over its rows. They equal
    those of each row alone up to rounding, with dropout off.

    Args:
        model: Causal language model of transformers.
        part: A bin of a plan.
        temperature: Logits are divided by it.
        attention: As in :func:`attention`.

    Returns:
        Numbers in the layout of ``batch.select(part.rows)``.

    Raises:
        ValueError: Packed rows would not be what they are alone; see :func:`check`.
    """
    found = _scored(model, part, temperature, attention)
    return PerToken(*(part.to_rows(x) for x in found))


@torch.no_grad()
def log_probs(model: Any, plan: TreePack, temperature: float = 1.0, attention: Kind = "auto") -> PerToken:
    """Return log-probs and entropies of all tokens of the batch of a plan, without gradient, bin by bin.

    Args:
        model: Causal language model of transformers.
        plan: The plan.
        temperature: Logits are divided by it.
        attention: As in :func:`attention`.

    Returns:
        Numbers in the layout of the batch.

    Raises:
        ValueError: Packed rows would not be what they are alone; see :func:`check`.
    """
    found = [_scored(model, part, temperature, attention) for part in plan]
    if not found:
        zeros = torch.zeros(plan.batch.num_tokens, device=plan.batch.device)
        return PerToken(plan.batch.shaped(zeros), plan.batch.shaped(zeros))
    both = (torch.cat(x) for x in zip(*found, strict=True))
    return PerToken(*(plan.batch.shaped(plan.to_rows(x)) for x in both))


@torch.no_grad()
def check(model: Any, attention: Kind = "auto") -> None:
    """Raise if packed rows are not what they are alone.

    Five forward passes over a few tokens: the log-probs of three rows that share tokens must equal those of each row
    alone, and when one token is changed, every place outside of its subtree must keep its bits.

    Args:
        model: Causal language model of transformers.
        attention: As in :func:`attention`.

    Raises:
        ValueError: Naming which of both fails.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    rows = [[x % vocabulary for x in row] for row in ([3, 4, 5, 6, 7], [3, 4, 5, 8, 6], [3, 9, 4, 5])]
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            _check(model, rows, device, attention)
    finally:
        for module in trained:
            module.training = True


def _check(model: Any, rows: list[list[int]], device: torch.device, attention: Kind) -> None:
    batch = Rollouts(
        torch.tensor([x for row in rows for x in row[1:]], device=device),
        torch.tensor([0, *(len(row) - 1 for row in rows)], device=device).cumsum(0),
        torch.zeros(len(rows), dtype=torch.int64, device=device),
        torch.zeros(len(rows), device=device),
        extras={"prompt_tokens": torch.tensor([row[:1] for row in rows], device=device)},
    )
    part = pack(batch).part(0)
    name = f"model: expected rows that do not depend on other branches, got {model.config.model_type}, in which "
    packed = _predict(model, part, True, True, attention)
    assert packed.logits is not None
    found = packed.logits.float().log_softmax(-1).gather(1, part.target[:, None])[part.index, 0]
    alone = []
    for row in part.rows.tolist():
        ids = torch.tensor(rows[row], device=device)
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        alone.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    whole = packed.logits.dtype in (torch.float32, torch.float64)
    exact = whole and (device.type == "cpu" or torch.get_float32_matmul_precision() == "highest")
    tolerance = 1e-4 if exact else 0.3
    difference = float((torch.cat(alone) - found).abs().max())
    if not difference <= tolerance:
        raise ValueError(f"{name}log-probs of packed rows differ by {difference:.2g} nats from those of rows alone")
    # The places of the second row's own tokens; only what is below the first of them may change.
    changed = int((part.position_ids == 3).nonzero()[-1])
    tokens = part.tokens.clone()
    tokens[changed] = rows[0][0]
    other = _predict(model, TreePart(**{**vars(part), "tokens": tokens}), True, True, attention)
    assert packed.hidden_states is not None and other.hidden_states is not None
    outside = (part.source < changed) | (part.source >= part.end[changed])
    # On CUDA the bits of an expert's product may depend on the number of its tokens.
    slack = tolerance if device.type != "cpu" and any(getattr(model.config, x, None) for x in _EXPERTS) else 0.0
    if not torch.allclose(packed.hidden_states[outside], other.hidden_states[outside], rtol=0, atol=slack):
        raise ValueError(f"{name}a token changes hidden states of other branches")
