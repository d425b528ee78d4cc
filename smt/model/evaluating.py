"""A model in evaluation mode, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode inside the block, and back in training mode after it where it was."""
    was_training = model.training
    if was_training:  # a walk through all modules, which takes as long as a part of a step
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
