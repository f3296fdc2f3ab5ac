"""The loss of an objective from hidden states, without the logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import head
from tokcredit.protocol import Loss, ObjectiveStage
from tokcredit.rollouts import Rollouts

_VARIABLES = ("log_probs", "entropies")


class HiddenLoss(NamedTuple):
    """The loss of a batch or of a part of it, from hidden states.

    Attributes:
        loss: 0-d, with gradient.
        metrics: 0-d tensors by name, without gradient.
        log_probs: Log-probs in the layout of the batch, without gradient; 0 where no token was read.
        entropies: Entropies in the layout of the batch, nats, without gradient; 0 where no token was read.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    log_probs: Tensor
    entropies: Tensor


def chosen_tokens(batch: Rollouts) -> Tensor:
    """Return the token ids in the layout of the batch, -1 where the policy did not choose the token.

    Args:
        batch: The rows.
    """
    everything = torch.ones(batch.num_rows, dtype=torch.bool, device=batch.device)
    return batch.shaped(batch.tokens.masked_fill(~ops.spread(everything, batch.spans), -1))


def tile_gradients(
    by_token: Any, evaluate: Callable[..., Loss], at: Tensor, variables: Sequence[Tensor], count: int
) -> list[Tensor | None]:
    """Return the derivatives of a loss of some tokens to the first variables, ``[m]`` each, or None for 0.

    Args:
        by_token: A prepared batch in which no token depends on another.
        evaluate: Returns the loss of a part of it for variables in its layout.
        at: int64 ``[m]``, positions of the tokens, ascending.
        variables: ``[m]`` each.
        count: Number of variables to differentiate.
    """
    first, last = int(at[0]), int(at[-1]) + 1
    at = at - first
    leaves = [x.new_zeros(last - first).index_copy_(0, at, x) for x in variables]
    with torch.enable_grad():
        loss = evaluate(by_token.section(first, last), *(x.requires_grad_() for x in leaves[:count]), *leaves[count:])
    found = torch.autograd.grad(loss.loss, leaves[:count], allow_unused=True)
    return [None if x is None else x.index_select(0, at) for x in found]


class FromHidden(ObjectiveStage):
    """Base of objectives whose loss can be computed from hidden states and the output layer of the model."""

    def loss(self, prepared: Any, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of a prepared batch.

        Args:
            prepared: From ``prepare`` or ``select``.
            per_token: The first of the objective's variables.
            variables: The further ones by name.
        """
        raise NotImplementedError

    def separable(self, prepared: Any) -> bool:
        """Return whether the derivative of the loss at a token depends on the log-prob and entropy of that token alone.

        Args:
            prepared: A prepared batch of this objective.
        """
        return False

    @ops.uncompiled
    def loss_from_hidden(
        self,
        prepared: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        variables: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> HiddenLoss:
        """Return the loss with its gradient to hidden states, weight and bias. The logits exist in tiles only.

        Where the objective is :meth:`separable`, loss and gradients are computed together, in three matrix products,
        and one backward pass is possible. Otherwise, and in float16, whose gradients need the factor of a gradient
        scaler, the backward pass computes the logits again: four products. On CUDA this waits for the device. Inside
        a function that ``torch.compile`` compiles it breaks the graph; :func:`tokcredit.head.log_probs_and_entropies`
        with :meth:`loss` does not.

        Args:
            prepared: From ``prepare`` or ``select``.
            hidden: float ``(B, T, d)`` or ``[N, d]``. ``hidden[:, t]`` is the hidden state at the token before token t:
                with ``ids = [prompt, response]`` it is ``last_hidden_state[:, prompt_length - 1 : -1]``.
            weight: float ``[V, d]``, weight of the output layer.
            bias: float ``[V]`` or None.
            variables: Further variables by name, such as the values of a critic, in the layout of the batch. They may
                come from the same hidden states; the loss has its gradient to them too.
            settings: ``temperature``, ``softcap``, ``scale``, ``vocabulary``, ``logits_dtype``, ``tile_bytes`` and
                ``shard``; see :class:`tokcredit.blocks.head.Head`.

        Raises:
            TypeError: A variable is missing or not needed, or a dtype is wrong.
            ValueError: A shape or number is wrong, or on the CPU a token is out of range.

        Example:
            >>> loss = objective.loss_from_hidden(prepared, hidden, model.lm_head.weight)
            >>> loss.loss.backward()
        """
        objective, batch, further = prepared.objective, prepared.batch, dict(variables or {})
        for name in objective.variables:
            if name not in (*_VARIABLES, *further):
                raise TypeError(f"objective: expected a loss of log-probs and entropies, got one of {name}")
        if taken := sorted(further.keys() & set(_VARIABLES)):
            raise TypeError(f"variables: expected none that follows from hidden, got {', '.join(taken)}")
        one_pass = (
            self.separable(prepared)
            and head.dtype_of(hidden) != torch.float16
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        )
        tokens = chosen_tokens(batch)

        def evaluate(part: Any, log_probs: Tensor, entropies: Tensor, *others: Tensor) -> Loss:
            named = dict(zip(further, others, strict=True))
            if "entropies" in objective.variables:
                named["entropies"] = entropies
            found: Loss = self.loss(part, log_probs, **named)
            return found

        if not one_pass:
            log_probs, entropies = head.log_probs_and_entropies(hidden, weight, tokens, bias, **settings)
            out = evaluate(prepared, log_probs, entropies, *further.values())
            return HiddenLoss(*out, log_probs.detach(), entropies.detach())
        by_token, whole = prepared.by_token(), list[HiddenLoss]()
        constants = [batch.flat(x, name).detach() for name, x in further.items()]

        def slopes(at: Tensor, log_probs: Tensor, entropies: Tensor) -> tuple[Tensor | None, Tensor | None]:
            others = (x.index_select(0, at) for x in constants)
            a, e = tile_gradients(by_token, evaluate, at, (log_probs, entropies, *others), 2)
            return a, e

        def total(log_probs: Tensor, entropies: Tensor) -> Tensor:
            with torch.set_grad_enabled(bool(further)):
                out = evaluate(prepared, log_probs, entropies, *further.values())
            whole.append(HiddenLoss(*out, log_probs, entropies))
            return out.loss.detach()

        loss = head.separable_loss(hidden, weight, tokens, slopes, total, bias, **settings)
        if further:  # what was computed of them inside has their gradient
            loss = loss + (whole[0].loss - whole[0].loss.detach())
        return whole[0]._replace(loss=loss)
