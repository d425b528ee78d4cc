"""How a model tells the completions of held-out pairs apart.

loss = nats per target of the chosen rows + lambda * mean odds ratio loss,   margin = log odds(chosen) - log odds(rejected)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smt.data.pair_walk import pair_batch
from smt.data.pairs import Pair
from smt.model.evaluating import evaluating
from smt.model.preference import log_odds, odds_ratio_loss
from smt.runtime.device import sent


@dataclass(frozen=True)
class PairEvaluation:
    """Means over a set of pairs.

    Attributes:
        loss: what ORPO descends.
        accuracy: share of the pairs whose chosen completion has the higher mean log-probability per token.
        margin: mean difference of log odds.
        n_pairs: how many there are.
    """

    loss: float
    accuracy: float
    margin: float
    n_pairs: int


@torch.no_grad()
def evaluate_pairs(objective: nn.Module, pairs: Sequence[Pair], *, batch_size: int, strength: float) -> PairEvaluation:
    """Run a model over ``pairs``, without dropout; of several processes each does all of it.

    Args:
        objective: gives sums of nats and log-probabilities of rows: ``smt.training.objective.PairLogProbabilities``, or what
            wraps it.
        pairs: one or more.
        batch_size: pairs that run together.
        strength: lambda of the loss.
    """
    device = next(objective.parameters()).device
    nats, log_p, n_targets = [], [], 0
    with evaluating(objective):
        for start in range(0, len(pairs), batch_size):
            batch = pair_batch(pairs[start : start + batch_size])
            completion = sent(batch.completion, device)
            of_rows, log_p_of_rows = objective(
                sent(batch.input_ids, device), sent(batch.targets, device), completion=completion
            )
            nats.append(of_rows[: batch.n_pairs])
            log_p.append(log_p_of_rows.view(2, -1))
            n_targets += batch.n_targets
    chosen, rejected = torch.cat(log_p, dim=1).cpu()
    margin, ratio = (log_odds(chosen) - log_odds(rejected)).double(), odds_ratio_loss(chosen, rejected).double()
    return PairEvaluation(
        loss=torch.cat(nats).cpu().double().sum().item() / n_targets + strength * ratio.mean().item(),
        accuracy=(chosen > rejected).double().mean().item(),
        margin=margin.mean().item(),
        n_pairs=len(pairs),
    )
