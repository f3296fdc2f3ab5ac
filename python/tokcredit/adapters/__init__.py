"""Adapters: tokcredit inside host trainers. Each module imports its host, so ``import tokcredit`` imports none."""
