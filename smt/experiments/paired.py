"""Two models on the same held-out tokens: their difference in loss, with a standard error.

    difference = sum(loss - loss of the control) / tokens        in nats per token; below 0 the model is better

How hard a passage is cancels in the difference. Its standard error is over documents, which are independent samples; where
there are few of them, over consecutive blocks of their tokens, which are nearly so when blocks are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smt.evaluation.scorer import TokenScores
from smt.evaluation.statistics import mean_per_count

# Below this many documents, blocks of this many tokens of them are compared.
FEW_DOCUMENTS, BLOCK = 10, 512


@dataclass(frozen=True)
class PairedDifference:
    """How much more a model loses per token than its control.

    Attributes:
        nats: per token.
        standard_error: of it, from unit to unit; None with fewer than two units.
        n_tokens: that were compared.
        n_units: documents or blocks.
        unit: which of the two.
    """

    nats: float
    standard_error: float | None
    n_tokens: int
    n_units: int
    unit: str


def paired_difference(scores: Sequence[TokenScores], control: Sequence[TokenScores]) -> PairedDifference:
    """The loss of ``scores`` minus that of ``control``, of the same documents.

    Raises:
        ValueError: they are not of the same documents, or there is none.
    """
    lengths, theirs = ([len(score.log_probs) for score in side] for side in (scores, control))
    if lengths != theirs or not lengths:
        raise ValueError(f"scores must be of the same documents, got lengths {lengths[:5]} and {theirs[:5]}")
    differences = [other.log_probs - score.log_probs for score, other in zip(scores, control, strict=True)]
    unit = "documents"
    if len(differences) < FEW_DOCUMENTS:
        differences = [block for difference in differences for block in difference.split(BLOCK)]
        unit = f"blocks of {BLOCK} tokens"
    counts = [len(difference) for difference in differences]
    found = mean_per_count([difference.sum().item() for difference in differences], counts)
    return PairedDifference(found.mean, found.standard_error, sum(counts), len(counts), unit)
