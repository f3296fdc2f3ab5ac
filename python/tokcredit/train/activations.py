"""What a model computes before its logits: hidden states of its layers, activations, attention to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokcredit.methods.sstoken import prompt_attention
from tokcredit.packing import TreePack, TreePart, attention
from tokcredit.packing.output_layer import body
from tokcredit.packing.predictions import check_once
from tokcredit.packing.tree_attention import Observed
from tokcredit.rollouts import Rollouts
from tokcredit.train.scoring import plan


@torch.no_grad()
def layers(model: Any, packed: TreePack) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of the predictions of a plan, and the hidden states after each layer, without gradient.

    The last hidden state is that after the final norm, as transformers gives it.

    Args:
        model: Causal language model of transformers.
        packed: The plan.

    Returns:
        float ``[Q, V]``, and float ``[Q, d]`` for each layer.
    """
    logits, states = [], []
    for part, arguments in _parts(model, packed):
        out = model(**arguments, output_hidden_states=True)
        logits.append(out.logits[0][part.source])
        states.append([x[0][part.source] for x in out.hidden_states[1:]])
    return torch.cat(logits), [torch.cat(x) for x in zip(*states, strict=True)]


@torch.no_grad()
def means(model: Any, batch: Rollouts, kinds: Collection[str]) -> dict[str, list[Tensor]]:
    """Return means of activations over their features, at the position that predicts the token, by kind.

    ``mlp`` is what the last layer of each MLP reads. ``attention`` is queries and keys, without and with the positions
    rotated in, values, and the output of each attention. ``residual`` is the embeddings, and hidden states as
    :func:`layers` gives them. ``logits`` is the logits.

    Args:
        model: Causal language model of transformers.
        batch: Packed rows with ``prompt_tokens``.
        kinds: Names of kinds.

    Returns:
        float32 ``[N, 1]`` for each activation.

    Raises:
        ValueError: The layers of the model have other names than those of Llama.
    """
    packed = plan(batch)
    parts: list[dict[str, list[Tensor]]] = []
    for part, arguments in _parts(model, packed):
        found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        with ExitStack() as stack:
            _watch(model, found, arguments, stack)
            out = model(**arguments, output_hidden_states=True)
        if "residual" in found:
            found["residual"] += [_mean(x, (2,)) for x in out.hidden_states]
        if "logits" in found:
            found["logits"].append(_mean(out.logits, (2,)))
        parts.append({kind: [x[part.source] for x in of_kind] for kind, of_kind in found.items()})
    return {
        kind: [packed.to_rows(torch.cat(x))[:, None] for x in zip(*(part[kind] for part in parts), strict=True)]
        for kind in kinds
    }


def _watch(model: Any, found: dict[str, list[Tensor]], arguments: dict[str, Any], stack: ExitStack) -> None:
    """Have the layers of a model add the means of what they compute, ``[M]`` each, during one forward pass."""

    def reads(kind: str) -> Callable[..., None]:
        return lambda _, given: found[kind].append(_mean(given[0], (2,)))

    def gives(kind: str) -> Callable[..., None]:
        return lambda _, given, out: found[kind].append(_mean(out[0] if isinstance(out, tuple) else out, (2,)))

    for module in _modules(model, "mlp.down_proj") if "mlp" in found else ():
        stack.callback(module.register_forward_pre_hook(reads("mlp")).remove)
    if "attention" in found:
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn"):
            for module in _modules(model, name):
                stack.callback(module.register_forward_hook(gives("attention")).remove)
        arguments["observe"] = lambda seen: found["attention"].extend(_mean(x, (1, 3)) for x in (seen.query, seen.key))


def _modules(model: Any, name: str) -> list[Any]:
    """Return the module of a name in each layer of a model."""
    try:
        return [layer.get_submodule(name) for layer in body(model).layers]
    except AttributeError as error:
        raise ValueError(
            f"model: expected layers with {name} because of mask_activations, got {type(model).__name__}; residual and "
            "logits are taken from any model"
        ) from error


def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.float().mean(axes)[0]


@torch.no_grad()
def attention_to_prompt(model: Any, batch: Rollouts) -> Tensor:
    """Return the attention of each token, at its own position, to what the policy did not choose, in the last layer.

    It is computed from the queries and keys of one layer; see :func:`tokcredit.methods.sstoken.prompt_attention`.

    Args:
        model: Causal language model of transformers.
        batch: Packed rows with ``prompt_tokens``.

    Returns:
        float32 ``[N]``, from 0 to 1.

    Raises:
        ValueError: The attention of the last layer has a window, a cap or a sink.
    """
    longer = _with_one_more_token(batch)
    begin, lengths = batch.begin.tolist(), (batch.end - batch.begin).tolist()
    shares = torch.zeros(batch.num_tokens, device=batch.device)
    last: list[Observed] = []
    for part, arguments in _parts(model, plan(longer, torch.ones_like(longer.response_mask))):
        body(model)(**arguments, observe=lambda seen: last.__setitem__(slice(None), [seen]))
        seen, at = last.pop(), 0
        if not seen.plain:
            raise ValueError(
                "model: expected a last layer of attention without window, cap and sinks, got "
                f"{model.config.model_type} with one of them"
            )
        places = torch.arange(part.end.numel(), device=batch.device)
        for row in part.rows.tolist():
            own = slice(begin[row], begin[row] + lengths[row])
            at += lengths[row] + 1
            # The place from which the further token is predicted is that of the last token of the row.
            end = part.source[part.index[at - 1]]
            path = ((places <= end) & (part.end > end)).nonzero()[:, 0]
            prompt = torch.ones_like(path, dtype=torch.bool)
            prompt[len(path) - lengths[row] :] = ~batch.response_mask[own]
            query, key = seen.query[0][:, path], seen.key[0][:, path]
            found = prompt_attention(query, key, prompt, seen.scaling)
            shares[own] = found[len(path) - lengths[row] :].float()
    return shares


def _with_one_more_token(batch: Rollouts) -> Rollouts:
    """Return the rows with a further token, because the last token of a row is else not read by the model."""
    lengths = batch.end - batch.begin
    offsets = torch.cat([lengths.new_zeros(1), (lengths + 1).cumsum(0)])
    tokens = batch.tokens.new_zeros(int(offsets[-1]))
    row = torch.arange(batch.num_rows, device=batch.device).repeat_interleave(lengths)
    tokens[torch.arange(batch.num_tokens, device=batch.device) + row] = batch.tokens
    prompts = batch.input("prompt_tokens")
    return Rollouts(tokens, offsets, batch.group_ids, batch.rewards, extras={"prompt_tokens": prompts})


def _parts(model: Any, packed: TreePack) -> Iterator[tuple[TreePart, dict[str, Any]]]:
    """Yield each bin of a plan with the arguments of a forward pass over it."""
    for part in list(packed) or [packed.empty_part]:
        check_once(model, part)
        with attention(model, part) as arguments:
            yield part, arguments
