"""Logits processors: sampling temperature per token, and the length of a text."""

from tokcredit.decoding import length, temperature

__all__ = ["length", "temperature"]
