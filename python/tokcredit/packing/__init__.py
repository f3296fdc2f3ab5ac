"""Training on the prefix tree: each distinct token of a batch is computed once, forward and backward."""

from tokcredit.blocks.tree_pack import TreePack, TreePart, pack

__all__ = ["TreePack", "TreePart", "pack"]
