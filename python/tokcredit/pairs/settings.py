"""Settings of ``tokcredit pairs``. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokcredit.settings import Declared, number, whole_number


@dataclass(frozen=True)
class PairsSettings(Declared):
    """Which rollouts become pairs of a chosen and a rejected response."""

    path: tyro.conf.Positional[Path]
    """Run folder, rollouts-*.parquet, TRL's completions_*.parquet, or .jsonl such as verl's."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("pairs.jsonl")
    """JSONL file to write."""
    choose: Literal["best_worst", "closest", "latest"] = "best_worst"
    """Which two responses of a group: best_worst takes the highest against the lowest reward; closest those with the
    fewest tokens outside of their common beginning and end; latest those whose common beginning is longest."""
    gap: float = number(0.0, at_least=0)
    """The rewards of a pair differ by more than this."""
    per_group: int = whole_number(1, at_least=1)
    """Largest number of pairs of a group. No response is in two of them."""
    texts_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write no token ids, for a model with another tokenizer."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer of files with token ids and without text; the default is that of the run."""
    rewards: dict[str, float] | None = None
    """Columns whose weighted sum is the reward, as NAME WEIGHT NAME WEIGHT; for TRL with several reward functions."""
