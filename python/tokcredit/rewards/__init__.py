"""Rewards that need more than a comparison: matching of tool calls."""

from tokcredit.rewards import matching

__all__ = ["matching"]
