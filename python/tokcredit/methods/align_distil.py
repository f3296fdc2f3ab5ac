"""Token-level adaptive policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from tokcredit.arguments import float_tensor
from tokcredit.blocks.divergence import Mixture
from tokcredit.rollouts import Rollouts
from tokcredit.settings import Range
from tokcredit.stages import aggregation
from tokcredit.stages.base import input_name, number
from tokcredit.stages.token_weights import TokenWeight
from tokcredit.supervised import Supervised, reverse_kl

_BLOCK = 1 << 22  # elements of the temporaries of a block


@torch.no_grad()
def teacher_distance(logits: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the ``teacher_distance`` of two teachers: ``sum over v of |softmax(logits)[v] - softmax(other)[v]|``.

    Args:
        logits: float ``(..., V)``, of the model trained by DPO.
        other: float ``(..., V)``, of the model trained by DPO with chosen and rejected responses swapped.
        temperature: Positive; divides the logits of both.

    Returns:
        ``(...)``, float32, or float64 if one of the two is, from 0 to 2: twice the total variation.

    Raises:
        ValueError: The shapes differ, the vocabularies among them, or the temperature is not positive.
    """
    Range("number", above=0).checked("temperature", temperature)
    if float_tensor("logits", logits).shape != float_tensor("other", other).shape or not logits.dim():
        raise ValueError(f"other: expected {list(logits.shape)}, got {list(other.shape)}")
    if not logits.shape[-1]:
        raise ValueError(f"logits: expected (..., V) with V above 0, got {list(logits.shape)}")
    wide = torch.promote_types(torch.promote_types(logits.dtype, other.dtype), torch.float32)
    shape, width = logits.shape[:-1], logits.shape[-1]
    pairs = zip(*(x.reshape(-1, width).split(max(1, _BLOCK // max(width, 1))) for x in (logits, other)), strict=True)
    probs = ([(x.to(wide) / temperature).softmax(-1) for x in both] for both in pairs)
    blocks = [(a - b).abs().sum(-1) for a, b in probs]
    return torch.cat(blocks).view(shape)


def teacher(
    logits: Tensor, other: Tensor, strength: float = 10.0, epsilon: float = 1e-3, temperature: float = 1.0
) -> Mixture:
    """Return the teacher that lies beyond the model trained by DPO, away from the reversed one.

    It is ``logits + alpha * (logits - other)`` with ``alpha = strength * teacher_distance(logits, other) + epsilon``:
    an argument of ``tokcredit.divergence.between(student, teacher, "reverse_kl", temperature=temperature)``.

    Args:
        logits: float ``(..., V)``, of the model trained by DPO.
        other: float ``(..., V)``, of the reversed model.
        strength: As in :func:`align_distil`.
        epsilon: As in :func:`align_distil`.
        temperature: As in :func:`teacher_distance`.

    Raises:
        ValueError: The shapes differ, or a setting is out of range.
    """
    Range("number", at_least=0).checked("strength", strength)
    Range("number", above=0).checked("epsilon", epsilon)
    return Mixture(logits, other, strength * teacher_distance(logits, other, temperature) + epsilon)


@dataclass(frozen=True)
class inverse_extrapolation(TokenWeight):
    """``beta / (strength * distance + epsilon)``: the weight of a token falls as its teacher is extrapolated further.

    Args:
        beta: Numerator, above 0.
        strength: Extrapolation per unit of distance, at least 0.
        epsilon: Smallest extrapolation, above 0.
        distance: Input with the distance of the two teachers.
    """

    beta: float = number(0.1, above=0)
    strength: float = number(10.0, at_least=0)
    epsilon: float = number(1e-3, above=0)
    distance: str = input_name("teacher_distance")

    @property
    def required_inputs(self) -> frozenset[str]:
        """The distance."""
        return frozenset({self.distance})

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return self.beta / (self.strength * batch.input(self.distance) + self.epsilon)

    def teacher(self, logits: Tensor, other: Tensor, temperature: float = 1.0) -> Mixture:
        """Return the teacher whose divergence has these weights; see :func:`teacher`.

        Args:
            logits: float ``(..., V)``, of the model trained by DPO.
            other: float ``(..., V)``, of the reversed model.
            temperature: As in :func:`teacher_distance`.
        """
        return teacher(logits, other, self.strength, self.epsilon, temperature)


def align_distil(
    beta: Annotated[float, Range("number", above=0)] = 0.1, strength: float = 10.0, epsilon: float = 1e-3
) -> Supervised:
    """AlignDistil: distillation from a model trained by DPO, extrapolated away from one trained by DPO in reverse.

    With the logits ``z_d`` of the first and ``z_r`` of the second, whose training swapped chosen and rejected::

        D = sum over v of |softmax(z_d)[v] - softmax(z_r)[v]|                    # the input teacher_distance
        alpha = strength * D + epsilon
        z = z_d + alpha * (z_d - z_r)
        loss = mean over rows of the mean over tokens of beta / alpha * KL(student || softmax(z))

    ``loss`` is given the divergences from ``z`` with their gradient: ``divergence.between(student, teacher(z_d, z_r),
    "reverse_kl")``, with the same settings and ``from tokcredit.methods.align_distil import teacher``.

    Args:
        beta: Numerator of the weights, above 0: the paper's beta_0.
        strength: Extrapolation per unit of distance, at least 0: r, 10 off policy and 15 on policy.
        epsilon: Smallest extrapolation, above 0.

    Cost: Forward passes of two teachers, and a backward pass of the student; no rewards.
    References: arXiv 2503.02832.
    Differences from the paper:
        - None known. Its TVD is the sum of absolute differences, twice the total variation.
    Differences from the released code:
        - Its masks leave out the first token of a response, and count one after its end. Here all tokens count.
        - Its off-policy form applies the temperature to the teacher alone; here it divides the logits of all models.
        - Its other rewards, with a fixed extrapolation, are left out.
    """
    weight = inverse_extrapolation(beta, strength, epsilon)
    return Supervised(reverse_kl(), token_weights=(weight,), aggregation=aggregation.sequence_mean())
