"""What the newest slot tells the head directly, and how: logits = embedding (hidden + W slot / rms(slot)).

Small decoders hardly learn to look a word up in a slot: the way leads through keys, values and two products in each layer. Here
what the memory holds of the past moves the logits by one matrix. It is zero at first, and as soon as it is not, the memory has
a gradient from every token.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from smt.model.windows import Span, over_blocks
from smt_kernels import WindowSpec
from smt_kernels.precision import NORM_EPS


class SlotReadout(nn.Linear):
    """One matrix from slots to hidden states."""

    def reset_parameters(self) -> None:
        """Zero: a fresh memory tells nothing."""
        nn.init.zeros_(self.weight)


def contribution(readout: nn.Module, slots: Tensor) -> Tensor:
    """What slots (..., d) add to the hidden states that read them: zero where a slot is zero.

    Args:
        readout: W, a linear layer without bias.
    """
    return readout(F.rms_norm(slots, slots.shape[-1:], eps=NORM_EPS))


def read_out(readout: nn.Module, hidden: Span, slots: Span, window: WindowSpec) -> Tensor:
    """Add to each hidden state (B, T, d) after the decoder's final norm what the newest of the slots (B, K, d) tells."""
    # The newest slot of block b is b - 2, all over the block.
    first, last = window.block_of(hidden.first) - 2, window.block_of(hidden.stop - 1) - 2
    known = max(first, slots.first)
    if last < known:
        return hidden.values
    # In the dtype of the sum, in which the gradients of a block's steps are then added.
    of_known = contribution(readout, slots.values[:, known - slots.first : last + 1 - slots.first]).to(hidden.values.dtype)
    of_blocks = F.pad(of_known, (0, 0, known - first, 0)) if known > first else of_known
    return hidden.values + over_blocks(of_blocks, window, hidden.first, hidden.stop)
