"""How much each input token mattered for an output of a model.

Every function returns one score per token. ``gradient_times_input`` and ``reagent`` work with causal language models;
``globenc`` and ``decompx`` read the layers of encoders of the BERT and RoBERTa families. The scores can be given to
``tokcredit.select.top_share``, which keeps the most important words.

Example::

    scores = tc.attribution.gradient_times_input(model, ids, target)
    kept = tc.select.top_share(scores, tc.select.Share(0.8, "nearest"), tc.Spans.single(len(ids)))
"""

from tokcredit.attribution.decompx import decompx
from tokcredit.attribution.faithfulness import Faithfulness, distance, faithfulness
from tokcredit.attribution.globenc import globenc
from tokcredit.attribution.gradient import gradient_times_input
from tokcredit.attribution.reagent import Importance, reagent
from tokcredit.attribution.replacement import from_masked_model, uniform

__all__ = [
    "Faithfulness",
    "Importance",
    "decompx",
    "distance",
    "faithfulness",
    "from_masked_model",
    "globenc",
    "gradient_times_input",
    "reagent",
    "uniform",
]
