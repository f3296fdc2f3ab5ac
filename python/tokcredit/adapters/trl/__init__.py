"""TRL: its trainers with the objectives of this package. Tested with TRL 1.16."""

from tokcredit.adapters.trl.dpo import CreditDPOTrainer
from tokcredit.adapters.trl.grpo import CreditGRPOTrainer
from tokcredit.adapters.trl.head import use_head
from tokcredit.adapters.trl.sft import CreditSFTTrainer
from tokcredit.adapters.trl.tree_row import TreeRow

__all__ = ["CreditDPOTrainer", "CreditGRPOTrainer", "CreditSFTTrainer", "TreeRow", "use_head"]
