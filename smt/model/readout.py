"""What the newest slot tells the head directly, and how: logits = embedding (hidden + W slot / rms(slot)).

Small decoders hardly learn to look a word up in a slot: the way leads through keys, values and two products in each layer. Here
what the memory holds of the past moves the logits by one matrix. It is zero at first, and as soon as it is not, the memory has
a gradient from every token.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from smt.state.rings import take

NORM_EPS = 1e-5


class SlotReadout(nn.Linear):
    """One matrix from slots to hidden states."""

    def reset_parameters(self) -> None:
        """Zero: a fresh memory tells nothing."""
        nn.init.zeros_(self.weight)


def read_out(readout: nn.Module, hidden: Tensor, slots: Tensor, newest: Tensor) -> Tensor:
    """Add to each hidden state what the newest slot tells.

    Args:
        readout: W, a linear layer without bias.
        hidden: (B, T, d) after the decoder's final norm.
        slots: (B, K, d).
        newest: (B, T) int64, or (1, T) for all rows alike: which of the slots; outside of 0..K - 1 there is none.

    Returns:
        (B, T, d).
    """
    told = readout(F.rms_norm(slots, slots.shape[-1:], eps=NORM_EPS))
    return hidden + take(told, newest)
