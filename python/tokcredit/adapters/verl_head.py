"""verl's fused output layer, computed by :mod:`tokcredit.head`.

Name this module in ``VERL_USE_EXTERNAL_MODULES`` or in ``actor_rollout_ref.model.external_lib``, and set
``actor_rollout_ref.model.use_fused_kernels=True``, whose backend ``torch`` (the default) is then replaced in all models
that verl patches. Tested with verl 0.9.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from verl.utils.experimental import torch_functional

from tokcredit.blocks import head


class FusedLinear(nn.Module):
    """What verl's patched models call in place of the output layer.

    Results are float32, also entropies, which verl rounds to the dtype of the hidden states.

    Args:
        chunk_size: Not read: tiles are sized by their bytes.
        impl_backend: verl's backend, ``torch``.

    Raises:
        ValueError: The backend is another one, whose kernels this would replace.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend != "torch":
            raise ValueError(f"fused_kernel_options.impl_backend: expected torch with tokcredit, got {impl_backend}")

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies in the shape of the ids.

        Args:
            hidden_states: float ``(..., d)``.
            vocab_weights: float ``[V, d]``.
            input_ids: int64 ``(...)``, the token that each hidden state predicts.
            temperature: Divisor of the logits.
        """
        weight = vocab_weights.to(head.dtype_of(hidden_states))
        log_probs, entropies = head.log_probs_and_entropies(hidden_states, weight, input_ids, temperature=temperature)
        return log_probs, entropies


torch_functional.FusedLinearForPPO = FusedLinear
