"""Attention on the prefix tree inside models of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokcredit.arguments import instance
from tokcredit.blocks.tree_pack import TreePart
from tokcredit.packing.mask import BLOCK, TreeMask
from tokcredit.packing.output_layer import body

NAME = "tokcredit_tree"
_LAYERS = {"full_attention", "sliding_attention", "attention"}

Kind = Literal["auto", "flex", "dense"]


class Observed(NamedTuple):
    """What the attention of a layer reads and gives.

    Attributes:
        module: The attention module.
        query: ``(1, H, M, d)``, with the positions rotated in.
        key: ``(1, G, M, d)``, likewise; each serves ``H / G`` heads.
        scaling: Factor of the dot products, or None for ``1 / sqrt(d)``.
        plain: Whether every ancestor is attended to by a softmax of the scaled dot products alone: there is no window,
            cap or sink.
    """

    module: Any
    query: Tensor
    key: Tensor
    scaling: float | None
    plain: bool


def refuse(model: Any) -> None:
    """Raise if tokens of one branch would reach another one inside the model, as far as its settings tell.

    Args:
        model: Causal language model of transformers.

    Raises:
        ValueError: Naming what the model has.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if wrong := sorted(layers - _LAYERS):
        raise ValueError(
            f"model: expected layers of full or sliding attention, got {', '.join(wrong)} ({config.model_type}); "
            "a recurrent or convolutional layer runs from one branch into the next"
        )
    if config.is_encoder_decoder or not model._supports_attention_backend:
        raise ValueError(
            f"model: expected a decoder that supports transformers' attention interface, got {config.model_type}"
        )
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError("model: expected no prompt learning, whose tokens no row has, got an adapter with it")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            raise ValueError(f"model: expected no active dropout, got {module.p} in {name}; call model.eval()")


def _window(module: Any, window: int | None) -> int | None:
    """Return the window of a layer after checking that the model passes it on as its settings say."""
    config = module.config
    types, own = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    number = getattr(module, "layer_idx", None)
    slides = types[number] == "sliding_attention" if types and number is not None else own is not None
    if slides != (window is not None):
        raise ValueError(
            f"model: expected the sliding window of layer {number} to be passed to its attention, "
            f"got {window} ({config.model_type}, sliding_window {own})"
        )
    return window


def _tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    tree_mask: TreeMask | None = None,
    observe: Callable[[Observed], None] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention ``(1, M, H, d)`` of queries ``(1, H, M, d)``, as transformers calls it."""
    if tree_mask is None:
        raise ValueError("tree_mask: expected what packing.attention gives, got None")
    if dropout or position_bias is not None or key.shape[2] != query.shape[2] or query.shape[0] != 1:
        raise ValueError(
            "model: expected attention without dropout, position bias and cache, for one sequence, "
            f"got dropout {dropout}, queries {list(query.shape)}, keys {list(key.shape)}"
        )
    window = _window(module, sliding_window)
    if observe is not None:
        observe(Observed(module, query, key, scaling, window is None and softcap is None and s_aux is None))
    mask = tree_mask.of_window(window)
    if tree_mask.flex:
        return _flex(query, key, value, mask, scaling, softcap, s_aux), None
    if softcap is None and s_aux is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0], None
    return _softmax(query, key, value, mask, scaling, softcap, s_aux), None


@functools.cache
def _compiled() -> Any:
    """FlexAttention for sequences of any length: compiled anew for each one it would take seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    # A number would become a symbol, which compiled score functions do not take.
    cap = None if softcap is None else torch.tensor(softcap, device=query.device, dtype=torch.float32)

    def capped(score: Tensor, *_: Any) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    shared = query.shape[1] // key.shape[1]
    if query.shape[1] & (query.shape[1] - 1):  # the kernel shares keys among powers of two only
        key, value, shared = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), 1
    settings = {"score_mod": None if cap is None else capped, "block_mask": mask, "scale": scaling}
    settings["enable_gqa"] = shared > 1
    if sinks is None:
        out = _compiled()(query, key, value, **settings)
    else:
        out, found = _compiled()(query, key, value, **settings, return_aux=AuxRequest(lse=True))
        # A sink takes part in the sum of the softmax, and has no value.
        out = out * torch.sigmoid(found.lse - sinks.view(1, -1, 1).float())[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous()


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a cap of the scores or with sinks, which torch's own function does not have."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = scores.float().softmax(-1).to(value.dtype)[..., : value.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous()


@contextmanager
def _implementation(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _tree_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _in_backward(model: Any, out: Any) -> None:
    """Have layers that are computed again in the backward pass attend in the same way."""

    def start(gradient: Tensor) -> None:
        context = _implementation(model)
        context.__enter__()

        def stop() -> None:
            context.__exit__(None, None, None)

        torch.autograd.Variable._execution_engine.queue_callback(stop)

    if out[0].requires_grad:
        out[0].register_hook(start)


@contextmanager
def attention(model: Any, part: TreePart, attention: Kind = "auto") -> Iterator[dict[str, Any]]:
    """Have a model attend along the prefix tree, and give the arguments of its call.

    Example::

        with tc.packing.attention(model, part) as arguments:
            hidden = model.base_model(**arguments).last_hidden_state[0]
        hidden[part.source]  # predicts part.target

    The attention that the model had before is restored at the end. Layers that gradient checkpointing computes again
    attend in the same way. Nothing else may be passed that depends on the sequence: no mask and no cache. A function
    that is passed as ``observe`` is called by every layer with :class:`Observed`.

    Args:
        model: Causal language model of transformers.
        part: A bin of a plan.
        attention: ``"dense"`` makes a mask of all pairs of places and uses ``scaled_dot_product_attention``;
            ``"flex"`` uses FlexAttention, whose work and memory follow the tree and which has a gradient on CUDA only;
            ``"auto"`` takes flex on CUDA and dense elsewhere.

    Raises:
        ValueError: The model has layers in which tokens of one branch reach another, active dropout, or a sliding
            window that it does not pass on.
    """
    instance("part", part, TreePart)
    if attention not in ("auto", "flex", "dense"):
        raise ValueError(f"attention: expected auto, flex or dense, got {attention!r}")
    refuse(model)
    flex = attention == "flex" or (attention == "auto" and part.tokens.is_cuda)
    tokens, position_ids, end = part.tokens, part.position_ids, part.end
    if flex and (rest := -tokens.numel() % BLOCK):
        alone = torch.arange(tokens.numel() + 1, tokens.numel() + rest + 1, device=end.device)
        end = torch.cat([end, alone])
        tokens, position_ids = (torch.nn.functional.pad(x, (0, rest)) for x in (tokens, position_ids))
    hook = None
    if torch.is_grad_enabled() and any(getattr(x, "gradient_checkpointing", False) for x in model.modules()):
        hook = body(model).register_forward_hook(lambda _, given, out: _in_backward(model, out))
    try:
        with _implementation(model):
            yield {
                "input_ids": tokens[None],
                "position_ids": position_ids[None],
                "use_cache": False,
                "tree_mask": TreeMask(end, position_ids, flex),
            }
    finally:
        if hook is not None:
            hook.remove()
